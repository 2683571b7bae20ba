"""The rows of all data-parallel processes in each of them, with gradients that find their way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Say whether rows are to be gathered: in training, with more than one process.

    In evaluation processes need not have equally many batches, and must not wait for each other.
    """
    return torch.is_grad_enabled() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def row_counts(rows: int, device: torch.device) -> list[int]:
    """Return how many rows each process has; a process may have none."""
    counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(rows, device=device))
    return [int(c) for c in counts]


def gather_rows(x: Tensor, counts: list[int]) -> Tensor:
    """Return the rows of all processes in their order: (rows here, ...) -> (rows of all, ...).

    The gradient of a row is the sum of what all processes ask of it.
    """
    gathered: Tensor = _Gather.apply(x, counts)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous().clone()
        dist.all_reduce(whole)
        return whole.split(ctx.counts)[dist.get_rank()], None
