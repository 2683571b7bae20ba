"""How workers share out the work of a robust rule: each combines one slice of everyone's gradients.

    roll call     24 bytes a worker: is its gradient finite, of the same names and shapes, there at all
    all-to-all    worker r gets the r-th slice of every gradient
    all-reduce    workers x workers inner products, summed over the slices (where the rule asks for them)
    all-gather    the combined slices

So a worker holds two copies of one gradient, however many workers there are, and sends about what a ring all-reduce
would: gathering everyone's gradients takes `workers` copies.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.gradients.reducer import Group, size

PATIENCE = 5.0
"""Seconds that survivors wait for each other's sign of life, to name who is gone."""


class Exchange:
    """The collectives of one group, with the bytes this worker hands to them counted at the calls.

    None waits for longer than the process group's own timeout (`init_process_group(timeout=...)`).
    """

    def __init__(self, group: Group, turn: int) -> None:
        self.group, self.turn = group, turn
        self.workers, self.rank = size(group), dist.get_rank(group)
        self.sent = 0

    def roll_call(self, checksum: int, finite: bool, count: int, device: torch.device) -> list[int]:
        """Return the workers whose gradients are not finite.

        Args:
            checksum: of names, shapes and types.
            count: numbers in this worker's gradient.
        Raises:
            LaminaError: a worker has no gradient, or is gone.
            ShapeError: workers disagree about names, shapes or types.
        """
        mine = torch.tensor([checksum, int(finite), count], dtype=torch.int64, device=device)
        words: list[list[int]] = self.gather(mine).view(self.workers, 3).tolist()
        silent = [r for r, (_, _, count) in enumerate(words) if count == 0]
        if silent:
            raise LaminaError(f"{named(silent)} sent no gradient; nothing was combined")
        usual = Counter(checksum for checksum, _, _ in words).most_common(1)[0][0]
        odd = [r for r, (checksum, _, _) in enumerate(words) if checksum != usual]
        if odd:
            raise ShapeError(
                f"{named(odd)} sent gradients of other names, shapes or types than most; nothing was combined "
                f"(this is worker {self.rank}; numbers a worker: {[count for _, _, count in words]})"
            )
        return [r for r, (_, finite, _) in enumerate(words) if not finite]

    def slices(self, flat: Tensor) -> Tensor:
        """Return this worker's slice of every worker's vector: (workers * n,) -> (workers, n)."""
        rows = torch.empty_like(flat)
        with self._told():
            dist.all_to_all_single(rows, flat, group=self.group)
        self.sent += flat.nbytes
        return rows.view(self.workers, -1)

    def total(self, values: Tensor, device: torch.device) -> Tensor:
        """Return the sum over the workers."""
        values = values.to(device)
        with self._told():
            dist.all_reduce(values, group=self.group)
        self.sent += values.nbytes
        return values.cpu()

    def gather(self, part: Tensor) -> Tensor:
        """Return the workers' slices, one after another: (n,) -> (workers * n,)."""
        whole = part.new_empty(self.workers * len(part))
        with self._told():
            dist.all_gather(list(whole.split(len(part))), part, group=self.group)
        self.sent += part.nbytes
        return whole

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn the error of a collective into a sentence that names who is gone."""
        try:
            yield
        except RuntimeError as error:
            gone = _missing(self.workers, self.rank, f"lamina/alive/{self.turn}")
            who = named(gone) if gone else "another worker"
            raise LaminaError(
                f"{who} ended, or did not answer within the process group's timeout, while gradients were exchanged "
                f"(its own output says why; this is worker {self.rank} of {self.workers}); nothing was combined: start "
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
