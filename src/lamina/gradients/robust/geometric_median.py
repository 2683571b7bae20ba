"""The point whose distances to the workers' gradients have the least sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.robust.gram import squared_distances, weighted_sum
from lamina.gradients.robust.rule import Nonfinite, RobustRule
from lamina.registry import register


@register(
    "reducer", source="Pillutla et al., Robust Aggregation for Federated Learning (2019), arXiv 1912.13445, alg. 2"
)
class GeometricMedian(RobustRule):
    """Geometric median of the workers' gradients: right as long as fewer than half of them are faulty.

    Weiszfeld's iteration: the mean weighted by 1 / distance, again and again. It runs on the workers' inner products,
    so that its cost does not depend on the number of parameters.

    Args:
        iters: how often at most, >= 1; it stops when no weight moves by more than 1e-12.
        smoothing: smallest distance that counts, > 0, in the gradients' unit.
        nonfinite: see `RobustRule`.
    Raises:
        LaminaError: an option out of its range, or fewer than 2 workers.
    Deviation: it starts from the mean of the half of the workers nearest to the one that is nearest to all (there: the
        mean of all), so that a huge gradient costs neither steps nor digits.
    Example:
        >>> GeometricMedian().aggregate(torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
        tensor([0., 0.])
    """

    def __init__(self, iters: int = 100, *, smoothing: float = 1e-6, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(nonfinite)
        if isinstance(iters, bool) or not isinstance(iters, int) or iters < 1:
            raise LaminaError(f"iters must be a whole number >= 1, got {iters!r}")
        if not smoothing > 0:
            raise LaminaError(f"smoothing must be above 0, got {smoothing!r}")
        self.iters, self.smoothing = iters, smoothing

    def check(self, workers: int, failed: int = 0) -> None:
        """Refuse a single worker."""
        if workers < 2:
            raise LaminaError(f"GeometricMedian needs at least 2 workers, got {workers}")

    def weigh(self, products: Tensor, failed: int) -> Tensor:
        """Return the weights of the median."""
        distances = squared_distances(products).sqrt()
        medoid = int(distances.sum(1).argmin())
        # Seen from the medoid, honest workers are near and lose no digits to a huge one's inner products.
        seen = products - products[medoid] - products[:, medoid, None] + products[medoid, medoid]
        near = distances[medoid].sort(stable=True).indices[: (len(products) + 1) // 2]
        weights = torch.zeros(len(products), dtype=torch.float64)
        weights[near] = 1 / len(near)
        for _ in range(self.iters):
            along = seen @ weights
            squares = seen.diagonal() - 2 * along + weights @ along
            new = 1 / squares.clamp(min=0).sqrt().clamp(min=self.smoothing)
            new /= new.sum()
            moved, weights = float((new - weights).abs().max()), new
            if moved < 1e-12:
                break
        return weights

    def combine(self, rows: Tensor, weights: Tensor | None, kept: Sequence[int], failed: int) -> Tensor:
        """Return the weighted mean."""
        assert weights is not None
        return weighted_sum(rows, weights, kept)
