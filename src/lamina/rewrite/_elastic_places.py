"""Where a model can be elastic: stages of blocks, hidden channels, depthwise kernels; which channels come first."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina import anatomy
from lamina.errors import AnatomyError
from lamina.nn.elastic import plain_class
from lamina.nn.elastic.layers import CONVOLUTIONS, ElasticDepthwiseConv, layer_kind
from lamina.rewrite._elastic_trace import BlockView, Group, look_into

Sampling = Literal["independent", "compound"]


@dataclass(frozen=True)
class StageOfBlocks:
    """A run of blocks that work on one stream; the first one may change its shape and always runs."""

    blocks: tuple[str, ...]
    """Paths, in the order they run."""
    depths: tuple[int, ...]
    """How many may run; the last = all."""
    returns_tuple: bool = False
    """Whether a block returns a tuple of one tensor."""


@dataclass(frozen=True)
class Channels:
    """Hidden channels of one block."""

    block: str
    producers: tuple[str, ...]
    between: tuple[str, ...]
    """Norms and depthwise convolutions that change them one by one."""
    consumers: tuple[str, ...]
    hidden: int
    choices: tuple[int, ...]
    """How many run at each of the block's widths; the last = all."""
    inner: bool = False
    """Whether it lies between another group of the block and itself (squeeze and excitation)."""
    order: tuple[int, ...] | None = None
    """Which channels come first; None = as they stand."""

    @property
    def members(self) -> tuple[str, ...]:
        """Paths of all layers that have a part in it."""
        return tuple(dict.fromkeys((*self.producers, *self.between, *self.consumers)))


@dataclass(frozen=True)
class Widths:
    """How wide a block may be."""

    expand: tuple[float, ...]
    """Whole numbers times what the block reads, or ratios of what it has."""
    multiple: int

    @property
    def ratios(self) -> bool:
        """Whether they are ratios of what a block has."""
        return all(isinstance(e, float) for e in self.expand)

    def count(self, value: float, read: int, hidden: int) -> int:
        """Return how many of the hidden channels that is."""
        return min(hidden, rounded((hidden if self.ratios else read) * value, self.multiple))

    def whole(self, read: int, hidden: int) -> float:
        """Return the value that stands for all channels."""
        return 1.0 if self.ratios else hidden / read


@dataclass
class Places:
    """What was found."""

    stages: list[StageOfBlocks] = field(default_factory=list)
    widths: dict[str, tuple[float, ...]] = field(default_factory=dict)
    groups: list[Channels] = field(default_factory=list)
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def rounded(channels: float, multiple: int) -> int:
    """Round to the nearest multiple, at least one of it and at most 10 % down (`make_divisible` of the MobileNets)."""
    found = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return found + multiple if found < 0.9 * channels else found


def find_places(
    model: nn.Module, depth: Sequence[int], widths: Widths, kernel: Sequence[int], match: str | None
) -> Places:
    """Look into every block of a model, on symbols.

    Raises:
        AnatomyError: no blocks, none at a path like `match`, or a depth that no stage has.
    """
    found, longest = Places(), 0
    tied = _tied(model)
    runs = list(_runs(model, match))
    if not any(runs):
        where = "" if match is None else f" at a path like {match!r}"
        raise AnatomyError(
            f"{type(model).__name__} has no block{where} with weights of its own: blocks that share theirs are one"
        )
    for run in runs:
        views = {path: look_into(anatomy.get(model, path)) for path in run}
        for blocks in _stages(model, views):
            longest = max(longest, len(blocks))
            depths = tuple(d for d in depth if d < len(blocks))
            if depths:
                found.stages.append(StageOfBlocks(blocks, (*depths, len(blocks)), views[blocks[-1]].returns_tuple))
        for path, view in views.items():
            found.skipped.update({f"{path}.{p}".rstrip("."): why for p, why in view.skipped.items()})
            _add_groups(model, path, view, widths, tied, found)
            _add_kernels(model, path, kernel, found)
    if longest and depth[-1] > longest:
        raise AnatomyError(
            f"depth {list(depth)} is beyond the stages of {type(model).__name__}: the longest has {longest} blocks"
        )
    for stage in found.stages:
        for path in stage.blocks:
            found.widths.setdefault(path, (1.0,))
    return found


def importance_order(model: nn.Module, group: Channels, groups: Sequence[Channels]) -> tuple[int, ...]:
    """Sort channels by falling importance: the sum of the absolute weights by which they are read.

    Layers inside the group (squeeze and excitation) do not count for it, only what leads on.
    """
    inner = {p for g in groups if g.inner and g.block == group.block for p in g.producers}
    readers = [c for c in group.consumers if c not in inner] or list(group.consumers)
    total = sum(_read_weight(anatomy.get(model, path)) for path in readers)
    assert isinstance(total, Tensor)
    if total.is_meta:
        return tuple(range(group.hidden))
    return tuple(torch.sort(total, descending=True, stable=True).indices.tolist())


def _read_weight(layer: Any) -> Tensor:
    """Sum the absolute weights of every input channel."""
    weight: Tensor = layer.weight.detach().float().abs()
    dim = 0 if plain_class(layer).__name__ == "Conv1D" else 1
    return weight.sum([d for d in range(weight.dim()) if d != dim])


def _runs(model: nn.Module, match: str | None) -> Iterator[list[str]]:
    """Yield the paths of the children of every container of blocks.

    Those that `dissect` finds, and others that hold a block of the same class (a stage whose only block changes the
    shape is no repetition to it).
    """
    trunks = anatomy.dissect(model).trunks
    known = [t.path for t in trunks]
    paths = [t.path for t in trunks if t.repeats == 1]
    kinds = {plain_class(anatomy.get(model, b.path)) for t in trunks for b in t.blocks}
    blocks = {b.path for t in trunks for b in t.blocks}
    for path, module in model.named_modules():
        inside = any(path == p or path.startswith(f"{p}.") for p in (*known, *blocks))
        lists = isinstance(module, (nn.Sequential, nn.ModuleList)) and not inside
        if lists and any(plain_class(c) in kinds for c in module.children()):
            paths.append(path)
    order = [p for p, _ in model.named_modules() if p in paths]
    for path in order:
        container = anatomy.get(model, path)
        listed = isinstance(container, (nn.Sequential, nn.ModuleList))
        children = [f"{path}.{n}".lstrip(".") for n, _ in container.named_children()]
        chosen = children if listed else [b.path for t in trunks if t.path == path for b in t.blocks]
        seen = [id(anatomy.get(model, c)) for c in chosen]
        yield [
            c
            for c, i in zip(chosen, seen, strict=True)
            if seen.count(i) == 1 and (match is None or fnmatch.fnmatchcase(c, match))
        ]


def _stages(model: nn.Module, views: dict[str, BlockView]) -> Iterator[tuple[str, ...]]:
    """Cut a run of blocks where one does not hand its stream on: such a block begins a stage, which it never leaves."""
    current: list[str] = []
    for path, view in views.items():
        last = current[-1] if current else None
        same = last is not None and plain_class(anatomy.get(model, last)) is plain_class(anatomy.get(model, path))
        alike = last is None or views[last].returns_tuple == view.returns_tuple
        if view.optional and same and alike:
            current.append(path)
            continue
        if len(current) > 1:
            yield tuple(current)
        current = [path] if view.optional or view.groups or view.skipped else []
    if len(current) > 1:
        yield tuple(current)


def _add_groups(model: nn.Module, path: str, view: BlockView, widths: Widths, tied: set[str], found: Places) -> None:
    """Add a block's hidden channels; all of them follow the one width that the block is asked for."""
    able: list[Group] = []
    for group in view.groups:
        held = [f"{path}.{m}" for m in (*group.producers, *group.between, *group.consumers)]
        shared = [m for m in held if m in tied]
        if shared:
            found.skipped[held[0]] = f"{shared[0]} shares its weights with another layer"
        else:
            able.append(group)
    outer = [g for g in able if not g.inner]
    if not outer:
        return
    read = _reads(anatomy.get(model, f"{path}.{outer[0].producers[0]}"))
    whole = tuple(g.hidden for g in outer)
    counts: dict[tuple[int, ...], float] = {}
    for value in sorted(set(widths.expand)):
        counts.setdefault(tuple(widths.count(value, read, g.hidden) for g in outer), value)
    counts.pop(whole, None)
    if not counts:
        found.skipped[f"{path}.{outer[0].producers[0]}"] = f"no width asked for is below its {whole[0]} channels"
        return
    counts[whole] = widths.whole(read, outer[0].hidden)
    found.widths[path] = tuple(counts.values())
    for group in able:
        if group.inner:
            around = next(i for i, o in enumerate(outer) if set(group.producers) <= set(o.consumers))
            share = max(1, round(outer[around].hidden / group.hidden))
            smaller = [min(group.hidden, rounded(c[around] / share, widths.multiple)) for c in counts]
            choices = (*smaller[:-1], group.hidden)
        else:
            choices = tuple(c[outer.index(group)] for c in counts)
        parts = (tuple(f"{path}.{m}" for m in names) for names in (group.producers, group.between, group.consumers))
        producers, between, consumers = parts
        found.groups.append(Channels(path, producers, between, consumers, group.hidden, choices, group.inner))


def _add_kernels(model: nn.Module, path: str, kernel: Sequence[int], found: Places) -> None:
    """Add the depthwise convolutions of a block whose kernel has a middle: odd, square, padded by half of it."""
    for name, module in anatomy.get(model, path).named_modules():
        if not kernel or layer_kind(module) is not ElasticDepthwiseConv:
            continue
        assert isinstance(module, CONVOLUTIONS)
        size, where = module.kernel_size[0], f"{path}.{name}"
        smaller = tuple(k for k in kernel if k < size)
        half = tuple(d * (size // 2) for d in module.dilation)
        if set(module.kernel_size) != {size} or size % 2 == 0:
            found.skipped[where] = f"its kernel {tuple(module.kernel_size)} is not odd and square"
        elif tuple(module.padding) != half:
            found.skipped[where] = f"it is not padded by half its kernel (padding {tuple(module.padding)})"
        elif smaller:
            found.kernels[where] = (*smaller, size)
            found.widths.setdefault(path, (1.0,))


def _reads(layer: Any) -> int:
    if isinstance(layer, CONVOLUTIONS):
        return int(layer.in_channels)
    return int(getattr(layer, "in_features", None) or layer.nx)


def _tied(model: nn.Module) -> set[str]:
    """Return the paths of layers that share a module or a tensor with another place."""
    held: dict[int, set[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        held.setdefault(id(tensor), set()).add(name.rpartition(".")[0])
    return {path for paths in held.values() if len(paths) > 1 for path in paths}
