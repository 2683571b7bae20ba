"""Workers' gradients as rows: their inner products and their weighted sums, a block of columns at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 22
"""What a block of columns of all rows takes in float64: small enough for a CPU's cache."""


def blocks(rows: Tensor) -> Iterator[slice]:
    """Yield ranges of columns of (workers, n) that together are all of them."""
    width = max(1, BLOCK_BYTES // (8 * max(1, len(rows))))
    if rows.is_cuda:
        width *= 16
    for start in range(0, rows.shape[1], width):
        yield slice(start, min(start + width, rows.shape[1]))


def gram(rows: Tensor) -> Tensor:
    """Return the inner products of all pairs of rows: (workers, n) -> (workers, workers) in float64, on the CPU.

    Float64 throughout, so that squares of float32 numbers neither overflow nor lose what tells two workers apart. A row
    with NaN or infinity makes its own row and column of the result not finite, and no other.
    """
    workers = len(rows)
    total = torch.zeros(workers, workers, dtype=torch.float64, device=rows.device)
    buffer: Tensor | None = None
    for columns in blocks(rows):
        block = rows[:, columns]
        if buffer is None or buffer.shape != block.shape:
            buffer = torch.empty(block.shape, dtype=torch.float64, device=rows.device)
        buffer.copy_(block)
        total.addmm_(buffer, buffer.T)
    return total.cpu()


def squared_distances(products: Tensor) -> Tensor:
    """Return the squared distances between rows from their inner products; infinite where they overflow."""
    norms = products.diagonal()
    found = norms[:, None] + norms[None, :] - 2 * products
    return found.nan_to_num(nan=float("inf"), posinf=float("inf")).clamp_(min=0).fill_diagonal_(0)


def weighted_sum(rows: Tensor, weights: Tensor, kept: Sequence[int] | None = None) -> Tensor:
    """Return sum_i weights_i rows_i: (workers, n) -> (n,), in the rows' dtype.

    Args:
        weights: (workers,), or of the kept ones; float64.
        kept: the rows that enter; the others may hold anything, NaN included. None = all.
    """
    # Weights of huge gradients are tiny: outside float32's range the sum is taken in float64.
    size = weights[weights != 0].abs()
    wide = rows.dtype == torch.float64 or bool((size < 1e-30).any() | (size > 1e30).any())
    work = torch.float64 if wide else torch.float32
    factors = weights.to(rows.device, work)
    if rows.dtype == work and (kept is None or len(kept) == len(rows)):
        return factors @ rows
    chosen = None if kept is None else torch.as_tensor(kept, device=rows.device)
    result = rows.new_empty(rows.shape[1])
    for columns in blocks(rows):
        block = rows[:, columns]
        result[columns] = (factors @ (block if chosen is None else block[chosen]).to(work)).to(rows.dtype)
    return result
