"""Digits as five tasks, for tests: which pair of classes a row is from (0/1, 2/3, ...) is its `condition`."""

from __future__ import annotations

import torch

from lamina.data import Columns, Data
from lamina.recipe import build


def digits_in_pairs(batch: int = 16) -> Data:
    """Return scikit-learn's digits with `labels` 0 or 1 and `condition` 0..4, one a row."""
    digits = build({"name": "digits", "batch": batch}, "data")

    def told(rows: object, count: int) -> Columns:
        found = rows.batch(torch.arange(count))  # type: ignore[attr-defined]
        pair, label = found["labels"] // 2, found["labels"] % 2
        return Columns({"pixel_values": found["pixel_values"], "condition": pair, "labels": label})

    return Data(told(digits.train, 160), told(digits.evaluation, 32), batch, {"classes": 2}, "digits_in_pairs")
