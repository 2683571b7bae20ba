"""Rules for one coordinate at a time: the median, and means of what is left without the extremes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.robust.bound import checked_f, left_faulty, refuse_fewer
from lamina.gradients.robust.columns import by_column, middle, nearest_mean, trimmed
from lamina.gradients.robust.rule import Nonfinite, RobustRule
from lamina.registry import register


class _CoordinateWise(RobustRule):
    """A rule that needs no more than one coordinate of all workers, so that it works bucket by bucket, too."""

    granularity: ClassVar[Literal["bucket", "model"]] = "bucket"
    uses_products = False

    @abstractmethod
    def column(self, ordered: Sequence[Tensor], failed: int) -> Tensor:
        """Return one number a column from the entries of the workers that are left, lowest first."""

    def combine(self, rows: Tensor, weights: Tensor | None, kept: Sequence[int], failed: int) -> Tensor:
        """Apply the rule to each column."""
        return by_column(rows, lambda ordered: self.column(ordered, failed), kept)


@register("reducer", source="Yin et al., Byzantine-Robust Distributed Learning (2018), arXiv 1803.01498, definition 1")
class Median(_CoordinateWise):
    """Coordinate-wise median of the workers' gradients: right as long as fewer than half of them are faulty.

    Between two workers: their mean. It may be used bucket by bucket, inside backward.

    Args:
        nonfinite: see `RobustRule`.
    Raises:
        LaminaError: fewer than 2 workers, or none with a finite gradient.
    Example:
        >>> Median().aggregate(torch.tensor([[1.0], [2.0], [3.0], [4.0], [100.0]]))
        tensor([3.])
    """

    def check(self, workers: int, failed: int = 0) -> None:
        """Refuse a single worker."""
        if workers < 2:
            raise LaminaError(f"Median needs at least 2 workers, got {workers}")

    def column(self, ordered: Sequence[Tensor], failed: int) -> Tensor:
        """Return the middle."""
        return middle(ordered)


class _Bounded(_CoordinateWise):
    """A coordinate-wise rule that is told how many workers may be faulty."""

    def __init__(self, f: int, *, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(nonfinite)
        self.f = checked_f(f)

    def check(self, workers: int, failed: int = 0) -> None:
        """Refuse fewer than 2 f + 1 workers."""
        refuse_fewer(self, workers, failed, self.f, 2 * self.f + 1, 2 * left_faulty(self.f, failed) + 1, "2 f + 1")


@register("reducer", source="Yin et al., Byzantine-Robust Distributed Learning (2018), arXiv 1803.01498, definition 2")
class TrimmedMean(_Bounded):
    """Mean of each coordinate without its `f` lowest and `f` highest entries.

    Args:
        f: how many workers may be faulty, >= 0; it takes 2 f + 1 workers. Workers that are left out for NaN count as
            some of them.
        nonfinite: see `RobustRule`.
    Raises:
        LaminaError: `f` below 0, or too few workers.
    Example:
        >>> TrimmedMean(1).aggregate(torch.tensor([[1.0], [2.0], [3.0], [4.0], [100.0]]))
        tensor([3.])
    """

    def column(self, ordered: Sequence[Tensor], failed: int) -> Tensor:
        """Return the mean of what is not at the ends."""
        return trimmed(ordered, left_faulty(self.f, failed))


@register("reducer", source="Xie et al., Generalized Byzantine-Tolerant SGD (2018), arXiv 1802.10116")
class MeaMed(_Bounded):
    """Mean of the workers - f entries of each coordinate that are nearest to its median.

    Args:
        f: how many workers may be faulty, >= 0; it takes 2 f + 1 workers. Workers that are left out for NaN count as
            some of them.
        nonfinite: see `RobustRule`.
    Raises:
        LaminaError: `f` below 0, or too few workers.
    Example:
        >>> MeaMed(1).aggregate(torch.tensor([[1.0], [2.0], [3.0], [4.0], [100.0]]))
        tensor([2.5000])
    """

    def column(self, ordered: Sequence[Tensor], failed: int) -> Tensor:
        """Return the mean around the median; of two equally near entries the lower counts."""
        return nearest_mean(ordered, middle(ordered), len(ordered) - left_faulty(self.f, failed))


@register("reducer", source="Xie et al., Phocas: dimensional Byzantine-resilient SGD (2018), arXiv 1805.09682")
class Phocas(_Bounded):
    """Mean of the workers - f entries of each coordinate that are nearest to its trimmed mean.

    Args:
        f: how many workers may be faulty, >= 0; it takes 2 f + 1 workers. Workers that are left out for NaN count as
            some of them.
        nonfinite: see `RobustRule`.
    Raises:
        LaminaError: `f` below 0, or too few workers.
    Example:
        >>> Phocas(1).aggregate(torch.tensor([[1.0], [2.0], [3.0], [4.0], [100.0]]))
        tensor([2.5000])
    """

    def column(self, ordered: Sequence[Tensor], failed: int) -> Tensor:
        """Return the mean around the trimmed mean; of two equally near entries the lower counts."""
        drop = left_faulty(self.f, failed)
        return nearest_mean(ordered, trimmed(ordered, drop), len(ordered) - drop)
