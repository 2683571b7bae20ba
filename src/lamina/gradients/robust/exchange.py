"""How workers share out the work of a robust rule: each combines one slice of everyone's gradients.

    roll call     24 bytes a worker: is its gradient finite, of the same names and shapes, there at all
    all-to-all    worker r gets the r-th slice of every gradient
    all-reduce    workers x workers inner products, summed over the slices (where the rule asks for them)
    all-gather    the combined slices

So a worker holds two copies of one gradient, however many workers there are, and sends about what a ring all-reduce
would: gathering everyone's gradients takes `workers` copies.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.gradients.lost_worker import lost_worker_told, named
from lamina.gradients.reducer import Group, size


class Exchange:
    """The collectives of one group, with the bytes this worker hands to them counted at the calls.

    None waits for longer than the process group's own timeout (`init_process_group(timeout=...)`).
    """

    def __init__(self, group: Group, turn: int) -> None:
        self.group, self.turn = group, f"robust/{turn}"
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
        with lost_worker_told(self.group, self.turn):
            dist.all_to_all_single(rows, flat, group=self.group)
        self.sent += flat.nbytes
        return rows.view(self.workers, -1)

    def total(self, values: Tensor, device: torch.device) -> Tensor:
        """Return the sum over the workers."""
        values = values.to(device)
        with lost_worker_told(self.group, self.turn):
            dist.all_reduce(values, group=self.group)
        self.sent += values.nbytes
        return values.cpu()

    def gather(self, part: Tensor) -> Tensor:
        """Return the workers' slices, one after another: (n,) -> (workers * n,)."""
        whole = part.new_empty(self.workers * len(part))
        with lost_worker_told(self.group, self.turn):
            dist.all_gather(list(whole.split(len(part))), part, group=self.group)
        self.sent += part.nbytes
        return whole
