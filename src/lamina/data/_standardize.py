"""Numbers in units of their own spread: mean 0 and deviation 1 over the training rows."""

from __future__ import annotations

import torch
from torch import Tensor


def standardized(values: Tensor, train: Tensor) -> Tensor:
    """Subtract mean and divide by deviation of the rows `train`, column by column; NaN stay, constants become 0.

    Args:
        values: (N, ...).
        train: row numbers.
    """
    mean, deviation = mean_and_deviation(values[train])
    return ((values.double() - mean) / deviation).to(values.dtype)


def mean_and_deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each column over what is not NaN, in float64; 1 for that of a constant."""
    wide = values.double()
    mean = wide.nanmean(0)
    deviation = (wide - mean).square().nanmean(0).sqrt()
    return mean, torch.where(deviation > 0, deviation, 1.0)
