"""Watching the residual stream while a model runs: running means of cosines, by hooks on its blocks' parts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy import Block, Sublayer, Trunk, get
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.probe import Callback

Scores = tuple[float | None, ...]
"""One number a block; None where the block has no such sublayer, or it does not keep the stream's shape."""


@dataclass(frozen=True)
class State:
    """The residual stream at one place; its squared lengths are taken once and used for every pair it is in."""

    given: Tensor
    precise: Tensor
    square: Tensor
    dim: int

    @staticmethod
    def of(given: Tensor, dim: int) -> State:
        precise = given if given.dtype in (torch.float32, torch.float64) else given.float()
        return State(given, precise, torch.linalg.vecdot(precise, precise, dim=dim), dim)

    def cosine(self, other: State) -> Tensor:
        length = self.square.sqrt() * other.square.sqrt()
        dot = torch.linalg.vecdot(self.precise, other.precise, dim=self.dim)
        return dot / length.masked_fill(length == 0, 1.0)


class Mean:
    """Weighted mean that stays on the device until it is read."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, values: Tensor, weights: Tensor) -> None:
        exact = torch.float64 if values.device.type != "mps" else torch.float32
        weights = weights.to(values.dtype)
        total, count = (values * weights).sum(dtype=exact), weights.sum(dtype=exact)
        self.sum = total if self.sum is None else self.sum + total
        self.weight = count if self.weight is None else self.weight + count

    def read(self, what: str) -> float | None:
        if self.sum is None or self.weight is None:
            return None
        if not self.weight:
            raise LaminaError(f"cannot score {what}: the calibration data has no token that is not padding or zero")
        score = float(self.sum / self.weight)
        if score != score:
            raise LaminaError(f"the score of {what} is NaN: the model's activations are not finite on this data")
        return score


class Watch:
    """Turns what hooks show of the residual stream into running means.

    A block whose forward is not called (lists of parts that the model itself loops over) ends with its last sublayer.
    """

    def __init__(self, model: nn.Module, trunk: Trunk, *, keep_norm: bool, span: int | None) -> None:
        self.model, self.trunk, self.keep_norm, self.span = model, trunk, keep_norm, span
        self.sublayers = {s.path: Mean() for b in trunk.blocks for s in b.sublayers}
        self.blocks = [Mean() for _ in trunk.blocks]
        self.runs = [Mean() for _ in range(len(trunk.blocks) - span + 1)] if span else []
        self.mask: Tensor | None = None
        self.entered: dict[str, _Kept] = {}
        """The stream as each sublayer of the running block got it."""
        self.added: dict[str, Tensor] = {}
        """What the ends of its branches gave, where the block is parallel or not called."""
        self.starts: deque[State] = deque(maxlen=span or 1)
        """Inputs of the last blocks, as many as a run has, so that memory does not grow with the depth."""
        self.last: State | None = None
        """Output of the block before."""
        self.copying, self.in_place = True, False
        """Copies are taken on the first batch, and on all where a block turned out to change the stream in place."""
        modules = [get(model, b.path) for b in trunk.blocks]
        self.dims = [channel_dim(model, block) for block in trunk.blocks]
        self.called = [not isinstance(block, (nn.ModuleList, nn.ModuleDict)) for block in modules]
        self.time_first = any(getattr(m, "batch_first", True) is False for block in modules for m in block.modules())

    def callbacks(self) -> dict[str, Callback]:
        """Return what is to be called after each module that shows something."""
        found: dict[str, list[Callback]] = {}
        for index, block in enumerate(self.trunk.blocks):
            for sublayer in block.sublayers:
                for path in _entries(sublayer):
                    found.setdefault(path, []).append(self._enter(sublayer.path))
                if block.parallel or not self.called[index]:
                    found.setdefault(_end(sublayer), []).append(self._leave(sublayer.path))
            if self.called[index]:
                found.setdefault(block.path, []).append(self._finish(index))
            elif block.sublayers:
                found.setdefault(_end(block.sublayers[-1]), []).append(self._finish_listed(index))
        return {path: _each(calls) for path, calls in found.items()}

    def batch_done(self) -> None:
        """Tell that a batch is over."""
        self.copying = self.in_place

    def read(self, kind: str) -> Scores:
        """Return the means of a kind of sublayer, one a block."""
        found = [block.find(kind) for block in self.trunk.blocks]
        return tuple(None if s is None else self.sublayers[s.path].read(s.path) for s in found)

    def _enter(self, sublayer: str) -> Callback:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            # Of the norms and the branch, the one that is through first reads the stream; the rest come later.
            if sublayer not in self.entered:
                self.entered[sublayer] = _Kept.of(_stream((*args, *kwargs.values())), copy=self.copying)

        return enter

    def _leave(self, sublayer: str) -> Callback:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self.added[sublayer] = _stream(out).clone() if self.copying else _stream(out)

        return leave

    def _finish(self, index: int) -> Callback:
        def finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._score(index, _stream((*args, *kwargs.values())), _stream(out))

        return finish

    def _finish_listed(self, index: int) -> Callback:
        first, last = self.trunk.blocks[index].sublayers[0], self.trunk.blocks[index].sublayers[-1]

        def finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if first.path in self.entered:
                added = self.added[last.path]
                whole = last.residual_inside or last.place == "post"
                left = added if whole else self.entered[last.path].value + added
                self._score(index, self.entered[first.path].given, left)

        return finish

    def _score(self, index: int, entered: Tensor, left: Tensor) -> None:
        if index == 0 or entered.shape != left.shape:
            self.starts.clear()
        if entered.shape == left.shape:
            self._score_kept(index, entered, left)
        self.entered.clear()
        self.added.clear()

    def _score_kept(self, index: int, entered: Tensor, left: Tensor) -> None:
        block, dim = self.trunk.blocks[index], self.dims[index]
        start, end = self._start(block, entered, dim), State.of(left, dim)
        # What changes in place would change under the next block's hands.
        self.last = None if self.in_place else end
        if block.parallel:
            self._side_by_side(block, start)
        else:
            self._in_turn(block, start, end)
        self._add(self.blocks[index], start, end)
        self.starts.append(start)
        if self.span and len(self.starts) == self.span:
            self._add(self.runs[index - self.span + 1], self.starts[0], end)

    def _start(self, block: Block, entered: Tensor, dim: int) -> State:
        self.in_place = self.in_place or any(kept.changed() for kept in self.entered.values())
        if self.last is not None and self.last.given is entered and not self.in_place:
            return self.last
        first = self.entered.get(block.sublayers[0].path) if block.sublayers else None
        if first is not None and first.given is entered:
            return State.of(first.value, dim)
        return State.of(entered, dim)

    def _in_turn(self, block: Block, start: State, end: State) -> None:
        if not block.sublayers:
            return
        first, *rest = block.sublayers
        # What comes ahead of the first one may be no sublayer (bare weights that mix): its norm tells.
        opening = (self._before(first, end, start) or start) if first.place == "pre" else start
        states = [opening, *(self._before(s, end, start) for s in rest), end]
        for sublayer, before, after in zip(block.sublayers, states[:-1], states[1:], strict=True):
            if before is None or after is None:
                continue
            if self.keep_norm and sublayer.place == "post":
                before = State.of(get(self.model, sublayer.norms[-1])(before.given), before.dim)
            self._add(self.sublayers[sublayer.path], before, after)

    def _before(self, sublayer: Sublayer, end: State, start: State) -> State | None:
        """The stream as the sublayer got it; OPT's comes with batch and time in one."""
        kept, shape = self.entered.get(sublayer.path), end.given.shape
        if kept is None or kept.value.shape not in (shape, (shape[:-1].numel(), shape[-1])):
            return None
        if kept.value is start.given or (kept.given is start.given and not self.in_place):
            return start
        return State.of(kept.value.reshape(shape), end.dim)

    def _side_by_side(self, block: Block, start: State) -> None:
        for sublayer in block.sublayers:
            branch = self.added.get(sublayer.path)
            if branch is not None and branch.shape == start.given.shape:
                self._add(self.sublayers[sublayer.path], start, State.of(start.given + branch, start.dim))

    def _add(self, mean: Mean, before: State, after: State) -> None:
        values = before.cosine(after)
        weights = self._real(values) * (before.square > 0)
        mean.add(values, weights)

    def _real(self, values: Tensor) -> Tensor:
        if self.mask is None:
            return torch.ones_like(values)
        mask = self.mask.T if self.time_first else self.mask
        if mask.shape != values.shape:
            raise ShapeError(
                f"the padding mask is {tuple(mask.shape)}, but {self.trunk.path} works on {tuple(values.shape)} tokens"
            )
        return mask


@dataclass(frozen=True)
class _Kept:
    """A tensor that a hook saw, as it was then, and what shows that it changed since."""

    given: Tensor
    value: Tensor
    version: int | None

    @staticmethod
    def of(given: Tensor, *, copy: bool) -> _Kept:
        # Tensors of torch.inference_mode count no versions.
        version = None if given.is_inference() else given._version
        return _Kept(given, given.clone() if copy else given, version)

    def changed(self) -> bool:
        return self.version is None or self.given._version != self.version


def channel_dim(model: nn.Module, block: Block) -> int:
    """Return the dimension of the channels: 1 in a block of convolutions, else -1."""
    modules = list(get(model, block.path).modules())
    images = any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in modules)
    dense = block.find("attention") is not None or any(isinstance(m, nn.Linear) for m in modules)
    return 1 if images and not dense else -1


def _entries(sublayer: Sublayer) -> tuple[str, ...]:
    outside = (n for n in sublayer.norms if not n.startswith(f"{sublayer.parts[0]}."))
    return (*outside, sublayer.parts[0])


def _end(sublayer: Sublayer) -> str:
    """Path of the module whose output is added to the stream (post-norm: is the stream)."""
    last = sublayer.norms[-1] if sublayer.norms and sublayer.place in ("sandwich", "post") else ""
    return last if last and not any(last.startswith(f"{p}.") for p in sublayer.parts) else sublayer.parts[-1]


def _each(calls: list[Callback]) -> Callback:
    def every(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        for call in calls:
            call(module, args, kwargs, out)

    return every


def _stream(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    for value in values if isinstance(values, (tuple, list)) else ():
        if isinstance(value, Tensor):
            return value
    raise AnatomyError(f"a block handed on a {type(values).__name__} without a tensor")
