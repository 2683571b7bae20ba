"""How large generated weights are at the start: hyperfan, by the fan of each tensor in the target.

The generator's raw numbers have mean square 1. A weight is raw * scale with scale^2 = g / fan_in (hyperfan-in) or
g / fan_out (hyperfan-out), g = 2 before a rectifier, else 1. What starts as a constant (biases at 0, gains of norms at
1) is constant + gate * raw with a trained gate that starts at 0; hyperfan-out opens a bias's gate to
sqrt(max(0, g (1 - fan_in / fan_out))). As biases start at 0, hyperfan-in needs no halving to make room for them.
Source: Chang et al., Principled Weight Initialization for Hypernetworks (2020), equations 5-8.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lamina.nn._hypernetwork_target import Entry

RECTIFIERS = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish)
RECTIFIER_NAMES = frozenset(("relu", "relu_", "leaky_relu", "relu6", "elu", "gelu", "silu", "hardswish", "mish"))
PASSED = (nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
"""What may stand between a layer and its rectifier; norms as well."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How one generated tensor starts."""

    scale: float
    """Of the raw numbers."""
    constant: float
    """Added to them."""
    gate: float | None
    """Start of the trained factor on the raw numbers; None = there is none."""


def hyperfan(target: nn.Module, entries: Sequence[Entry], values: Sequence[Tensor], *, outward: bool) -> list[Start]:
    """Return how each entry starts; `values` are the target's own."""
    rectified = rectified_modules(target)
    starts = []
    for entry, value in zip(entries, values, strict=True):
        path, attribute = entry.places[0]
        module = target.get_submodule(path)
        g = 2.0 if path in rectified else 1.0
        fans = fans_of(module, attribute)
        if fans is None:
            # No layer whose arithmetic is known: as spread as it was, or constant where it was constant.
            mean, spread = mean_and_spread(value)
            scale, gate = (spread / math.sqrt(entry.rank or 1), None) if spread > 0 else (1.0, 0.0)
            starts.append(Start(scale, 0.0 if math.isnan(mean) else mean, gate))
        elif value.dim() < 2:
            opened = g * (1 - fans[0] / fans[1]) if outward else 0.0
            starts.append(Start(1.0, 0.0, math.sqrt(max(0.0, opened))))
        else:
            starts.append(Start(math.sqrt(g / fans[outward]) / math.sqrt(entry.rank or 1), 0.0, None))
    return starts


def fans_of(module: nn.Module, attribute: str) -> tuple[int, int] | None:
    """Return (fan_in, fan_out) of the layer that holds a weight or bias; None where it is no known layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        size = math.prod(module.kernel_size)
        return module.in_channels // module.groups * size, module.out_channels // module.groups * size
    if isinstance(module, nn.MultiheadAttention) and attribute.startswith("in_proj"):
        return module.embed_dim, module.embed_dim
    return None


def rectified_modules(target: nn.Module) -> set[str]:
    """Name the layers whose output goes into a rectifier, by tracing the target's forward.

    A forward that cannot be traced is read by its `nn.Sequential`s alone.
    """
    try:
        graph = fx.Tracer().trace(target)
    except Exception as error:  # Tracing runs the target's own code, which may fail in any way.
        logger.info("%s cannot be traced (%s): rectifiers are looked for in its Sequentials", type(target), error)
        return _in_sequentials(target)
    modules = dict(target.named_modules())
    return {
        str(n.target) for n in graph.nodes if n.op == "call_module" and any(_rectifies(u, modules) for u in n.users)
    }


def _rectifies(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, RECTIFIERS):
            return True
        return _is_passed(module) and any(_rectifies(u, modules) for u in node.users)
    return getattr(node.target, "__name__", node.target) in RECTIFIER_NAMES


def _in_sequentials(target: nn.Module) -> set[str]:
    found = set()
    for path, module in target.named_modules():
        if isinstance(module, nn.Sequential):
            layer = ""
            for name, child in module.named_children():
                if isinstance(child, RECTIFIERS) and layer:
                    found.add(layer)
                if not _is_passed(child):
                    layer = f"{path}.{name}" if path else name
    return found


def _is_passed(module: nn.Module) -> bool:
    return isinstance(module, PASSED) or "Norm" in type(module).__name__


def mean_and_spread(value: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the target's own values; NaN where they are not there (meta)."""
    if value.is_meta:
        return math.nan, math.nan
    spread, mean = torch.std_mean(value.detach().float(), correction=0)
    return float(mean), float(spread)
