"""Batches that a language model can be looked at with where its user names none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lamina.data._tokenize import tokenizer_of
from lamina.data.examples import Data
from lamina.data.loader import Loader
from lamina.data.text import text
from lamina.data.tokens import from_tokens, numbers

_log = logging.getLogger(__name__)

BYTES = 256
"""Vocabulary of a model that reads bytes."""

LONGEST = 256
"""Tokens a row: longer ones tell a pass no more."""

_LIMIT = 400_000
"""Bytes of the standard library that are tokenized: some ten times what passes look at."""


class StandardText:
    """Some batches of the standard library's text, under a model's own tokenizer; read when first looked at.

    Args:
        tokenizer: folder of a Hugging Face tokenizer; None = bytes.
        context: tokens a row. batch: rows. count: batches.
    """

    def __init__(self, tokenizer: Path | None, *, context: int, batch: int = 4, count: int = 8) -> None:
        self.tokenizer, self.context, self.size, self.count = tokenizer, context, batch, count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        _log.warning("looking at text of Python's standard library, for want of other data")
        data = self._data()
        return islice(iter(Loader(data.train, data.batch)), self.count)

    def _data(self) -> Data:
        if self.tokenizer is None:
            return text(context=self.context, batch=self.size, target="none", split=0.0)
        source = text(context=_LIMIT, batch=1, split=0.0, target="none", limit=_LIMIT).train
        first = source.batch(torch.zeros(1, dtype=torch.long))["input_ids"][0]
        content = first.to(torch.uint8).numpy().tobytes().decode("utf-8", errors="ignore")
        tool = tokenizer_of(str(self.tokenizer))
        ids = numbers(content.splitlines(keepends=True), tool)
        vocabulary = int(ids.max(initial=0)) + 1
        return from_tokens(ids, vocabulary, self.context, self.size, target="none", split=0.0, name="python-stdlib")


def standard_text(folder: Path, *, vocabulary: int | None, context: int | None) -> StandardText | None:
    """Return text for a language model saved in a folder; None where nothing tells how the model reads text."""
    shortened = min(context or LONGEST, LONGEST)
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return StandardText(folder, context=shortened)
    return StandardText(None, context=shortened) if vocabulary == BYTES else None
