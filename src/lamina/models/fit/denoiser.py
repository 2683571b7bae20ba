"""FIT as the network of a diffusion model: noisy tokens, a time and a condition in, clean tokens out.

Source: Chen, Li, FIT: Far-reaching Interleaved Transformers (2023), arXiv 2305.12689, section 4.3; latent
self-conditioning: Jabri, Fleet, Chen, Scalable Adaptive Computation for Iterative Generation (2022), arXiv 2212.11972.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models.fit.encoder import check_global, check_stem, of_latents, with_side
from lamina.models.fit.grouping import into_groups
from lamina.models.fit.interleaved import FITShape, InterleavedLayers
from lamina.models.fit.layers import SOURCE, Positions, ResidualMLP, TokenStem, initialise, norm_of
from lamina.models.transformer import normed, sinusoids
from lamina.recipe import Node
from lamina.registry import Slot, register

TIMES = 1000.0
"""What a time from 0 to 1 is multiplied by before it becomes sines."""


@register("model", "fit_denoiser", source=f"{SOURCE}, section 4.3")
class FITDenoiser(nn.Module):
    """FIT between noisy tokens and clean ones, for diffusion over very long sequences such as large images.

    x (B, t, n, in_features), time (B,) from 0 to 1 -> tokens (B, t, n, out_features), and the latents (B, t, m,
    latent_width) for the next step of the sampler, where `self_conditioning` reads them.

    Args:
        out_features: numbers of an answered token; None = in_features.
        condition_features: numbers of a condition's tokens (B, s, condition_features); 0 = there is none but time.
        self_conditioning: add what an MLP makes of the step before's latents, through a norm whose gain starts at 0.
        cross_mlp: an MLP behind every cross-attention.
        context_norm: normalise what the cross-attentions read.
        local_attention: False leaves the MLPs alone in the local layers.
        The rest: as of `FIT`.
    Raises:
        ShapeError: sizes do not fit; at the call, other tokens, times or conditions. RecipeError: no global layers, or
            ones at the end, which no answer learns from.
    Source: section 4.3 and the official FITDenoiser.
    Example:
        >>> sizes = {"in_features": 5, "token_width": 8, "latent_width": 16, "token_heads": 2, "latent_heads": 2}
        >>> model = FITDenoiser("(1)1(1)", 4, 3, 2, **sizes)
        >>> [tuple(x.shape) for x in model(torch.randn(2, 3, 4, 5), torch.rand(2))]
        [(2, 3, 4, 5), (2, 3, 2, 16)]
    """

    def __init__(
        self,
        layers: str,
        tokens_per_group: int,
        groups: int,
        latents_per_group: int,
        in_features: int,
        token_width: int,
        latent_width: int,
        token_heads: int,
        latent_heads: int,
        *,
        out_features: int | None = None,
        condition_features: int = 0,
        self_conditioning: bool = False,
        cross_mlp: bool = False,
        context_norm: bool = True,
        local_attention: bool = True,
        mlp_ratio: int = 4,
        positions: Positions = "learned",
        side_features: int = 0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        token_layer: Annotated[Node | None, Slot("layer")] = None,
        latent_layer: Annotated[Node | None, Slot("layer")] = None,
        pad_groups: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        shape = FITShape(
            layers=layers, tokens_per_group=tokens_per_group, groups=groups, latents_per_group=latents_per_group,
            token_width=token_width, latent_width=latent_width, token_heads=token_heads, latent_heads=latent_heads,
            mlp_ratio=mlp_ratio, dropout=dropout, drop_path=drop_path, token_layer=token_layer,
            latent_layer=latent_layer, checkpoint=checkpoint, condition=True, cross_mlp=cross_mlp,
            context_norm=context_norm, local_attention=local_attention,
        )  # fmt: skip
        check_stem(in_features, side_features)
        check_global(shape)
        if shape.ends_global:
            # Not for self_conditioning either: the latents of the step before are read detached, so none would learn.
            raise RecipeError(f"layers={layers!r} ends with global layers that change no token: end it with local ones")
        if token_layer is not None and not local_attention:
            raise RecipeError("local_attention=False is about the layers that token_layer replaces: give one of them")
        out_features = in_features if out_features is None else out_features
        if min(out_features, condition_features + 1) < 1:
            raise ShapeError(f"FIT: {out_features=} must be at least 1, {condition_features=} at least 0")
        self.in_features, self.group_shape, self.pad_groups = in_features, (groups, tokens_per_group), pad_groups
        self.stem = TokenStem(in_features, token_width, tokens_per_group, positions, side_features)
        self.time = TimeEmbedding(latent_width)
        self.condition_features = condition_features
        self.condition = nn.Linear(condition_features, latent_width) if condition_features else None
        self.previous = PreviousLatents(latent_width, mlp_ratio) if self_conditioning else None
        self.trunk = InterleavedLayers(shape)
        self.token_norm, self.head = norm_of(token_width), nn.Linear(token_width, out_features)
        initialise(self)

    def forward(
        self,
        inputs: Tensor,
        time: Tensor,
        condition: Tensor | None = None,
        latents: Tensor | None = None,
        y: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the clean tokens and the latents.

        Args:
            inputs: x; also (B, L, in_features) with L = t * n, or fewer under pad_groups.
            time: (B,); how noisy, from 0 to 1.
            condition: (B, s, condition_features).
            latents: of the step before, under self_conditioning; None = zeros. Usually detached.
            y, attention_mask: as of `FIT`.
        """
        x, mask = into_groups(inputs, attention_mask, self.group_shape, self.in_features, self.pad_groups)
        start = self.trunk.start(*x.shape[:2])
        if self.previous is not None:
            start = self.previous(start, latents, of_latents(mask, start))
        elif latents is not None:
            raise ShapeError("latents of the step before are read by a FITDenoiser with self_conditioning=True")
        read, seen = self._condition(len(x), time, condition), with_side(mask, y)
        tokens, found = self.trunk(self.stem(x, y, seen), start, seen, read)
        return self.head(normed(self.token_norm, tokens[:, :, -x.shape[2] :], mask)), found

    def _condition(self, batch: int, time: Tensor, condition: Tensor | None) -> Tensor:
        """Put the time and the condition's tokens into one sequence (B, 1 + s, latent_width)."""
        if time.shape != (batch,) or not time.is_floating_point():
            raise ShapeError(f"time must be {batch} floating-point numbers, got {time.dtype} {tuple(time.shape)}")
        embedded = self.time(time)[:, None]
        if self.condition is None and condition is None:
            return embedded
        wanted = (batch, "s", self.condition_features)
        if self.condition is None or condition is None or condition.dim() != 3:
            given = None if condition is None else tuple(condition.shape)
            raise ShapeError(f"the condition must be {wanted if self.condition else None}, got {given}")
        if (len(condition), condition.shape[-1]) != (batch, self.condition_features):
            raise ShapeError(f"the condition must be {wanted}, got {tuple(condition.shape)}")
        return torch.cat((embedded, self.condition(condition)), dim=1)


class TimeEmbedding(nn.Module):
    """Linear SiLU linear of `time_features`; (B,) -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 8:
            raise ShapeError(f"the time becomes width / 4 sines and cosines: latent_width must be 8 k, got {width}")
        self.features = width // 4
        self.up, self.down = nn.Linear(self.features, width), nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Embed times from 0 to 1."""
        return self.down(F.silu(self.up(time_features(time, self.features).to(self.up.weight.dtype))))


class PreviousLatents(nn.Module):
    """latents + norm(MLP(previous)): without influence until the norm's gain has left zero."""

    def __init__(self, width: int, mlp_ratio: int) -> None:
        super().__init__()
        self.mlp, self.norm = ResidualMLP(width, mlp_ratio, 0.0, 0.0), norm_of(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, latents: Tensor, previous: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Add what is made of the step before's latents (B, t, m, D); None = zeros. mask (B, t, m), True = real."""
        if previous is not None and previous.shape != latents.shape:
            raise ShapeError(f"latents of the step before must be {tuple(latents.shape)}, got {tuple(previous.shape)}")
        given = torch.zeros_like(latents) if previous is None else previous.to(latents.dtype)
        return latents + normed(self.norm, self.mlp(given, mask), mask)


def time_features(time: Tensor, width: int) -> Tensor:
    """Turn times (B,) from 0 to 1 into (B, width) sines and cosines of 1000 * time, of mean 0 and deviation 1 each."""
    found = sinusoids(TIMES * time.float(), width)
    return (found - found.mean(-1, keepdim=True)) / found.std(-1, correction=0, keepdim=True)
