"""Products of maps with slow kernels and of the results with the maps: the HyperZZW operators; and the slow loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import ClassVar

from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.hyper_convolution.coordinate_kernel import SOURCE, CoordinateKernel
from lamina.registry import register


@register("mixer", "hyper_zzw_global", source=f"{SOURCE}, equation 3")
class HyperZZWGlobal(nn.Module):
    """Mix the cells of a square map by a product of matrices: (x * W) @ x per channel, W computed from coordinates.

    A token mixer without attention and without a fixed size: cell (i, j) sees row i of x * W and column j of x, and
    two of them in a row see everything. x (B, C, S, S) -> same; cost C * S^3. It has no bias and no norm of its own,
    and is quadratic in x: put a norm before it (the blocks of a transformer have one).

    Args:
        width: C.
        grid: (S, S) it is trained on; at another size the slow kernel is asked for on that grid, and the product is
            scaled by trained over asked side, so that a row keeps its weight.
        hidden, layers, omega0: of the slow net, see `CoordinateKernel`.
    Raises:
        ShapeError: a grid that is not square, sizes below 1; at the call, other channels or a map that is not square.
    Source: equation 3, with one input used as both z.
    Example:
        >>> mixer = HyperZZWGlobal(8, (4, 4))
        >>> mixer(torch.randn(2, 8, 4, 4)).shape, mixer(torch.randn(2, 8, 9, 9)).shape
        (torch.Size([2, 8, 4, 4]), torch.Size([2, 8, 9, 9]))
    """

    layout: ClassVar[str] = "grid"

    def __init__(
        self, width: int, grid: tuple[int, int], hidden: int = 64, layers: int = 2, omega0: float = 10.0
    ) -> None:
        super().__init__()
        if grid[0] != grid[1]:
            raise ShapeError(f"HyperZZWGlobal multiplies maps as matrices: the grid must be square, got {tuple(grid)}")
        self.width = width
        self.kernel = CoordinateKernel(2, tuple(grid), width, hidden, layers, omega0)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, C, S, S)."""
        side = check_square("HyperZZWGlobal", x, self.width)
        product = global_product(x * self.kernel(size=side).to(x.dtype), x)
        return product if side == self.kernel.size[0] else product * (self.kernel.size[0] / side)


def global_product(context: Tensor, y: Tensor) -> Tensor:
    """Multiply the maps of every channel as matrices: (B, C, S, S), (B, C, S, S) -> same; rows meet columns.

    Raises:
        ShapeError: maps that are not square, or of different shapes.
    """
    if context.shape != y.shape or context.shape[-1] != context.shape[-2]:
        raise ShapeError(f"the global product takes equal square maps, got {tuple(context.shape)} and {tuple(y.shape)}")
    return context @ y


def two_product(kernel: Tensor, y: Tensor) -> Tensor:
    """Return (y * kernel) * y, the element-wise operator on z, z and W."""
    return (y * kernel) * y


def slow_kernel_distance(kernels: Sequence[Tensor], factors: Sequence[int]) -> Tensor:
    """Sum over pairs j < i of the mean square of (kernel j, tiled along channels to those of kernel i) - kernel i.

    Args:
        kernels: (1, C_i, S, S) each, C_{i+1} = C_i * factors[i].
        factors: by how much each block widens its channels; the last one's is not read.
    Raises:
        ShapeError: fewer factors than kernels, or channels that do not follow from them.
    Source: the slow neural loss of arXiv 2401.17948.
    """
    if not kernels or len(factors) < len(kernels):
        raise ShapeError(f"as many factors as kernels, at least one of each, got {len(factors)} and {len(kernels)}")
    total = kernels[0].new_zeros(())
    for j, i in combinations(range(len(kernels)), 2):
        near, far, times = kernels[j], kernels[i], math.prod(factors[j:i])
        if near.shape[1] * times != far.shape[1] or near.shape[2:] != far.shape[2:]:
            raise ShapeError(
                f"slow kernel {j} of {tuple(near.shape)}, {times} times along its channels, does not make kernel {i} "
                f"of {tuple(far.shape)}"
            )
        total = total + (far.unflatten(1, (times, -1)) - near[:, None]).square().mean()
    return total


def mixer_kernels(model: nn.Module) -> tuple[list[Tensor], list[int]]:
    """Return the slow kernels of every `HyperZZWGlobal` in a model, all on the largest of their grids, and factors.

    Raises:
        ShapeError: the channels of one are no multiple of those of the one before it.
    """
    found = [m for m in model.modules() if isinstance(m, HyperZZWGlobal)]
    side = max((m.kernel.size[0] for m in found), default=1)
    factors = [1] * len(found)
    for i, (near, far) in enumerate(pairwise(found)):
        if far.width % near.width:
            raise ShapeError(
                f"slow kernels are compared where each has a multiple of the channels before it, got "
                f"{[m.width for m in found]}"
            )
        factors[i] = far.width // near.width
    return [m.kernel(size=side) for m in found], factors


def check_square(name: str, x: Tensor, width: int) -> int:
    """Return the side of square maps (B, width, S, S).

    Raises:
        ShapeError: other channels, sides that differ, integers.
    """
    if x.dim() != 4 or x.shape[1] != width or x.shape[2] != x.shape[3] or not x.is_floating_point():
        raise ShapeError(f"{name} takes floating-point square maps (B, {width}, S, S), got {x.dtype} {tuple(x.shape)}")
    return x.shape[2]
