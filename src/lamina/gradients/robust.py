"""Reducers that a minority of faulty workers cannot carry away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from lamina.gradients.reducer import Group, Stateless, flatten, gather, unflatten
from lamina.registry import register


@register("reducer", source="Yin et al., Byzantine-Robust Distributed Learning (2018), arXiv 1803.01498, definition 1")
class Median(Stateless):
    """Coordinate-wise median of the workers' gradients: right as long as fewer than half of them are faulty.

    A worker's NaN or infinity counts as an outlier, not as the result: NaN is taken for +infinity. Every rank
    gathers every worker's gradient: world times the gradient's memory for one bucket (or the whole model, outside
    DistributedDataParallel).
    """

    granularity: ClassVar[Literal["bucket", "model"]] = "bucket"

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Return the coordinate-wise median over the group."""
        result = {}
        for name, flat in flatten(gradients).items():
            everyone = gather(flat, group)
            self.sent += flat.nbytes if len(everyone) > 1 else 0
            result[name] = median(everyone)
        return unflatten(result, gradients)


def median(rows: Tensor) -> Tensor:
    """Return the median of each column of (workers, n): the mean of the middle two where workers is even."""
    ordered = rows.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf")).sort(dim=0).values
    middle = len(rows) // 2
    if len(rows) % 2:
        return ordered[middle]
    low, high = ordered[middle - 1], ordered[middle]
    return low + (high - low) / 2
