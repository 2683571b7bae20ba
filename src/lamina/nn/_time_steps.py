"""Rows of many sequences laid out step after step: what the recurrent loops share.

The layout is that of `torch.nn.utils.rnn.PackedSequence`: rows (N, ...) of step 0, then step 1, ...; within a step
the longest sequences come first. `batch_sizes` (T,) counts the rows of each step; None = all of the batch, always.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_sizes(rows: Tensor, batch: int, batch_sizes: Tensor | None) -> list[int]:
    """Return the number of rows of each step."""
    if batch_sizes is None:
        return [batch] * (rows.shape[0] // batch)
    return [int(n) for n in batch_sizes]


def resume(state: Tensor, initial: Tensor, count: int) -> Tensor:
    """Return the state the next step starts from: its first `count` rows, newcomers at their initial state."""
    have = state.shape[0]
    if have == count:
        return state
    return state[:count] if have > count else torch.cat([state, initial[have:count]])


def previous(rows: Tensor, initial: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Return, for every row (N, H), the row of the step before it (`initial` (B, H) where there is none)."""
    batch = initial.shape[0]
    if batch_sizes is None:
        return torch.cat([rows[batch:], initial] if reverse else [initial, rows[:-batch]])
    sizes = batch_sizes.tolist()
    starts = [0, *torch.cumsum(batch_sizes, 0).tolist()]
    index = []
    for t, count in enumerate(sizes):
        before = t + 1 if reverse else t - 1
        known = sizes[before] if 0 <= before < len(sizes) else 0
        # Rows of `initial` stand behind the N others.
        index += [starts[before] + b if b < known else starts[-1] + b for b in range(count)]
    return torch.cat([rows, initial])[torch.tensor(index, device=rows.device)]


def last(rows: Tensor, batch: int, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Return the row (B, H) at which each sequence ended."""
    if reverse:
        return rows[:batch]
    if batch_sizes is None:
        return rows[-batch:]
    starts = torch.cumsum(batch_sizes, 0) - batch_sizes
    lengths = (batch_sizes[None, :] > torch.arange(batch)[:, None]).sum(1)
    return rows[(starts[lengths - 1] + torch.arange(batch)).to(rows.device)]


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Multiply matrices into `out`, in the dtype of `right` where a half-precision weight meets float32 states."""
    if left.dtype == right.dtype:
        return torch.mm(left, right, out=out)
    return out.copy_(torch.mm(left.to(right.dtype), right))


def weight_gradient(gradient: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of a recurrent weight over all steps, as one GEMM."""
    return torch.mm(gradient.to(weight.dtype).t(), before.to(weight.dtype))


def no_second_derivative(*_: object) -> None:
    """Refuse a double backward; registered as the gradient of every hand-written gradient."""
    raise NotImplementedError(
        "the layer-normalised recurrent nets have no second derivative (their backward is written by hand): "
        "differentiate once, or unroll the cells"
    )
