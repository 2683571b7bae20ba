"""Weighted sums of rows of a table: what interpolation in grids and hash tables comes to, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Return sum_k weight[n, k] * table[index[n, k]]: table (rows, F), index and weight (N, K) -> (N, F).

    Differentiable in table and weight (once). Compiled it is the plain formula; otherwise the sum is taken while
    rows are fetched, and the gradient added to the rows as complex numbers where F is 2, so that a row is touched once.
    """
    if torch.compiler.is_compiling() or table.is_meta or table.device.type != "cpu" or table.dtype != torch.float32:
        return (table[index.long()] * weight[..., None]).sum(-2)
    found: Tensor = _WeightedRows.apply(table, index, weight)
    return found


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weight)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, index, weight = ctx.saved_tensors
        g = gradients[0].contiguous()
        of_weight = (table[index.long()] * g[:, None]).sum(-1) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, None, of_weight
        if g.shape[1] == 2:
            added = torch.view_as_complex(g)[:, None] * weight
            total = torch.zeros(len(table), dtype=added.dtype)
            total.index_add_(0, index.reshape(-1), added.reshape(-1))
            return torch.view_as_real(total), None, of_weight
        rows = (g[:, None] * weight[..., None]).reshape(-1, g.shape[1])
        total = torch.zeros_like(table)
        # Along an expanded index torch adds row by row; `index_add_` of rows is twice as slow.
        total.scatter_add_(0, index.reshape(-1, 1).long().expand_as(rows), rows)
        return total, None, of_weight


def corners(p: Tensor, low: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the corners of the cells in which points are, and how near the points are to them.

    Coordinates come first, and corners before points: each operation then runs along the points.

    Args:
        p: points (dim, ..., N) in units of cells. low: the lower corners of their cells, whole numbers, same shape.
    Returns:
        the lower corner and the next by axis, int32, each (2, 1, 1, ..., N) with the 2 at that axis' place; and weights
        (2, 2, 2, ..., N).
    """
    dim, part = len(p), p - low
    axes, weights = [], []
    for i in range(dim):
        shape = [*(2 if k == i else 1 for k in range(dim)), *p.shape[1:]]
        first = low[i].int()
        axes.append(torch.stack([first, first + 1]).reshape(shape))
        weights.append(torch.stack([1 - part[i], part[i]]).reshape(shape))
    return axes, functools.reduce(torch.mul, weights)


def row_numbers(axes: Sequence[Tensor], strides: Sequence[Tensor | int]) -> Tensor:
    """Return sum_i axis_i * stride_i over all corners: (2, 2, 2, ..., N)."""
    return functools.reduce(torch.add, [a * s for a, s in zip(axes, strides, strict=True)])
