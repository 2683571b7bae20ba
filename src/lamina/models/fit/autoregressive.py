"""FIT as a language model of long sequences: tokens see their group so far, and earlier groups through latents.

Source: Chen, Li, FIT: Far-reaching Interleaved Transformers (2023), arXiv 2305.12689, section 4.2.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models._tied_head import TiedHead
from lamina.models.fit.encoder import initialise_head
from lamina.models.fit.generation import GroupCache
from lamina.models.fit.interleaved import FITBlock, FITShape, InterleavedLayers
from lamina.models.fit.layers import SOURCE, FITLayer, Positions, PositionTable, initialise, norm_of
from lamina.models.transformer import sample
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("model", "fit_autoregressive", source=f"{SOURCE}, section 4.2")
class FITAutoregressive(TiedHead):
    """Decoder over t groups of n tokens, for sequences that full attention is too slow for: bytes, pixels, text.

    input_ids (B, L) -> logits (B, L, vocabulary) of the token after each; L a multiple of n, at most t * n. A token
    sees its group up to itself, and earlier groups whole, through their latents: group i reads those of group i - 1,
    which have read all groups up to theirs.

    Args:
        layers: "(2)4(2)", ending with local layers; see `FIT`.
        tokens_per_group: n. groups: t. latents_per_group: m.
        vocabulary: number of token ids.
        pad_groups: take any length up to t * n; the last group is filled up, and what was filled is cut off again.
        head: built as head(token_width, vocabulary); the plain one is the token embedding, with a bias.
        The rest: as of `FIT`. A token_layer is given a causal mask.
    Raises:
        ShapeError: sizes do not fit; at the call, a length that is not of whole groups, or too long. RecipeError: a
            layer string without global layers, or with some at the end, where no token would read them.
    Source: section 4.2, and the official FITAR. Deviation: that one puts a token 0 before the sequence, drops the
        last one, and answers logits of the inputs themselves; the same function where the data begins with that token.
    Example:
        >>> sizes = {"token_width": 8, "latent_width": 16, "token_heads": 2, "latent_heads": 2}
        >>> FITAutoregressive("(1)1(1)", 4, 3, 2, vocabulary=32, **sizes)(torch.zeros(1, 12, dtype=torch.long)).shape
        torch.Size([1, 12, 32])
    """

    def __init__(
        self,
        layers: str,
        tokens_per_group: int,
        groups: int,
        latents_per_group: int,
        token_width: int,
        latent_width: int,
        token_heads: int,
        latent_heads: int,
        *,
        vocabulary: int,
        mlp_ratio: int = 4,
        positions: Positions = "learned",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        token_layer: Annotated[Node | None, Slot("layer")] = None,
        latent_layer: Annotated[Node | None, Slot("layer")] = None,
        pad_groups: bool = False,
        checkpoint: bool = False,
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        shape = FITShape(
            layers=layers, tokens_per_group=tokens_per_group, groups=groups, latents_per_group=latents_per_group,
            token_width=token_width, latent_width=latent_width, token_heads=token_heads, latent_heads=latent_heads,
            mlp_ratio=mlp_ratio, dropout=dropout, drop_path=drop_path, token_layer=token_layer,
            latent_layer=latent_layer, causal_tokens=True, causal_latents=True, checkpoint=checkpoint,
        )  # fmt: skip
        if shape.ends_global or not any(count for _, count in shape.counts):
            raise RecipeError(f"layers={layers!r} must have global layers and end with local ones, which read them")
        if vocabulary < 1:
            raise ShapeError(f"FIT: vocabulary must be at least 1, got {vocabulary}")
        self.tokens_per_group, self.context = tokens_per_group, groups * tokens_per_group
        self.pad_groups, self.causal = pad_groups, True
        self.embedding = nn.Embedding(vocabulary, token_width)
        self.positions = PositionTable(tokens_per_group, token_width, positions)
        self.trunk = InterleavedLayers(shape)
        self.token_norm = norm_of(token_width)
        initialise(self)
        self.head: nn.Module = factory("layer", head)(token_width, vocabulary)
        initialise_head(self.head)
        if type(self.head) is nn.Linear:
            self.tie_weights()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits; see the class for shapes."""
        self._check(input_ids)
        lacking = -input_ids.shape[1] % self.tokens_per_group
        if lacking and not self.pad_groups:
            raise ShapeError(
                f"{input_ids.shape[1]} tokens are no whole groups of {self.tokens_per_group}; any number is taken with "
                "pad_groups=True"
            )
        return self._logits(input_ids)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, steps: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue each sequence by `steps` tokens; (B, T) -> (B, T + steps). Call `eval()` first to turn dropout off.

        T may be any length. Keys and values of the group at hand and of all latents are kept, where every layer can.

        Args:
            temperature: divides the logits before sampling; 0 = always the likeliest token.
            generator: draws the samples; on the model's device.
        Raises:
            ShapeError: longer than t * n tokens, or nothing to begin with.
        """
        if temperature < 0 or steps < 0:
            raise ValueError(f"temperature and steps must not be negative, got {temperature} and {steps}")
        if not input_ids.shape[1]:
            raise ShapeError(f"generation continues at least one token, got input_ids {tuple(input_ids.shape)}")
        if input_ids.shape[1] + steps > self.context:
            raise ShapeError(f"{input_ids.shape[1]} tokens and {steps} steps do not fit the context of {self.context}")
        cache, seen = GroupCache() if self.caches else None, input_ids
        for _ in range(steps):
            last = self._logits(seen)[:, -1] if cache is None else self._next_logits(seen[:, cache.length :], cache)
            seen = torch.cat((seen, sample(last, temperature, generator)), dim=1)
        return seen

    @property
    def caches(self) -> bool:
        """Whether generation can reuse keys and values: every layer takes a cache."""
        blocks: list[FITBlock] = list(self.trunk.blocks)  # type: ignore[arg-type]
        layers = [layer for block in blocks for layer in (*block.local, *block.latent)]
        return all(
            isinstance(layer, FITLayer) and layer.takes("cache") and getattr(layer.mixer, "caches", True)
            for layer in layers
        )

    def _logits(self, seen: Tensor) -> Tensor:
        """Return the logits after each of any number of tokens up to the context; (B, L) -> (B, L, vocabulary)."""
        n, length = self.tokens_per_group, seen.shape[1]
        # No token sees a later one: what fills the last group up changes nothing before it.
        x = self.embedding(F.pad(seen, (0, -length % n))).unflatten(1, (-1, n))
        tokens, _ = self.trunk(self.positions(x))
        return self.head(self.token_norm(tokens).flatten(1, 2)[:, :length])

    def _next_logits(self, fresh: Tensor, cache: GroupCache) -> Tensor:
        """Return the logits after the last of the tokens that the cache has not seen; (B, L) -> (B, vocabulary)."""
        x = None
        while fresh.shape[1]:
            part = fresh[:, : self.tokens_per_group - cache.in_group]
            fresh = fresh[:, part.shape[1] :]
            x = cache.advance(self.trunk, self.positions(self.embedding(part), cache.in_group), self.tokens_per_group)
        assert x is not None
        return self.head(self.token_norm(x[:, -1]))

    def _check(self, input_ids: Tensor) -> None:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ShapeError(f"expected token ids (batch, tokens), got {input_ids.dtype} {tuple(input_ids.shape)}")
        if not 1 <= input_ids.shape[1] <= self.context:
            raise ShapeError(f"the sequence has {input_ids.shape[1]} tokens, the model's context is {self.context}")
