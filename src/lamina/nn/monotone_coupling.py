"""Couplings of discrete variables whose mean field has one answer: Phi with I - Phi >= m I, whatever the weights.

Source: Feng, Winston, Kolter, Monotone deep Boltzmann machines (2023), arXiv 2307.04990, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn._precision import without_autocast
from lamina.nn._state_blocks import Run, StateBlocks
from lamina.nn.fixed_point_solver import extreme_eigenvalues
from lamina.registry import register

SOURCE = "Feng, Winston, Kolter, Monotone deep Boltzmann machines (2023), arXiv 2307.04990"
EXACT = 2048
"""Widest vector whose smallest eigenvalue is computed exactly."""


@runtime_checkable
class Coupling(Protocol):
    """What a mean field needs of a symmetric matrix Phi that couples no variable with itself."""

    blocks: StateBlocks

    def prepare(self) -> tuple[Tensor, ...]:
        """Return what Phi is made of, once for many products, as differentiable functions of the weights."""
        ...

    def product(self, q: Tensor, *prepared: Tensor) -> Tensor:
        """Return Phi q, (B, dim) -> same, linear in q."""
        ...


class MonotoneCoupling(nn.Module):
    """What the dense and the convolutional coupling share: the product as a layer, and what can be asked of Phi."""

    blocks: StateBlocks
    m: float

    def prepare(self) -> tuple[Tensor, ...]:
        """See `Coupling`."""
        raise NotImplementedError

    def product(self, q: Tensor, *prepared: Tensor) -> Tensor:
        """See `Coupling`."""
        raise NotImplementedError

    def forward(self, q: Tensor) -> Tensor:
        """Return Phi q; (B, dim) -> same."""
        self.blocks.check(q, "q")
        with without_autocast(q.device):
            prepared = self.prepare()
            return self.product(q.to(prepared[0].dtype), *prepared).to(q.dtype)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return Phi, (dim, dim); for a wide coupling in memory of that size."""
        prepared = self.prepare()
        return self.product(torch.eye(self.blocks.dim).to(prepared[0]), *prepared)

    @torch.no_grad()
    def lipschitz(self, iterations: int = 10) -> float:
        """Estimate the largest eigenvalue of I - Phi with that many products (from below)."""
        return coupling_range(self, self.prepare(), iterations)[1]

    @torch.no_grad()
    def min_eigenvalue(self) -> float:
        """Return the smallest eigenvalue of I - Phi, at least m: exact to 2048 states, beyond it from 200 products."""
        if self.blocks.dim > EXACT:
            return coupling_range(self, self.prepare(), 200)[0]
        phi = self.dense().double()
        return float(torch.linalg.eigvalsh(torch.eye(len(phi), dtype=phi.dtype, device=phi.device) - phi)[0])

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"variables={self.blocks.count}, states={self.blocks.dim}, m={self.m}"


def coupling_range(coupling: Coupling, prepared: Sequence[Tensor], iterations: int = 10) -> tuple[float, float]:
    """Estimate the smallest and largest eigenvalue of I - Phi from inside its spectrum."""
    held = [t.detach() for t in prepared]
    return extreme_eigenvalues(lambda v: v - coupling.product(v, *held), coupling.blocks.dim, held[0], iterations)


@register("layer", source=f"{SOURCE}, equations 8 and 9; scaled symmetrically")
class MonotoneHollow(MonotoneCoupling):
    """Couple every state of every variable with those of all others: q -> Phi q, dense with a rank.

    q (B, sum(sizes)) -> same. Phi = blkdiag(A_i^T A_i) - A^T A, with the columns A_i of each variable scaled down until
    the largest eigenvalue of A_i^T A_i is at most 1 - m: so Phi is symmetric, its diagonal blocks are zero and
    I - Phi >= m I for any weights. float32 inside.

    Args:
        sizes: number of states of each variable, at least 2; equal ones beside each other are computed together.
        rank: rows of A.
        m: margin of monotonicity, strictly between 0 and 1. Smaller: stronger couplings, slower solves.
    Raises:
        ShapeError: a size or rank that cannot be. LaminaError: m out of range.
    Source: section 3. Deviation: each A_i is scaled as a whole, so that Phi stays symmetric; the official code scales
        rows of the product only. Weights start as Gaussians of variance 1/rank.
    Example:
        >>> MonotoneHollow([2, 2, 3], rank=4)(torch.ones(1, 7)).shape
        torch.Size([1, 7])
    """

    def __init__(self, sizes: Sequence[int], rank: int, m: float = 0.1) -> None:
        super().__init__()
        if rank < 1:
            raise ShapeError(f"rank must be at least 1, got {rank}")
        self.m, self.blocks, self.rank = check_margin(m), StateBlocks.of_sizes(sizes), rank
        self.weight = nn.Parameter(torch.randn(rank, self.blocks.dim) * rank**-0.5)

    @classmethod
    def of_groups(cls, groups: Sequence[tuple[int, int]], rank: int, m: float = 0.1) -> MonotoneHollow:
        """Build one from (count, states) of each group, every group a run of its own whatever its neighbours have."""
        made = cls([states for count, states in groups for _ in range(count)], rank, m)
        made.blocks = StateBlocks(tuple(Run(count, states) for count, states in groups))
        return made

    @property
    def materialises(self) -> bool:
        """Whether products are taken with Phi itself, which is then less work than with its factors."""
        return self.blocks.dim <= 2 * self.rank

    def prepare(self) -> tuple[Tensor, ...]:
        """Return (Phi,) where that is smaller than its factors; else the scaled A and the products A_i^T A_i."""
        scaled = self._scaled()
        if self.materialises:
            owner = torch.repeat_interleave(
                torch.arange(self.blocks.count, device=scaled.device),
                torch.tensor([r.states for r in self.blocks.runs for _ in range(r.outer)], device=scaled.device),
                output_size=self.blocks.dim,
            )
            return ((scaled.T @ scaled).neg() * (owner[:, None] != owner[None, :]),)
        return (scaled, *(self._grams(a) for a, r in self._columns(scaled) if r.states <= self.rank))

    def product(self, q: Tensor, *prepared: Tensor) -> Tensor:
        """Return Phi q."""
        if self.materialises:
            return q @ prepared[0]
        scaled, *grams = prepared
        left, own = iter(grams), []
        for piece, (columns, run) in zip(self.blocks.split(q), self._columns(scaled), strict=True):
            values = piece[..., 0].transpose(0, 1)
            # More states than rows: through A_i, whose Gram matrix would be the larger thing.
            wide = run.states > self.rank
            same = (values @ columns.mT) @ columns if wide else values @ next(left)
            own.append(same.transpose(0, 1)[..., None])
        return self.blocks.join(own) - (q @ scaled.T) @ scaled

    def _columns(self, weight: Tensor) -> list[tuple[Tensor, Run]]:
        """Cut A into one (variables, rank, states) a run."""
        pieces = self.blocks.split(weight)
        return [(p[..., 0].transpose(0, 1), run) for p, run in zip(pieces, self.blocks.runs, strict=True)]

    def _grams(self, columns: Tensor) -> Tensor:
        return columns.mT @ columns

    def _scaled(self) -> Tensor:
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        scales = []
        for columns, run in self._columns(weight):
            small = columns.mT @ columns if run.states <= self.rank else columns @ columns.mT
            scales.append(symmetric_scale(small, self.m)[:, None].expand(-1, run.states).reshape(-1))
        return weight * torch.cat(scales)


def symmetric_scale(grams: Tensor, m: float) -> Tensor:
    """Return the factor by which to scale A_i so that |A_i^T A_i| <= 1 - m; grams (..., k, k) -> (...), at most 1."""
    norms = torch.linalg.eigvalsh(grams)[..., -1]
    return ((1.0 - m) / norms.clamp(min=1.0 - m)).sqrt()


def check_margin(m: float) -> float:
    """Return m, or refuse it.

    Raises:
        LaminaError: not strictly between 0 and 1.
    """
    if not 0.0 < m < 1.0:
        raise LaminaError(f"the margin m must be strictly between 0 and 1, got {m}")
    return float(m)
