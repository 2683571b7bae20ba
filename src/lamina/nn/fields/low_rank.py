"""A field in low-rank tensors: planes times lines (TensoRF's vector-matrix decomposition)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._precision import without_autocast
from lamina.nn.fields.field import FieldWithNetworks, clip_log_density
from lamina.registry import register

PLANES = ((0, 1), (0, 2), (1, 2))
LINES = (2, 1, 0)


@register("field", source="Chen et al., TensoRF (2022), arXiv 2203.09517, equation 3; sizes of arXiv 2211.15977")
class LowRankField(FieldWithNetworks):
    """Sums of products of a plane and a line, for each pair of axes: a grid's resolution for a fraction of its size.

    x (N, 3) in the box, unit d (N, 3) -> sigma (N,), rgb (N, 3), float32. The log-density is the sum of
    3 * density_rank products, the feature a linear map of 3 * color_rank, clipped like the log-density. With dim=2 a
    product of two lines takes the place of plane and line.

    Args:
        resolution: vertices a side.
        density_rank: products an axis for the log-density.
        color_rank: for the feature.
        bound: half the side of the box.
        dim: 3, or 2 for pictures: x (N, 2) -> rgb (N, 3); then there is no log-density.
        soft_clip: let gradients through the clips where they point inwards.
    Raises:
        ShapeError: sizes below 1, resolution below 2; at the call, another shape.
    Source: as registered.
    Example:
        >>> LowRankField(resolution=8, density_rank=2, color_rank=4)(torch.zeros(5, 3), torch.eye(3)[[2] * 5])[1].shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        resolution: int = 300,
        density_rank: int = 16,
        color_rank: int = 48,
        *,
        bound: float = 1.0,
        dim: int = 3,
        soft_clip: bool = False,
    ) -> None:
        options = {"resolution": resolution, "density_rank": density_rank, "color_rank": color_rank}
        super().__init__(options, bound, dim, soft_clip)
        if resolution < 2 or min(density_rank, color_rank) < 1:
            raise ShapeError(
                "a low-rank field needs a resolution of 2 and ranks of 1, got "
                f"{resolution=}, {density_rank=}, {color_rank=}"
            )
        side, pairs = resolution, 3 if dim == 3 else 1
        if dim == 3:
            self.density_planes = nn.Parameter(0.1 * torch.randn(3, density_rank, side, side))
            self.density_lines = nn.Parameter(0.1 * torch.randn(3, density_rank, side, 1))
        self.color_planes = nn.Parameter(0.1 * torch.randn(pairs, color_rank, *((side, side) if dim == 3 else (side, 1))))  # fmt: skip  # noqa: E501
        self.color_lines = nn.Parameter(0.1 * torch.randn(pairs, color_rank, side, 1))
        self.basis = nn.Linear(pairs * color_rank, self.features, bias=False)

    def geometry(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return s (N,) and g (N, 15), g clipped."""
        with without_autocast(x.device):
            on_planes, on_lines = self.places(x.float() / self.bound)
            s = None
            if self.dim == 3:
                s = products(self.density_planes, self.density_lines, on_planes, on_lines).sum(0)
            parts = products(self.color_planes, self.color_lines, on_planes, on_lines).mT
        g: Tensor = self.basis(parts)
        return s, clip_log_density(g, soft=self.soft_clip)

    def places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where x (N, dim), in -1..1, is on the planes and on the lines: two times (pairs, N, 2)."""
        if self.dim == 2:
            return tuple(torch.stack([torch.zeros_like(x[:, i]), x[:, i]], -1)[None] for i in range(2))  # type: ignore[return-value]
        # The first of grid_sample's coordinates runs along the last axis.
        planes = torch.stack([x[:, [b, a]] for a, b in PLANES])
        lines = torch.stack([torch.stack([torch.zeros_like(x[:, i]), x[:, i]], -1) for i in LINES])
        return planes, lines

    def size_penalty(self) -> Tensor:
        """Return the sum of the mean absolute values of the density's planes and of its lines, each set of three."""
        if self.dim == 2:
            return self.basis.weight.new_zeros(())
        return sum_of_sizes(self.density_planes) + sum_of_sizes(self.density_lines)


def products(planes: Tensor, lines: Tensor, on_planes: Tensor, on_lines: Tensor) -> Tensor:
    """Return the products at N points, bilinear: planes (P, R, S, S), lines (P, R, S, 1) -> (P * R, N); 0 outside."""
    first = _sample(planes, on_planes)
    return (first * _sample(lines, on_lines)).flatten(0, 1)


def sum_of_sizes(factors: Tensor) -> Tensor:
    """Return the mean absolute value of each of the factors (pairs, R, ...), summed over the pairs."""
    return factors.abs().flatten(1).mean(1).sum()


def _sample(values: Tensor, places: Tensor) -> Tensor:
    found = F.grid_sample(values, places[:, :, None].to(values.dtype), mode="bilinear", align_corners=True)
    return found.squeeze(-1)
