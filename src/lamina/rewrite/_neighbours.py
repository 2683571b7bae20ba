"""Who reads what a norm puts out, followed through operations that a scale and shift of every channel commutes with.

Seen in a forward pass over one batch: a tensor is known by its identity, and with it goes the dimension in which its
channels lie. Reshapes, transposes, a choice of tokens and their mean are followed; any other operation is a reader.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lamina import probe
from lamina.anatomy import get, undisturbed
from lamina.batches import Batch, call
from lamina.rewrite._links import RESULT, links_on_symbols, tensors_in


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: the output of a module, moved about."""

    path: str
    from_last: int
    """Place of the channels, counted from the last dimension: -1, -2, ..."""


@dataclass
class Neighbours:
    """What was seen of the watched modules, by path."""

    readers: dict[str, dict[str, None]] = field(default_factory=dict)
    """Who uses its output, in order: paths of watched modules, else words for operations."""
    given: dict[str, list[tuple[Source | None, ...]]] = field(default_factory=dict)
    """For every call, the sources of the tensors it was called with."""

    def sources(self, path: str) -> set[Source | None]:
        """Return what a module was ever called with; None stands for anything that was not followed."""
        return {source for one in self.given.get(path, []) for source in one}


def neighbours_of_run(model: nn.Module, batch: Batch, watched: Collection[str]) -> Neighbours:
    """Run a model once in evaluation mode, without gradients."""
    seen = Neighbours()
    follower = _Follower(model, seen)
    before = {path: functools.partial(follower.starts, path) for path in watched}
    after = {path: functools.partial(follower.ends, path) for path in watched}
    unseeded = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with unseeded, undisturbed(model), torch.no_grad(), probe.observe(model, after, before), follower:
        result = call(model, batch)
    follower.read((result,), RESULT)
    return seen


def neighbours_on_symbols(model: nn.Module, watched: Collection[str]) -> Neighbours:
    """Trace with torch.fx, whole or in parts: direct readers alone; what was not traced is not in the answer."""
    links, _ = links_on_symbols(model, watched)
    seen = Neighbours()
    for path, calls in links.items():
        for one in calls:
            source = None if one.reads is None else Source(one.reads, channels_from_last(get(model, one.reads)))
            # An argument more may be the very tensor again (an attention's query, key and value), or not.
            seen.given.setdefault(path, []).append((source,) if one.alone else (source, None))
            seen.readers.setdefault(path, {}).update(dict.fromkeys(one.readers))
    return seen


def channels_from_last(module: nn.Module) -> int:
    """Return the place of the channels in what a module puts out and takes in."""
    spatial = len(getattr(module, "kernel_size", ()))
    return -1 - spatial


class _Follower(TorchDispatchMode):
    def __init__(self, model: nn.Module, seen: Neighbours) -> None:
        super().__init__()
        self.model, self.seen = model, seen
        self.inside: list[str] = []
        self.known: dict[int, tuple[Tensor, Source]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket.__name__)
        if self.inside:
            self.read((args, kwargs), self.inside[-1])
        elif not self._follows(name, args, kwargs or {}, result):
            self.read((args, kwargs), name)
        return result

    def starts(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if isinstance(module, nn.MultiheadAttention):
            names = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            given = [names[n] for n in ("query", "key", "value")]
        self.seen.given.setdefault(path, []).append(tuple(self._source(t) for t in given))
        self.inside.append(path)

    def ends(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.inside.pop()
        if isinstance(output, Tensor) and output.dim():
            # A module that returns its input made nothing.
            self.known.setdefault(id(output), (output, Source(path, channels_from_last(module))))

    def read(self, value: Any, reader: str) -> None:
        for tensor in tensors_in(value):
            source = self._source(tensor)
            if source is not None:
                self.seen.readers.setdefault(source.path, {})[reader] = None

    def _source(self, tensor: Tensor) -> Source | None:
        kept, source = self.known.get(id(tensor), (None, None))
        # It is held, so nothing else can have its identity.
        return source if kept is tensor else None

    def _follows(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> bool:
        """Hand the source of the first argument on to the result, where the operation commutes with scale and shift."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        source = None if first is None else self._source(first)
        if first is None or source is None or any(self._source(t) for t in tensors_in((args[1:], kwargs))):
            return False
        if name == "as_strided_":
            # Torch's pooling to one cell words its result's layout anew.
            return _keeps_order(first, args[2])
        made = [t for t in tensors_in((result,)) if t is not first]
        moved = [channels_after(name, first, args[1:], kwargs, t, first.dim() + source.from_last) for t in made]
        if not made or any(place is None for place in moved):
            return False
        for tensor, place in zip(made, moved, strict=True):
            assert place is not None
            self.known[id(tensor)] = (tensor, Source(source.path, place - tensor.dim()))
        return True


_SAME = frozenset({"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh"})
_VIEWS = frozenset({"view", "_unsafe_view", "_reshape_alias", "reshape", "unsqueeze", "squeeze"})
_PARTS = frozenset({"select", "slice", "split", "split_with_sizes", "unbind", "index_select", "mean"})


def channels_after(
    name: str, x: Tensor, rest: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor, channel: int
) -> int | None:
    """Return where the channels are after an operation; None = it is not known to leave every channel as it was.

    Args:
        rest: the arguments after x.
        channel: the dimension of x they are in.
    """
    if name in _SAME:
        return channel
    if name in _VIEWS:
        return _through_view(x, result, channel)
    if name in ("transpose", "t"):
        one, two = (d % x.dim() for d in (rest[:2] if name == "transpose" else (0, 1)))
        return {one: two, two: one}.get(channel, channel)
    if name == "permute":
        return [d % x.dim() for d in rest[0]].index(channel)
    if name == "expand":
        return channel + result.dim() - x.dim()
    if name == "_adaptive_avg_pool2d":
        return channel if channel < x.dim() - 2 else None
    if name == "index":
        # Each index takes a dimension, a mask as many as it has.
        taken = sum(i.dim() if isinstance(i, Tensor) and i.dtype is torch.bool else 1 for i in rest[0])
        return result.dim() - 1 if channel == x.dim() - 1 and taken <= channel else None
    return _through_part(name, x, rest, kwargs, result, channel) if name in _PARTS else None


def _keeps_order(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether strides are those of a contiguous tensor, wherever there is more than one number."""
    plain = torch.empty(x.shape, device="meta").stride()
    return all(size == 1 or a == b for size, a, b in zip(x.shape, strides, plain, strict=True))


def _through_view(x: Tensor, result: Tensor, channel: int) -> int | None:
    """Find the dimension of the same size with as many numbers behind it (and so before it)."""
    behind = math.prod(x.shape[channel + 1 :])
    for place, size in enumerate(result.shape):
        if size == x.shape[channel] and math.prod(result.shape[place + 1 :]) == behind:
            return place
    return None


def _through_part(
    name: str, x: Tensor, rest: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor, channel: int
) -> int | None:
    """Follow a choice along, or the mean over, other dimensions than the channels'."""
    at = 1 if name in ("split", "split_with_sizes") else 0
    dims = kwargs.get("dim", rest[at] if len(rest) > at else 0)
    if dims is None or (name == "mean" and not (rest or "dim" in kwargs)):
        return None
    gone = sorted({d % x.dim() for d in (dims if isinstance(dims, (list, tuple)) else [dims])})
    if channel in gone or (name == "mean" and not gone):
        return None
    return channel if result.dim() == x.dim() else channel - sum(d < channel for d in gone)
