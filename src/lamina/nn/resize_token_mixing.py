"""Run a token mixer that is bound to one grid on maps of any size, by bicubic interpolation there and back.

Source: Tatsunami, Taki, RaftMLP (2021), arXiv 2108.04384, section 3.4.
"""

from __future__ import annotations

import warnings
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.nn.layout import SequenceAsGrid, layout_of
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SOURCE = "Tatsunami & Taki 2021, arXiv 2108.04384, section 3.4"
FINEST = 4
"""A map with so many times fewer cells along an axis than the mixer's grid is warned about."""


@register("mixer", "resize_token_mixing", source=SOURCE)
@register("layer", "resize_token_mixing", source=SOURCE)
class ResizeTokenMixing(nn.Module):
    """Resize a map to a mixer's grid, mix, resize back; at the grid itself only mix. x (B, C, H, W) -> same.

    Bicubic, without aligned corners or a blur. The mixing costs what it costs on its grid, whatever the size of the
    map: a larger map passes it at the grid's resolution, so what is finer gets lost (all of it with a mixer that keeps
    its own residual, as in RaftMLP; with `residual=False` the trunk still adds the map itself).

    Args:
        mixer: built already, or a name or node that is built as mixer(width=, grid=) as far as it names them; one of
            sequences reads the cells row by row.
        grid: (H, W) of the mixer.
        width: C; only for a mixer that is still to be built.
    Raises:
        RecipeError: a mixer to be built without width. ShapeError: a grid below (1, 1); at the call, no floating-point
            map.
    Warns:
        UserWarning: a map with less than a quarter of the grid's cells along an axis.
    Source: section 3.4. The official code keeps the size in its modules; here it is read from x.
    Example:
        >>> from lamina.nn import MixerTokenMixing
        >>> ResizeTokenMixing(MixerTokenMixing(8, (4, 4)), (4, 4))(torch.randn(2, 8, 6, 5)).shape
        torch.Size([2, 8, 6, 5])
    """

    layout: ClassVar[str] = "grid"

    def __init__(
        self, mixer: Annotated[Node | nn.Module, Slot("mixer")], grid: tuple[int, int], width: int | None = None
    ) -> None:
        super().__init__()
        if min(grid) < 1:
            raise ShapeError(f"grid must be (rows, columns), both at least 1, got {tuple(grid)}")
        self.grid = (int(grid[0]), int(grid[1]))
        if isinstance(mixer, nn.Module):
            built = mixer
        elif width is None:
            raise RecipeError(f"resize_token_mixing builds its mixer {mixer!r}, and needs the width for it")
        else:
            built = factory("mixer", mixer)(width=width, grid=self.grid)
        self.mixer: nn.Module = built if layout_of(built) == "grid" else SequenceAsGrid(built)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, C, H, W)."""
        if x.dim() != 4 or not x.is_floating_point():
            raise ShapeError(
                f"ResizeTokenMixing takes floating-point maps (B, C, H, W), got {x.dtype} {tuple(x.shape)}"
            )
        size = (x.shape[2], x.shape[3])
        if size == self.grid:
            mixed: Tensor = self.mixer(x)
            return mixed
        _tell_of_few_cells(size, self.grid)
        return resize(self.mixer(resize(x, self.grid)), size)

    def extra_repr(self) -> str:
        """Show the grid."""
        return f"grid={self.grid}"


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate (B, C, H, W) bicubically to another (H, W); an empty batch stays empty."""
    if x.shape[0] == 0:
        return x.new_empty(*x.shape[:2], *size)
    return F.interpolate(x, size, mode="bicubic", align_corners=False)


def _tell_of_few_cells(size: tuple[int, int], grid: tuple[int, int]) -> None:
    if torch.compiler.is_compiling():
        return
    if any(have * FINEST < want for have, want in zip(size, grid, strict=True)):
        warnings.warn(
            f"a map of {size} cells is blown up to the mixer's grid of {grid}, more than {FINEST} times along an axis: "
            "train at a size near the one you use",
            stacklevel=3,
        )
