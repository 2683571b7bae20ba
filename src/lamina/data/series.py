"""Time series: windows of the past and what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lamina.data._files import existing
from lamina.data._tables import check_complete, check_known, read_columns
from lamina.data.examples import Data, check_split
from lamina.data.tabular import standardised
from lamina.errors import LaminaError
from lamina.registry import register


@register("data")
def series(
    source: str | Path,
    context: int = 96,
    horizon: int = 24,
    batch: int = 32,
    *,
    columns: Sequence[str] = (),
    drop: Sequence[str] = (),
    standardise: bool = True,
    split: float = 0.2,
) -> Data:
    """Windows of a time series: `inputs` (B, context, channels) and `labels` (B, horizon, channels), the rows after.

    Evaluation is the end of the series. Its inputs may reach back into the training rows, as in use; its labels and
    those of training never share a row.

    Args:
        source: .csv file (.gz too) with a header line, one row a time step, oldest first.
        context: rows a model sees.
        horizon: rows it is to foretell.
        batch: global batch size.
        columns: the channels; default: all columns.
        drop: columns left out (the date).
        standardise: bring channels to mean 0 and standard deviation 1 of the training rows.
        split: evaluation's share of the rows.
    Raises:
        LaminaError: a column is missing or not numeric, or a part is shorter than one window.
    """
    check_split(split)
    path = existing(source, "the time series")
    table = read_columns(path)
    check_known(table, [*columns, *drop], path)
    values = numbers({n: v for n, v in table.items() if n in (columns or table) and n not in drop}, path)
    cut = len(values) - round(len(values) * split)
    return from_values(
        values,
        context,
        horizon,
        batch,
        train=cut,
        evaluation=(cut, len(values)),
        standardise=standardise,
        name="series",
    )


def from_values(
    values: Tensor,
    context: int,
    horizon: int,
    batch: int,
    *,
    train: int,
    evaluation: tuple[int, int],
    standardise: bool = True,
    name: str = "series",
) -> Data:
    """Make windows of values (rows, channels): training is rows 0..train, the labels of evaluation its rows."""
    start, end = evaluation
    if context < 1 or horizon < 1:
        raise LaminaError(f"context and horizon must be at least 1, got {context} and {horizon}")
    if train < context + horizon or 0 < end - start < horizon:
        raise LaminaError(
            f"{name} has {train} training and {end - start} evaluation rows, too few for windows of {context} "
            f"and a horizon of {horizon}"
        )
    if standardise:
        values = standardised(values, torch.arange(train))
    values = values.float()
    held = Windows(values[start - context : end], context, horizon) if end > start else None
    sizes = {"channels": values.shape[1], "context": context, "horizon": horizon}
    return Data(Windows(values[:train], context, horizon), held, batch, sizes, name)


class Windows:
    """Every window of `context` + `horizon` successive rows of values (rows, channels)."""

    def __init__(self, values: Tensor, context: int, horizon: int) -> None:
        self.values = values
        self.context = context
        self.horizon = horizon

    def __len__(self) -> int:
        return len(self.values) - self.context - self.horizon + 1

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return `inputs` (B, context, channels) and `labels` (B, horizon, channels)."""
        rows = self.values[indices[:, None] + torch.arange(self.context + self.horizon)]
        return {"inputs": rows[:, : self.context], "labels": rows[:, self.context :]}


def numbers(columns: dict[str, list[str]], path: Path) -> Tensor:
    """Turn columns of text into float64 (rows, columns).

    Raises:
        LaminaError: a value is missing or not a number; the column is named.
    """
    if not columns:
        raise LaminaError(f"{str(path)!r} has no column left")
    result = []
    for name, written in columns.items():
        check_complete(name, written, path)
        try:
            result.append(np.array(written, dtype=np.float64))
        except ValueError as error:
            raise LaminaError(f"the column {name!r} of {path.name!r} is not numeric ({error}): drop it") from error
    return torch.from_numpy(np.stack(result, axis=1))
