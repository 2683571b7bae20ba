"""Multiply-adds of any part of an elastic model, from one forward pass of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lamina.anatomy import undisturbed
from lamina.batches import Batch, call
from lamina.nn.elastic.layers import ElasticDepthwiseConv
from lamina.nn.elastic.subnet import Subnet

if TYPE_CHECKING:
    from lamina.nn.elastic.supernet import Supernet


def multiply_adds(net: Supernet, batch: Batch) -> Callable[[Subnet], int]:
    """Return what counts a sub-network's multiply-adds on inputs of this batch's shapes.

    Every layer's count is proportional to the channels it reads and makes and to the taps of its kernel; everything
    else in a block counts while the block runs, and what is outside of blocks always.
    """
    measured = _measured(net, batch)
    layers = {path: measured.get(path, 0) for path in net.layers}
    around = {p: measured.get(p, 0) - sum(v for q, v in layers.items() if q.startswith(f"{p}.")) for p in net.blocks}
    outside = measured[""] - sum(measured.get(p, 0) for p in net.blocks)

    def count(subnet: Subnet) -> int:
        subnet = net.checked(subnet)
        running, counts = net.running(subnet), net.counts(subnet)
        sizes = dict(zip(net.kernels, subnet.kernel, strict=True))
        total = outside
        for block in running:
            total += around[block]
            total += sum(_part(net, q, v, counts, sizes) for q, v in layers.items() if q.startswith(f"{block}."))
        return total

    return count


def _part(net: Supernet, path: str, whole: int, counts: dict[str, int], sizes: dict[str, int]) -> int:
    """Scale a layer's count; every division is exact."""
    layer = net.layers[path]
    groups = {layer.elastic_reads, layer.elastic_makes}
    for name in groups:
        if name in counts:
            assert name is not None
            hidden = net.groups[name][1].hidden
            whole = whole * counts[name] // hidden
    if path in sizes and isinstance(layer, ElasticDepthwiseConv):
        weight: Any = layer.weight
        dims = weight.dim() - 2
        whole = whole * sizes[path] ** dims // layer.elastic_kernels[-1] ** dims
    return whole


def _measured(net: Supernet, batch: Batch) -> dict[str, int]:
    """Run the whole once; return the multiply-adds inside every module, by path."""
    model = net.model
    counter = FlopCounterMode(display=False)
    # What runs now may be a part: a copy of the tree, which shares the weights, is set whole.
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    whole = copy.deepcopy(model, tensors)
    view = type(net)(whole)
    view.set(view.full())
    state = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with state, torch.no_grad(), undisturbed(whole), counter:
        call(whole, batch)
    found = {"": counter.get_total_flops() // 2}
    root = type(whole).__name__
    for name, operations in counter.get_flop_counts().items():
        if name.startswith(f"{root}."):
            found[name.removeprefix(f"{root}.")] = sum(operations.values()) // 2
    return found
