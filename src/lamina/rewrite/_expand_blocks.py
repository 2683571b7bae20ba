"""What linear expansion does with blocks: see that they are alike, draw their tensors, make blocks of them again."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lamina import anatomy
from lamina.anatomy import Trunk
from lamina.anatomy.depth import set_depth
from lamina.errors import AnatomyError, LaminaError
from lamina.rewrite._expanded_stack import ExpandedStack, interpolate, with_tensors
from lamina.rewrite._fused_layer import leave_fused_path

BASE_STD = 0.02
"""Of the base's projections, as in the authors' code."""


def check_trunk(model: nn.Module, trunk: Trunk) -> None:
    """Refuse a trunk that is no container of blocks alone; see `LinearExpansion` for what is raised."""
    where, name = trunk.path or "the model itself", type(model).__name__
    if trunk.repeats > 1:
        raise AnatomyError(f"{where} of {name} runs one block's weights {trunk.repeats} times: its slope is 0 already")
    container = anatomy.get(model, trunk.path)
    if not trunk.path or not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise AnatomyError(
            f"{where} of {name} is a {type(container).__name__}, expected a ModuleList or Sequential of blocks inside "
            "the model"
        )
    children = [f"{trunk.path}.{child}" for child in container._modules]
    if children != [b.path for b in trunk.blocks]:
        raise AnatomyError(f"{where} of {name} holds other modules beside its blocks: {', '.join(children)}")


def blocks_at(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the blocks in the container at a path, if one base and slope can stand for them.

    Raises:
        LaminaError, AnatomyError: see `LinearExpansion`.
    """
    blocks = list(anatomy.get(model, path).children())
    if len(blocks) < 2:
        raise AnatomyError(f"{path} of {type(model).__name__} has one block: a line over depth needs at least two")
    _check_same(path, blocks)
    _check_own(model, path, blocks)
    return blocks


def drawn(block: nn.Module, slope_std: float, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Start base and slope anew: projections normal, biases 0, a norm's gain 1 with slope 0; nothing on meta."""
    base, slope = {}, {}
    for name, old in block.named_parameters():
        path, _, last = name.rpartition(".")
        owner = block.get_submodule(path)
        base[name], slope[name] = torch.empty_like(old.detach()), torch.zeros_like(old.detach())
        if old.is_meta:
            continue
        if old.dim() >= 2:
            base[name] = _normal(old, BASE_STD, f"{seed}:base:{name}")
            slope[name] = _normal(old, slope_std, f"{seed}:slope:{name}")
        elif last.endswith("bias"):
            base[name].zero_()
        elif anatomy.is_norm(owner):
            base[name].fill_(_neutral_gain(owner, last))
        else:
            base[name].copy_(old.detach())
    return base, slope


def expanded(stack: ExpandedStack, depth: int) -> tuple[list[nn.Module], list[int]]:
    """Make `depth` blocks of a stack; return them, and for each the layer whose modules it copies.

    Kinds of layers that alternate (sliding and full attention) go on alternating: block l is made as layer l modulo
    the stack's depth is. Rates of drop-path follow their line, buffers are those of the layer at the same place.
    """
    base, slope = dict(stack.base.named_parameters()), dict(stack.slope.named_parameters())
    if any(isinstance(p, DTensor) for p in base.values()):
        raise LaminaError(
            "the expanded stack is sharded: take the model back first (lamina.parallel.data_parallel.gather)"
        )
    layers: list[Any] = stack.layers()
    sources = [place % len(layers) for place in range(depth)]
    blocks = []
    for place, source in enumerate(sources):
        with torch.no_grad():
            values = interpolate(base, slope, place / depth)
        parameters = {n: Parameter(v, requires_grad=base[n].requires_grad) for n, v in values.items()}
        near = layers[place * len(layers) // depth]
        buffers = {n: getattr(owner, last).clone() for n, owner, last in near.lamina_buffers}
        layer = layers[source]
        block = with_tensors(layer.lamina_block, parameters, buffers)
        block._forward_hooks.update(layer._forward_hooks)
        if getattr(layer, "gradient_checkpointing", False):
            block.gradient_checkpointing = True  # type: ignore[assignment]
        block.train(layer.training)
        blocks.append(block)
    return renumbered(blocks, [layer.lamina_block for layer in layers]), sources


def renumbered(blocks: list[nn.Module], old: Sequence[nn.Module]) -> list[nn.Module]:
    """Number the cache slots of blocks by their place, and lay their drop-path rates on the line of the old ones."""
    for place, block in enumerate(blocks):
        for core in anatomy.attention_cores(block, ""):
            core.layer_idx = place  # type: ignore[assignment]
    rates = [_drop_path(block) for block in old]
    moulds = {name: module.get_submodule(name) for module, found in zip(old, rates, strict=True) for name in found}
    for place, block in enumerate(blocks):
        at = place * (len(old) - 1) / max(len(blocks) - 1, 1)
        low, high = rates[int(at)], rates[min(int(at) + 1, len(old) - 1)]
        for name, mould in moulds.items():
            rate = low.get(name, 0.0) + (at - int(at)) * (high.get(name, 0.0) - low.get(name, 0.0))
            if rate and not _rate_of(block.get_submodule(name)):
                anatomy.swap(block, name, copy.deepcopy(mould))
            setattr(block.get_submodule(name), _rate_of(mould), rate)
    return blocks


def put(model: nn.Module, path: str, container: nn.ModuleList | nn.Sequential, before: int, sources: list[int]) -> None:
    """Put a container where another is, and let configurations know its depth."""
    anatomy.swap(model, path, container)
    set_depth(model, path, before, sources)
    # torch's own encoder reads the weights of its first layer.
    first = next(name for name, child in container.named_children() if child is container[0])
    leave_fused_path(model, f"{path}.{first}")


def _check_same(where: str, blocks: Sequence[nn.Module]) -> None:
    first, *others = blocks
    for place, block in enumerate(others, 1):
        if type(block) is not type(first):
            raise AnatomyError(
                f"the blocks of {where} are not alike: block 0 is a {type(first).__name__}, block {place} a "
                f"{type(block).__name__}; one base and slope stand for blocks of one kind"
            )
        different = _difference(first, block)
        if different:
            raise AnatomyError(
                f"the blocks of {where} are not alike: block 0 and block {place} differ in {different}; one base and "
                "slope stand for blocks of one kind"
            )


def _difference(first: nn.Module, other: nn.Module) -> str:
    # What has no tensors may differ, as stochastic depth does that is nn.Identity at rate 0: it stays with its layer.
    one, two = ({n: type(m) for n, m in b.named_modules() if m._parameters or m._buffers} for b in (first, other))
    for name in sorted(one.keys() & two.keys()):
        if one[name] is not two[name]:
            return f"the class of {name}: {one[name].__name__} and {two[name].__name__}"
    for kind, mine, theirs in (
        ("parameter", dict(first.named_parameters()), dict(other.named_parameters())),
        ("buffer", dict(first.named_buffers()), dict(other.named_buffers())),
    ):
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in mine or name not in theirs:
                return f"the {kind} {name}, which one of them lacks"
            a, b = mine[name], theirs[name]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                return f"the {kind} {name}: {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
            if kind == "buffer" and not a.is_meta and not torch.equal(a, b):
                return f"the values of the buffer {name}, which must not depend on depth"
    return ""


def _check_own(model: nn.Module, path: str, blocks: Sequence[nn.Module]) -> None:
    """Refuse tensors of blocks that cannot be moved along a line, or that something else holds too."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for parameter in (p for block in blocks for p in block.parameters()):
        held = places[id(parameter)]
        if isinstance(parameter, DTensor):
            raise LaminaError(f"{held[0]} is sharded: take the model back first (lamina.parallel.data_parallel.gather)")
        if not parameter.is_floating_point():
            raise AnatomyError(f"{held[0]} holds {parameter.dtype}: quantised blocks have no line over depth")
        if len(held) > 1:
            raise AnatomyError(f"one parameter stands at {', '.join(held[:3])}: what is tied cannot vary with depth")


def _normal(like: Tensor, std: float, key: str) -> Tensor:
    if std == 0.0:
        return torch.zeros_like(like.detach())
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    numbers = torch.empty(like.shape, dtype=torch.float32, device="cpu")
    # The bounds of the authors' code, which are absolute: they cut nothing at this deviation.
    return nn.init.trunc_normal_(numbers, std=std, a=-2.0, b=2.0, generator=generator).to(like.device, like.dtype)


def _neutral_gain(norm: nn.Module, name: str) -> float:
    """Return what a norm's gain is when it does nothing: 1, or 0 where the norm multiplies by 1 + gain (Gemma)."""
    trial = copy.deepcopy(norm).eval()
    parameters = dict(trial.named_parameters(recurse=False))
    if callable(getattr(trial, "reset_parameters", None)) or set(parameters) != {name}:
        return 1.0
    with torch.no_grad():
        x = torch.linspace(-1.0, 2.0, parameters[name].numel(), device=parameters[name].device)[None]
        parameters[name].zero_()
        return 0.0 if bool(trial(x.to(parameters[name].dtype)).any()) else 1.0


def _drop_path(block: nn.Module) -> dict[str, float]:
    """Rates of stochastic depth, by path."""
    found = {path: getattr(m, _rate_of(m), None) for path, m in block.named_modules() if _rate_of(m)}
    return {path: float(rate) for path, rate in found.items() if isinstance(rate, (int, float))}


def _rate_of(module: nn.Module) -> str:
    """Return what a module of stochastic depth calls its rate; empty for any other."""
    if "droppath" not in type(module).__name__.lower():
        return ""
    return next((n for n in ("drop_prob", "rate") if hasattr(module, n)), "")
