"""Rules that look at one coordinate of all workers at a time: on sorted columns, a block of them after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from lamina.gradients.robust.gram import blocks

Column = Callable[[Sequence[Tensor]], Tensor]
"""From the sorted entries of each column, lowest first (each (n,), float32 or float64), to one number a column."""


def by_column(rows: Tensor, rule: Column, kept: Sequence[int] | None = None, mix: Tensor | None = None) -> Tensor:
    """Apply a rule to every column: (workers, n) -> (n,), in the rows' dtype.

    NaN sorts as +infinity.

    Args:
        kept: the rows that enter; None = all.
        mix: (any number, kept rows): the rule sees these combinations of the rows instead.
    """
    work = torch.promote_types(rows.dtype, torch.float32)
    chosen = None if kept is None or len(kept) == len(rows) else torch.as_tensor(kept, device=rows.device)
    result = rows.new_empty(rows.shape[1])
    for columns in blocks(rows):
        block = rows[:, columns] if chosen is None else rows[chosen, columns]
        block = block.to(work, copy=True)
        if mix is not None:
            block = mix.to(block) @ block
        result[columns] = rule(sort_rows(block.nan_to_num_(torch.inf, torch.inf, -torch.inf))).to(rows.dtype)
    return result


def sort_rows(block: Tensor) -> list[Tensor]:
    """Sort each column of (workers, n) by a network of comparators; return the rows, lowest first. Uses up `block`.

    A few dozen passes over short rows that stay in the cache: several times faster than sorting column by column.
    """
    rows = list(block.unbind())
    spare = torch.empty_like(block[0])
    for i, j in comparators(len(rows)):
        torch.minimum(rows[i], rows[j], out=spare)
        torch.maximum(rows[i], rows[j], out=rows[j])
        rows[i], spare = spare, rows[i]
    return rows


@cache
def comparators(count: int) -> tuple[tuple[int, int], ...]:
    """List the comparators (low, high) of Batcher's merge exchange for `count` entries.

    Source: Knuth, The Art of Computer Programming 3, section 5.2.2, algorithm M.
    """
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while count > 1 and p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return tuple(pairs)


def middle(ordered: Sequence[Tensor]) -> Tensor:
    """Return the median of sorted entries: the mean of the middle two where there are evenly many."""
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return ordered[half - 1] + (ordered[half] - ordered[half - 1]) / 2


def trimmed(ordered: Sequence[Tensor], drop: int) -> Tensor:
    """Return the mean of sorted entries without the `drop` lowest and the `drop` highest."""
    return total(ordered[drop : len(ordered) - drop]) / (len(ordered) - 2 * drop)


def nearest_mean(ordered: Sequence[Tensor], centre: Tensor, keep: int) -> Tensor:
    """Return the mean of the `keep` sorted entries nearest to a centre; of two equally near ones the lower is kept."""
    # The nearest are neighbours in the order. Seen from the lowest window, entry i gives way to entry i + keep while
    # that is nearer: so each entry modulo `keep` holds exactly one of the chosen, and no outlier is ever added.
    chosen = list(ordered[:keep])
    for i in range(len(ordered) - keep):
        low, high = ordered[i], ordered[i + keep]
        chosen[i % keep] = torch.where(centre - low > high - centre, high, chosen[i % keep])
    return total(chosen) / keep


def total(entries: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    result = entries[0].clone()
    for entry in entries[1:]:
        result += entry
    return result


def median(rows: Tensor) -> Tensor:
    """Return the median of each column of (workers, n): the mean of the middle two where workers is even.

    NaN is taken for +infinity.
    """
    return by_column(rows, middle)
