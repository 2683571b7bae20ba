"""Two layouts of tokens, (B, T, C) and (B, C, H, W): let a mixer made for one run on the other.

A mixer whose class says `layout = "grid"` takes images; every other takes sequences.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError


class SequenceAsGrid(nn.Module):
    """Run a sequence mixer on an image: the cells, row by row, are the tokens; (B, C, H, W) -> the same."""

    layout: ClassVar[str] = "grid"

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, C, H, W)."""
        return self.mixer(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class GridAsSequence(nn.Module):
    """Run a grid mixer on a sequence of prefix tokens and image cells, row by row.

    (B, prefix + H * W, C) -> the same. Prefix tokens (a class token) have no place on the grid: their output is zero.

    Args:
        grid: (H, W) of the cells.
        prefix: tokens ahead of them.
    Raises:
        ShapeError: the sequence is not prefix + H * W long.
    """

    layout: ClassVar[str] = "sequence"

    def __init__(self, mixer: nn.Module, grid: tuple[int, int], prefix: int = 0) -> None:
        super().__init__()
        self.mixer, self.grid, self.prefix = mixer, grid, prefix

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, prefix + H * W, C)."""
        height, width = self.grid
        if x.shape[1] != self.prefix + height * width:
            raise ShapeError(f"expected {self.prefix} + {height} * {width} tokens, got {x.shape[1]}")
        cells = x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        mixed = self.mixer(cells).flatten(2).transpose(1, 2)
        return torch.cat((torch.zeros_like(x[:, : self.prefix], dtype=mixed.dtype), mixed), dim=1)


def layout_of(mixer: nn.Module) -> str:
    """Return "grid" or "sequence" (where a mixer does not say)."""
    return getattr(mixer, "layout", "sequence")
