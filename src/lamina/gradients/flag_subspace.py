"""The subspace that best explains a set of directions, found on their inner products alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError

EPS = 1e-7
"""Added to 1 - v before a negative power."""

CUT = 1e-10
"""Eigenvalues below this share of the largest are rounding, and dropped."""

CONVERGED = 1e-10
"""A step that lowers the objective by less is the last."""


@dataclass(frozen=True)
class FlagSubspace:
    """A subspace with the orthonormal basis Y = U @ basis, where U has the directions as columns."""

    basis: Tensor
    """(directions, rank or less), float64."""
    explained: Tensor
    """v: share of each direction's squared length that lies in the subspace, 0..1."""
    weights: Tensor
    """w: (1 - v + 1e-7)^((1/a - 1) / 2), the column weights that a further step would use."""
    projected: Tensor
    """(directions, directions): Y Y^T U = U @ projected."""
    objectives: list[float]
    """After each accepted step; never rising."""


def flag_subspace(
    products: Tensor,
    rank: int,
    iters: int = 5,
    *,
    lam: float = 0.0,
    a: float = 2.0,
    compat: Literal["reference"] | None = None,
) -> FlagSubspace:
    """Minimise sum_i (1 - v_i)^(1/a) + lam / (p (p - 1)) sum_{i != j} (1 - v_ij)^(1/a) over subspaces.

    v_i is the share of direction i inside the subspace, v_ij that of the difference of directions i and j. Each step
    takes the leading singular vectors of the directions weighted by (1 - v + 1e-7)^((1/a - 1) / 2), and of their
    weighted differences; the first has equal weights, and so is plain PCA. The power 1/a makes an outlier, which no
    small subspace explains along with the others, count ever less.

    Everything happens in coordinates of the directions' own span: p x p matrices, whatever the dimension.

    Args:
        products: inner products of p unit vectors: (p, p), float64.
        rank: dimension of the subspace, 1..p; where the directions span less, that.
        iters: steps at most, >= 1.
        lam: weight of the differences, >= 0.
        a: exponent, >= 1; 2 = maximum likelihood of v ~ Beta(1, 1/2), 1 = plain PCA.
        compat: `reference` = the official code's differences, which are not normalised and whose weights lack the root.
    Raises:
        ShapeError, LaminaError: an argument out of its range.
    Source: Almasi et al., Flag Aggregator (2024), arXiv 2302.05865, equations 2 to 5 and algorithm 1; FlagIRLS:
        Mankovich et al. (2022), arXiv 2203.04437.
    Example:
        >>> u = torch.eye(3, dtype=torch.float64)[[0, 0, 0, 1]]
        >>> flag_subspace(u @ u.T, rank=1).explained.round().tolist()
        [1.0, 1.0, 1.0, 0.0]
    """
    p = len(products)
    if products.ndim != 2 or products.shape != (p, p) or p < 1:
        raise ShapeError(f"products must be a square matrix, got shape {tuple(products.shape)}")
    if not 1 <= rank <= p:
        raise LaminaError(f"rank must be within 1..{p}, the number of directions, got {rank}")
    values, vectors = torch.linalg.eigh(products.double())
    real = values > CUT * values[-1]
    scale, vectors = values[real].sqrt(), vectors[:, real]
    x = scale[:, None] * vectors.T  # (span, p): each direction in an orthonormal basis of the span
    pairs = _Pairs(x, lam, a, compat) if lam > 0 and p > 1 else None
    explained = torch.zeros(p, dtype=torch.float64)
    objectives: list[float] = []
    found = (torch.zeros(len(x), 0, dtype=torch.float64), explained)
    inside: Tensor | None = None
    for _ in range(iters):
        spread = (x * _column_weights(explained, a).square()) @ x.T
        if pairs is not None:
            spread += pairs.spread(inside)
        inside = torch.linalg.eigh(spread).eigenvectors[:, -rank:]
        explained = (inside.T @ x).square().sum(0).clamp(0, 1)
        objective = float((1 - explained).pow(1 / a).sum()) + (pairs.objective(inside) if pairs is not None else 0.0)
        if objectives and objective > objectives[-1]:
            break
        found = (inside, explained)
        objectives.append(objective)
        if len(objectives) > 1 and objectives[-2] - objective < CONVERGED:
            break
    inside, explained = found
    basis = vectors @ (inside / scale[:, None])
    return FlagSubspace(basis, explained, _column_weights(explained, a), basis @ (inside.T @ x), objectives)


def _column_weights(explained: Tensor, a: float) -> Tensor:
    """Return the weights whose squares are the objective's slopes."""
    return (1 - explained + EPS).pow((1 / a - 1) / 2)


class _Pairs:
    """The differences of all directions, seen in the span's coordinates."""

    def __init__(self, x: Tensor, lam: float, a: float, compat: str | None) -> None:
        p = x.shape[1]
        self.x, self.a, self.reference = x, a, compat == "reference"
        self.factor = lam / (p * (p - 1))
        self.lengths = torch.cdist(x.T, x.T, compute_mode="donot_use_mm_for_euclid_dist").square()
        self.there = self.lengths > 1e-18

    def unexplained(self, inside: Tensor | None) -> Tensor:
        """Return 1 - v_ij; equal directions have no difference, and 1."""
        if inside is None:
            return torch.ones_like(self.lengths)
        seen = inside.T @ self.x
        shares = torch.cdist(seen.T, seen.T, compute_mode="donot_use_mm_for_euclid_dist").square()
        if self.reference:
            return (1 - shares).abs()
        return torch.where(self.there, 1 - shares / self.lengths.where(self.there, 1.0), 1.0).clamp(0, 1)

    def spread(self, inside: Tensor | None) -> Tensor:
        """Return the sum over ordered pairs of weight^2 (x_i - x_j)(x_i - x_j)^T: a graph's Laplacian between x."""
        squares = (self.unexplained(inside) + EPS).pow(1 / self.a - 1)
        if self.reference:
            squares = squares * self.factor**2
        else:
            squares = torch.where(self.there, squares * self.factor / self.lengths.where(self.there, 1.0), 0.0)
        squares = 2 * squares.fill_diagonal_(0)
        return self.x @ (torch.diag(squares.sum(1)) - squares) @ self.x.T

    def objective(self, inside: Tensor) -> float:
        """Return the differences' part of the objective; the official code does not look at it."""
        if self.reference:
            return 0.0
        rest = self.unexplained(inside).pow(1 / self.a).where(self.there, torch.zeros(()).double())
        return self.factor * float(rest.sum())
