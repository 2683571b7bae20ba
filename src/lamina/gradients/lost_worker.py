"""A collective that fails because a worker is gone says who it is, in a sentence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from lamina.errors import LaminaError

PATIENCE = 5.0
"""Seconds that survivors wait for each other's sign of life, to name who is gone."""


@contextmanager
def lost_worker_told(group: dist.ProcessGroup | None, turn: str) -> Iterator[None]:
    """Turn the error of a collective into a sentence that names who is gone.

    Args:
        turn: what all workers call this round of collectives, and no other; signs of life are given under it.
    Raises:
        LaminaError: a worker ended, or did not answer within the group's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        rank, workers = dist.get_rank(group), dist.get_world_size(group)
        gone = _missing(workers, rank, f"lamina/alive/{turn}")
        who = named(gone) if gone else "another worker"
        raise LaminaError(
            f"{who} ended, or did not answer within the process group's timeout, while gradients were exchanged "
            f"(its own output says why; this is worker {rank} of {workers}); nothing was combined: start "
            f"again from the last checkpoint, as torchrun --max-restarts does [{str(error).splitlines()[0][:120]}]"
        ) from error


def named(workers: Sequence[int]) -> str:
    """Word a list of workers."""
    return f"worker{'s' if len(workers) > 1 else ''} {', '.join(map(str, workers))}"


def _missing(workers: int, rank: int, key: str) -> list[int]:
    """Return the workers that give no sign of life through the group's store; none where the store is gone."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{key}/{rank}", "1")
        missing, end = [r for r in range(workers) if r != rank], time.monotonic() + PATIENCE
        while missing and time.monotonic() < end:
            time.sleep(0.05)
            missing = [r for r in missing if not store.check([f"{key}/{r}"])]
    except RuntimeError:
        return []
    return missing
