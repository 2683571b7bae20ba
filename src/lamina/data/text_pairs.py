"""Two texts a row, for sentence encoders: passages that follow each other, or sentences with a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.data._tokenize import Tokenizer, encode, tokenizer_of, vocabulary_of
from lamina.data.examples import Columns, Data, Examples
from lamina.data.sentence_pairs import SentencePairs, sentence_pairs
from lamina.data.text import STANDARD_LIBRARY, text
from lamina.registry import register


@register("data")
def passage_pairs(
    source: str | Path = STANDARD_LIBRARY,
    context: int = 64,
    batch: int = 32,
    *,
    split: float = 0.05,
    pattern: str = "*",
    seed: int = 0,
    limit: int | None = None,
) -> Data:
    """Cut text into passages and pair each with the one that follows: `input_ids` (B, 2, context), bytes.

    An anchor and its positive, from any text and without labels, for `matryoshka` and its losses. No passage is in two
    pairs. Options as in `text`, of which each pair is one block.

    Args:
        context: bytes a passage.
    Raises:
        LaminaError: see `text`.
    """
    whole = text(source, 2 * context, batch, split=split, target="none", pattern=pattern, seed=seed, limit=limit)
    held = None if whole.evaluation is None else InTwo(whole.evaluation)
    return Data(InTwo(whole.train), held, batch, {**whole.sizes, "context": context}, "passage_pairs")


@register("data")
def scored_pairs(
    source: str | Path | SentencePairs,
    context: int = 64,
    batch: int = 32,
    *,
    evaluation: str | Path | SentencePairs | None = None,
    first: str = "sentence1",
    second: str = "sentence2",
    score: str = "score",
    tokenizer: str | Tokenizer | None = None,
) -> Data:
    """Pairs of sentences and how alike they are: `input_ids`, `attention_mask` (B, 2, context), `label` (B,) float32.

    For `cosent` and `matryoshka`; the larger the score, the more alike.

    Args:
        source: a .csv or .tsv file (.gz too) with a header line, or pairs that were read (`sts_b()`).
        context: tokens a sentence, cut or padded.
        batch: global batch size.
        evaluation: the held-out pairs, likewise; None = none.
        first, second, score: columns of the files.
        tokenizer: a folder or name of a transformers tokenizer (extra hf), or a callable; None = bytes of UTF-8.
    Raises:
        LaminaError: a file or column is missing, a score is no number, a sentence is empty.
    """
    tool = tokenizer_of(tokenizer)
    parts = []
    for part in (source, evaluation):
        pairs = part
        if pairs is not None and not isinstance(pairs, SentencePairs):
            pairs = sentence_pairs(pairs, first=first, second=second, score=score)
        parts.append(None if pairs is None else Columns(encoded_pairs(pairs, context, tool)))
    train, held = parts
    assert train is not None
    sizes: dict[str, Any] = {**vocabulary_of(tool), "context": context}
    return Data(train, held, batch, sizes, "scored_pairs")


def encoded_pairs(pairs: SentencePairs, context: int, tokenizer: Tokenizer | None) -> dict[str, Tensor]:
    """Tokenize pairs: `input_ids` and `attention_mask` (rows, 2, context), `label` (rows,)."""
    both = encode([*pairs.first, *pairs.second], context, tokenizer)
    columns = {name: torch.stack(values.chunk(2), 1) for name, values in both.items()}
    return {**columns, "label": pairs.scores}


class InTwo:
    """Examples whose `input_ids` (B, 2 T) are two passages (B, 2, T)."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows, each in two."""
        found = self.examples.batch(indices)
        return {**found, "input_ids": found["input_ids"].unflatten(1, (2, -1))}
