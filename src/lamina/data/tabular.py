"""Tables: numbers and categories to a class or a number."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lamina.data._arrays import Array, npz
from lamina.data._files import existing
from lamina.data._tables import check_complete, check_known, read_columns
from lamina.data.examples import Columns, Data, split_rows
from lamina.errors import LaminaError, ShapeError
from lamina.registry import register

CATEGORIES = 64
"""More different texts than this in one column are taken for names or free text, not for categories."""


@register("data")
def tabular(
    source: str | Path,
    target: str = "y",
    batch: int = 128,
    *,
    task: Literal["classification", "regression"] = "classification",
    inputs: str = "X",
    drop: Sequence[str] = (),
    delimiter: str = ",",
    standardise: bool = True,
    split: float = 0.2,
    seed: int = 0,
) -> Data:
    """Rows of a table: `inputs` (B, features) float32, and `labels` (B,): int64 classes, or float32 numbers.

    Args:
        source: .csv or .tsv file (.gz too) with a header line, or .npz file. A column of text becomes one 0/1 feature
            for each of its values.
        target: the column, or the array of the .npz, to predict. Classes are numbered in sorted order.
        batch: global batch size.
        task: what the target is; a regression target keeps its unit.
        inputs: the array (rows, features) of a .npz.
        drop: columns left out.
        delimiter: between columns; a .tsv file is always split at tabs, without quotes.
        standardise: bring features to mean 0 and standard deviation 1 of the *training* rows; constant ones become 0.
        split: evaluation's share of the rows, drawn with `seed`.
        seed: of the draw.
    Raises:
        LaminaError: the file or a column is missing, a value is missing or not a number, a text column has more than
            64 different values.
    """
    path = existing(source, "the table")
    if path.suffix == ".npz":
        features, labels = npz(path, [inputs, target])
        names = [f"{inputs}[:, {i}]" for i in range(features.shape[-1])]
    else:
        columns = read_columns(path, delimiter)
        check_known(columns, [target, *drop], path)
        check_complete(target, columns[target], path)
        labels = np.array(columns[target])
        features, names = _features({n: v for n, v in columns.items() if n != target and n not in drop}, path)
    return from_arrays(
        features,
        labels,
        batch,
        task=task,
        standardise=standardise,
        split=split,
        seed=seed,
        columns=names,
        name=path.name,
    )


def from_arrays(
    features: Array,
    labels: Array,
    batch: int = 128,
    *,
    task: Literal["classification", "regression"] = "classification",
    standardise: bool = True,
    split: float = 0.2,
    seed: int = 0,
    evaluation: Sequence[int] | Array | None = None,
    columns: Sequence[str] | None = None,
    name: str = "the table",
) -> Data:
    """Make a data set of features (rows, features) and labels (rows,); see `tabular`.

    Args:
        evaluation: the row numbers held out, instead of a draw (`split` is then unused).
        columns: feature names, for messages.
    Raises:
        LaminaError: a feature or label is not a finite number.
        ShapeError: features are not (rows, features) with a label a row.
    """
    if features.ndim != 2 or labels.shape not in ((len(features),), (len(features), 1)):
        raise ShapeError(
            f"{name} needs features (rows, features) and a label a row, got {features.shape} {labels.shape}"
        )
    x = _finite(features, columns or [f"column {i}" for i in range(features.shape[1])], name)
    labels, sizes = labels.reshape(-1), {"features": x.shape[1]}
    if task == "classification":
        classes, y = _classes(labels, name)
        sizes["classes"] = classes
    else:
        y = _finite(labels[:, None], ["the target"], name)[:, 0].float()
        sizes["outputs"] = 1
    train, held = split_rows(len(x), split, seed) if evaluation is None else _given(len(x), evaluation)
    if standardise:
        x = standardised(x, train)
    parts = [Columns({"inputs": x[rows].float(), "labels": y[rows]}) for rows in (train, held)]
    return Data(parts[0], parts[1] if len(held) or (split and evaluation is None) else None, batch, sizes, name)


def standardised(x: Tensor, train: Tensor) -> Tensor:
    """Shift and scale every column of x (rows, columns) by the mean and deviation of the rows `train`."""
    mean, std = x[train].mean(0), x[train].std(0, correction=0)
    return (x - mean) / torch.where(std > 0, std, 1.0)


def _features(columns: dict[str, list[str]], path: Path) -> tuple[Array, list[str]]:
    parts: list[Array] = []
    names: list[str] = []
    for name, values in columns.items():
        check_complete(name, values, path)
        try:
            parts.append(np.array([float(v) for v in values]))
            names.append(name)
        except ValueError:
            known = sorted(set(values))
            if len(known) > CATEGORIES:
                raise LaminaError(
                    f"the column {name!r} of {path.name!r} has {len(known)} different texts such as {known[0]!r}, more "
                    f"than {CATEGORIES} categories: leave it out with drop"
                ) from None
            given = np.array(values)
            parts += [(given == value).astype(np.float64) for value in known]
            names += [f"{name}={value}" for value in known]
    if not parts:
        raise LaminaError(f"{str(path)!r} has no column left beside the target")
    return np.stack(parts, axis=1), names


def _finite(values: Array, columns: Sequence[str], name: str) -> Tensor:
    try:
        numbers = values.astype(np.float64)
    except ValueError as error:
        raise LaminaError(f"{name} has {', '.join(columns)} that is not a number: {error}") from error
    bad = ~np.isfinite(numbers)
    if bad.any():
        column = int(bad.any(0).argmax())
        raise LaminaError(
            f"{columns[column]!r} of {name} has {int(bad[:, column].sum())} values that are missing or infinite "
            f"(first in row {int(bad[:, column].argmax()) + 1})"
        )
    return torch.from_numpy(numbers)


def _classes(labels: Array, name: str) -> tuple[int, Tensor]:
    if labels.dtype.kind == "f":
        _finite(labels[:, None], ["the target"], name)
    if labels.dtype.kind == "U":
        # Where all are numbers they are sorted as such: 2 before 10.
        with contextlib.suppress(ValueError):
            labels = labels.astype(np.float64)
    known, numbers = np.unique(labels, return_inverse=True)
    if len(known) > max(2, len(labels) // 2):
        raise LaminaError(f"the target of {name} has {len(known)} classes in {len(labels)} rows: task='regression'?")
    return len(known), torch.from_numpy(numbers.astype(np.int64))


def _given(length: int, evaluation: Sequence[int] | Array) -> tuple[Tensor, Tensor]:
    rows = np.asarray(evaluation)
    if rows.ndim != 1 or not (rows.size == 0 or rows.dtype.kind in "iu"):
        raise ShapeError(f"evaluation is a list of row numbers, got {rows.dtype} {rows.shape}")
    held = torch.from_numpy(np.unique(rows).astype(np.int64))
    if len(held) and not 0 <= int(held[0]) <= int(held[-1]) < length:
        raise LaminaError(f"evaluation names rows {int(held[0])}..{int(held[-1])}, but there are 0..{length - 1}")
    if len(held) != rows.size:
        raise LaminaError(f"evaluation names {rows.size} rows, of which only {len(held)} are different")
    keep = torch.ones(length, dtype=torch.bool)
    keep[held] = False
    return keep.nonzero()[:, 0], held
