"""ListOps: nested operations on lists of digits, whose value is the class; made by a generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import IO

import numpy as np
import torch
from torch import Tensor

from lamina.data._arrays import Array
from lamina.data._files import cached
from lamina.data.examples import Data
from lamina.errors import LaminaError
from lamina.registry import register

TOKENS = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""The vocabulary, in the order of the token numbers: digit d is token d + 1."""

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: _median(values),
    "[SM": lambda values: sum(values) % 10,
}
"""What each operator does; the median of an even number of values is the mean of the middle two, rounded down."""

OPERATOR_SHARE = 0.25
"""Probability of an operator where the depth allows one."""

_NUMBER = {token: i for i, token in enumerate(TOKENS)}
_CHOICES = list(OPERATORS)


@register("data", source="Nangia and Bowman 2018; Tay et al. 2020")
def listops(
    context: int = 2000,
    batch: int = 32,
    *,
    shortest: int = 500,
    depth: int = 10,
    arguments: int = 10,
    rows: int = 96_000,
    evaluation_rows: int = 2000,
    seed: int = 0,
) -> Data:
    """Expressions like `[MAX 2 9 [MIN 4 7 ] 0 ]`: `input_ids`, `attention_mask` (B, context), `labels` (B,) 0..9.

    Needs the nesting to be understood: a task that favours depth. The defaults are those of the Long Range Arena;
    making them takes minutes, once (they are kept in the cache folder). All expressions are different.

    Args:
        context: tokens of the longest expression; shorter ones are padded.
        batch: global batch size.
        shortest: tokens of the shortest expression.
        depth: levels of the deepest expression, the digits counted.
        arguments: most arguments of an operator; the fewest are 2.
        rows: expressions to train on.
        evaluation_rows: expressions held out; 0 = none.
        seed: of the expressions.
    Raises:
        LaminaError: a number out of range, or expressions of those lengths do not turn up (too shallow, too few).
    Source: Nangia, Bowman, ListOps (2018), arXiv 1804.06028; generator and sizes: Tay et al., Long Range Arena (2020),
        arXiv 2011.04006, section 2.2.1. Deviation: lengths are counted without the parentheses that its files hold.
    """
    _check(context, shortest, depth, arguments, rows, evaluation_rows)
    name = f"listops/{context}-{shortest}-{depth}-{arguments}-{rows + evaluation_rows}-{seed}.npz"

    def write(file: IO[bytes]) -> None:
        tokens, starts, labels = _generate(rows + evaluation_rows, shortest, context, depth, arguments, seed)
        np.savez_compressed(file, tokens=tokens, starts=starts, labels=labels)

    with np.load(cached(name, write), allow_pickle=False) as found:
        every = _Expressions(found["tokens"], found["starts"], found["labels"], context)
    train, held = every.part(0, rows), every.part(rows, rows + evaluation_rows)
    sizes = {"vocabulary": len(TOKENS), "context": context, "classes": 10}
    return Data(train, held if evaluation_rows else None, batch, sizes, "listops")


class _Expressions:
    """Expressions back to back, from `starts[i]` to `starts[i + 1]`."""

    def __init__(self, tokens: Array, starts: Array, labels: Array, context: int) -> None:
        self.tokens, self.starts, self.labels, self.context = tokens, starts, labels, context

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, first: int, last: int) -> _Expressions:
        """Return some of the rows."""
        return _Expressions(self.tokens, self.starts[first : last + 1], self.labels[first:last], self.context)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return padded rows with their mask and value."""
        ids = np.zeros((len(indices), self.context), dtype=np.int64)
        for row, i in enumerate(indices.tolist()):
            expression = self.tokens[self.starts[i] : self.starts[i + 1]]
            ids[row, : len(expression)] = expression
        labels = torch.from_numpy(self.labels[indices.numpy()].astype(np.int64))
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(ids > 0), "labels": labels}


class _TooLong(Exception):
    """An expression has more tokens than allowed."""


def _generate(
    rows: int, shortest: int, longest: int, depth: int, arguments: int, seed: int, tries: int = 10_000
) -> tuple[Array, Array, Array]:
    """Draw expressions until there are enough; returns the tokens, where each starts (and the last ends), the values.

    Args:
        tries: draws in a row without a new expression after which there are no more.
    """
    draw, seen, failed = random.Random(seed), set(), 0
    kept: list[bytes] = []
    labels: list[int] = []
    while len(kept) < rows:
        tokens = bytearray()
        try:
            value = _expression(tokens, 1, depth, arguments, longest, draw.random)
        except _TooLong:
            value = -1
        if value < 0 or len(tokens) < shortest or bytes(tokens) in seen:
            failed += 1
            if failed > tries:
                raise LaminaError(
                    f"listops found only {len(kept)} different expressions of {shortest} to {longest} tokens, of depth "
                    f"{depth} and at most {arguments} arguments; asked for are {rows}: allow other lengths or depths"
                )
            continue
        failed = 0
        kept.append(bytes(tokens))
        seen.add(kept[-1])
        labels.append(value)
    starts = np.cumsum([0, *map(len, kept)])
    return np.frombuffer(b"".join(kept), dtype=np.uint8), starts, np.array(labels, dtype=np.uint8)


def _expression(
    tokens: bytearray, level: int, depth: int, arguments: int, longest: int, draw: Callable[[], float]
) -> int:
    """Append a random expression and return its value."""
    if len(tokens) >= longest:
        raise _TooLong
    if level >= depth or draw() >= OPERATOR_SHARE:
        digit = int(draw() * 10)
        tokens.append(digit + 1)
        return digit
    count = 2 + int(draw() * (arguments - 1))
    operator = _CHOICES[int(draw() * len(_CHOICES))]
    tokens.append(_NUMBER[operator])
    values = [_expression(tokens, level + 1, depth, arguments, longest, draw) for _ in range(count)]
    if len(tokens) >= longest:
        raise _TooLong
    tokens.append(_NUMBER["]"])
    return OPERATORS[operator](values)


def _median(values: list[int]) -> int:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def _check(context: int, shortest: int, depth: int, arguments: int, rows: int, evaluation_rows: int) -> None:
    if not 1 <= shortest <= context:
        raise LaminaError(f"shortest must lie in 1..context ({context}), got {shortest}")
    if depth < 1 or arguments < 2:
        raise LaminaError(f"depth must be at least 1 and arguments at least 2, got {depth} and {arguments}")
    if rows < 1 or evaluation_rows < 0:
        raise LaminaError(f"rows must be at least 1 and evaluation_rows not negative, got {rows} and {evaluation_rows}")
