"""The blocks of a RaftMLP, and what its levels do to sizes.

Source: Tatsunami, Taki, RaftMLP (2021), arXiv 2108.04384.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.models._metaformer_block import DropPath
from lamina.nn.feed_forward import FeedForward
from lamina.nn.resize_token_mixing import ResizeTokenMixing, resize
from lamina.recipe import Node

Grid = tuple[int, int]


class RaftMLPBlock(nn.Module):
    """A token mixing with residuals of its own, then x + MLP(norm(x)) over the channels. (B, H, W, C) -> same."""

    def __init__(self, width: int, token_mixing: nn.Module, feed_forward: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.token_mixing, self.norm = token_mixing, nn.LayerNorm(width)
        self.feed_forward, self.drop_path = feed_forward, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        x = self.token_mixing(x.movedim(-1, 1)).movedim(1, -1)
        return x + self.drop_path(self.feed_forward(self.norm(x)))


def make_level(
    width: int,
    depth: int,
    grid: Grid,
    mixing: Callable[..., nn.Module],
    *,
    expansion: int,
    drop_path: float,
    dropout: float,
    resize: bool,
    linear: Node,
) -> nn.Sequential:
    """Build the blocks of a level, (B, H, W, C) -> same.

    Args:
        grid: (H, W) of its tokens at the size trained on.
        mixing: built as mixing(width=, grid=, drop_path=), a grid mixer bound to that size.
        resize: interpolate maps of other sizes round the mixing; False = the mixing refuses them.
    """

    def block() -> RaftMLPBlock:
        mixer = mixing(width=width, grid=grid, drop_path=drop_path)
        feeding = FeedForward(width, expansion * width, linear=linear, dropout=dropout)
        return RaftMLPBlock(width, ResizeTokenMixing(mixer, grid) if resize else mixer, feeding, drop_path)

    return nn.Sequential(*(block() for _ in range(depth)))


def enlarged(x: Tensor, patch: int) -> Tensor:
    """Resize a map (B, C, H, W) to the next multiples of the patch; as it is where it divides."""
    if x.shape[2] % patch == 0 and x.shape[3] % patch == 0:
        return x
    return resize(x, (x.shape[2] + -x.shape[2] % patch, x.shape[3] + -x.shape[3] % patch))


def level_grids(image: int | Grid, patches: Sequence[int]) -> list[Grid]:
    """Return the (H, W) of every level for an image size; what patches do not divide is rounded up.

    Raises:
        ShapeError: an image without pixels.
    """
    height, width = (image, image) if isinstance(image, int) else image
    if min(height, width) < 1:
        raise ShapeError(f"image must be at least 1 pixel high and wide, got {image}")
    grids = []
    for patch in patches:
        height, width = math.ceil(height / patch), math.ceil(width / patch)
        grids.append((height, width))
    return grids


def token_mean(x: Tensor, norm: nn.Module) -> Tensor:
    """Average the normalised channels of all positions: (B, C, H, W) -> (B, C)."""
    mean: Tensor = norm(x.movedim(1, -1)).mean((1, 2))
    return mean
