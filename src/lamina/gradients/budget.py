"""Which option of each layer is cheapest while the errors of all of them stay within a budget: solved exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lamina.errors import LaminaError, ShapeError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def solve_budget(
    errors: Sequence[ArrayLike],
    sizes: Sequence[ArrayLike],
    budget: float,
    buckets: int = 10_000,
    *,
    default: Sequence[int] | None = None,
) -> tuple[list[int], float]:
    """Choose one option a layer: the least total size among those whose total error is within the budget.

    Errors are rounded up to multiples of budget / buckets; under that rounding the answer is optimal, and its true
    error never exceeds the budget. Two choices compete besides, by their true error: the default one, which rounding
    may have pushed over the edge, and the one of least error.

    Where even the least error of every layer exceeds the budget, that choice is returned: compare `true_error`.

    Args:
        errors: of each layer, of each of its options; >= 0. NaN and infinity: not allowed.
        sizes: the same shape, in any unit.
        budget: bound on the sum of errors, >= 0.
        buckets: how finely errors are told apart.
        default: an option of each layer.
    Returns:
        (option of each layer, sum of their errors).
    Raises:
        ShapeError: errors, sizes and default do not fit together.
        LaminaError: a layer without an option that is allowed, a budget below 0.
    Source: Alimohammadi et al. (2023), arXiv 2210.17357, algorithm 1. Deviation: an option without error takes no
        bucket (there: one); options that cannot be in any optimum are left out beforehand, by their reduced costs in
        the Lagrangian relaxation, which leaves most layers one option and the dynamic programme milliseconds.
    Example:
        >>> solve_budget([[0, 3], [0, 1]], [[10, 2], [10, 5]], budget=3)
        ([1, 0], 3.0)
    """
    e, s = _tables(errors, sizes, budget, default)
    rows = np.arange(len(e))
    least = _least(e, s)
    candidates = [least]
    if default is not None:
        candidates.append(np.asarray(default, dtype=np.int64))
    # Rounding errors of the quotient may put the sum an ulp over the edge: then with a bucket less.
    for room in (buckets, buckets - 1):
        found = _within(e, s, budget, buckets, room)
        if found is None:
            break
        if math.fsum(e[rows, found]) <= budget:
            candidates.append(found)
            break
    fitting = [c for c in candidates if math.fsum(e[rows, c]) <= budget]
    best = min(fitting, key=lambda c: (float(s[rows, c].sum()), math.fsum(e[rows, c])), default=least)
    return best.tolist(), math.fsum(e[rows, best])


def _tables(
    errors: Sequence[ArrayLike], sizes: Sequence[ArrayLike], budget: float, default: Sequence[int] | None
) -> tuple[Floats, Floats]:
    """Return errors and sizes as (layers, options), options that are not there or not allowed infinite."""
    each = [
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)) for a, b in zip(errors, sizes, strict=False)
    ]
    if len(errors) != len(sizes) or any(a.shape != b.shape or a.ndim != 1 for a, b in each):
        raise ShapeError(f"errors and sizes must have the same layers and options, got {len(errors)} and {len(sizes)}")
    if default is not None and (
        len(default) != len(each) or any(not 0 <= d < len(a) for d, (a, _) in zip(default, each, strict=True))
    ):
        raise ShapeError(f"default must name one option of each of {len(each)} layers, got {list(default)[:8]}")
    if not budget >= 0:
        raise LaminaError(f"budget must be at least 0, got {budget!r}")
    most = max((len(a) for a, _ in each), default=1)
    e = np.full((len(each), most), np.inf)
    s = np.full((len(each), most), np.inf)
    for i, (a, b) in enumerate(each):
        if (a < 0).any():
            raise LaminaError(f"errors must be at least 0, layer {i} has {a.min()}")
        e[i, : len(a)] = np.where(np.isnan(a), np.inf, a)
        s[i, : len(b)] = b
    s[np.isinf(e)] = np.inf
    lost = np.flatnonzero(np.isinf(e).all(axis=1))
    if len(lost):
        raise LaminaError(f"layer {lost[0]} has no option with a finite error")
    return e, s


def _least(e: Floats, s: Floats) -> Integers:
    """Return the option of least error of each layer, the smallest of several."""
    tied = e <= e.min(axis=1, keepdims=True)
    return np.where(tied, s, np.inf).argmin(axis=1)


def _within(e: Floats, s: Floats, budget: float, buckets: int, room: int) -> Integers | None:
    """Solve with errors in whole buckets; None where nothing fits."""
    with np.errstate(invalid="ignore"):
        steps = np.ceil(e * buckets / budget) if budget > 0 else np.where(e > 0, np.inf, 0.0)
    steps[~(steps <= room)] = np.inf
    if np.isinf(steps).all(axis=1).any() or steps.min(axis=1).sum() > room:
        return None
    s = np.where(np.isinf(steps), np.inf, s)
    return _dynamic(steps, s, room, _worth_trying(steps, s, room))


def _worth_trying(steps: Floats, s: Floats, room: int) -> NDArray[np.bool_]:
    """Say which options some optimum may have: at a price per bucket, taking another one alone must not cost more
    than the gap between a choice that fits and the bound that the price gives.
    """
    rows = np.arange(len(s))
    low, high = 0.0, 1.0
    fits = steps.argmin(axis=1)
    upper = float(s[rows, fits].sum())
    bound, price = -math.inf, 0.0
    finite = np.where(np.isinf(steps), 0.0, steps)

    def at(price: float) -> tuple[Floats, Integers, float]:
        cost = s + price * finite
        chosen = cost.argmin(axis=1)
        return cost, chosen, float(finite[rows, chosen].sum())

    while at(high)[2] > room and high < 1e30:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        cost, chosen, used = at(middle)
        value = float(cost[rows, chosen].sum()) - middle * room
        if value > bound:
            bound, price = value, middle
        if used <= room:
            high = middle
            upper = min(upper, float(s[rows, chosen].sum()))
        else:
            low = middle
    _, fits, used = at(high)
    if used <= room:
        upper = min(upper, _filled(steps, s, room, fits))
    cost, chosen, _ = at(price)
    slack = 1e-9 * (1 + abs(upper))
    keep: NDArray[np.bool_] = cost - cost[rows, chosen][:, None] <= upper - bound + slack
    return keep & np.isfinite(s)


def _filled(steps: Floats, s: Floats, room: int, chosen: Integers) -> float:
    """Return the size after what room a choice leaves is spent where it saves most, one layer after another."""
    rows = np.arange(len(s))
    chosen = chosen.copy()
    for _ in range(len(s)):
        free = room - steps[rows, chosen].sum()
        saved = np.where(steps - steps[rows, chosen][:, None] <= free, s[rows, chosen][:, None] - s, 0.0)
        layer, option = np.unravel_index(int(saved.argmax()), saved.shape)
        if saved[layer, option] <= 0:
            break
        chosen[layer] = option
    return float(s[rows, chosen].sum())


def _dynamic(steps: Floats, s: Floats, room: int, keep: NDArray[np.bool_]) -> Integers:
    """Fill the table layer by layer over the buckets used so far, and walk back from the cheapest end."""
    count = len(steps)
    whole = np.where(keep, steps, 0).astype(np.int64)
    rest = [np.flatnonzero(k) for k in keep]
    answer = np.array([r[0] if len(r) else 0 for r in rest], dtype=np.int64)
    open_layers = [i for i in range(count) if len(rest[i]) > 1]
    room -= int(sum(whole[i, answer[i]] for i in range(count) if len(rest[i]) == 1))
    table = np.zeros(room + 1)
    # table[b]: the least size with at most b buckets used.
    taken = np.zeros((len(open_layers), room + 1), dtype=np.int16)
    for t, i in enumerate(open_layers):
        new = np.full(room + 1, np.inf)
        for option in rest[i]:
            used = whole[i, option]
            if used > room:
                continue
            cost = table[: room + 1 - used] + s[i, option]
            better = cost < new[used:]
            new[used:][better] = cost[better]
            taken[t, used:][better] = option
        table = new
    left = room
    for t in range(len(open_layers) - 1, -1, -1):
        answer[open_layers[t]] = taken[t, left]
        left -= int(whole[open_layers[t], taken[t, left]])
    return answer
