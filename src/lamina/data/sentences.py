"""Sentences with a class each (sentiment, topic, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lamina.data._files import existing
from lamina.data._tables import check_complete, check_known, read_columns
from lamina.data._tokenize import Tokenizer, encode, tokenizer_of, vocabulary_of
from lamina.data.examples import Columns, Data, split_rows
from lamina.errors import LaminaError, ShapeError
from lamina.registry import register


@register("data")
def sentences(
    source: str | Path,
    text: str = "sentence",
    label: str = "label",
    context: int = 64,
    batch: int = 32,
    *,
    tokenizer: str | Tokenizer | None = None,
    split: float = 0.1,
    seed: int = 0,
) -> Data:
    """Classified texts: `input_ids` and `attention_mask` (B, context), `labels` (B,).

    Args:
        source: .csv or .tsv file (.gz too) with a header line.
        text: column of the text.
        label: column of the class; classes are numbered in sorted order.
        context: tokens a text, cut or padded.
        batch: global batch size.
        tokenizer: Hugging Face name or folder, a callable from texts to token lists, or None = bytes of UTF-8.
        split: evaluation's share, drawn with `seed`. Equal texts stay on one side.
        seed: of the draw.
    Raises:
        LaminaError: the file or a column is missing, or a value is empty.
    """
    path = existing(source, "the table of sentences")
    columns = read_columns(path)
    check_known(columns, [text, label], path)
    check_complete(label, columns[label], path)
    texts, labels = columns[text], columns[label]
    different = {t: i for i, t in enumerate(dict.fromkeys(texts))}
    _, held = split_rows(len(different), split, seed)
    chosen = torch.isin(torch.tensor([different[t] for t in texts]), held).tolist()
    rows = list(zip(texts, labels, chosen, strict=True))
    train = [t for t, _, c in rows if not c], [v for _, v, c in rows if not c]
    evaluation = [t for t, _, c in rows if c], [v for _, v, c in rows if c]
    return from_texts(train, evaluation if split else None, context, batch, tokenizer=tokenizer, name="sentences")


def from_texts(
    train: tuple[Sequence[str], Sequence[object]],
    evaluation: tuple[Sequence[str], Sequence[object]] | None,
    context: int,
    batch: int,
    *,
    tokenizer: str | Tokenizer | None = None,
    name: str = "sentences",
) -> Data:
    """Make a data set of (texts, labels) pairs; see `sentences`.

    Raises:
        LaminaError: evaluation has a class that training has not, or a text is empty.
    """
    tool = tokenizer_of(tokenizer)
    classes = sorted(set(train[1]), key=_order)
    parts = [_columns(part, classes, context, tool, name) if part else None for part in (train, evaluation)]
    sizes = {**vocabulary_of(tool), "context": context, "classes": len(classes)}
    if parts[0] is None:
        raise LaminaError(f"{name} has no training text")
    return Data(parts[0], parts[1], batch, sizes, name)


def _order(value: object) -> tuple[float, str]:
    """Numbers as numbers (2 before 10), then words."""
    try:
        return float(str(value)), ""
    except ValueError:
        return float("inf"), str(value)


def _columns(
    part: tuple[Sequence[str], Sequence[object]],
    classes: Sequence[object],
    context: int,
    tokenizer: Tokenizer | None,
    name: str,
) -> Columns:
    texts, labels = part
    if len(texts) != len(labels):
        raise ShapeError(f"{name} has {len(texts)} texts for {len(labels)} labels")
    strange = sorted({str(v) for v in labels} - {str(c) for c in classes})
    if strange:
        raise LaminaError(f"the evaluation part of {name} has the class {strange[0]!r}, training only {list(classes)}")
    numbers = {value: i for i, value in enumerate(classes)}
    targets = torch.from_numpy(np.array([numbers[v] for v in labels], dtype=np.int64))
    return Columns({**encode(texts, context, tokenizer), "labels": targets})
