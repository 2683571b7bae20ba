"""A field on the vertices of a grid, dense or only where something is (Plenoxels)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.fields.field import LOWEST, Field
from lamina.nn.fields.interpolation import corners, row_numbers, weighted_rows
from lamina.nn.fields.spherical_harmonics import spherical_harmonics
from lamina.registry import register


@register("field", source="Fridovich-Keil et al., Plenoxels (2022), arXiv 2112.05131; sizes of arXiv 2211.15977")
class GridField(Field):
    """Log-density and spherical harmonics of the three colours at every vertex, without a network: can be edited.

    x (N, 3) in the box, unit d (N, 3) -> sigma (N,), rgb (N, 3), float32: trilinear between vertices, rgb the sigmoid
    of the harmonics' sum. `sparse` keeps only the vertices of some part of the box.

    Args:
        resolution: vertices a side.
        bands: of the harmonics, 1 (the same colour from everywhere) to 4.
        kept: vertices that have values of their own; None = all. The others share one row, that of empty space.
        bound: half the side of the box.
        dim: 3, or 2 for pictures: x (N, 2) -> rgb (N, 3), three numbers a vertex.
        soft_clip: let gradients through the clip of the log-density where they point inwards.
    Raises:
        ShapeError: a size out of range; at the call, another shape.
    Source: as registered, section 3. Deviation: every vertex exists, unless `sparse` was called.
    Example:
        >>> GridField(resolution=8)(torch.zeros(5, 3), torch.eye(3)[[2] * 5])[1].shape
        torch.Size([5, 3])
    """

    features = 0
    rows: Tensor | None

    def __init__(
        self,
        resolution: int = 128,
        bands: int = 3,
        kept: int | None = None,
        *,
        bound: float = 1.0,
        dim: int = 3,
        soft_clip: bool = False,
    ) -> None:
        super().__init__({"resolution": resolution, "bands": bands, "kept": kept}, bound, dim, soft_clip)
        if resolution < 2 or not 1 <= bands <= 4 or (kept is not None and not 0 < kept <= resolution**dim):
            raise ShapeError(
                f"a grid field needs a resolution of 2, 1 to 4 bands and kept in 1..resolution^{dim} or None, got "
                f"{resolution=}, {bands=}, {kept=}"
            )
        self.resolution, self.bands = resolution, bands
        count = resolution**dim if kept is None else kept + 1
        self.values = nn.Parameter(0.02 * torch.randn(count, 1 + 3 * bands**2 if dim == 3 else 3))
        rows = None
        if kept is not None:
            rows = torch.zeros(resolution**dim, dtype=torch.int32)
            rows[:kept] = torch.arange(1, kept + 1, dtype=torch.int32)
        self.register_buffer("rows", rows)

    def geometry(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return s (N,) and, in place of the feature, the harmonics' coefficients (N, 3 * bands^2)."""
        last = self.resolution - 1
        # The last vertex belongs to the last cell.
        p = self.in_unit(x).T.contiguous() * last
        axes, weight = corners(p, p.detach().floor().clamp(max=last - 1))
        numbers = row_numbers(axes, [self.resolution**i for i in range(self.dim)])
        index, weight = (v.flatten(0, self.dim - 1).T for v in (numbers, weight))
        if self.rows is not None:
            index = self.rows[index.long()]
        found = weighted_rows(self.values, index, weight)
        return (found[:, 0], found[:, 1:]) if self.dim == 3 else (None, found)

    def color(self, g: Tensor, d: Tensor | None) -> Tensor:
        """Return rgb (N, 3) from coefficients and directions."""
        if self.dim == 2 or d is None:
            return torch.sigmoid(g)
        return torch.sigmoid((g.unflatten(-1, (3, -1)) * spherical_harmonics(d, self.bands)[:, None]).sum(-1))

    def vertices(self) -> Tensor:
        """Return where the vertices are: (resolution^dim, dim), the first axis fastest."""
        line = torch.linspace(-self.bound, self.bound, self.resolution, device=self.values.device)
        axes = torch.meshgrid(*(line,) * self.dim, indexing="ij")
        return torch.stack([a.flatten() for a in reversed(axes)], dim=-1)

    @torch.no_grad()
    def sparse(self, occupied: Callable[[Tensor], Tensor]) -> GridField:
        """Return a field that holds values only at the vertices of cells where something is; other space is empty.

        Args:
            occupied: points (N, dim) -> bool (N,), such as an `OccupancyGrid`; asked at the vertices and beside them.
        Raises:
            ShapeError: nothing is occupied, or dim is 2.
        """
        if self.dim != 3:
            raise ShapeError("sparse is of grids in space; a picture has no empty part")
        side, step = self.resolution, 2 * self.bound / (self.resolution - 1)
        near = torch.zeros(side**3, dtype=torch.bool, device=self.values.device)
        for x in (-0.5, 0.0, 0.5):
            for y in (-0.5, 0.0, 0.5):
                for z in (-0.5, 0.0, 0.5):
                    beside = self.vertices() + step * torch.tensor([x, y, z], device=near.device)
                    near |= occupied(beside.clamp(-self.bound, self.bound))
        kept = near.nonzero().squeeze(1)
        if not len(kept):
            raise ShapeError("sparse found nothing occupied: the whole field would be empty space")
        made = GridField(side, self.bands, len(kept), bound=self.bound, soft_clip=self.soft_clip).to(self.values)
        assert made.rows is not None
        made.rows = torch.zeros(side**3, dtype=torch.int32, device=near.device)
        made.rows[kept] = torch.arange(1, len(kept) + 1, dtype=torch.int32, device=near.device)
        made.values[0] = 0.0
        made.values[0, 0] = LOWEST
        made.values[1:] = (self.values if self.rows is None else self.values[self.rows.long()])[kept]
        return made.train(self.training)
