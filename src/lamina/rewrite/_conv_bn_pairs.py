"""Find the batch norms that only normalise what one convolution or linear layer puts out, and say why others do not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from lamina.anatomy import get
from lamina.batches import Batch
from lamina.errors import AnatomyError
from lamina.nn import TokenBatchNorm
from lamina.rewrite._conv_bn_block import LAYERS, NORMS, ConvBNBlock, HeldConv
from lamina.rewrite._links import Call, Links, links_of_run, links_on_symbols

_BEFORE: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.BatchNorm1d: (nn.Conv1d, nn.ConvTranspose1d, nn.Linear),
    nn.BatchNorm2d: (nn.Conv2d, nn.ConvTranspose2d),
    nn.BatchNorm3d: (nn.Conv3d, nn.ConvTranspose3d),
    nn.SyncBatchNorm: tuple(LAYERS),
    TokenBatchNorm: (nn.Linear,),
}


@dataclass(frozen=True)
class Pairs:
    """What was found, by the path of the norm."""

    found: dict[str, str]
    """The path of the layer whose output the norm alone reads."""
    skipped: dict[str, str]
    """Why the norm stays as it is."""


def find_pairs(model: nn.Module, data: Iterable[Batch] | None = None, match: str | None = None) -> Pairs:
    """Find every batch norm whose path matches, and the layer before it; changes nothing.

    By torch.fx; where the model cannot be traced, in forward passes over the first batch of `data`; without data, in
    those parts of the model that can be traced.

    Raises:
        AnatomyError: there is no batch norm, or none at such a path; or a pass over data would be a lazy model's first.
    """
    known = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    norms = {path: m for path, m in known.items() if match is None or fnmatch.fnmatchcase(path, match)}
    if not known:
        raise AnatomyError(f"{type(model).__name__} has no batch norm: there is nothing to fold into a convolution")
    if not norms:
        raise AnatomyError(
            f"no batch norm of {type(model).__name__} stands at a path like {match!r}; they are at {', '.join(known)}"
        )
    lazy = [path for path, p in model.named_parameters() if is_lazy(p)]
    if lazy and data is not None:
        raise AnatomyError(
            f"{type(model).__name__} waits for its first batch to know the size of {lazy[0]}: call it once"
        )
    found = _in_blocks(model, norms)
    skipped = {path: reason for path, m in norms.items() if (reason := norm_reason(m))}
    rest = [path for path in norms if path not in found and path not in skipped]
    if rest:
        links, complete = _look(model, data)
        several = set() if complete else _at_several_paths(model)
        for path in rest:
            layer, reason = _layer_before(model, path, links, several)
            if reason:
                unseen = "" if complete else _HOW
                skipped[path] = f"{reason}{unseen if path not in links else ''}"
            else:
                found[path] = layer
    return Pairs({p: found[p] for p in norms if p in found}, {p: skipped[p] for p in norms if p in skipped})


_HOW = " (the model cannot be traced by torch.fx: pass data, and one batch is looked at)"


def norm_reason(norm: nn.Module) -> str:
    """Say why a norm is not a fixed scale and shift in evaluation; empty = it is."""
    name = type(norm).__name__
    if isinstance(norm, ConvBNBlock):
        return ""
    if any(is_lazy(t) for t in (*norm.parameters(), *norm.buffers())):
        return f"{name} has not seen its first batch"
    if type(norm) not in NORMS:
        return f"{name} is a class of its own, which may compute something else"
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return "it keeps no running statistics: it normalises by the batch, always"
    batches = getattr(norm, "num_batches_tracked", None)
    if getattr(norm, "momentum", 0.1) is None and batches is not None and not batches.is_meta and not batches.item():
        return "its statistics are the average of no batch yet (momentum=None)"
    return module_reason(norm)


def _layer_before(model: nn.Module, path: str, links: Links, several: set[int]) -> tuple[str, str]:
    """Return (path of the layer, why not); no reason: the two are a pair."""
    norm, calls = get(model, path), links.get(path, [])
    if len(calls) != 1:
        return "", f"it is called {len(calls)} times in a forward pass, and a pair must run once"
    layer_path = calls[0].reads
    if layer_path is None or isinstance(get(model, layer_path), (_BatchNorm, HeldConv)):
        return "", "its input is not the output of a convolution or linear layer"
    layer = get(model, layer_path)
    reason = _layer_reason(layer) or _use_reason(path, layer_path, calls[0], links[layer_path])
    if not reason and type(layer) not in _BEFORE[type(norm)]:
        reason = f"a {type(norm).__name__} does not normalise the channels of a {type(layer).__name__}"
    if not reason and several & {id(layer), id(norm)}:
        reason = "the layer or the norm stands at several paths"
    return layer_path, f"{layer_path}: {reason}" if reason else ""


def _use_reason(path: str, layer_path: str, call: Call, layer_calls: list[Call]) -> str:
    if len(layer_calls) != 1:
        return f"the layer is called {len(layer_calls)} times in a forward pass"
    if not call.alone or not layer_calls[0].alone:
        return "it is called with more than its input"
    others = [r for r in layer_calls[0].readers if r != path]
    return f"the layer's output is also read by {', '.join(others)}" if others else ""


def _layer_reason(layer: nn.Module) -> str:
    name = type(layer).__name__
    if any(is_lazy(t) for t in layer.parameters()):
        return f"{name} has not seen its first batch"
    if hasattr(layer, "parametrizations"):
        return "its weight has a parametrization: fold that first"
    if type(layer) not in LAYERS:
        return f"{name} is a class of its own, which may compute something else"
    return module_reason(layer)


def module_reason(module: nn.Module) -> str:
    """Say what keeps any module from being taken over; empty = nothing."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return "hooks are registered on it"
    if "forward" in vars(module) or module._compiled_call_impl is not None:
        return "its forward is not its class's (patched or compiled)"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__} (sharded or quantised)"
        if not parameter.is_floating_point():
            return f"its {name} is of type {parameter.dtype}, not a floating-point number"
    return ""


def _in_blocks(model: nn.Module, norms: Mapping[str, nn.Module]) -> dict[str, str]:
    """Read the pairs of a model that was rewritten before."""
    held = {id(m): path for path, m in model.named_modules() if isinstance(m, HeldConv)}
    return {path: held[id(m.held[0])] for path, m in norms.items() if isinstance(m, ConvBNBlock)}


def _look(model: nn.Module, data: Iterable[Batch] | None) -> tuple[Links, bool]:
    watched = [path for path, m in model.named_modules() if _is_watched(m)]
    links, whole = links_on_symbols(model, watched)
    if whole or data is None:
        return links, whole
    return links_of_run(model, first_batch(data), watched), True


def _is_watched(module: Any) -> bool:
    # The projection inside torch's attention is never called as a module.
    layer = isinstance(module, tuple(LAYERS)) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return layer or isinstance(module, _BatchNorm)


def first_batch(data: Iterable[Batch]) -> Batch:
    """Return the first batch.

    Raises:
        AnatomyError: there is none.
    """
    for batch in data:
        return batch
    raise AnatomyError("the data to look at has no batch")


def _at_several_paths(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    several: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        (several if id(module) in seen else seen).add(id(module))
    return several
