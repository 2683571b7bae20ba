"""One level of a V-cycle: its smoothing steps, the way down to the next and the way up from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["zeros", "circular", "reflect"]

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
TRANSPOSE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Shape(NamedTuple):
    """What the convolutions of a level have in common."""

    dim: int
    f_channels: int
    u_channels: int
    padding_mode: Padding
    bias: bool

    def conv(self, into: int, out: int, stride: int = 1, *, padded: bool = True, bias: bool | None = None) -> nn.Module:
        """Build a convolution with a kernel of 3 and this level's boundary."""
        options: dict[str, Any] = {"padding": 1, "padding_mode": self.padding_mode} if padded else {}
        return CONV[self.dim](into, out, 3, stride, bias=self.bias if bias is None else bias, **options)


class Level(nn.Module):
    """The parts of one level; the coarsest has no restriction and no way up.

    Args:
        steps: smoothing steps (before the coarser levels, after them).
        coarser: channels of f and u on the next level; None = this is the coarsest.
        way_up: the boundary of the way up, whether the restriction is padded, the sizes of this grid or None.
        first: nothing is known of u yet, so the first step is S f.
    """

    def __init__(
        self,
        shape: Shape,
        steps: tuple[int, int],
        coarser: tuple[int, int] | None,
        way_up: tuple[Padding, bool, Sequence[int] | None],
        *,
        first: bool,
        use_residual: bool,
    ) -> None:
        super().__init__()
        pre, post = steps
        # There is no way back up to the coarsest level: its later steps follow the earlier.
        pre, post = (pre, post) if coarser else (pre + post, 0)
        self.pre = nn.ModuleList(Smoothing(shape, first=first and i == 0) for i in range(pre))
        self.post = nn.ModuleList(Smoothing(shape) for _ in range(post))
        self.restriction = Restriction(shape, coarser, way_up[1], use_residual=use_residual) if coarser else None
        self.prolongation = Prolongation(shape, coarser[1], *way_up) if coarser else None
        self.norm: nn.Module = nn.Identity()

    def smooth(self, u: Tensor | None, f: Tensor) -> Tensor:
        """Run the steps before the coarser levels."""
        for step in self.pre:
            u = step(u, f)
        assert u is not None
        return u

    def correct(self, u: Tensor, coarse: Tensor, f: Tensor) -> Tensor:
        """Add what the coarser level found, and run the steps after it."""
        assert self.prolongation is not None
        u = self.norm(u + self.prolongation(coarse, u.shape[2:]))
        for step in self.post:
            u = step(u, f)
        return u


class Smoothing(nn.Module):
    """One step towards A u = f: u + S(f - A u); the very first is S f."""

    def __init__(self, shape: Shape, *, first: bool = False) -> None:
        super().__init__()
        self.operator = None if first else shape.conv(shape.u_channels, shape.f_channels)
        self.smoother = shape.conv(shape.f_channels, shape.u_channels)

    def forward(self, u: Tensor | None, f: Tensor) -> Tensor:
        """Return the next u."""
        if self.operator is None or u is None:
            return self.smoother(f)
        return u + self.smoother(f - self.operator(u))


class Restriction(nn.Module):
    """Hand u and f (or its residual f - A u) to the next level, each by a convolution of stride 2."""

    def __init__(self, shape: Shape, coarser: tuple[int, int], padded: bool, *, use_residual: bool) -> None:
        super().__init__()
        self.of_u = shape.conv(shape.u_channels, coarser[1], 2, padded=padded, bias=False)
        self.of_f = shape.conv(shape.f_channels, coarser[0], 2, padded=padded, bias=False)
        self.operator = shape.conv(shape.u_channels, shape.f_channels) if use_residual else None

    def forward(self, u: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return u and f of the next level."""
        rest = f if self.operator is None else f - self.operator(u)
        return self.of_u(u), self.of_f(rest)


class Prolongation(nn.Module):
    """Bring u of the next level to this grid by a transposed convolution of stride 2, without bias."""

    def __init__(self, shape: Shape, channels: int, padding: Padding, padded: bool, grid: Sequence[int] | None) -> None:
        super().__init__()
        self.dim, self.padding, self.padded = shape.dim, padding, padded
        kernel = [4] * shape.dim if grid is None else [3 if n % 2 else 4 for n in grid]
        crop = 1 if padded else 0
        self.conv = TRANSPOSED[shape.dim](channels, shape.u_channels, kernel, 2, crop, bias=False)

    def forward(self, coarse: Tensor, size: Sequence[int]) -> Tensor:
        """Return u (B, channels, *size)."""
        return prolong(coarse, self.conv.weight, size, self.padding, padded=self.padded)  # type: ignore[arg-type]


def prolong(coarse: Tensor, weight: Tensor, size: Sequence[int], padding: Padding, *, padded: bool = True) -> Tensor:
    """Transposed convolution of stride 2 onto a grid of the given sizes: (B, c, *coarse) -> (B, c', *size).

    Cell i of the coarse grid lies at cell 2 i of the fine one (2 i + 1 where the restriction was not padded).

    Args:
        weight: (c, c', *kernel), kernels of 3 or 4.
        padding: what lies beyond the coarse boundary.
    """
    dim, beyond = coarse.dim() - 2, 0 if padding == "zeros" else 1
    if beyond:
        coarse = extend(coarse, size, padding)
    crop = (1 if padded else 0) + 2 * beyond
    given = zip(size, coarse.shape[2:], weight.shape[2:], strict=True)
    missing = [n - (2 * (m - 1) + k - 2 * crop) for n, m, k in given]
    found = TRANSPOSE[dim](coarse, weight, None, 2, crop, [max(extra, 0) for extra in missing])
    for axis, extra in enumerate(missing):
        if extra < 0:
            found = found.narrow(axis + 2, 0, size[axis])
    return found


def extend(coarse: Tensor, size: Sequence[int], padding: Padding) -> Tensor:
    """Add one cell beyond every side of the coarse grid, by the boundary condition of the fine one.

    A field reflected at the fine grid's last cell is reflected at the coarse one's last where the size is odd; where it
    is even, the coarse grid ends one fine cell earlier, and the mirror image of its last cell is the next.
    """
    for axis, n in enumerate(size):
        at, length = axis + 2, coarse.shape[axis + 2]
        if padding == "circular":
            before, after = length - 1, 0
        else:
            before, after = 1, length - 2 if n % 2 else length - 1
        parts = [coarse.narrow(at, before, 1), coarse, coarse.narrow(at, after, 1)]
        coarse = torch.cat(parts, at)
    return coarse


def level_grids(grid: Sequence[int], levels: int, *, padded: bool = True) -> list[tuple[int, ...]]:
    """Return the sizes of every level: halved and rounded up, or (n - 1) // 2 where restriction is not padded."""
    grids = [tuple(grid)]
    for _ in range(levels - 1):
        grids.append(tuple(-(-n // 2) if padded else (n - 1) // 2 for n in grids[-1]))
    return grids
