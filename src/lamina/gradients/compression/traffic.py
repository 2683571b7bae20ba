"""The collectives a compressor calls: bytes are counted here, and a worker that is gone is told in a sentence."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from lamina.gradients.lost_worker import lost_worker_told
from lamina.gradients.reducer import Group, mean_later, size


class Traffic:
    """Counts what one worker hands to collectives, and what of it leaves the worker where they run as rings.

    Nothing waits for longer than the process group's own timeout (`init_process_group(timeout=...)`).
    """

    def __init__(self) -> None:
        self.sent = 0
        """Bytes handed to collectives."""
        self.crossed = 0
        """Bytes that leave this worker over its link where every collective is a ring: an all-reduce of n bytes is
        2 n (workers - 1) / workers, an all-gather n (workers - 1)."""
        self.turn = 0

    def mean(self, flat: Tensor, group: Group) -> Tensor:
        """Return the mean of every worker's vector, by all-reduce; bitwise the same on all."""
        flat = flat * (1 / size(group))  # before the sum, so that fp16 does not overflow
        with self._next(group):
            dist.all_reduce(flat, group=group)
        self.count_all_reduce(flat.nbytes, group)
        return flat

    def mean_later(self, flat: Tensor, group: Group) -> torch.futures.Future[Tensor]:
        """Replace a vector by the workers' mean, in place, while the caller goes on."""
        self.count_all_reduce(flat.nbytes, group)
        return mean_later(flat, group)

    def gather(self, flat: Tensor, group: Group) -> Tensor:
        """Return every worker's vector, all of one length: (n,) -> (workers, n)."""
        world = size(group)
        everyone = flat.new_empty((world, flat.numel()))
        with self._next(group):
            dist.all_gather(list(everyone.unbind()), flat.contiguous(), group=group)
        self.sent += flat.nbytes
        self.crossed += (world - 1) * flat.nbytes
        return everyone

    def broadcast(self, values: Tensor, group: Group) -> Tensor:
        """Fill `values` with those of the group's first worker, in place; return it."""
        with self._next(group):
            dist.broadcast(values, group=group, group_src=0)
        if dist.get_rank(group) == 0:
            self.sent += values.nbytes
            self.crossed += values.nbytes
        return values

    def count_all_reduce(self, nbytes: int, group: Group) -> None:
        """Count an all-reduce of so many bytes."""
        world = size(group)
        self.sent += nbytes
        self.crossed += 2 * nbytes * (world - 1) // world

    def _next(self, group: Group) -> AbstractContextManager[None]:
        self.turn += 1
        return lost_worker_told(group, f"compression/{self.turn}")

    def state_dict(self) -> dict[str, int]:
        """Return both counters."""
        return {"sent": self.sent, "crossed": self.crossed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take both counters back."""
        self.sent, self.crossed = int(state["sent"]), int(state["crossed"])
