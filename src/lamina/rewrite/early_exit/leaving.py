"""One forward pass with exits: blocks report to a run, a rule says who leaves, and those are not computed again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError
from lamina.rewrite.early_exit.halting import LambdaHead


class Run(Protocol):
    """One forward pass as the blocks see it."""

    def block(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one block, or what of it is needed, and return what the model shall go on with."""
        ...


class Exits:
    """What the blocks of one model report to; without a run they work as ever."""

    def __init__(self) -> None:
        self.run: Run | None = None


class Reporting:
    """Stands as the forward of one block, so that no name in the model changes."""

    def __init__(self, plain: Callable[..., Any], exits: Exits) -> None:
        self.plain, self.exits = plain, exits
        self.__signature__ = inspect.signature(plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or leave it to the run that goes on."""
        run = self.exits.run
        return self.plain(*args, **kwargs) if run is None else run.block(self.plain, args, kwargs)


class EveryLayer:
    """Every layer for every row, all streams kept: training, and the expectation."""

    def __init__(self) -> None:
        self.streams: list[Tensor] = []

    def block(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block and keep its stream."""
        result = plain(*args, **kwargs)
        self.streams.append(_stream_of(result))
        return result


class Rule(Protocol):
    """Says who leaves; keeps what it needs of the rows that stay."""

    def leaves(self, h: Tensor, layer: int) -> Tensor:
        """Say of each row's h (B, C), after this layer (1..n), whether it leaves: (B,) bool."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices) alone."""
        ...


class ByProbability:
    """Q-exit, or a draw."""

    def __init__(self, head: LambdaHead, q: float | None) -> None:
        self.head, self.q = head, q
        self.carried: Tensor | None = None
        self.stayed: Tensor | None = None

    def leaves(self, h: Tensor, layer: int) -> Tensor:
        """See `Rule`."""
        logits, self.carried = self.head.step(h, self.carried)
        if self.q is None:
            return torch.rand_like(logits) < torch.sigmoid(logits)
        staying = F.logsigmoid(-logits)
        self.stayed = staying if self.stayed is None else self.stayed + staying
        return 1.0 - self.stayed.exp() > self.q

    def keep(self, rows: Tensor) -> None:
        """See `Rule`."""
        self.carried = None if self.carried is None else self.carried[rows]
        self.stayed = None if self.stayed is None else self.stayed[rows]


class ByPatience:
    """The same answer so many times on end (PABEE)."""

    def __init__(self, answer: Callable[[Tensor, int], Tensor], patience: int, tolerance: float) -> None:
        self.answer, self.patience, self.tolerance = answer, patience, tolerance
        self.last: Tensor | None = None
        self.count: Tensor | None = None

    def leaves(self, h: Tensor, layer: int) -> Tensor:
        """See `Rule`."""
        scores = self.answer(h, layer)
        now = scores[:, 0] if scores.shape[1] == 1 else scores.argmax(1)
        if self.last is None or self.count is None:
            self.count = torch.zeros_like(now, dtype=torch.long)
        else:
            same = (now - self.last).abs() < self.tolerance if scores.shape[1] == 1 else now == self.last
            self.count = torch.where(same, self.count + 1, 0)
        self.last = now
        return self.count >= self.patience

    def keep(self, rows: Tensor) -> None:
        """See `Rule`."""
        self.last = None if self.last is None else self.last[rows]
        self.count = None if self.count is None else self.count[rows]


class Leaving:
    """Layer by layer: whoever has left keeps the stream it left with, to the model's own end of the pass.

    With `compact` the blocks get the rows that are still there and nothing else, and are not called for none; without,
    they get all rows, and what they make of those that left is dropped.
    """

    def __init__(
        self,
        rule: Rule,
        read: Callable[[Tensor, Tensor | None], Tensor],
        mask: Tensor | None,
        depth: int,
        fixed: tuple[str, ...],
        *,
        compact: bool,
    ) -> None:
        self.rule, self.read, self.mask = rule, read, mask
        self.depth, self.fixed, self.compact = depth, fixed, compact
        self.ran = 0
        self.left_at: Tensor | None = None
        self.staying: Tensor | None = None
        """Compact: indices of the rows still there, None = all. Else a mask of them."""
        self.last: Any = None

    @property
    def stream(self) -> Tensor:
        """What the last block gave the model: each row's stream as it left."""
        return _stream_of(self.last)

    def block(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block for the rows that are still there, and ask the rule."""
        self.ran += 1
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        if self.left_at is None:
            self.left_at = torch.full((len(x),), self.depth, dtype=torch.long, device=x.device)
        if self.compact:
            self.last = self._compact(plain, x, args, kwargs)
        else:
            self.last = self._gathered(plain, x, args, kwargs)
        return self.last

    def _compact(self, plain: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        there = self.staying
        if there is not None and not len(there):
            return self.last
        if there is not None:
            args = tuple(self._rows(a, str(i), there, len(x)) for i, a in enumerate(args))
            kwargs = {k: self._rows(v, k, there, len(x)) for k, v in kwargs.items()}
        result = plain(*args, **kwargs)
        y = _stream_of(result)
        if self.ran < self.depth:
            mask = self.mask if there is None or self.mask is None else self.mask[there]
            leaves = self.rule.leaves(self.read(y, mask), self.ran)
            (gone,) = leaves.nonzero(as_tuple=True)
            if len(gone):
                (rest,) = leaves.logical_not().nonzero(as_tuple=True)
                assert self.left_at is not None
                self.left_at[gone if there is None else there[gone]] = self.ran
                self.staying = rest if there is None else there[rest]
                if len(rest):
                    self.rule.keep(rest)
        return result if there is None else _put_back(x, result, there)

    def _gathered(self, plain: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = plain(*args, **kwargs)
        y = _stream_of(result)
        there = self.staying
        if there is not None:
            y = torch.where(there[:, None, None], y, x.to(y.dtype))
            result = (y, *result[1:]) if isinstance(result, tuple) else y
        if self.ran < self.depth:
            leaves = self.rule.leaves(self.read(y, self.mask), self.ran)
            assert self.left_at is not None
            new = leaves if there is None else leaves & there
            self.left_at = torch.where(new, self.ran, self.left_at)
            self.staying = ~leaves if there is None else there & ~leaves
        return result

    def _rows(self, value: Any, key: str, there: Tensor, count: int) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, there) if value.shape[:1] == (count,) and key not in self.fixed else value
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self._rows(v, f"{key}.{i}", there, count) for i, v in enumerate(value))
        if type(value) is dict:
            return {k: self._rows(v, f"{key}.{k}", there, count) for k, v in value.items()}
        return value


def _stream_of(result: Any) -> Tensor:
    stream = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(stream, Tensor):
        raise LaminaError(f"a block returned a {type(result).__name__}, expected a tensor or a tuple that begins so")
    return stream


def _put_back(x: Tensor, result: Any, there: Tensor) -> Any:
    """Give a block's result its full number of rows: those that left keep what they had."""
    y = _stream_of(result)
    full = x.to(y.dtype).index_copy(0, there, y)
    if not isinstance(result, (tuple, list)):
        return full
    return (full, *(_spread(r, there, len(x)) for r in result[1:]))


def _spread(value: Any, there: Tensor, count: int) -> Any:
    if isinstance(value, Tensor) and value.shape[:1] == there.shape:
        return value.new_zeros(count, *value.shape[1:]).index_copy(0, there, value)
    return value
