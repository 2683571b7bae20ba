"""FIT as an encoder and classifier: of tokens in groups, or of images cut into sub-images.

Source: Chen, Li, FIT: Far-reaching Interleaved Transformers (2023), arXiv 2305.12689, section 3.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models.fit.grouping import group_image, into_groups
from lamina.models.fit.interleaved import FITShape, InterleavedLayers
from lamina.models.fit.layers import SOURCE, Positions, TokenStem, initialise, norm_of
from lamina.models.transformer import mean_token, normed
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("model", "fit", source=SOURCE)
class FIT(nn.Module):
    """Transformer over very long sequences: attention inside groups of tokens, and among a few latents of all groups.

    x (B, t, n, in_features), t groups of n tokens, -> tokens (B, t, n, token_width) and latents (B, t, m,
    latent_width), or with `classes` logits (B, classes). Attention costs t n^2 + (t m)^2 in place of (t n)^2.

    Args:
        layers: "(2)4(2)" = two local layers, four global ones, two local ones; see `parse_layers`.
        tokens_per_group: n. groups: t. latents_per_group: m.
        in_features: numbers of a token.
        token_heads, latent_heads: the cross-attentions have the fewer of both, of the narrower width.
        mlp_ratio: hidden numbers of an MLP for each of its inputs.
        causal_latents: latents see their own group's and earlier groups' only.
        positions: of a token in its group: a learned table, sines, or sines of rows and columns (n a square). Groups
            are told apart by their latents alone.
        side_features: numbers of each side token `y`, such as a one-hot group index where groups are shuffled.
        classes: answer with logits from the mean of the latents where the string ends with global layers, else of the
            tokens.
        dropout: inside the MLPs, in training. drop_path: of the layers' branches, the rate of all.
        token_layer, latent_layer: built as layer(width), in place of the pre-norm transformer layer; called as
            layer(x), or layer(x, mask) with a mask (T, T) of 0 and -inf where latents are causal.
        pad_groups: fill up fewer groups or tokens; they are masked. False = refuse them.
        checkpoint: keep the blocks' inputs only, and compute the rest again in the backward pass.
        head: built as head(width, classes).
    Raises:
        ShapeError: sizes do not fit; at the call, other tokens. RecipeError: a layer string, or one without global
            layers.
    Source: section 3. Deviation: sine tables hold sines, then cosines, where the official ones alternate.
    Example:
        >>> sizes = {"in_features": 5, "token_width": 8, "latent_width": 16, "token_heads": 2, "latent_heads": 2}
        >>> model = FIT("(1)1(1)", 4, 3, 2, **sizes)
        >>> [tuple(x.shape) for x in model(torch.randn(2, 3, 4, 5))]
        [(2, 3, 4, 8), (2, 3, 2, 16)]
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
        mlp_ratio: int = 4,
        causal_latents: bool = False,
        positions: Positions = "learned",
        side_features: int = 0,
        classes: int | None = None,
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
            latent_layer=latent_layer, causal_latents=causal_latents, checkpoint=checkpoint,
        )  # fmt: skip
        check_stem(in_features, side_features)
        check_global(shape)
        if classes is not None and classes < 1:
            raise ShapeError(f"FIT: classes must be at least 1, got {classes}")
        self.in_features, self.group_shape, self.pad_groups = in_features, (groups, tokens_per_group), pad_groups
        self.from_latents = shape.ends_global
        self.stem = TokenStem(in_features, token_width, tokens_per_group, positions, side_features)
        self.trunk = InterleavedLayers(shape)
        # A classifier has only the norm of what it reads: the other would get no gradient.
        self.token_norm = norm_of(token_width) if classes is None or not self.from_latents else None
        self.latent_norm = norm_of(latent_width) if classes is None or self.from_latents else None
        initialise(self)
        width = latent_width if self.from_latents else token_width
        self.head: nn.Module | None = None
        if classes is not None:
            self.head = factory("layer", head)(width, classes)
            initialise_head(self.head)

    def forward(
        self, inputs: Tensor, y: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return tokens and latents, or logits.

        Args:
            inputs: x; also (B, L, in_features) with L = t * n, or fewer under pad_groups.
            y: (B, t, k, side_features), k side tokens in front of every group.
            attention_mask: (B, t, n), or (B, L) as x; True = a real token. A group may have none.
        """
        x, mask = into_groups(inputs, attention_mask, self.group_shape, self.in_features, self.pad_groups)
        seen = with_side(mask, y)
        tokens, latents = self.trunk(self.stem(x, y, seen), None, seen)
        tokens, kept = tokens[:, :, -x.shape[2] :], of_latents(mask, latents)
        if self.head is None:
            assert self.token_norm is not None
            assert self.latent_norm is not None
            return normed(self.token_norm, tokens, mask), normed(self.latent_norm, latents, kept)
        if self.latent_norm is not None:
            return self.head(_mean(self.latent_norm, latents, kept))
        assert self.token_norm is not None
        return self.head(_mean(self.token_norm, tokens, mask))


@register("model", "fit_image", source=f"{SOURCE}, section 4")
class FITImage(FIT):
    """FIT of images: groups are square sub-images, tokens their patches; see `group_image`.

    pixel_values (B, channels, H, W) -> tokens (B, t, n, token_width) and latents (B, t, m, latent_width), or logits
    (B, classes).

    Args:
        group: side of a sub-image in pixels. patch: side of a patch in pixels.
        image: (H, W) or side of the images, in pixels.
        The rest: as of `FIT`.
    Raises:
        ShapeError: patches that do not divide groups, or groups the image; at the call, other images.
    Example:
        >>> sizes = {"token_width": 8, "latent_width": 16, "token_heads": 2, "latent_heads": 2}
        >>> FITImage("(1)1", 8, 4, 2, image=16, classes=5, **sizes)(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        layers: str,
        group: int,
        patch: int,
        latents_per_group: int,
        token_width: int,
        latent_width: int,
        token_heads: int,
        latent_heads: int,
        *,
        image: int | tuple[int, int],
        channels: int = 3,
        classes: int | None = None,
        mlp_ratio: int = 4,
        causal_latents: bool = False,
        positions: Positions = "learned",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        token_layer: Annotated[Node | None, Slot("layer")] = None,
        latent_layer: Annotated[Node | None, Slot("layer")] = None,
        checkpoint: bool = False,
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        if channels < 1:
            raise ShapeError(f"FITImage: channels must be at least 1, got {channels}")
        height, width = (image, image) if isinstance(image, int) else image
        blank = group_image(torch.empty(1, channels, height, width, device="meta"), group, patch)
        super().__init__(
            layers, blank.shape[2], blank.shape[1], latents_per_group, blank.shape[3],
            token_width, latent_width, token_heads, latent_heads, mlp_ratio=mlp_ratio, causal_latents=causal_latents,
            positions=positions, classes=classes, dropout=dropout, drop_path=drop_path, token_layer=token_layer,
            latent_layer=latent_layer, checkpoint=checkpoint, head=head,
        )  # fmt: skip
        self.group, self.patch, self.image_shape = group, patch, (channels, height, width)

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return tokens and latents, or logits."""
        if pixel_values.shape[1:] != self.image_shape:
            raise ShapeError(f"FITImage takes (batch, {self.image_shape}), got {tuple(pixel_values.shape)}")
        return super().forward(group_image(pixel_values, self.group, self.patch))


def check_stem(in_features: int, side_features: int) -> None:
    """Refuse sizes of tokens that cannot be.

    Raises:
        ShapeError: names them.
    """
    if in_features < 1 or side_features < 0:
        raise ShapeError(f"FIT: in_features must be at least 1 and side_features 0, got {in_features}, {side_features}")


def check_global(shape: FITShape) -> None:
    """Refuse a layer string without global layers.

    Raises:
        RecipeError: the groups would never learn of each other.
    """
    if not any(count for _, count in shape.counts):
        raise RecipeError(f"layers={shape.layers!r} has no global layers: no group would learn of another")


def with_side(mask: Tensor | None, y: Tensor | None) -> Tensor | None:
    """Put the side tokens in front of a mask (B, t, n); they are real where their group is."""
    if mask is None or y is None:
        return mask
    return torch.cat((mask.any(-1, keepdim=True).expand(-1, -1, y.shape[2]), mask), dim=2)


def of_latents(mask: Tensor | None, latents: Tensor) -> Tensor | None:
    """Turn a mask (B, t, n) into that of the latents (B, t, m, D): (B, t, m), those of a group with any real token."""
    return None if mask is None else mask.any(-1, keepdim=True).expand(latents.shape[:3])


def initialise_head(head: nn.Module) -> None:
    """Draw a plain head; one of another kind keeps how it started."""
    if type(head) is nn.Linear:
        initialise(head)


def _mean(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Average the real ones of (B, t, n, C), behind the norm; (B, C)."""
    return mean_token(normed(norm, x, mask).flatten(1, 2), None if mask is None else mask.flatten(1))
