"""The processes of one run: who is who, sums over all of them, and errors that all of them see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lamina.errors import LaminaError
from lamina.train.precision import TrainingError

TIMEOUT = 600.0
"""Seconds after which a process stops waiting for the others."""


CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """Where this process is among those of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place; return the argument."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def everyone(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, error: str | None) -> None:
        """Wait for all; raise on every process what went wrong on any.

        Raises:
            TrainingError: the first error.
        """
        for found in self.everyone(error):
            if found is not None:
                raise TrainingError(found)


def start(device: str = "auto", *, timeout: float = TIMEOUT) -> World:
    """Return this process's place; join the others where torchrun (or the like) started several.

    Args:
        device: `auto`, or a torch device; under CUDA each process takes the one of its local rank.
        timeout: seconds to wait for the others, in every collective.
    Raises:
        LaminaError: no such device.
    """
    place = _device(device)
    if not dist.is_available():
        return World(device=place)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Two backends under CUDA: checkpoints and decisions are agreed on by way of the CPU.
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        _join(backend, timedelta(seconds=timeout))
    if not dist.is_initialized():
        return World(device=place)
    return World(dist.get_rank(), dist.get_world_size(), place)


def finish() -> None:
    """Leave the process group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_peers_told(world: World) -> Iterator[None]:
    """Turn the error of a collective whose other side is gone into one sentence."""
    try:
        yield
    except LaminaError:
        raise
    except RuntimeError as error:
        if world.size == 1 or not _peer_is_gone(error):
            raise
        raise TrainingError(
            f"process {world.rank} of {world.size} lost another one, which ended or hangs "
            "(its own output says why); start again with resume to go on from the last checkpoint "
            f"[{str(error).splitlines()[0][:160]}]"
        ) from error


def _join(backend: str, timeout: timedelta) -> None:
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not restarts:
        dist.init_process_group(backend, timeout=timeout)
        return
    # torchrun's static rendezvous keeps its store over a restart, with the addresses of the dead processes in it.
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"restart-{restarts}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _peer_is_gone(error: RuntimeError) -> bool:
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "timed out", "timeout", "broken pipe", "nccl", "gloo")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and name == "mps":
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LaminaError(f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LaminaError(f"device is {name!r}, but this torch finds no CUDA device")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device
