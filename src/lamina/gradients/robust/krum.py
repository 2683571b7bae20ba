"""Rules that pick workers by how near they are to the others: Krum, Multi-Krum and Bulyan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.robust.bound import checked_f, left_faulty, refuse_fewer
from lamina.gradients.robust.columns import by_column, middle, nearest_mean
from lamina.gradients.robust.gram import squared_distances, weighted_sum
from lamina.gradients.robust.rule import Nonfinite, Plan, RobustRule, by_worker
from lamina.registry import register

Compat = Literal["garfield"] | None


@register("reducer", source="Blanchard et al., Machine Learning with Adversaries (2017), section 4")
class Krum(RobustRule):
    """The gradient that is nearest to most others, or the mean of the best few (Multi-Krum).

    A worker's score is the sum of its squared distances to the workers - f - 2 that are nearest to it; the lowest score
    wins, of equal ones the lowest rank.

    Args:
        f: how many workers may be faulty, >= 0; it takes 2 f + 3 workers. Workers that are left out for NaN count as
            some of them.
        select: how many of the best are averaged, 1 .. workers - f - 2; `multi` = workers - f - 2.
        compat: `garfield` = that library's scores: distances that are not squared, to workers - f - 1 others.
        nonfinite: see `RobustRule`.
    Raises:
        LaminaError: an option out of its range, or too few workers.
    Example:
        >>> Krum(1).aggregate(torch.tensor([[1.0], [2.0], [3.0], [4.0], [100.0]]))
        tensor([2.])
    """

    def __init__(
        self,
        f: int,
        select: int | Literal["multi"] = 1,
        *,
        compat: Compat = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        super().__init__(nonfinite)
        self.f, self.compat = checked_f(f), checked_compat(compat)
        if select != "multi" and (isinstance(select, bool) or not isinstance(select, int) or select < 1):
            raise LaminaError(f"select must be a whole number >= 1 or 'multi', got {select!r}")
        self.select = select

    def check(self, workers: int, failed: int = 0) -> None:
        """Refuse fewer than 2 f + 3 workers, and more to select than there are to trust."""
        f = left_faulty(self.f, failed)
        refuse_fewer(self, workers, failed, self.f, 2 * self.f + 3, 2 * f + 3, "2 f + 3")
        if self.select != "multi" and self.select > workers - failed - f - 2:
            raise LaminaError(
                f"Krum can select up to workers - f - 2 = {workers - failed - f - 2}, got select = {self.select}"
            )

    def weigh(self, products: Tensor, failed: int) -> Tensor:
        """Return equal weights for those of the lowest scores."""
        workers, f = len(products), left_faulty(self.f, failed)
        count = workers - f - 2 if self.select == "multi" else int(self.select)
        best = _order(_scores(squared_distances(products), workers, f, self.compat))[:count]
        weights = torch.zeros(workers, dtype=torch.float64)
        weights[best] = 1 / count
        return weights

    def combine(self, rows: Tensor, weights: Tensor | None, kept: Sequence[int], failed: int) -> Tensor:
        """Return the mean of the selected."""
        assert weights is not None
        chosen = torch.nonzero(weights).flatten()
        return weighted_sum(rows, weights[chosen], [kept[i] for i in chosen.tolist()])


@register(
    "reducer", source="El Mhamdi et al., The Hidden Vulnerability of Distributed Learning (2018), arXiv 1802.07927"
)
class Bulyan(RobustRule):
    """Krum again and again, and of those it picked the mean of each coordinate around its median.

    theta = workers - 2 f are picked one by one by Krum among those that remain (the nearest remaining - f - 2 count,
    and at least one); then theta - 2 f entries of each coordinate, those nearest to the median, are averaged.

    Args:
        f: how many workers may be faulty, >= 0; it takes 4 f + 3 workers. Workers that are left out for NaN count as
            some of them.
        compat: `garfield` = that library's rule: workers - 2 f - 2 means of ever fewer of the workers that stand best
            in one ranking by distances that are not squared, and the lower of two medians.
        nonfinite: see `RobustRule`.
    Raises:
        LaminaError: an option out of its range, or too few workers.
    Example:
        >>> Bulyan(1).aggregate(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [100.0]]))
        tensor([3.])
    """

    def __init__(self, f: int, *, compat: Compat = None, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(nonfinite)
        self.f, self.compat = checked_f(f), checked_compat(compat)

    def check(self, workers: int, failed: int = 0) -> None:
        """Refuse fewer than 4 f + 3 workers."""
        f = left_faulty(self.f, failed)
        refuse_fewer(self, workers, failed, self.f, 4 * self.f + 3, 4 * f + 3, "4 f + 3")

    def weigh(self, products: Tensor, failed: int) -> Tensor:
        """Return what is picked, as combinations of the workers: (picked, workers)."""
        workers, f = len(products), left_faulty(self.f, failed)
        distances = squared_distances(products)
        if self.compat == "garfield":
            return _ever_fewer(_order(_scores_of_best(distances.sqrt(), workers - f - 2)), f)
        left, picks = list(range(workers)), torch.zeros(workers - 2 * f, workers, dtype=torch.float64)
        for pick in picks:
            among = distances[left][:, left]
            pick[left.pop(_order(_scores_of_best(among, max(1, len(left) - f - 2)))[0])] = 1
        return picks

    def combine(self, rows: Tensor, weights: Tensor | None, kept: Sequence[int], failed: int) -> Tensor:
        """Average what was picked around its median."""
        assert weights is not None
        f = left_faulty(self.f, failed)

        def rule(ordered: Sequence[Tensor]) -> Tensor:
            centre = ordered[(len(ordered) - 1) // 2] if self.compat == "garfield" else middle(ordered)
            return nearest_mean(ordered, centre, len(ordered) - 2 * f)

        if self.compat == "garfield":
            return by_column(rows, rule, kept, mix=weights)
        return by_column(rows, rule, [kept[int(i)] for i in weights.argmax(1)])

    def note(self, plans: Sequence[Plan], workers: int) -> None:
        """Keep how much of what was picked is each worker's."""
        self.weights = by_worker(plans, workers, lambda picks: picks.mean(0))


def checked_compat(compat: Compat) -> Compat:
    """Return whose definitions hold; refuse unknown ones."""
    if compat not in (None, "garfield"):
        raise LaminaError(f"compat must be None or 'garfield', got {compat!r}")
    return compat


def _scores(squared: Tensor, workers: int, f: int, compat: Compat) -> Tensor:
    if compat == "garfield":
        return _scores_of_best(squared.sqrt(), workers - f - 1)
    return _scores_of_best(squared, workers - f - 2)


def _scores_of_best(distances: Tensor, count: int) -> Tensor:
    """Sum each worker's `count` smallest distances to others."""
    if len(distances) == 1:
        return torch.zeros(1, dtype=distances.dtype)
    off = distances + torch.diag(torch.full((len(distances),), torch.inf, dtype=distances.dtype))
    return off.sort(dim=1).values[:, : min(count, len(distances) - 1)].sum(1)


def _order(scores: Tensor) -> list[int]:
    """List the workers from the lowest score up, of equal ones the lowest rank first."""
    order: list[int] = scores.sort(stable=True).indices.tolist()
    return order


def _ever_fewer(order: Sequence[int], f: int) -> Tensor:
    """Return means of the workers ranked i .. workers - f - 3, for i = 0, 1, ...: (workers - 2 f - 2, workers)."""
    workers = len(order)
    mix = torch.zeros(workers - 2 * f - 2, workers, dtype=torch.float64)
    for i, row in enumerate(mix):
        chosen = list(order[i : workers - f - 2])
        row[chosen] = 1 / len(chosen)
    return mix
