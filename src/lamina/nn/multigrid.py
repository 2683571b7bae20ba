"""A linear map between functions on a grid, computed as one multigrid V-cycle of small convolutions.

Every cell reaches every other at a cost linear in the number of cells, and the boundary condition is the padding of the
convolutions: zeros for fields that vanish outside (Dirichlet), circular for periodic ones, reflect for those without
flux through the boundary (Neumann).
Source: He, Liu, Xu, MgNO: Efficient Parameterization of Linear Operators via Multigrid (ICLR 2024), arXiv 2310.19809.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.nn._multigrid_levels import Level, Padding, Shape, level_grids
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SOURCE = "He, Liu & Xu 2024, arXiv 2310.19809"
Schedule = Sequence[tuple[int, int]]
"""Smoothing steps of each level, finest first: (before the coarser levels, after them)."""

SCHEDULE: Schedule = ((1, 0), (1, 0), (1, 0), (2, 0))


@register("layer", source=f"{SOURCE}, section 3")
class MultigridLinear(nn.Module):
    """Linear map of fields that reaches the whole grid: a V-cycle whose operators are learned 3^dim convolutions.

    In place of a convolution whose view is too narrow, or of attention over a grid that is too large for it. On a CPU
    planes in torch.channels_last take a fifth less time; the layer leaves the format as it is.
    f (B, in_channels, *grid) -> (B, out_channels, *grid), any grid whose coarsest level keeps 2 cells an axis; a level
    has half the cells of the one above, rounded up. The weights belong to one spacing of the grid: on a finer one the
    map is another. With `bias` or `norm` it is not linear.

    Args:
        schedule: (pre, post) smoothing steps of each level; the finest needs one step before, the coarsest one at all.
        dim: axes of the grid, 1..3.
        padding_mode: what lies beyond the boundary: "zeros", "circular", "reflect".
        use_residual: restrict f - A u, as the textbook; False = f itself, as the released code.
        bias: of the smoothing convolutions.
        norm: after each return to a finer level, built as norm(channels), or norm([channels, *grid]) where it takes a
            `normalized_shape`; None = none.
        transposed_padding: "match" = the way up sees the same boundary as the convolutions; "zeros" = zeros beyond it,
            whatever the padding (the released code).
        grid: sizes trained on. Picks the kernels of the way up: 3 along an axis whose size is odd, 4 where it is even;
            None = 4. For norms over the grid it is the only grid.
        widen: level j has (j + 1) times the channels.
        pad_restriction: False = restriction without padding, and so the way up: n -> (n - 1) // 2 cells.
    Raises:
        RecipeError: a norm over the grid without `grid`, an unknown padding.
        ShapeError: no step at the finest or coarsest level, sizes below 1, a grid too small; at the call, other
            channels, another number of axes, complex numbers or integers, another grid under a norm over it.
    Source: section 3. Deviation: the way up of circular and reflected fields is padded as they are (the
        released code has zeros there), and one kernel serves any size, cropped (there the sizes are written out).
    Example:
        >>> MultigridLinear(1, 8, ((1, 0), (1, 1), (2, 0)))(torch.randn(2, 1, 16, 21)).shape
        torch.Size([2, 8, 16, 21])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        schedule: Schedule = SCHEDULE,
        *,
        dim: int = 2,
        padding_mode: Padding = "zeros",
        use_residual: bool = False,
        bias: bool = False,
        norm: Annotated[Node | None, Slot("norm")] = None,
        transposed_padding: Literal["match", "zeros"] = "match",
        grid: Sequence[int] | None = None,
        widen: bool = False,
        pad_restriction: bool = True,
    ) -> None:
        super().__init__()
        _check(in_channels, out_channels, schedule, dim, padding_mode, transposed_padding)
        self.in_channels, self.out_channels, self.dim = in_channels, out_channels, dim
        self.schedule = tuple((int(pre), int(post)) for pre, post in schedule)
        self.padding_mode, self.pad_restriction = padding_mode, pad_restriction
        self.grid = None if grid is None else tuple(int(n) for n in grid)
        if self.grid is not None and len(self.grid) != dim:
            raise ShapeError(f"grid must have {dim} sizes, as dim says, got {self.grid}")
        grids = [None] * len(self.schedule) if self.grid is None else self._grids(self.grid)
        match: Padding = padding_mode if transposed_padding == "match" and pad_restriction else "zeros"
        levels, last = [], len(self.schedule) - 1
        for j, steps in enumerate(self.schedule):
            times, below = (j + 1, j + 2) if widen else (1, 1)
            shape = Shape(dim, in_channels * times, out_channels * times, padding_mode, bias)
            coarser = None if j == last else (in_channels * below, out_channels * below)
            way_up = (match, pad_restriction, grids[j])
            level = Level(shape, steps, coarser, way_up, first=j == 0, use_residual=use_residual)
            if norm is not None and j < last:
                level.norm = norm_of(norm, out_channels * times, grids[j])
            levels.append(level)
        self.levels = nn.ModuleList(levels)
        self.bound = norm is not None and last > 0 and is_over_grid(norm)

    def forward(self, f: Tensor) -> Tensor:
        """Run one V-cycle on (B, in_channels, *grid)."""
        self._check_field(f)
        return v_cycle(f, cast("list[Level]", list(self.levels)))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_channels}, {self.out_channels}, schedule={self.schedule}, padding_mode={self.padding_mode!r}"

    def _grids(self, grid: tuple[int, ...]) -> list[Any]:
        grids = level_grids(grid, len(self.schedule), padded=self.pad_restriction)
        least = 2 if len(grids) > 1 or self.padding_mode == "reflect" else 1
        if min(grids[-1]) < least:
            raise ShapeError(
                f"{len(grids)} levels leave {min(grids[-1])} cells of a grid of {tuple(grid)} at the coarsest, which "
                f"needs {least}: take fewer levels in schedule"
            )
        return grids

    def _check_field(self, f: Tensor) -> None:
        if f.dim() != self.dim + 2 or f.shape[1] != self.in_channels or not f.is_floating_point():
            axes = ", ".join("HWD"[: self.dim] if self.dim < 3 else "DHW")
            raise ShapeError(
                f"MultigridLinear takes real floating-point fields (B, {self.in_channels}, {axes}), "
                f"got {f.dtype} {tuple(f.shape)}"
            )
        self._grids(tuple(f.shape[2:]))
        if self.bound and tuple(f.shape[2:]) != self.grid:
            raise ShapeError(
                f"MultigridLinear with a norm over the grid was built for {self.grid}, got {tuple(f.shape[2:])}"
            )


@register("mixer", "multigrid_linear", source=SOURCE)
class MultigridMixer(MultigridLinear):
    """Multigrid linear map as a token mixer: x (B, C, H, W) -> same; without the x that the block adds.

    Args:
        width: C.
        grid: (H, W); without it give a schedule. Other sizes are taken as well.
        schedule: as in `MultigridLinear`; None = as many levels as leave at least 4 cells an axis, one step each and
            two on the coarsest.
        padding_mode, use_residual, bias, norm: as in `MultigridLinear`.
    Raises:
        RecipeError: neither grid nor schedule. Others as in `MultigridLinear`.
    Example:
        >>> MultigridMixer(8, (14, 14))(torch.randn(2, 8, 14, 14)).shape
        torch.Size([2, 8, 14, 14])
    """

    layout: ClassVar[str] = "grid"

    def __init__(
        self,
        width: int,
        grid: tuple[int, int] | None = None,
        schedule: Schedule | None = None,
        *,
        padding_mode: Padding = "zeros",
        use_residual: bool = False,
        bias: bool = False,
        norm: Annotated[Node | None, Slot("norm")] = None,
    ) -> None:
        if schedule is None and grid is None:
            raise RecipeError("multigrid_linear builds its levels for a grid: give grid=(H, W) or a schedule")
        steps = schedule_for(grid) if schedule is None and grid is not None else schedule
        assert steps is not None
        options: dict[str, Any] = {"padding_mode": padding_mode, "use_residual": use_residual, "bias": bias}
        super().__init__(width, width, steps, norm=norm, grid=grid, **options)


def v_cycle(f: Tensor, levels: Sequence[Level]) -> Tensor:
    """Go down the levels and up again: f on the finest grid -> u on the finest grid.

    Down: smooth u on each level, hand it and f to the next. Up: add what the coarser level found, smooth again.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    u: Tensor | None = None
    for level in levels:
        u = level.smooth(u, f)
        kept.append((u, f))
        if level.restriction is not None:
            u, f = level.restriction(u, f)
    assert u is not None
    for level, (fine, f) in zip(reversed(levels[:-1]), reversed(kept[:-1]), strict=True):
        u = level.correct(fine, u, f)
    return u


def schedule_for(grid: Sequence[int], least: int = 4) -> Schedule:
    """Return a schedule with as many levels as leave `least` cells an axis: one step each, two on the coarsest."""
    side, levels = min(grid), 1
    while -(-side // 2) >= least:
        side, levels = -(-side // 2), levels + 1
    return ((1, 0),) * (levels - 1) + ((2, 0),)


def norm_of(norm: Node, channels: int, grid: Sequence[int] | None) -> nn.Module:
    """Build a norm of fields: over the channels and the grid where it takes a `normalized_shape`, else by channels.

    Raises:
        RecipeError: a norm over the grid, and no grid.
    """
    make = factory("norm", norm)
    if not is_over_grid(norm):
        return make(channels)
    if grid is None:
        raise RecipeError(f"the norm {norm!r} is over channels and grid: give grid, the sizes it is for")
    return make([channels, *grid])


def is_over_grid(norm: Node) -> bool:
    """Say whether a norm of fields is bound to a grid."""
    return "normalized_shape" in factory("norm", norm).found.signature.options  # type: ignore[attr-defined]


def _check(
    in_channels: int, out_channels: int, schedule: Schedule, dim: int, padding_mode: str, transposed_padding: str
) -> None:
    if in_channels < 1 or out_channels < 1 or dim not in (1, 2, 3):
        raise ShapeError(
            f"in_channels and out_channels must be at least 1 and dim 1, 2 or 3, got {in_channels}, {out_channels}, "
            f"{dim}"
        )
    if not schedule or any(len(s) != 2 or min(s) < 0 for s in schedule):
        raise ShapeError(f"schedule must have two counts a level, (pre, post), none negative, got {schedule!r}")
    if schedule[0][0] < 1:
        raise ShapeError(f"the finest level must begin with a smoothing step: schedule[0] is {tuple(schedule[0])}")
    if sum(schedule[-1]) < 1:
        raise ShapeError("the coarsest level must have a smoothing step: else what f says there is lost")
    if padding_mode not in ("zeros", "circular", "reflect"):
        raise RecipeError(f"padding_mode must be 'zeros', 'circular' or 'reflect', got {padding_mode!r}")
    if transposed_padding not in ("match", "zeros"):
        raise RecipeError(f"transposed_padding must be 'match' or 'zeros', got {transposed_padding!r}")
