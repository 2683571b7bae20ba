"""What a teacher said about each row of a data set, on disk: written once, read ever after, never taken for another's.

A folder holds `teacher.json` (whose outputs, which tensors) and memory-mapped pieces of each tensor, by row number.
A row is known by a fingerprint of the inputs that the teacher saw, so another data set, or a random augmentation, is
refused at the first row that differs. Several processes may fill one folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lamina.batches import TARGETS, Batch
from lamina.errors import LaminaError

INDEX = "index"
"""Batch entry with each row's number; the data set `indexed` adds it."""

FORMAT = 1
PIECE = 2**24
"""Bytes of a piece of the store; on most file systems what is not written takes no room."""

Outputs = dict[str, Tensor]


class TeacherCache:
    """Outputs of one teacher, by row.

    Args:
        folder: is made where there is none.
        teacher: the model whose outputs they are; its weights must be those of the folder's. None = anyone's.
    """

    def __init__(self, folder: str | Path, teacher: nn.Module | None = None) -> None:
        self.folder, self.teacher = Path(folder), teacher
        self._manifest: dict[str, Any] | None = None
        self._stores: dict[str, _Store] = {}

    def outputs(self, batch: Batch, compute: Callable[[Batch], Outputs]) -> Outputs:
        """Return the teacher's outputs for a batch: from disk where every row is there, else computed and written.

        Args:
            batch: with `index`, (B,) whole numbers from 0.
            compute: the teacher itself; every tensor is (B, ...).
        Raises:
            LaminaError: no `index`, a row that looks different than when the teacher saw it, or a folder of another
                teacher's.
        """
        index, seen = self._index(batch), fingerprints(batch).cpu()
        kept = self._stored(index)
        known = kept != 0
        if bool((known & (kept != seen)).any()):
            row = int(index[known & (kept != seen)][0])
            raise LaminaError(
                f"row {row} looks different than when the teacher saw it: {self.folder} is of another data set, or the "
                "rows are augmented at random, which cached outputs cannot follow"
            )
        if self._manifest is not None and bool(known.all()):
            device = batch[INDEX].device
            return {name: self._store(name).read(index).to(device, non_blocking=True) for name in self._manifest["outputs"]}  # fmt: skip  # noqa: E501
        found = compute(batch)
        self._write(index, seen, {name: tensor.detach().float().cpu() for name, tensor in found.items()}, ~known)
        return found

    def _index(self, batch: Batch) -> Tensor:
        index = batch.get(INDEX)
        if not isinstance(index, Tensor):
            raise LaminaError("cached teacher outputs need each row's number: wrap the data set in `indexed`")
        return index.cpu()

    def _stored(self, index: Tensor) -> Tensor:
        if self._manifest is None:
            self._manifest = self._read_manifest()
        if self._manifest is None:
            return torch.zeros(len(index), dtype=torch.int64)
        return self._store("fingerprints").read(index)

    def _write(self, index: Tensor, seen: Tensor, found: Outputs, new: Tensor) -> None:
        if self._manifest is None:
            self._manifest = self._make_manifest(found)
        for name, shape in self._manifest["outputs"].items():
            if name not in found or list(found[name].shape[1:]) != shape:
                got = tuple(found[name].shape[1:]) if name in found else "nothing"
                raise LaminaError(
                    f"{self.folder} keeps {name!r} of shape {tuple(shape)} a row, the teacher gives {got}"
                )
            self._store(name).write(index[new], found[name][new])
        # Last, so that a row with a fingerprint is whole.
        self._store("fingerprints").write(index[new], seen[new])

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / "teacher.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise LaminaError(f"{path} has format {found.get('format')}; this version of lamina reads format {FORMAT}")
        if self.teacher is not None and found["teacher"] != digest_of(self.teacher):
            raise LaminaError(f"{self.folder} holds the outputs of another teacher: name another folder, or delete it")
        return found

    def _make_manifest(self, found: Outputs) -> dict[str, Any]:
        digest = None if self.teacher is None else digest_of(self.teacher)
        content = {"format": FORMAT, "teacher": digest, "outputs": {n: list(t.shape[1:]) for n, t in found.items()}}
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".teacher-{os.getpid()}.part"
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.folder / "teacher.json")
        return content

    def _store(self, name: str) -> _Store:
        if name not in self._stores:
            assert self._manifest is not None
            mark = name == "fingerprints"
            shape = [] if mark else self._manifest["outputs"][name]
            # A path may hold what no file name may.
            stem = name if mark else f"output-{list(self._manifest['outputs']).index(name)}"
            self._stores[name] = _Store(self.folder / stem, shape, np.dtype("<i8" if mark else "<f4"))
        return self._stores[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherCache:
        return TeacherCache(self.folder, copy.deepcopy(self.teacher, memo))


class _Store:
    """Rows of one shape in pieces of a fixed number of rows, each a memory-mapped file."""

    def __init__(self, stem: Path, shape: list[int], dtype: np.dtype[Any]) -> None:
        self.stem, self.shape, self.dtype = stem, tuple(shape), dtype
        self.rows = max(PIECE // max(dtype.itemsize * int(np.prod(shape, dtype=np.int64)), 1), 1)
        self.pieces: dict[int, Any] = {}

    def read(self, index: Tensor) -> Tensor:
        pieces = torch.div(index, self.rows, rounding_mode="floor")
        first = int(pieces[0]) if len(pieces) else 0
        if bool((pieces == first).all()):
            return torch.from_numpy(self._piece(first)[(index - first * self.rows).numpy()])
        found = torch.empty(len(index), *self.shape, dtype=torch.int64 if self.dtype.kind == "i" else torch.float32)
        for piece in pieces.unique().tolist():
            here = pieces == piece
            found[here] = torch.from_numpy(self._piece(piece)[(index[here] - piece * self.rows).numpy()])
        return found

    def write(self, index: Tensor, values: Tensor) -> None:
        pieces = torch.div(index, self.rows, rounding_mode="floor")
        for piece in pieces.unique().tolist():
            here = pieces == piece
            self._piece(piece)[(index[here] - piece * self.rows).numpy()] = values[here].numpy()

    def _piece(self, number: int) -> Any:
        if number not in self.pieces:
            path = self.stem.with_name(f"{self.stem.name}-{number:06d}.bin")
            size = self.rows * self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
            # Every process makes a piece of the same size, so it does not matter who is first.
            with open(path, "ab") as file:
                file.truncate(size)
            self.pieces[number] = np.memmap(path, self.dtype, "r+", shape=(self.rows, *self.shape))
        return self.pieces[number]


def fingerprints(batch: Batch) -> Tensor:
    """Return a number of 64 bits for each row of a batch's inputs, never 0: (B,) int64; labels and numbers left out."""
    total: Tensor | None = None
    for name in sorted(batch):
        value = batch[name]
        if name == INDEX or name in TARGETS or not isinstance(value, Tensor) or value.dim() == 0:
            continue
        flat = _as_integers(value.detach().contiguous()).flatten(1) if value.dim() > 1 else _as_integers(value)[:, None]
        part = (flat.long() * _coefficients(flat.shape[1], name).to(flat.device)).sum(1)
        total = part if total is None else total + part
    if total is None:
        raise LaminaError("the batch has no tensor that a teacher could see")
    return total | 1


def _as_integers(value: Tensor) -> Tensor:
    views = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    if value.is_floating_point():
        return value.view(views[value.element_size()]) if value.element_size() > 1 else value.view(torch.uint8)
    return value


@lru_cache(maxsize=32)
def _coefficients(length: int, name: str) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    drawn = torch.randint(-(2**62), 2**62, (length,), generator=torch.Generator().manual_seed(seed))
    return drawn * 2 + 1


def digest_of(model: nn.Module) -> str:
    """Return a digest of a model's weights and buffers with their names."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            kept = value.detach().cpu().contiguous()
            found.update(f"{name} {kept.dtype} {tuple(kept.shape)}".encode())
            found.update(kept.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def refuse_random_rows(examples: Any, what: str) -> None:
    """Refuse a data set whose rows look different each time, by fetching two of them twice, an epoch apart.

    Raises:
        LaminaError: `what` cannot be used with it.
    """
    rows, tell = torch.arange(min(2, len(examples))), getattr(examples, "set_epoch", None)
    seen: list[Mapping[str, Any]] = []
    for epoch in (0, 1):
        if tell is not None:
            tell(epoch)
        seen.append(examples.batch(rows))
    if tell is not None:
        tell(0)
    if not torch.equal(*(fingerprints(batch) for batch in seen)):
        raise LaminaError(f"{what} cannot be used with random augmentation: rows of the data set look different each time")  # fmt: skip  # noqa: E501
