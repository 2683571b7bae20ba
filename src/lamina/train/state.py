"""Checkpoints: written aside, forced to disk, renamed; tensors by torch.distributed.checkpoint, the rest as JSON.

    checkpoints/step-000120/   state.json, *.safetensors (one a process), complete

Tensors go into safetensors files (torch's own writer for them), so nothing is pickled, sharded models are written
shard by shard, and another number of processes can read them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor

from lamina.errors import LaminaError
from lamina.train.distributed import World

FORMAT = 1
STATE, COMPLETE = "state.json", "complete"


def name_of(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a run folder, oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if (p / COMPLETE).exists()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def clean(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for leftover in (folder / "checkpoints").glob(".*"):
        shutil.rmtree(leftover)


def save(folder: Path, step: int, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], world: World) -> Path:
    """Write one checkpoint; every process calls it. It appears whole or not at all.

    Args:
        plain: JSON values; rank 0's are written.
        tensors: by key. A DTensor is written shard by shard; a key that several processes have is written once.
    Raises:
        TrainingError: it could not be written (disk full, ...); earlier checkpoints are untouched.
    """
    target = folder / "checkpoints" / name_of(step)
    aside = target.with_name(f".{target.name}.partial")
    if world.first:
        shutil.rmtree(aside, ignore_errors=True)
    what = f"the checkpoint {target.name}"
    together(world, folder, what, lambda: aside.mkdir(parents=True, exist_ok=True))
    together(world, folder, what, lambda: _write_tensors(aside, tensors, world))
    kinds = {k: [str(t.dtype).removeprefix("torch."), list(t.shape)] for k, t in tensors.items()}
    kinds = {k: kind for part in world.everyone(kinds) for k, kind in part.items()}
    content = {**plain, "format": FORMAT, "step": step, "tensors": kinds}
    together(world, folder, what, lambda: _complete(aside, target, content) if world.first else None)
    return target


@dataclass(frozen=True)
class Loaded:
    """The JSON half of a checkpoint, and a way to its tensors."""

    path: Path
    plain: Mapping[str, Any]
    world: World

    @property
    def step(self) -> int:
        """Number of steps done."""
        return int(self.plain["step"])

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read the tensors of these keys, in place; every process calls it.

        Raises:
            LaminaError: the checkpoint has other shapes, or not all of them.
        """
        stored = self.plain["tensors"]
        for key, tensor in tensors.items():
            if key not in stored or list(tensor.shape) != stored[key][1]:
                has = f"has it with shape {tuple(stored[key][1])}" if key in stored else "does not have it"
                raise LaminaError(f"{key} of shape {tuple(tensor.shape)} cannot be read: {self.path.name} {has}")
        if tensors:
            _read_tensors(self.path, dict(tensors), self.world)

    def allocate(self, key: str, like: Tensor | None = None) -> Tensor:
        """Return room for a stored tensor: sharded as `like` where that is a DTensor of the same shape."""
        dtype, shape = self.plain["tensors"][key]
        kind: torch.dtype = getattr(torch, dtype)
        if isinstance(like, DTensor) and list(like.shape) == shape:
            return torch.empty_like(like, dtype=kind, requires_grad=False)
        return torch.empty(shape, dtype=kind)


def load(path: Path, world: World) -> Loaded:
    """Read the JSON half of a checkpoint.

    Raises:
        LaminaError: not a checkpoint, or of another format.
    """
    try:
        plain = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaminaError(f"{path} is not a readable checkpoint: {error}") from error
    if plain.get("format") != FORMAT:
        raise LaminaError(f"{path} has format {plain.get('format')}; this version of lamina reads format {FORMAT}")
    return Loaded(path, plain, world)


def prune(folder: Path, keep_last: int, best: int | None) -> None:
    """Remove all but the newest checkpoints, and the best one's."""
    found = checkpoints(folder)
    for old in found[:-keep_last]:
        if best is None or old.name != name_of(best):
            # Renamed first: a kill while files go must not leave what looks complete.
            gone = old.with_name(f".{old.name}.old")
            old.rename(gone)
            shutil.rmtree(gone)


def _write_tensors(aside: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    seen: set[int] = set()
    ready = {k: t if isinstance(t, DTensor) else _own_memory(t, seen) for k, t in tensors.items()}
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_tensors(ready, storage_writer=writer, no_dist=world.size == 1)


def _own_memory(tensor: Tensor, seen: set[int]) -> Tensor:
    """Copy a tensor that shares memory with an earlier one (tied weights): safetensors refuses those."""
    place = tensor.untyped_storage().data_ptr()
    shared = place in seen and tensor.numel() > 0
    seen.add(place)
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def _read_tensors(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=world.size == 1)
        except CheckpointException as error:
            raise LaminaError(f"{path} cannot be read: {_reason(error)}") from error


def _complete(aside: Path, target: Path, content: Mapping[str, Any]) -> None:
    if (target / COMPLETE).exists():
        # The same step of the same run once more (best and regular, or after a resume).
        shutil.rmtree(aside)
        return
    (aside / STATE).write_text(json.dumps(content), encoding="utf-8")
    for file in aside.iterdir():
        _sync(file)
    (aside / COMPLETE).touch()
    _sync(aside)
    aside.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def together(world: World, folder: Path, what: str, work: Callable[[], object]) -> None:
    """Run `work`, which writes `what` below a run folder, on every process; where it fails on one, fail on all.

    Raises:
        TrainingError: says why, and which checkpoint is the last good one.
    """
    failed: str | None = None
    try:
        work()
    except (OSError, CheckpointException) as error:
        earlier = checkpoints(folder)
        last = f"{earlier[-1].name} is intact" if earlier else "there is none yet"
        failed = f"{what} could not be written: {_reason(error)}; the last good checkpoint: {last}"
    world.agree(failed)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))[0]
        return _reason(first)
    return f"{error.strerror} ({error.filename or error.errno})" if isinstance(error, OSError) else str(error)
