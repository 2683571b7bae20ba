"""Texts to padded token numbers, with any tokenizer or as plain bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.errors import LaminaError, require

Tokenizer = Callable[..., Any]
"""A Hugging Face tokenizer, or any callable from a list of texts to lists of token numbers."""


def tokenizer_of(tokenizer: str | Tokenizer | None) -> Tokenizer | None:
    """Load a tokenizer given by name or folder (extra hf); leave anything else as it is."""
    if not isinstance(tokenizer, str):
        return tokenizer
    return require("transformers", "hf").AutoTokenizer.from_pretrained(tokenizer)


def vocabulary_of(tokenizer: Tokenizer | None) -> dict[str, int]:
    """Return `{"vocabulary": n}` where it is known: 256 for bytes."""
    if tokenizer is None:
        return {"vocabulary": 256}
    return {"vocabulary": len(tokenizer)} if hasattr(tokenizer, "__len__") else {}


def numbered(texts: Sequence[str], tokenizer: Tokenizer | None, context: int | None = None) -> list[Any]:
    """Return the token numbers of each text, at most `context` of them: bytes where there is no tokenizer."""
    if tokenizer is None:
        return [np.frombuffer(text.encode("utf-8")[:context], dtype=np.uint8) for text in texts]
    if not hasattr(tokenizer, "pad_token_id"):
        return [ids[:context] for ids in tokenizer(list(texts))]
    # A Hugging Face tokenizer shortens by itself, so that the closing special token stays.
    cut = {"truncation": True, "max_length": context} if context else {}
    return list(tokenizer(list(texts), **cut)["input_ids"])


def encode(texts: Sequence[str], context: int, tokenizer: Tokenizer | None) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, both (rows, context) int64, padded on the right.

    Raises:
        LaminaError: a text has no token at all.
    """
    rows = numbered(texts, tokenizer, context)
    lengths = np.array([len(row) for row in rows])
    if len(rows) and not lengths.min():
        raise LaminaError(f"text {int(lengths.argmin())} is empty: {texts[int(lengths.argmin())]!r}")
    mask = np.arange(context) < lengths[:, None]
    ids = np.full((len(rows), context), getattr(tokenizer, "pad_token_id", None) or 0, dtype=np.int64)
    if len(rows):
        ids[mask] = np.concatenate(rows)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
