"""A field in hash tables: levels of grids whose vertices share a table of limited size (Instant-NGP)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.fields.field import FieldWithNetworks, bias_free
from lamina.nn.fields.interpolation import corners, row_numbers, weighted_rows
from lamina.registry import register

PRIMES = (1, 2654435761, 805459861)


@register("field", source="Mueller et al., Instant neural graphics primitives (2022), arXiv 2201.05989")
class HashField(FieldWithNetworks):
    """Multi-resolution hash table and two small networks: fast to train and to render, large to store.

    x (N, 3) in the box, unit d (N, 3) -> sigma (N,), rgb (N, 3), float32; safe under autocast. A level whose grid has
    no more vertices than its table has rows is collision-free.

    Args:
        levels: grids, their resolutions growing geometrically.
        features: numbers a vertex, per level.
        log2_table: rows of a level's table at most, as a power of two.
        base: resolution of the coarsest level.
        finest: of the finest, for a bound of 1; it grows with the bound.
        bound: half the side of the box.
        dim: 3, or 2 for pictures: x (N, 2) -> rgb (N, 3).
        soft_clip: let gradients through the clip of the log-density where they point inwards.
    Raises:
        ShapeError: a size out of range; at the call, points or directions of another shape.
    Source: as registered, equations 1 to 4; sizes of Fang et al. (2023), arXiv 2211.15977.
    Example:
        >>> sigma, rgb = HashField(levels=4, log2_table=10, finest=64)(torch.zeros(5, 3), torch.eye(3)[[2] * 5])
        >>> sigma.shape, rgb.shape
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        levels: int = 14,
        features: int = 2,
        log2_table: int = 19,
        base: int = 16,
        finest: int = 2048,
        *,
        bound: float = 1.0,
        dim: int = 3,
        soft_clip: bool = False,
    ) -> None:
        options = {"levels": levels, "features": features, "log2_table": log2_table, "base": base, "finest": finest}
        super().__init__(options, bound, dim, soft_clip)
        if min(levels, features) < 1 or base < 2 or finest * bound < base or not 4 <= log2_table <= 24:
            raise ShapeError(
                "a hash field needs a level, a feature, base at least 2, finest * bound at least base and log2_table "
                f"in 4..24, got {levels=}, {features=}, {base=}, {finest=}, {log2_table=}"
            )
        growth = (finest * bound / base) ** (1 / max(levels - 1, 1))
        self.scales = [base * growth**level - 1 for level in range(levels)]
        """Cells a side of each level, less one."""
        sides = [math.ceil(scale) + 2 for scale in self.scales]
        self.limit = 2**log2_table
        self.strides = [side for side in sides if side**dim <= self.limit]
        """Vertices a side of the levels without collisions; the others come after them."""
        rows = [min(self.limit, -(-(side**dim) // 8) * 8) for side in sides]
        self.starts = [sum(rows[:level]) for level in range(levels)]
        # Products of an odd number below the limit have the low bits that the full prime's have, and do not overflow.
        self.primes = [prime % self.limit for prime in PRIMES[:dim]]
        self.wide = max(sides) * self.limit >= 2**31 or sum(rows) >= 2**31
        self.table = nn.Parameter(torch.empty(sum(rows), features).uniform_(-1e-4, 1e-4))
        self.geometry_net = bias_free(levels * features, 64, 16 if dim == 3 else 15)

    def geometry(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return s (N,) and g (N, 15)."""
        numbers: Tensor = self.geometry_net(self.encode(x))
        return self.split(numbers)

    def encode(self, x: Tensor) -> Tensor:
        """Return the interpolated features of all levels: (N, levels * features)."""
        index, weight = (v.transpose(0, 1).flatten(0, 1) for v in self.vertices(x))
        found = weighted_rows(self.table, index, weight)
        return found.unflatten(0, (len(self.scales), len(x))).transpose(0, 1).flatten(1)

    def vertices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of the table and their weights: two times (N, levels, 2^dim)."""
        scales = torch.tensor(self.scales, device=x.device)
        p = self.in_unit(x).T.contiguous()[:, None] * scales[:, None] + 0.5
        axes, weight = corners(p, p.detach().floor())
        if self.wide:
            axes = [a.long() for a in axes]
        dense, kind = len(self.strides), axes[0].dtype
        parts = []
        if dense:
            side = torch.tensor(self.strides, device=x.device, dtype=kind)[:, None]
            parts.append(row_numbers([a[..., :dense, :] for a in axes], [side**i for i in range(self.dim)]))
        if dense < len(self.scales):
            mixed = [a[..., dense:, :] * p for a, p in zip(axes, self.primes, strict=True)]
            parts.append(functools.reduce(torch.bitwise_xor, mixed) & (self.limit - 1))
        starts = torch.tensor(self.starts, device=x.device, dtype=kind)
        index = torch.cat(parts, dim=-2) + starts[:, None]
        # Seen as asked; in memory the points stay together.
        found = (v.flatten(0, self.dim - 1).permute(2, 1, 0) for v in (index, weight))
        return next(found), next(found)

    def extra_repr(self) -> str:
        """Say the sizes."""
        return f"levels={len(self.scales)}, rows={len(self.table)}, without collisions={len(self.strides)}"
