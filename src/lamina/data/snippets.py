"""Byte-level classification of text: which folder a snippet comes from."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lamina.data._arrays import Array
from lamina.data._files import existing, read
from lamina.data.examples import Data, check_split
from lamina.data.text import STANDARD_LIBRARY
from lamina.errors import LaminaError, nearest
from lamina.registry import register

PACKAGES = ("asyncio", "email", "multiprocessing", "xml")
"""Classes of `python-stdlib` where none are named: packages of every Python, of a few hundred kilobytes each."""

_NOT_TEXT = frozenset({"test", "tests"})
"""Folders of the standard library that are left out: some Pythons come without them."""


@register("data")
def snippets(
    source: str | Path = STANDARD_LIBRARY,
    context: int = 256,
    batch: int = 32,
    *,
    folders: Sequence[str] | None = None,
    pattern: str = "*.py",
    split: float = 0.2,
    seed: int = 0,
) -> Data:
    """Cut files into snippets of bytes, labelled by their folder: `input_ids` (B, context), `labels` (B,).

    The byte-level text classification of the Long Range Arena, on text that every machine has. Whole files are held out
    for evaluation. Every class has as many snippets as the smallest, in both parts, so that guessing is right in
    1 / classes; the remainder of a file that fills no snippet is left out.

    Args:
        source: `python-stdlib` (the packages of the running interpreter), or a folder with a folder a class.
        context: bytes a snippet.
        batch: global batch size.
        folders: the classes, in order; None = four packages of the standard library, or all folders in `source`.
        pattern: of the names of files read, at any depth.
        split: evaluation's share of the files' bytes in each class, at least one file; 0 = no evaluation.
        seed: of the draw of held-out files, and of the snippets taken from larger classes.
    Raises:
        LaminaError: no such folder, fewer than two classes, or a class too small for a snippet in each part.
    Source: the task is that of Tay et al., Long Range Arena (2020), arXiv 2011.04006, section 2.2.2.
    """
    check_split(split)
    if context < 1:
        raise LaminaError(f"context must be at least 1, got {context}")
    root = Path(sysconfig.get_paths()["stdlib"]) if source == STANDARD_LIBRARY else existing(source, "the text source")
    standard = source == STANDARD_LIBRARY
    without = frozenset({"__pycache__"}) | (_NOT_TEXT if standard else frozenset())
    there = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name not in without and p.name[0] not in "._")
    names = _chosen(root, there, (PACKAGES if standard else there) if folders is None else folders)
    cut = [_cut(root / name, pattern, context, split, seed, without) for name in names]
    train, held = (_Snippets(_balanced([both[i] for both in cut], seed)) for i in range(2))
    for part, rows, share in (("training", train, 1 - split), ("evaluation", held, split)):
        if share and not len(rows):
            raise LaminaError(
                f"the {part} part of a class has no snippet of {context} bytes (classes: {', '.join(names)})"
            )
    sizes = {"vocabulary": 256, "context": context, "classes": len(names)}
    return Data(train, held if split else None, batch, sizes, "snippets")


class _Snippets:
    """Equally many rows a class, as bytes."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows  # (classes, rows a class, context)

    def __len__(self) -> int:
        return self.rows.shape[0] * self.rows.shape[1]

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return `input_ids` and `labels`; rows are numbered class by class in turn."""
        label, row = indices.numpy() % len(self.rows), indices.numpy() // len(self.rows)
        found = self.rows[label, row].astype(np.int64)
        return {"input_ids": torch.from_numpy(found), "labels": torch.from_numpy(label.astype(np.int64))}


def _chosen(root: Path, there: Sequence[str], chosen: Sequence[str]) -> Sequence[str]:
    for name in chosen:
        if name not in there:
            raise LaminaError(f"there is no folder {name!r} in {str(root)!r}{nearest(name, there)}")
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise LaminaError(f"a classification needs at least two different folders, got {', '.join(chosen) or 'none'}")
    return chosen


def _cut(
    folder: Path, pattern: str, context: int, split: float, seed: int, without: frozenset[str]
) -> tuple[Array, Array]:
    """Return the snippets (rows, context) of a class for training and for evaluation."""
    paths = sorted(p for p in folder.rglob(pattern) if p.is_file() and not without & set(p.relative_to(folder).parts))
    blocks = []
    for path in paths:
        content = np.frombuffer(read(path), dtype=np.uint8)
        rows = len(content) // context
        blocks.append(content[: rows * context].reshape(rows, context))
    blocks = [b for b in blocks if len(b)] or [np.empty((0, context), dtype=np.uint8)]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    share = split * sum(map(len, blocks))
    held: list[int] = []
    while split and order and sum(len(blocks[i]) for i in held) < share:
        held.append(order.pop())
    kept = [blocks[i] for i in sorted(order)] or [blocks[0][:0]]
    return np.concatenate(kept), np.concatenate([blocks[i] for i in sorted(held)] or [blocks[0][:0]])


def _balanced(classes: Sequence[Array], seed: int) -> Array:
    fewest, generator = min(map(len, classes)), torch.Generator().manual_seed(seed)
    return np.stack([c[torch.randperm(len(c), generator=generator)[:fewest].sort().values.numpy()] for c in classes])
