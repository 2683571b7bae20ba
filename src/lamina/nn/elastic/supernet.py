"""One view on an elastic model: which places it has, which part of it runs, and what a part costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.batches import Batch, bare
from lamina.errors import LaminaError
from lamina.nn.elastic.blocks import BlockPlan, ElasticBlock
from lamina.nn.elastic.costs import multiply_adds
from lamina.nn.elastic.layers import ElasticDepthwiseConv, ElasticLayer
from lamina.nn.elastic.subnet import Subnet
from lamina.recipe import Choice


@dataclass(frozen=True)
class Stage:
    """A run of blocks of which the first ones can run alone."""

    blocks: tuple[str, ...]
    """Paths."""
    choices: tuple[int, ...]
    """How many may run, the last = all."""


def is_elastic(model: nn.Module) -> bool:
    """Tell whether any block of a model is elastic."""
    return any(isinstance(m, ElasticBlock) for m in bare(model).modules())


def supernet(model: nn.Module) -> Supernet:
    """Return the view on an elastic model; it holds no state of its own, so any number may be made.

    Raises:
        LaminaError: the model is not elastic.
    """
    return Supernet(model)


class Supernet:
    """The elastic places of a model, read off its module tree as it stands.

    Args:
        model: after the pass `elastic`; wrapped or bare. Passes after it may have taken blocks or layers away: what is
            left of a place counts.
    Raises:
        LaminaError: the model is not elastic.
    Example:
        >>> from lamina.models import ResNet
        >>> from lamina.rewrite import Elastic, rewrite
        >>> net = rewrite(ResNet((2, 2), (8, 16), stem="small"), Elastic(depth=(1, 2), expand=(0.5, 1.0)))
        >>> supernet(net).smallest()
        Subnet(depth=(1, 1), expand=(0.5, 0.5), kernel=())
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = bare(model)
        named = list(self.model.named_modules())
        self.blocks = {path: m for path, m in named if isinstance(m, ElasticBlock)}
        self.layers = {path: m for path, m in named if isinstance(m, ElasticLayer)}
        if not self.blocks:
            raise LaminaError(
                f"{type(self.model).__name__} is not elastic: rewrite(model, Elastic(...)) makes it so, and a model "
                "that was loaded without its rewrites has lost it"
            )
        members: dict[str, int] = {}
        for layer in self.layers.values():
            for group in {layer.elastic_reads, layer.elastic_makes} - {None}:
                members[str(group)] = members.get(str(group), 0) + 1
        self.groups = {
            name: (path, group)
            for path, block in self.blocks.items()
            for name, group in block.elastic_plan.groups.items()
            if members.get(name) == group.members
        }
        held = {path for path, _ in self.groups.values()}
        self.wide = [path for path, b in self.blocks.items() if len(b.elastic_plan.widths) > 1 and path in held]
        self.stages = list(_stages(self.blocks))
        self.mode = next(iter(self.blocks.values())).elastic_plan.mode
        self.kernels = {
            path: m.elastic_kernels
            for path, m in self.layers.items()
            if isinstance(m, ElasticDepthwiseConv) and len(m.elastic_kernels) > 1
        }

    def choices(self) -> dict[str, list[Sequence[float]]]:
        """Return what every place can be, by axis, the smallest first."""
        return {
            "depth": [s.choices for s in self.stages],
            "expand": [self._plan(p).widths for p in self.wide],
            "kernel": list(self.kernels.values()),
        }

    def space(self) -> dict[str, list[Choice]]:
        """Return the choices as a recipe leaves them open, for `lamina search`: the option `config` of `extract`."""
        return {
            axis: [Choice("oneof", list(c)) for c in choices] for axis, choices in self.choices().items() if choices
        }

    def full(self) -> Subnet:
        """Return the sub-network that is the whole."""
        return self._pick(lambda choices: choices[-1])

    def smallest(self) -> Subnet:
        """Return the one with the least of everything."""
        return self._pick(lambda choices: choices[0])

    def sample(self, generator: torch.Generator) -> Subnet:
        """Draw one: every place on its own, or (sampling "compound") the widths of a stage along with its depth."""

        def draw(count: int) -> int:
            return int(torch.randint(count, (1,), generator=generator))

        drawn = [draw(len(s.choices)) for s in self.stages]
        along = {
            path: (at, len(stage.choices))
            for stage, at in zip(self.stages, drawn, strict=True)
            for path in stage.blocks
        }
        expand = []
        for path in self.wide:
            plan = self._plan(path)
            last = len(plan.widths) - 1
            if plan.compound and path in along:
                at, count = along[path]
                expand.append(plan.widths[round(at * last / max(count - 1, 1)) if count > 1 else last])
            else:
                expand.append(plan.widths[draw(last + 1)])
        depth = tuple(s.choices[at] for s, at in zip(self.stages, drawn, strict=True))
        return Subnet(depth, tuple(expand), tuple(sizes[draw(len(sizes))] for sizes in self.kernels.values()))

    def checked(self, subnet: Subnet | Mapping[str, Any]) -> Subnet:
        """Return the sub-network, an axis that it leaves out filled in whole.

        Raises:
            LaminaError: a value that its place cannot have, or another number of values than places.
        """
        subnet, full = Subnet.of(subnet), self.full()
        filled: dict[str, tuple[Any, ...]] = {}
        for axis, choices in self.choices().items():
            values = getattr(subnet, axis) or getattr(full, axis)
            if len(values) != len(choices):
                raise LaminaError(
                    f"{axis} of the sub-network has {len(values)} values, {type(self.model).__name__} has "
                    f"{len(choices)} such places"
                )
            for at, (value, allowed) in enumerate(zip(values, choices, strict=True)):
                if value not in allowed:
                    raise LaminaError(f"{axis}[{at}] of the sub-network is {value}, it can be one of {list(allowed)}")
            filled[axis] = values
        return Subnet(**filled)

    def set(self, subnet: Subnet | Mapping[str, Any]) -> Subnet:
        """Let a part of the model run from now on; return it, checked.

        In mode "slice" the others are not computed; in mode "mask" they are, and count for nothing.
        """
        subnet = self.checked(subnet)
        running, counts = frozenset(self.running(subnet)), self.counts(subnet)
        # The first block of a stage always runs: it may change the shape.
        for path in (p for stage in self.stages for p in stage.blocks[1:]):
            self._leave(self.blocks[path], path not in running)
        sizes = dict(zip(self.kernels, subnet.kernel, strict=True))
        for path, layer in self.layers.items():
            self._narrow(layer, counts)
            if path in sizes and isinstance(layer, ElasticDepthwiseConv):
                whole = sizes[path] == layer.elastic_kernels[-1]
                if self.mode == "mask":
                    device = layer.weight.device
                    layer.elastic_kernel_limit = torch.tensor(sizes[path], device=device)
                else:
                    layer.elastic_kernel = None if whole else sizes[path]
        return subnet

    @contextmanager
    def running_as(self, subnet: Subnet | Mapping[str, Any]) -> Iterator[None]:
        """Run as a part inside this context, and whole again afterwards."""
        self.set(subnet)
        try:
            yield
        finally:
            self.set(self.full())

    def running(self, subnet: Subnet) -> list[str]:
        """Return the paths of the elastic blocks that run."""
        left = {p for s, depth in zip(self.stages, subnet.depth, strict=True) for p in s.blocks[depth:]}
        return [path for path in self.blocks if path not in left]

    def counts(self, subnet: Subnet) -> dict[str, int]:
        """Return how many channels of each group run."""
        chosen = dict(zip(self.wide, subnet.expand, strict=True))
        return {
            name: group.choices[self._plan(path).widths.index(chosen[path])]
            for name, (path, group) in self.groups.items()
            if path in chosen
        }

    def costs(self, batch: Batch) -> Callable[[Subnet], int]:
        """Return what counts the multiply-adds of any sub-network on inputs like these, one forward pass for all.

        Of linear layers, convolutions and attention's products, as torch's own counter has them.
        """
        return multiply_adds(self, batch)

    def _plan(self, path: str) -> BlockPlan:
        return self.blocks[path].elastic_plan

    def _pick(self, pick: Callable[[Sequence[Any]], Any]) -> Subnet:
        return Subnet(**{axis: tuple(pick(c) for c in choices) for axis, choices in self.choices().items()})

    def _leave(self, block: ElasticBlock, out: bool) -> None:
        if self.mode == "mask":
            device = next((p.device for p in block.parameters()), None)
            block.elastic_gate = torch.tensor(not out, device=device)
        else:
            block.elastic_skipped = out

    def _narrow(self, layer: ElasticLayer, counts: Mapping[str, int]) -> None:
        """Set how many channels a layer reads and makes."""
        for name, side in ((layer.elastic_reads, "in"), (layer.elastic_makes, "out")):
            if name not in self.groups:
                continue
            hidden = self.groups[str(name)][1].hidden
            count = counts.get(str(name), hidden)
            if self.mode == "mask":
                if side == "in" and layer.elastic_makes != name:
                    layer.elastic_in_mask = _mask(layer, hidden, count)
            else:
                setattr(layer, f"elastic_{side}", None if count == hidden else count)


def _mask(layer: ElasticLayer, hidden: int, count: int) -> torch.Tensor:
    """Tell the channels that count; a new tensor, for backward passes to come may still need the old one."""
    order = layer.elastic_in_order
    device = layer.weight.device
    mask = torch.arange(hidden, device=device) < count
    return mask if order is None else torch.zeros_like(mask).index_copy_(0, order, mask)


def _stages(blocks: Mapping[str, ElasticBlock]) -> Iterator[Stage]:
    """Gather the blocks of every stage as they are left."""
    found: dict[str, list[str]] = {}
    for path, block in blocks.items():
        if block.elastic_plan.stage is not None:
            found.setdefault(block.elastic_plan.stage, []).append(path)
    for paths in found.values():
        depths = blocks[paths[0]].elastic_plan.depths
        choices = (*(d for d in depths if d < len(paths)), len(paths))
        if len(choices) > 1:
            yield Stage(tuple(paths), choices)
