"""ViT: a transformer encoder over image patches, with the DeiT sizes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models.transformer import TransformerBlock, check_linear
from lamina.nn.attention import Attention
from lamina.nn.feed_forward import FeedForward, SwiGLU
from lamina.nn.layout import GridAsSequence, layout_of
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

NORM: Node = {"name": "layer_norm", "eps": 1e-6}
MIXER: Node = {"name": "attention", "bias": True}
INITIAL_STD = 0.02
"""Of every weight. DeiT cuts the normal off at 2, which is a hundred standard deviations: the same."""


@register("model", source="Dosovitskiy et al. 2021; sizes: Touvron et al. 2021")
class VisionTransformer(nn.Module):
    """Cut an image into patches, embed them, run pre-norm transformer blocks, classify.

    pixel_values (B, channels, image, image) -> logits (B, classes).

    Args:
        image: height and width in pixels; a multiple of patch.
        patch: height and width of a patch in pixels.
        norm: built as norm(width).
        mixer: built as mixer(width=, heads=, context=, causal=False, grid=(rows, columns), prefix=), as far as it
            names them (prefix: tokens before the grid's); a mixer of layout "grid" runs on the patches alone, and the
            class token passes it by.
        feed_forward: built as feed_forward(width=, hidden=, dropout=), as far as it names them.
        hidden: channels inside the feed-forward; None = its own default (4 * width).
        pool: "class" (a class token, read at the end) or "mean" (of the patches; there is no class token).
        dropout: of embeddings and branches, in training; 0..1.
        linear: the layers inside mixer and feed_forward, as far as they have a slot of that name.
        head: built as head(width, classes).
    Raises:
        ShapeError: sizes do not fit, or the images are of another size. RecipeError: unknown pool.
    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), arXiv 2010.11929, equations 1-4; DeiT: Touvron
        et al. (2021), arXiv 2012.12877, table 1.
    Example:
        >>> VisionTransformer(8, 4, depth=1, width=16, heads=2, classes=5)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        depth: int = 12,
        width: int = 192,
        heads: int = 3,
        *,
        classes: int = 1000,
        channels: int = 3,
        norm: Annotated[Node, Slot("norm")] = NORM,
        mixer: Annotated[Node, Slot("mixer")] = MIXER,
        feed_forward: Annotated[Node, Slot("layer")] = "feed_forward",
        hidden: int | None = None,
        pool: Literal["class", "mean"] = "class",
        dropout: float = 0.0,
        linear: Annotated[Node, Slot("layer")] = "linear",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        _check(image=image, patch=patch, depth=depth, width=width, heads=heads, classes=classes, channels=channels)
        if pool not in ("class", "mean"):
            raise RecipeError(f"pool must be 'class' or 'mean', got {pool!r}")
        self.image_shape = (channels, image, image)
        grid, prefix = (image // patch, image // patch), int(pool == "class")
        context = prefix + grid[0] * grid[1]
        make_norm, make_mixer = factory("norm", norm), factory("mixer", mixer)
        make_feed_forward = factory("layer", feed_forward)
        check_linear(linear, make_mixer, make_feed_forward)
        given: dict[str, Any] = {"width": width, "heads": heads, "context": context, "causal": False}
        given |= {"grid": grid, "prefix": prefix}

        def block() -> TransformerBlock:
            mixing = make_mixer(**given, linear=linear)
            if layout_of(mixing) == "grid":
                mixing = GridAsSequence(mixing, grid, prefix)
            feeding = make_feed_forward(width=width, hidden=hidden, dropout=dropout, linear=linear)
            return TransformerBlock(make_norm(width), mixing, make_norm(width), feeding, dropout)

        self.patch_embedding = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if prefix else None
        self.position_embedding = nn.Parameter(torch.empty(1, context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.final_norm: nn.Module = make_norm(width)
        self.head: nn.Module = factory("layer", head)(width, classes)
        self._initialise()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        if pixel_values.shape[1:] != self.image_shape:
            raise ShapeError(f"VisionTransformer takes (batch, {self.image_shape}), got {tuple(pixel_values.shape)}")
        # In order: the residual stream keeps the layout it begins with, and sums and products of a turned one are slow.
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2).contiguous()  # (B, T, C)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
        x = self.dropout(x + self.position_embedding)
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        return self.head(x.mean(dim=1) if self.class_token is None else x[:, 0])

    def _initialise(self) -> None:
        # A head of another kind, like every part of other methods, keeps the initialisation of its paper.
        head = self.head if type(self.head) is nn.Linear else None
        weights = (self.class_token, self.position_embedding, self.patch_embedding.weight)
        for weight in (*weights, None if head is None else head.weight):
            if weight is not None:
                nn.init.normal_(weight, std=INITIAL_STD)
        for bias in (self.patch_embedding.bias, None if head is None else head.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for module in self.blocks.modules():
            # Parts of other methods keep the initialisation of their papers.
            if isinstance(module, (Attention, FeedForward, SwiGLU)):
                module.initialise(INITIAL_STD, INITIAL_STD)


@register("model", source="Touvron et al. 2021, table 1")
def deit_tiny(classes: int = 1000, image: int = 224, *, depth: int = 12, dropout: float = 0.0) -> VisionTransformer:
    """DeiT-Ti: 12 blocks of width 192, 3 heads, patches of 16; 5.7 M parameters."""
    return VisionTransformer(image, 16, depth, 192, 3, classes=classes, dropout=dropout)


@register("model", source="Touvron et al. 2021, table 1")
def deit_small(classes: int = 1000, image: int = 224, *, depth: int = 12, dropout: float = 0.0) -> VisionTransformer:
    """DeiT-S: 12 blocks of width 384, 6 heads, patches of 16; 22 M parameters."""
    return VisionTransformer(image, 16, depth, 384, 6, classes=classes, dropout=dropout)


@register("model", source="Touvron et al. 2021, table 1")
def deit_base(classes: int = 1000, image: int = 224, *, depth: int = 12, dropout: float = 0.0) -> VisionTransformer:
    """DeiT-B (the size of ViT-B): 12 blocks of width 768, 12 heads, patches of 16; 86.6 M parameters."""
    return VisionTransformer(image, 16, depth, 768, 12, classes=classes, dropout=dropout)


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ShapeError(f"VisionTransformer: {name} must be at least 1, got {size}")
    if sizes["image"] % sizes["patch"]:
        raise ShapeError(f"image {sizes['image']} is not a multiple of patch {sizes['patch']}")
