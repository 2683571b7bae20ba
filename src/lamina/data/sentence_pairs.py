"""Pairs of sentences with a score of how alike they are: what sentence encoders are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lamina.data._files import existing
from lamina.data._tables import check_complete, check_known, read_columns
from lamina.errors import LaminaError, ShapeError


@dataclass(frozen=True)
class SentencePairs:
    """Two sentences and a score a row."""

    first: Sequence[str]
    second: Sequence[str]
    scores: Tensor
    """(rows,) float32; larger = more alike."""

    def __post_init__(self) -> None:
        """Refuse columns of different lengths."""
        if not len(self.first) == len(self.second) == len(self.scores):
            lengths = len(self.first), len(self.second), len(self.scores)
            raise ShapeError(f"sentence pairs need as many first and second sentences as scores, got {lengths}")

    def __len__(self) -> int:
        return len(self.first)


def sentence_pairs(
    source: str | Path, *, first: str = "sentence1", second: str = "sentence2", score: str = "score"
) -> SentencePairs:
    """Read pairs from a .csv or .tsv file (.gz too) with a header line.

    Args:
        first: column of the one sentence.
        second: column of the other.
        score: column of the number.
    Raises:
        LaminaError: the file or a column is missing, or a score is missing or no number.
    """
    path = existing(source, "the table of sentence pairs")
    columns = read_columns(path)
    check_known(columns, [first, second, score], path)
    check_complete(score, columns[score], path)
    try:
        scores = torch.tensor([float(v) for v in columns[score]])
    except ValueError as error:
        raise LaminaError(f"the column {score!r} of {path.name!r} is not numeric: {error}") from error
    return SentencePairs(columns[first], columns[second], scores)
