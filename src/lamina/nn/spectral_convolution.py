"""Convolution with a kernel as large as the grid, learned by its lowest frequencies: the Fourier layer of an FNO.

Source: Li et al., Fourier Neural Operator for Parametric Partial Differential Equations (2021), arXiv 2010.08895.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._precision import without_autocast
from lamina.registry import register


@register("layer", source="Li et al. 2021, arXiv 2010.08895, section 4")
class SpectralConvolution(nn.Module):
    """Multiply the lowest frequencies of a periodic field by learned matrices, drop the others.

    x (B, in_channels, *grid) -> (B, out_channels, *grid), any grid. A matrix of complex numbers for every frequency:
    below `modes` either way along every axis (along the last, whose negative ones follow, from 0). On a grid too
    coarse for all of them the highest are left out. float32 inside (half precision has no Fourier transform).

    Args:
        modes: frequencies kept along each axis, one number or one an axis.
        dim: axes of the grid, 1..3.
    Raises:
        ShapeError: sizes below 1; at the call, other channels or axes, complex numbers or integers.
    Source: section 4. The weights are held as pairs of real numbers, so that every optimizer takes them.
    Example:
        >>> SpectralConvolution(2, 4, modes=3)(torch.randn(1, 2, 16, 12)).shape
        torch.Size([1, 4, 16, 12])
    """

    def __init__(self, in_channels: int, out_channels: int, modes: int | Sequence[int] = 8, *, dim: int = 2) -> None:
        super().__init__()
        each = (modes,) * dim if isinstance(modes, int) else tuple(modes)
        if min(in_channels, out_channels, *each) < 1 or dim not in (1, 2, 3) or len(each) != dim:
            raise ShapeError(
                f"channels and modes must be at least 1, dim 1, 2 or 3 with as many modes, got {in_channels}, "
                f"{out_channels}, {modes}, {dim}"
            )
        self.in_channels, self.modes, self.dim = in_channels, each, dim
        scale = 1 / (in_channels * out_channels)
        # One block of frequencies for every choice of signs of the axes before the last.
        shape = (2 ** (dim - 1), in_channels, out_channels, *each, 2)
        self.weight = nn.Parameter(scale * torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Filter (B, in_channels, *grid)."""
        if x.dim() != self.dim + 2 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ShapeError(
                f"SpectralConvolution takes real floating-point fields (B, {self.in_channels}, ...) with {self.dim} "
                f"axes, got {x.dtype} {tuple(x.shape)}"
            )
        if not len(x):
            # The library behind torch's transform refuses to do nothing.
            return x.new_zeros(0, self.weight.shape[2], *x.shape[2:])
        with without_autocast(x.device):
            wide = x.dtype if x.dtype == torch.float64 else torch.float32
            return filter_frequencies(x.to(wide), self.weight.to(wide), self.modes).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_channels}, {self.weight.shape[2]}, modes={self.modes}"


def filter_frequencies(x: Tensor, weight: Tensor, modes: Sequence[int]) -> Tensor:
    """Multiply each kept frequency of x (B, c, *grid) by its matrix; weight (signs, c, c', *modes, 2)."""
    dim, grid = len(modes), x.shape[2:]
    axes = tuple(range(2, 2 + dim))
    found = torch.fft.rfftn(x, dim=axes)
    matrices = torch.view_as_complex(weight.contiguous())
    result = found.new_zeros(x.shape[0], weight.shape[2], *found.shape[2:])
    kept = [min(m, n // 2) for m, n in zip(modes[:-1], grid[:-1], strict=True)] + [min(modes[-1], grid[-1] // 2 + 1)]
    # An axis of one cell has the frequency 0 alone.
    kept = [max(k, 1) for k in kept]
    for block, signs in enumerate(itertools.product((False, True), repeat=dim - 1)):
        if any(negative and n == 1 for negative, n in zip(signs, grid, strict=False)):
            continue
        there: list[slice] = []
        of: list[slice] = []
        for axis, k in enumerate(kept):
            negative = axis < dim - 1 and signs[axis]
            there.append(slice(grid[axis] - k, grid[axis]) if negative else slice(0, k))
            # The last of a block's negative frequencies is -1, whatever the grid.
            of.append(slice(modes[axis] - k, modes[axis]) if negative else slice(0, k))
        part, matrix = found[:, :, *there], matrices[block][:, :, *of]
        result[:, :, *there] = torch.einsum("bi...,io...->bo...", part, matrix)
    return torch.fft.irfftn(result, s=grid, dim=axes)
