"""Make a trained network elastic: its first blocks, first channels and inner taps run alone, and are trained to.

    model = rewrite(model, Elastic(depth=(1, 2, 3), expand=(1, 2, 4)))       # the same function; `Sandwich` trains it
    small = cut_out(model, supernet(model).smallest(), data=batches)         # an ordinary small model, calibrated

Source: Annavajjala et al., DepS: Delayed epsilon-Shrinking for Faster Once-For-All Training (ECCV 2024), arXiv
2407.06167; Cai et al., Once-for-All (ICLR 2020), arXiv 1908.09791.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from lamina import anatomy
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.nn.elastic import BlockPlan, GroupPlan, elastic_layer, supernet
from lamina.nn.elastic.blocks import elastic_block
from lamina.nn.elastic.layers import Mode
from lamina.registry import register
from lamina.rewrite._elastic_places import Channels as Channels
from lamina.rewrite._elastic_places import Places, Sampling, Widths, find_places, importance_order
from lamina.rewrite._elastic_places import StageOfBlocks as StageOfBlocks
from lamina.rewrite._fused_layer import leave_fused_path
from lamina.rewrite.rewriting import apply_decision, from_json, history, pass_name

SOURCE = "Annavajjala et al., DepS (ECCV 2024); Cai et al., Once-for-All (ICLR 2020)"


@dataclasses.dataclass(frozen=True)
class ElasticDecision:
    """Which places of a model become elastic, what each can be, and which channels come first."""

    stages: tuple[StageOfBlocks, ...]
    """Runs of blocks of equal shape of which the first ones can run alone."""
    widths: dict[str, tuple[float, ...]]
    """What every elastic block can be asked for, by its path; the last is what it has."""
    groups: tuple[Channels, ...]
    """Hidden channels of the blocks."""
    kernels: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Sizes of every depthwise convolution's kernel, by its path; the last is what it has."""
    mode: Mode = "slice"
    sampling: Sampling = "independent"
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why a place stays as it is, by its path."""

    def table(self) -> str:
        """Word the decision for people."""
        lines = [f"  {s.blocks[0]} ... {s.blocks[-1]}: {_listed(s.depths)} blocks" for s in self.stages]
        for group in self.groups:
            inner = "inside, " if group.inner else ""
            lines.append(f"  {group.producers[0]} -> {group.consumers[0]}: {inner}{_listed(group.choices)} channels")
        lines += [f"  {path}: kernel {_listed(sizes)}" for path, sizes in self.kernels.items()]
        return "\n".join([*lines, *(f"  stays: {path}: {why}" for path, why in self.skipped.items())])


@register("pass", source=SOURCE)
class Elastic:
    """Let the blocks of a network run in part: fewer blocks of a stage, fewer hidden channels, smaller kernels.

    For one network that is trained once and cut to many devices: with `sandwich` as objective its parts become good
    by themselves, `supernet(model)` sets and samples them, `extract` cuts one out. Any residual convolutional net
    (bottlenecks, inverted residuals, squeeze and excitation) and the feed-forward layers of any transformer. Set whole,
    as it is after the pass, the model computes what it did. Parameters stay the same objects under the same names.

    Which channels come first is an order by importance (the sum of what reads a channel, in absolute value), which the
    decision holds. Applied again, the pass orders anew (`sort_channels` does just that).

    Args:
        depth: how many blocks of a stage may run, besides all of them; the first ones, at least 1.
        expand: hidden channels of a block, besides all of them: whole numbers, times the channels that the block reads;
            or ratios of what it has, 0..1.
        kernel: sizes of depthwise kernels, odd, besides the whole; None = they stay.
        sampling: "independent" draws every place on its own; "compound" couples the widths of a stage with its depth.
        sort: order the channels by importance; else they come as they stand.
        mode: "slice" computes only what runs; "mask" computes everything and hides the rest, so that shapes never
            change (one compiled graph for all parts).
        multiple: channels are rounded to multiples of this, at most 10 % down.
        match: pattern of the blocks' paths; default all.
    Raises:
        LaminaError: an option out of range. AnatomyError: no elastic place, or a depth beyond every stage; the message
            says why.
    Source: Once-for-All, arXiv 1908.09791, section 3; DepS, arXiv 2407.06167, section 3. Deviation: channels are not
        moved, an order says which come first, so that names and momentum stay; the whole is always among the choices.
    Example:
        >>> from lamina.models import ResNet
        >>> from lamina.rewrite import rewrite
        >>> net = rewrite(ResNet((2, 2), (8, 16), stem="small"), Elastic(depth=(1, 2), expand=(0.5, 1.0)))
        >>> supernet(net).smallest().depth
        (1, 1)
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "function"

    def __init__(
        self,
        depth: Sequence[int] = (2, 3, 4),
        expand: Sequence[int | float] = (3, 4, 6),
        kernel: Sequence[int] | None = None,
        *,
        sampling: Sampling = "independent",
        sort: bool = True,
        mode: Mode = "slice",
        multiple: int = 8,
        match: str | None = None,
    ) -> None:
        _check(depth, expand, kernel, multiple)
        if sampling not in ("independent", "compound"):
            raise LaminaError(f"Elastic: sampling must be independent or compound, got {sampling!r}")
        if mode not in ("slice", "mask"):
            raise LaminaError(f"Elastic: mode must be slice or mask, got {mode!r}")
        self.widths = Widths(tuple(expand), multiple)
        self.depth, self.kernel = tuple(sorted(set(depth))), tuple(sorted(set(kernel or ())))
        self.sampling, self.sort, self.mode, self.match = sampling, sort, mode, match

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ElasticDecision:
        """Find the elastic places by torch.fx, block by block; change nothing, look at no data."""
        model = bare(model)
        places = self._places(model)
        groups = places.groups
        if self.sort:
            groups = [dataclasses.replace(g, order=importance_order(model, g, groups)) for g in groups]
        return ElasticDecision(
            tuple(places.stages), places.widths, tuple(groups), places.kernels, self.mode, self.sampling, places.skipped
        )

    def fits(self, model: nn.Module) -> None:
        """Raise what `decide` would; looks at no weight."""
        self._places(bare(model))

    def apply(self, model: nn.Module, decision: ElasticDecision, lineage: Lineage) -> nn.Module:
        """Put elastic layers and blocks where the decision says; parameters are shared, only kernel maps are new."""
        groups = {f"{g.block}#{i}": g for i, g in enumerate(decision.groups)}
        layers = dict.fromkeys([*(m for g in groups.values() for m in g.members), *decision.kernels])
        for path in layers:
            _swap_layer(model, path, groups, decision.kernels.get(path))
        stages = {path: (at, stage) for at, stage in enumerate(decision.stages) for path in stage.blocks}
        for path, widths in decision.widths.items():
            at, stage = stages.get(path, (0, None))
            plan = BlockPlan(
                name=path,
                widths=widths,
                groups={
                    n: GroupPlan(g.hidden, g.choices, len(g.members)) for n, g in groups.items() if g.block == path
                },
                stage=None if stage is None else f"{at}:{stage.blocks[0]}",
                depths=() if stage is None else stage.depths,
                compound=decision.sampling == "compound",
                mode=decision.mode,
            )
            leave_fused_path(model, path)
            returns_tuple = stage is not None and stage.returns_tuple
            old = anatomy.get(model, path)
            anatomy.swap(model, path, elastic_block(old, plan, returns_tuple=returns_tuple), all=True)
        net = supernet(model)
        net.set(net.full())
        return model

    def _places(self, model: nn.Module) -> Places:
        places = find_places(model, self.depth, self.widths, self.kernel, self.match)
        if not places.stages and not places.groups and not places.kernels:
            why = "; ".join(f"{p}: {r}" for p, r in list(places.skipped.items())[:3]) or "no block has a hidden layer"
            raise AnatomyError(f"no place of {type(model).__name__} can be elastic with these options: {why}")
        return places


def sort_channels(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Order the channels of an elastic model anew, by what its weights are now; the whole computes the same.

    For a model that was elastic from the start of its training, at the moment when its parts begin to be trained. It is
    recorded in the model's history.

    Raises:
        LaminaError: the model is not elastic.
    """
    supernet(model)
    record = next((r for r in reversed(history(model)) if r.name == pass_name(Elastic())), None)
    if record is None:
        raise LaminaError(f"{type(model).__name__} is elastic, but its history does not say how: apply Elastic again")
    old: ElasticDecision = from_json(Elastic, record.decision, record.version)
    groups = tuple(dataclasses.replace(g, order=importance_order(model, g, old.groups)) for g in old.groups)
    again: Any = Elastic()
    return apply_decision(model, again, dataclasses.replace(old, groups=groups), optimizer=optimizer)


def _swap_layer(model: nn.Module, path: str, groups: dict[str, Channels], kernels: tuple[int, ...] | None) -> None:
    """Put the elastic form of a layer in its place."""
    makes = next((n for n, g in groups.items() if path in g.producers or path in g.between), None)
    reads = next((n for n, g in groups.items() if path in g.consumers or path in g.between), None)
    new = elastic_layer(
        anatomy.get(model, path),
        reads=reads,
        makes=makes,
        in_order=None if reads is None else groups[reads].order,
        out_order=None if makes is None else groups[makes].order,
        kernels=kernels,
    )
    anatomy.swap(model, path, new, all=True)


def _check(depth: Any, expand: Any, kernel: Any, multiple: int) -> None:
    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if not depth or not all(whole(d, 1) for d in depth):
        raise LaminaError(f"Elastic: depth lists numbers of blocks, each at least 1, got {depth!r}")
    ratios = all(isinstance(e, float) and 0.0 < e <= 1.0 for e in expand)
    if not expand or not (ratios or all(whole(e, 1) for e in expand)):
        raise LaminaError(
            "Elastic: expand lists either whole numbers (times what a block reads) or ratios of what it has, above 0 "
            f"and at most 1.0, got {expand!r}"
        )
    if kernel is not None and not (kernel and all(whole(k, 1) and k % 2 for k in kernel)):
        raise LaminaError(f"Elastic: kernel lists odd sizes, got {kernel!r}")
    if not whole(multiple, 1):
        raise LaminaError(f"Elastic: multiple must be a whole number, at least 1, got {multiple!r}")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
