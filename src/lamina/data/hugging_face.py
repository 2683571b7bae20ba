"""Data sets of the Hugging Face `datasets` library, in memory or in Arrow files, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.data._tokenize import Tokenizer, encode, tokenizer_of, vocabulary_of
from lamina.data.examples import Data, Examples
from lamina.errors import LaminaError, ShapeError, nearest, require
from lamina.registry import register


@register("data", source="Hugging Face datasets")
def hugging_face(
    path: str,
    columns: Mapping[str, str],
    batch: int = 32,
    *,
    config: str | None = None,
    train: str = "train",
    evaluation: str | None = None,
    tokenizer: str | Tokenizer | None = None,
    context: int = 128,
) -> Data:
    """Load what `datasets.load_dataset` loads: a hub name, or a folder of csv, json, parquet files (extra hf).

    Args:
        path: hub name or folder.
        columns: column of the set -> entry of the batch, as `{sentence: input_ids, label: labels}`.
        batch: global batch size.
        config: of a hub set with several.
        train: name of the split to train on.
        evaluation: name of the split to evaluate on; None = none.
        tokenizer: for a column of text; None = bytes of UTF-8.
        context: tokens a text, cut or padded.
    Raises:
        LaminaError: the set cannot be loaded, or a split or column is missing.
    """
    parts = load_dataset(path, config)
    for name in filter(None, (train, evaluation)):
        if name not in parts:
            raise LaminaError(f"the data set {path!r} has no split {name!r}, only {list(parts)}{nearest(name, parts)}")
    held = parts[evaluation] if evaluation else None
    return from_datasets(parts[train], columns, batch, evaluation=held, tokenizer=tokenizer, context=context, name=path)


def from_datasets(
    dataset: Any,
    columns: Mapping[str, str],
    batch: int,
    *,
    evaluation: Any = None,
    tokenizer: str | Tokenizer | None = None,
    context: int = 128,
    name: str = "datasets",
) -> Data:
    """Make a data set of a `datasets.Dataset`; rows are fetched, tokenized and decoded batch by batch.

    Args:
        dataset: the training rows.
        columns: column -> entry of the batch; text becomes `input_ids` and `attention_mask`, images
            (B, C, H, W) floats from 0 to 1, anything else a tensor (doubles: float32).
        evaluation: the held-out rows.
    Raises:
        LaminaError: a column is missing.
    """
    tool = tokenizer_of(tokenizer)
    train = ArrowRows(dataset, columns, tool, context)
    held: Examples | None = None if evaluation is None else ArrowRows(evaluation, columns, tool, context)
    sizes: dict[str, Any] = {**vocabulary_of(tool), "context": context} if "input_ids" in columns.values() else {}
    label = next((c for c, entry in columns.items() if entry == "labels"), None)
    classes = getattr(dataset.features.get(label), "num_classes", None)
    return Data(train, held, batch, {**sizes, **({"classes": classes} if classes else {})}, name)


class ArrowRows:
    """Rows of a `datasets.Dataset` as named tensors; see `from_datasets`."""

    def __init__(
        self, dataset: Any, columns: Mapping[str, str], tokenizer: Tokenizer | None = None, context: int = 128
    ) -> None:
        known = getattr(dataset, "column_names", None)
        if not isinstance(known, list) or not hasattr(dataset, "__len__"):
            what = f"splits {list(known)}: give one of them" if isinstance(known, dict) else "no rows to pick from"
            raise LaminaError(f"expected a datasets.Dataset, got a {type(dataset).__name__} with {what}")
        if not columns:
            raise LaminaError(f"name the columns to use, of {known}")
        for column in columns:
            if column not in known:
                raise LaminaError(f"the data set has no column {column!r}, only {known}{nearest(column, known)}")
        # Without a format of its own: torch and NumPy rows would hide which column is text.
        self.dataset = dataset.select_columns(list(columns)).with_format(None)
        self.columns = dict(columns)
        self.tokenizer = tokenizer
        self.context = context

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows under the names of the batch."""
        rows = self.dataset[indices.tolist()]
        result: dict[str, Tensor] = {}
        for column, entry in self.columns.items():
            result.update(self._tensors(column, entry, rows[column]))
        return result

    def _tensors(self, column: str, entry: str, values: Sequence[Any]) -> dict[str, Tensor]:
        if any(value is None for value in values):
            raise LaminaError(f"the column {column!r} misses values: fill them in, or leave the rows out")
        if values and isinstance(values[0], str):
            found = encode(values, self.context, self.tokenizer)
            return {entry: found.pop("input_ids"), **found}
        if values and hasattr(values[0], "convert"):
            return {entry: _pixels(values, column)}
        try:
            array = np.asarray(values)
            # Python's floats are doubles; models are not.
            return {entry: torch.as_tensor(array.astype(np.float32) if array.dtype == np.float64 else array)}
        except (TypeError, ValueError) as error:
            raise LaminaError(f"the column {column!r} cannot be a tensor: {error}") from error


def load_dataset(path: str, config: str | None = None) -> Any:
    """Load all splits of a set; any failure (no network, no such set) is worded in one sentence.

    Raises:
        LaminaError: it cannot be loaded.
        MissingExtra: `datasets` is not installed.
    """
    library = require("datasets", "hf")
    try:
        return library.load_dataset(path, config)
    except Exception as error:
        # Offline, unknown, gated and broken sets each raise their own kind, of three libraries.
        reason = str(error).partition("\n")[0]
        raise LaminaError(f"datasets.load_dataset({path!r}) failed: {type(error).__name__}: {reason}") from error


def _pixels(images: Sequence[Any], column: str) -> Tensor:
    arrays = [np.asarray(image) for image in images]
    if len({a.shape for a in arrays}) > 1:
        raise ShapeError(f"the images of column {column!r} differ in size: {sorted({a.shape for a in arrays})}")
    values = torch.from_numpy(np.stack(arrays)).float() / 255
    return values.unsqueeze(1) if values.dim() == 3 else values.permute(0, 3, 1, 2).contiguous()
