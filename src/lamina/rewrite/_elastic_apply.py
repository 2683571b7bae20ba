"""Carrying out what `elastic` decided: layers and blocks with another forward where the plain ones stood."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lamina import anatomy
from lamina.nn.elastic import BlockPlan, GroupPlan, elastic_layer, supernet
from lamina.nn.elastic.blocks import elastic_block
from lamina.rewrite._fused_layer import leave_fused_path

if TYPE_CHECKING:
    from lamina.rewrite._elastic_places import Channels
    from lamina.rewrite.elastic import ElasticDecision


def make_elastic(model: nn.Module, decision: ElasticDecision) -> nn.Module:
    """Swap layers and blocks, in place; weights need not be there (meta)."""
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
            groups={n: GroupPlan(g.hidden, g.choices, len(g.members)) for n, g in groups.items() if g.block == path},
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
