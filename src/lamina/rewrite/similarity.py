"""How little each sublayer and block changes the residual stream, measured in one forward pass over some data."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy import Block, Sublayer, Trunk, get, undisturbed
from lamina.batches import Batch, bare, call, to_device
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.probe import Callback, observe

Scores = tuple[float | None, ...]
"""One number a block; None where the block has no such sublayer, or it does not keep the stream's shape."""

FEW_TOKENS = 1000
"""Below this many tokens the means are rough, and a log line says so."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Similarity:
    """Mean cosine between the residual stream before and after, per block in order; 1 = changes nothing."""

    attention: Scores
    mlp: Scores
    block: Scores
    runs: Scores = ()
    """Asked for with `span`: cosine from the input of block i to the output of block i + span - 1."""
    tokens: int = 0
    """Tokens the means are over: padding and all-zero vectors are left out."""


@torch.no_grad()
def similarity(
    model: nn.Module,
    trunk: Trunk,
    data: Iterable[Batch],
    *,
    samples: int = 256,
    keep_norm: bool = False,
    span: int | None = None,
) -> Similarity:
    """Score every sublayer and block of a trunk in one pass, by sums that run along; no activation outlives a batch.

    The cosine is over channels, in float32, between what the stream is and what it would be without the part; the
    mean is over real tokens (`attention_mask`, `decoder_attention_mask` for a decoder that has an encoder,
    `src_key_padding_mask`). The model runs in evaluation mode and is as before afterwards.

    Args:
        samples: rows of data that are looked at.
        keep_norm: score a post-norm sublayer against norm(x), as dropping it but not its norm would leave.
        span: score each run of this many blocks, too.
    Raises:
        LaminaError: no data, weights on the meta device, or a score that is not finite.
    Source: He et al. (2024), arXiv 2406.15786, equations 2-4.
    """
    model = bare(model)
    if any(p.is_meta for p in model.parameters()):
        raise LaminaError(f"{type(model).__name__} has weights on the meta device: there is nothing to score")
    watch = _Watch(model, trunk, keep_norm, span)
    options = _cheaper(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with undisturbed(model), observe(model, watch.callbacks()):
        for batch in take(data, samples):
            moved = to_device(batch, device)
            watch.mask = _mask(moved, trunk)
            call(model, moved, **options)
    return watch.result()


def take(data: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Yield batches until `samples` rows are reached, the last one cut to fit.

    Raises:
        LaminaError: the data is empty.
    """
    left = samples
    for batch in data:
        rows = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)
        if rows > left:
            batch = {k: v[:left] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
        yield batch
        left -= rows
        if left <= 0:
            return
    if left == samples:
        raise LaminaError("the calibration data is empty: similarity needs at least one batch")


def cosine(x: Tensor, y: Tensor, dim: int = -1) -> Tensor:
    """Cosine between vectors along `dim`, in float32 or better; 0 where either is all zero."""
    return _State.of(x, dim).cosine(_State.of(y, dim))


@dataclass(frozen=True)
class _State:
    """The residual stream at one place; its squared lengths are taken once and used for every pair it is in."""

    given: Tensor
    precise: Tensor
    square: Tensor
    dim: int

    @staticmethod
    def of(given: Tensor, dim: int) -> _State:
        precise = given if given.dtype in (torch.float32, torch.float64) else given.float()
        return _State(given, precise, torch.linalg.vecdot(precise, precise, dim=dim), dim)

    def cosine(self, other: _State) -> Tensor:
        length = (self.square * other.square).sqrt()
        dot = torch.linalg.vecdot(self.precise, other.precise, dim=self.dim)
        return dot / length.masked_fill(length == 0, 1.0)


class _Mean:
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


class _Watch:
    """Turns what the hooks show into running means."""

    def __init__(self, model: nn.Module, trunk: Trunk, keep_norm: bool, span: int | None) -> None:
        self.model, self.trunk, self.keep_norm, self.span = model, trunk, keep_norm, span
        self.sublayers = {s.path: _Mean() for b in trunk.blocks for s in b.sublayers}
        self.blocks = [_Mean() for _ in trunk.blocks]
        self.runs = [_Mean() for _ in range(len(trunk.blocks) - span + 1)] if span else []
        self.mask: Tensor | None = None
        self.seen: dict[str, Tensor] = {}
        """What the entries (of parallel branches: the ends) of the running block showed."""
        self.starts: deque[_State] = deque(maxlen=span or 1)
        """Inputs of the last blocks, as many as a run has, so that memory does not grow with the depth."""
        self.last: _State | None = None
        """Output of the block before."""
        self.dims = [channel_dim(model, block) for block in trunk.blocks]
        self.time_first = any(
            getattr(m, "batch_first", True) is False for b in trunk.blocks for m in get(model, b.path).modules()
        )

    def callbacks(self) -> dict[str, Callback]:
        found: dict[str, Callback] = {}
        for index, block in enumerate(self.trunk.blocks):
            for sublayer in block.sublayers if block.parallel else block.sublayers[1:]:
                path = end_of(sublayer) if block.parallel else entry_of(sublayer)
                found[path] = self._see(path, output=block.parallel)
            found[block.path] = self._finish(index)
        return found

    def _see(self, path: str, *, output: bool) -> Callback:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self.seen[path] = _stream(out if output else (*args, *kwargs.values()))

        return see

    def _finish(self, index: int) -> Callback:
        def finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._score(index, _stream((*args, *kwargs.values())), _stream(out))
            self.seen.clear()

        return finish

    def _score(self, index: int, entered: Tensor, left: Tensor) -> None:
        if index == 0:
            self.starts.clear()
        if entered.shape != left.shape:
            self.starts.clear()
            return
        block, dim = self.trunk.blocks[index], self.dims[index]
        known = self.last is not None and self.last.given is entered
        start = self.last if known and self.last is not None else _State.of(entered, dim)
        end = self.last = _State.of(left, dim)
        if block.parallel:
            self._side_by_side(block, start)
        else:
            self._in_turn(block, start, end)
        self._add(self.blocks[index], start, end)
        self.starts.append(start)
        if self.span and len(self.starts) == self.span:
            self._add(self.runs[index - self.span + 1], self.starts[0], end)

    def _in_turn(self, block: Block, start: _State, end: _State) -> None:
        if not block.sublayers:
            return
        middle = [self._entered(entry_of(s), end) for s in block.sublayers[1:]]
        states = [start, *middle, end]
        for sublayer, before, after in zip(block.sublayers, states[:-1], states[1:], strict=True):
            if before is None or after is None:
                continue
            if self.keep_norm and sublayer.place == "post":
                before = _State.of(get(self.model, sublayer.norms[-1])(before.given), before.dim)
            self._add(self.sublayers[sublayer.path], before, after)

    def _entered(self, path: str, end: _State) -> _State | None:
        """The stream as the module at `path` got it; OPT's comes with batch and time in one."""
        value, shape = self.seen.get(path), end.given.shape
        if value is None or value.shape[end.dim] != shape[end.dim] or value.numel() != end.given.numel():
            return None
        return _State.of(value.reshape(shape), end.dim)

    def _side_by_side(self, block: Block, start: _State) -> None:
        for sublayer in block.sublayers:
            branch = self.seen.get(end_of(sublayer))
            if branch is not None and branch.shape == start.given.shape:
                self._add(self.sublayers[sublayer.path], start, _State.of(start.given + branch, start.dim))

    def _add(self, mean: _Mean, before: _State, after: _State) -> None:
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

    def result(self) -> Similarity:
        name = self.trunk.path
        blocks = tuple(m.read(f"block {i} of {name}") for i, m in enumerate(self.blocks))
        tokens = max((int(m.weight) for m in self.blocks if m.weight is not None), default=0)
        if tokens < FEW_TOKENS:
            _log.warning("similarity of %s is measured on %d tokens only: the scores are rough", name, tokens)
        return Similarity(
            attention=self._of("attention"),
            mlp=self._of("mlp"),
            block=blocks,
            runs=tuple(m.read(f"the run of {self.span} blocks from {i} of {name}") for i, m in enumerate(self.runs)),
            tokens=tokens,
        )

    def _of(self, kind: str) -> Scores:
        found = [block.find(kind) for block in self.trunk.blocks]
        return tuple(None if s is None else self.sublayers[s.path].read(s.path) for s in found)


def entry_of(sublayer: Sublayer) -> str:
    """Path of the module that reads the stream first: the norm before the branch, or the branch."""
    norm = sublayer.norms[0] if sublayer.norms else ""
    before = sublayer.place in ("pre", "sandwich") and not norm.startswith(sublayer.parts[0] + ".")
    return norm if before and norm else sublayer.parts[0]


def end_of(sublayer: Sublayer) -> str:
    """Path of the module whose output is added to the stream."""
    return sublayer.norms[-1] if sublayer.place == "sandwich" and len(sublayer.norms) > 1 else sublayer.parts[-1]


def _stream(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    for value in values if isinstance(values, (tuple, list)) else ():
        if isinstance(value, Tensor):
            return value
    raise AnatomyError(f"a block handed on a {type(values).__name__} without a tensor")


def channel_dim(model: nn.Module, block: Block) -> int:
    """Return the dimension of the channels: 1 in a block of convolutions, else -1."""
    modules = list(get(model, block.path).modules())
    images = any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in modules)
    return (
        1 if images and block.find("attention") is None and not any(isinstance(m, nn.Linear) for m in modules) else -1
    )


def _mask(batch: Batch, trunk: Trunk) -> Tensor | None:
    """The batch's real tokens (B, T), True = real, or None; a decoder that has an encoder has its own mask."""
    decoding = "decoder" in trunk.path.split(".") and any(k.startswith("decoder_") for k in batch)
    mask = batch.get("decoder_attention_mask" if decoding else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    padding = batch.get("src_key_padding_mask")
    return ~padding.bool() if isinstance(padding, Tensor) and not decoding else None


def _cheaper(model: nn.Module) -> dict[str, Any]:
    """Options of a Hugging Face forward that leave out what scoring does not need."""
    taken = inspect.signature(model.forward).parameters
    return {k: v for k, v in (("use_cache", False), ("logits_to_keep", 1)) if k in taken}
