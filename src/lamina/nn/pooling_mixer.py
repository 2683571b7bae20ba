"""Token mixers on a grid: pooling, and the control arms that MetaFormer compares it with.

A grid mixer is built as `mixer(width=C, grid=(H, W))` (each where it names it) and maps (B, C, H, W) to the same shape.
Source: Yu et al., MetaFormer Is Actually What You Need for Vision (2022), arXiv 2111.11418.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.registry import register

SOURCE = "Yu et al., MetaFormer Is Actually What You Need for Vision (2022), arXiv 2111.11418"


@register("mixer", source=f"{SOURCE}, equation 4")
class PoolingMixer(nn.Module):
    """Average of the neighbours minus the cell itself: a token mixer without parameters.

    x (B, C, H, W) -> same. The subtraction is there because the block adds x back. At the border only the cells
    inside count, so a constant image gives zero.

    Args:
        width: C; not needed, taken so that the slot can offer it.
        kernel_size: side of the neighbourhood, odd.
    Raises:
        ShapeError: an even or non-positive kernel_size.
    """

    layout: ClassVar[str] = "grid"

    def __init__(self, width: int | None = None, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ShapeError(f"kernel_size must be odd and positive, so that a cell has a centre, got {kernel_size}")
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, C, H, W)."""
        return pool_and_subtract(x, self.kernel_size)

    def extra_repr(self) -> str:
        """Show the neighbourhood."""
        return f"kernel_size={self.kernel_size}"


@register("mixer", source=f"{SOURCE}, ablation table")
class IdentityMixer(nn.Module):
    """No mixing at all: tokens meet only where the network shrinks the image. x -> x."""

    layout: ClassVar[str] = "grid"

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


@register("mixer", source=f"{SOURCE}, ablation table; rows normalised by softmax as in arXiv 2210.13452")
class RandomMixer(nn.Module):
    """Mix cells by a frozen random matrix whose rows are softmax weights. x (B, C, H, W) -> same, fixed H and W.

    Args:
        grid: (H, W).
        seed: of the matrix, which is a buffer and saved; None = from torch's generator, as weights are, so that
            every layer of a network has another matrix.
    Raises:
        ShapeError: another H or W at the call.
    """

    layout: ClassVar[str] = "grid"
    weights: Tensor

    def __init__(self, grid: tuple[int, int], seed: int | None = None) -> None:
        super().__init__()
        self.grid = _checked(grid)
        cells, here = grid[0] * grid[1], torch.empty(0).device
        if seed is None:
            drawn = torch.rand(cells, cells)
        else:
            # The same numbers on every device; under torch.device("meta") a generator has none to give.
            generator = torch.Generator("cpu").manual_seed(seed)
            drawn = torch.rand(cells, cells, generator=generator, device="cpu")
        self.register_buffer("weights", drawn.softmax(-1).to(here))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, C, H, W)."""
        _check_grid("RandomMixer", x, self.grid)
        return F.linear(x.flatten(2), self.weights.to(x.dtype)).unflatten(2, self.grid)


@register("mixer", source=f"{SOURCE}, section 4.4; the mixer of ResMLP and MLP-Mixer, one layer deep")
class SpatialLinearMixer(nn.Module):
    """Mix cells by one learned matrix shared by all channels. x (B, C, H, W) -> same, fixed H and W.

    Args:
        grid: (H, W).
    Raises:
        ShapeError: another H or W at the call.
    """

    layout: ClassVar[str] = "grid"

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = _checked(grid)
        cells = grid[0] * grid[1]
        self.linear = nn.Linear(cells, cells, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, C, H, W)."""
        _check_grid("SpatialLinearMixer", x, self.grid)
        return self.linear(x.flatten(2)).unflatten(2, self.grid)


@register("norm", "channel_norm_2d", source=f"{SOURCE}, hybrid models")
class ChannelNorm2d(nn.LayerNorm):
    """Layer normalisation of the channel vector at every position of a map. x (B, C, H, W) -> same.

    Not `channel_layer_norm`, whose statistics run over the positions too.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over dimension 1."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def pool_and_subtract(x: Tensor, kernel_size: int) -> Tensor:
    """Average over a kernel_size square without padding cells, minus x; (B, C, H, W) -> same."""
    return F.avg_pool2d(x, kernel_size, 1, kernel_size // 2, count_include_pad=False) - x


def _checked(grid: tuple[int, int]) -> tuple[int, int]:
    height, width = grid
    if height < 1 or width < 1:
        raise ShapeError(f"grid must be (rows, columns), both at least 1, got {tuple(grid)}")
    return int(height), int(width)


def _check_grid(name: str, x: Tensor, grid: tuple[int, int]) -> None:
    if tuple(x.shape[2:]) != grid:
        raise ShapeError(f"{name} was built for a grid of {grid}, got {tuple(x.shape[2:])}: it is bound to one size")
    if not x.is_floating_point():
        raise ShapeError(f"{name} takes floating-point images, got {x.dtype} {tuple(x.shape)}")
