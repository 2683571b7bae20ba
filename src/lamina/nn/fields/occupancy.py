"""Which cells of a field's box hold something: what lets a renderer skip empty space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError


class OccupancyGrid(nn.Module):
    """A bit a cell of the box [-bound, bound]^3: points (..., 3) -> bool (...); all cells are occupied at first.

    Args:
        resolution: cells a side.
        bound: half the side of the box.
    Raises:
        LaminaError: a resolution below 1, a bound not above 0.
    Example:
        >>> OccupancyGrid(resolution=4)(torch.zeros(2, 3))
        tensor([True, True])
    """

    cells: Tensor

    def __init__(self, resolution: int = 128, *, bound: float = 1.0) -> None:
        super().__init__()
        if resolution < 1 or not bound > 0:
            raise LaminaError(f"an occupancy grid needs a cell and a bound above 0, got {resolution=}, {bound=}")
        self.resolution, self.bound = resolution, float(bound)
        self.register_buffer("cells", torch.ones(resolution**3, dtype=torch.bool))

    def forward(self, points: Tensor) -> Tensor:
        """Return whether the cells of the points hold something."""
        side = self.resolution
        unit = points.detach() / (2 * self.bound) + 0.5
        cell = (unit * side).long().clamp(0, side - 1)
        return self.cells[cell[..., 0] + side * (cell[..., 1] + side * cell[..., 2])]

    @torch.no_grad()
    def update(self, field: Any, threshold: float = 1.0, draws: int = 4, seed: int = 0) -> OccupancyGrid:
        """Look where the field's density is above the threshold; return self.

        A cell is occupied if it is at its middle or at one of the points drawn in it, or in a neighbour of such a cell.

        Args:
            threshold: density; above e^-2 = 0.14, which is what the clip of the log-density leaves of empty space.
            draws: random points a cell, beside its middle.
        """
        side, device = self.resolution, self.cells.device
        line = torch.arange(side, device=device)
        low = torch.stack([a.flatten() for a in reversed(torch.meshgrid(line, line, line, indexing="ij"))], dim=-1)
        generator = torch.Generator().manual_seed(seed)
        found = torch.zeros(side**3, dtype=torch.bool, device=device)
        for turn in range(draws + 1):
            place = torch.full((len(low), 3), 0.5) if turn == 0 else torch.rand(len(low), 3, generator=generator)
            points = ((low + place.to(device)) / side * 2 - 1) * self.bound
            found |= torch.cat([self._density(field, part) > threshold for part in points.split(2**16)])
        wide = found.reshape(1, 1, side, side, side).float()
        self.cells = nn.functional.max_pool3d(wide, 3, stride=1, padding=1).flatten() > 0
        return self

    @staticmethod
    def _density(field: Any, points: Tensor) -> Tensor:
        density: Tensor = field.density(field.geometry(points)[0])
        return density

    @property
    def share(self) -> float:
        """The share of cells that hold something."""
        return float(self.cells.float().mean())

    def extra_repr(self) -> str:
        """Say the size."""
        return f"resolution={self.resolution}, bound={self.bound}"
