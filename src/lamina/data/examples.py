"""What a data set is: rows that can be fetched many at a time, split into training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError


@runtime_checkable
class Examples(Protocol):
    """Rows of a data set, numbered from 0."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows `indices` (B,) int64 as named tensors of B rows each (`input_ids`, `labels`, ...)."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set ready for training."""

    train: Examples
    evaluation: Examples | None
    """Held-out rows; None where everything is for training."""
    batch: int
    """Global batch size: over all workers and accumulation steps together."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """What a model's constructor may want to know: `vocabulary`, `context`, `classes`, `channels`, `image`, ..."""
    name: str = "data"

    def __post_init__(self) -> None:
        """Refuse an empty part or a batch that the training rows cannot fill."""
        if self.batch < 1:
            raise LaminaError(f"the batch of {self.name} must be at least 1, got {self.batch}")
        if self.batch > len(self.train):
            raise LaminaError(f"{self.name} has {len(self.train)} training rows, too few for a batch of {self.batch}")
        if self.evaluation is not None and not len(self.evaluation):
            raise LaminaError(f"the evaluation part of {self.name} has no row; take a larger split, or 0 for none")


class Columns:
    """Examples held as equally long tensors; a batch is a row selection of each.

    Args:
        columns: name -> tensor (rows, ...).
    Raises:
        ShapeError: no column, or columns of different lengths.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ShapeError(f"columns need one common length, got {lengths}")
        self.columns = dict(columns)
        self.length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows `indices` of every column."""
        return {name: values[indices] for name, values in self.columns.items()}


def split_rows(length: int, split: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw disjoint row numbers for training and evaluation, each in ascending order.

    Args:
        split: evaluation's share of the rows, 0..1 (exclusive of 1), rounded to whole rows.
        seed: of the draw.
    Raises:
        LaminaError: the share is outside its range or leaves no training row.
    """
    check_split(split)
    held = round(length * split)
    if held >= length:
        raise LaminaError(f"a split of {split} leaves no training row of {length}")
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


def check_split(split: float) -> None:
    """Refuse an evaluation share outside 0 <= split < 1."""
    if not 0 <= split < 1:
        raise LaminaError(f"split is evaluation's share of the data and must be in 0 <= split < 1, got {split}")
