"""Text as blocks of bytes or characters for next-token and masked-token training."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lamina.data._files import cached, existing, read
from lamina.data.examples import Data, check_split
from lamina.errors import LaminaError
from lamina.registry import register

Array = npt.NDArray[Any]

STANDARD_LIBRARY = "python-stdlib"
"""The source that needs no file: the running interpreter's own library."""

# Parts that a distribution may leave out, that are tests, or that differ from machine to machine.
_NOT_LIBRARY = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "_sysconfigdata*",
)


@register("data")
def text(
    source: str | Path = STANDARD_LIBRARY,
    context: int = 256,
    batch: int = 16,
    *,
    split: float = 0.05,
    unit: Literal["bytes", "characters"] = "bytes",
    target: Literal["next", "none"] = "next",
    pattern: str = "*",
    seed: int = 0,
    limit: int | None = None,
) -> Data:
    """Cut text into blocks that do not overlap: `input_ids` (B, context) and `labels` (B, context), one step later.

    Held out for evaluation are whole files (of the standard library: whole top-level packages), drawn with `seed`,
    as many as fit into the share; with one file, or few unequal ones, the end of the text. No byte is in both parts.

    Args:
        source: `python-stdlib` (about 10 MB of source of this interpreter), a file, or a folder, searched to any
            depth; files ending in .gz are decompressed. A single plain file is memory-mapped where it stands, anything
            else is joined once into a file of the cache folder, named by its content.
        context: tokens a block.
        batch: global batch size.
        split: evaluation's share of the bytes, 0..1; 0 = no evaluation.
        unit: `bytes` (vocabulary 256), or `characters` of UTF-8 text (vocabulary: those that occur; held in memory).
        target: `next` gives labels for next-token objectives; `none` leaves them out, for masked-token ones.
        pattern: of the file names taken from a folder, as in a shell.
        seed: of the draw of held-out files.
        limit: bytes used at most, training and evaluation together.
    Raises:
        LaminaError: the source is missing or empty, the text is shorter than a block, or not UTF-8 for `characters`.
    """
    check_split(split)
    if context < 1:
        raise LaminaError(f"context must be at least 1, got {context}")
    if limit is not None and limit < 1:
        raise LaminaError(f"limit must be at least 1, got {limit}")
    train, evaluation = _limited(*_parts(source, pattern, split, seed), limit, split)
    vocabulary = 256
    if unit == "characters":
        train, evaluation, vocabulary = _characters(train, evaluation, str(source))
    part = functools.partial(_blocks, context=context, next_token=target == "next", source=str(source))
    return Data(
        train=part(train, "training"),
        evaluation=part(evaluation, "evaluation") if split else None,
        batch=batch,
        sizes={"vocabulary": vocabulary, "context": context},
        name="text",
    )


class Blocks:
    """Non-overlapping blocks of a long token array (a memory map stays one: only a batch's tokens are read).

    Args:
        tokens: (n,) of any integer type.
        context: tokens a block.
        next_token: also give `labels`, the tokens one step later; this takes one token beyond the last block.
    """

    def __init__(self, tokens: Array, context: int, *, next_token: bool = True) -> None:
        self.tokens = tokens
        self.context = context
        self.next_token = next_token

    def __len__(self) -> int:
        return max(0, len(self.tokens) - self.next_token) // self.context

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return `input_ids` (B, context) int64 and, for next-token training, `labels` likewise."""
        starts = indices.numpy() * self.context
        if len(starts) and not 0 <= starts.min() <= starts.max() < len(self) * self.context:
            raise IndexError(f"blocks are numbered 0..{len(self) - 1}, got {indices.min()}..{indices.max()}")
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(self.tokens), self.context + self.next_token)
        rows = torch.from_numpy(windows[starts].astype(np.int64))
        if not self.next_token:
            return {"input_ids": rows}
        # Copies: a masking objective may write into one of the two.
        return {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def _blocks(tokens: Array, part: str, *, context: int, next_token: bool, source: str) -> Blocks:
    blocks = Blocks(tokens, context, next_token=next_token)
    if not len(blocks):
        raise LaminaError(
            f"the {part} part of {source!r} has {len(tokens)} tokens, too few for one block of context {context}"
        )
    return blocks


@dataclass(frozen=True)
class _Document:
    group: str
    path: Path
    size: int
    digest: bytes


def _parts(source: str | Path, pattern: str, split: float, seed: int) -> tuple[Array, Array]:
    """Return the bytes for training and for evaluation, as two parts of one memory map."""
    if source == STANDARD_LIBRARY:
        return _joined(_documents(_standard_library(), top_level=True), split, seed)
    path = existing(source, "the text source")
    if path.is_file() and path.suffix != ".gz":
        return _tail(_mapped(path), split)
    if path.is_file():
        return _joined(_documents([(path.name, path)]), split, seed)
    found = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file())
    visible = [(n, p) for n, p in found if not any(part.startswith(".") for part in n.split("/"))]
    chosen = [(n, p) for n, p in visible if fnmatch.fnmatch(p.name, pattern)]
    if not chosen:
        raise LaminaError(f"the text source {str(path)!r} has no file named like {pattern!r} ({len(visible)} others)")
    return _joined(_documents(chosen), split, seed)


def _standard_library() -> list[tuple[str, Path]]:
    root, found = sysconfig.get_paths()["stdlib"], []
    for folder, below, files in os.walk(root):
        # In place: os.walk then never descends into site-packages.
        below[:] = [name for name in below if not _skipped(name)]
        found += [Path(folder, f) for f in files if f.endswith(".py") and not _skipped(f)]
    return sorted((p.relative_to(root).as_posix(), p) for p in found)


def _skipped(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _NOT_LIBRARY)


def _documents(files: Sequence[tuple[str, Path]], top_level: bool = False) -> list[_Document]:
    result = []
    for name, path in files:
        content = read(path)
        group = name.split("/")[0] if top_level else name
        result.append(_Document(group, path, len(content), hashlib.blake2b(content, digest_size=16).digest()))
    return result


def _joined(documents: Sequence[_Document], split: float, seed: int) -> tuple[Array, Array]:
    held = _held_out(documents, split, seed)
    train = [d for d in documents if d.group not in held]
    ordered = [*train, *(d for d in documents if d.group in held)]
    key = hashlib.blake2b(b"".join(d.digest for d in ordered), digest_size=16).hexdigest()

    def write(file: IO[bytes]) -> None:
        for document in ordered:
            file.write(read(document.path))

    if not any(d.size for d in ordered):
        raise LaminaError(f"the text source is empty: {str(ordered[0].path)!r} and {len(ordered) - 1} more files")
    content = _mapped(cached(f"text/{key}.bin", write))
    if not held:
        return _tail(content, split)
    cut = sum(d.size for d in train)
    return content[:cut], content[cut:]


def _held_out(documents: Sequence[_Document], split: float, seed: int) -> set[str]:
    """Draw the groups for evaluation: none where whole groups come to less than half of the share."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + document.size
    share, total, held = split * sum(sizes.values()), 0, set()
    groups = sorted(sizes)
    for i in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        if total + sizes[groups[i]] <= share:
            held.add(groups[i])
            total += sizes[groups[i]]
    return held if total >= share / 2 and total else set()


def _mapped(path: Path) -> Array:
    if not path.stat().st_size:
        raise LaminaError(f"the text file {str(path)!r} is empty")
    return np.memmap(path, dtype=np.uint8, mode="r")


def _tail(content: Array, split: float) -> tuple[Array, Array]:
    cut = _boundary(content, len(content) - round(len(content) * split))
    return content[:cut], content[cut:]


def _limited(train: Array, evaluation: Array, limit: int | None, split: float) -> tuple[Array, Array]:
    if limit is None:
        return train, evaluation
    held = round(limit * split)
    return train[: _boundary(train, limit - held)], evaluation[: _boundary(evaluation, held)]


def _boundary(content: Array, cut: int) -> int:
    """Move a cut back to where a UTF-8 character starts (at most three bytes: other bytes are cut anywhere)."""
    if not 0 < cut < len(content):
        return min(cut, len(content))
    return next((c for c in range(cut, max(cut - 4, -1), -1) if content[c] & 0xC0 != 0x80), cut)


def _characters(train: Array, evaluation: Array, source: str) -> tuple[Array, Array, int]:
    """Number the characters of both parts by their place among those that occur, in code-point order."""
    try:
        points = [
            np.frombuffer(p.tobytes().decode("utf-8").encode("utf-32-le"), dtype="<u4") for p in (train, evaluation)
        ]
    except UnicodeDecodeError as error:
        raise LaminaError(f"{source!r} is not UTF-8 text ({error}): use unit='bytes'") from error
    known = np.unique(np.concatenate(points))
    return np.searchsorted(known, points[0]), np.searchsorted(known, points[1]), len(known)
