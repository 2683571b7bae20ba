"""Text that is already token numbers, or becomes them once, as one memory-mapped file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, Literal

import numpy as np
from torch import Tensor

from lamina.data._arrays import Array, npy
from lamina.data._files import cached, existing, read
from lamina.data._tokenize import Tokenizer, numbered, tokenizer_of, vocabulary_of
from lamina.data.examples import Data, check_split
from lamina.data.text import Blocks
from lamina.errors import LaminaError
from lamina.registry import register


@register("data")
def tokens(
    source: str | Path,
    vocabulary: int,
    context: int = 256,
    batch: int = 16,
    *,
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16",
    target: Literal["next", "none"] = "next",
    split: float = 0.05,
) -> Data:
    """Blocks of a file of token numbers: `input_ids` (B, context) and `labels` (B, context), one step later.

    Args:
        source: .npy file of whole numbers (n,), or any other file, read as bare numbers of `dtype`. Memory-mapped.
        vocabulary: tokens are 0..vocabulary-1; checked batch by batch.
        context: tokens a block.
        batch: global batch size.
        dtype: of a file that is not .npy.
        target: `none` leaves the labels out, for masked-token objectives.
        split: evaluation's share, taken from the end of the file.
    Raises:
        LaminaError: the file is missing, of another type, or shorter than a block.
    """
    path = existing(source, "the token file")
    if path.suffix == ".npy":
        content = npy(path)
        if content.ndim != 1 or content.dtype.kind not in "iu":
            raise LaminaError(f"{str(path)!r} must hold whole numbers (n,), got {content.dtype} {content.shape}")
    else:
        size, width = path.stat().st_size, np.dtype(dtype).itemsize
        if not size or size % width:
            raise LaminaError(f"{str(path)!r} has {size} bytes: not a file of {dtype} tokens, {width} bytes each")
        content = np.memmap(path, dtype=dtype, mode="r")
    return from_tokens(content, vocabulary, context, batch, target=target, split=split, name=path.name)


@register("data")
def tokenized_text(
    source: str | Path,
    tokenizer: str | Tokenizer,
    context: int = 256,
    batch: int = 16,
    *,
    target: Literal["next", "none"] = "next",
    split: float = 0.05,
) -> Data:
    """Blocks of a text file under a tokenizer; a fast one runs once, into a file of the cache folder.

    Args:
        source: UTF-8 text file (.gz too); every line is tokenized by itself, with its line end.
        tokenizer: Hugging Face name or folder, or a callable from a list of texts to lists of token numbers.
        context: tokens a block.
        batch: global batch size.
        target: `none` leaves the labels out, for masked-token objectives.
        split: evaluation's share, taken from the end of the text.
    Raises:
        LaminaError: the file is missing or not UTF-8, or shorter than a block.
    """
    path = existing(source, "the text file")
    tool = tokenizer_of(tokenizer)
    content = read(path)
    try:
        lines = content.decode("utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise LaminaError(f"{str(path)!r} is not UTF-8 text: {error}") from error

    def write(file: IO[bytes]) -> None:
        np.save(file, numbers(lines, tool), allow_pickle=False)

    # Only a fast tokenizer spells itself out in full; a name alone could stand for another one tomorrow.
    backend = getattr(tool, "backend_tokenizer", None)
    if backend is None:
        found = numbers(lines, tool)
    else:
        key = hashlib.blake2b(backend.to_str().encode() + content, digest_size=16).hexdigest()
        found = npy(cached(f"tokens/{key}.npy", write))
    vocabulary = vocabulary_of(tool).get("vocabulary") or int(found.max(initial=0)) + 1
    return from_tokens(found, vocabulary, context, batch, target=target, split=split, name=path.name)


def from_tokens(
    content: Array, vocabulary: int, context: int, batch: int, *, target: str = "next", split: float = 0.05, name: str
) -> Data:
    """Make a data set of a long array of token numbers (n,); evaluation is its end."""
    check_split(split)
    if context < 1 or vocabulary < 1:
        raise LaminaError(f"{name} needs a context and a vocabulary of at least 1, got {context} and {vocabulary}")
    cut = len(content) - round(len(content) * split)
    train, evaluation = (
        _Bounded(c, context, vocabulary, target == "next", name) for c in (content[:cut], content[cut:])
    )
    for part, share in ((train, 1 - split), (evaluation, split)):
        if share and not len(part):
            raise LaminaError(
                f"a part of {name} has {len(part.tokens)} tokens, too few for a block of context {context}"
            )
    sizes = {"vocabulary": vocabulary, "context": context}
    return Data(train, evaluation if split else None, batch, sizes, name)


class _Bounded(Blocks):
    """Blocks whose tokens are checked against the vocabulary, batch by batch: the file may be too long to scan."""

    def __init__(self, tokens: Array, context: int, vocabulary: int, next_token: bool, name: str) -> None:
        super().__init__(tokens, context, next_token=next_token)
        self.vocabulary = vocabulary
        self.name = name

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        found = super().batch(indices)
        for values in found.values():
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.vocabulary:
                low, high = int(values.min()), int(values.max())
                raise LaminaError(f"{self.name} has tokens {low}..{high}, the vocabulary is 0..{self.vocabulary - 1}")
        return found


def numbers(lines: list[str], tokenizer: Tokenizer | None) -> Array:
    """Tokenize lines and join them into one array (n,) int32; special tokens are not added."""
    if hasattr(tokenizer, "pad_token_id"):
        rows = tokenizer(lines, add_special_tokens=False)["input_ids"] if tokenizer else []
    else:
        rows = numbered(lines, tokenizer)
    filled = [np.asarray(row, dtype=np.int32) for row in rows if len(row)]
    return np.concatenate(filled) if filled else np.empty(0, dtype=np.int32)
