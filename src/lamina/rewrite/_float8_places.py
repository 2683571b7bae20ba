"""Which parts of a block can train on float8, and as what: judged by what modules compute, not by their names."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import anatomy
from lamina.nn.float8.activation import FUNCTIONS, Function, activate

NormKind = Literal["rms_norm", "layer_norm"]


@dataclass(frozen=True)
class GatedPlan:
    """The three layers of a gated network, by name in it, and its activation."""

    gate: str
    up: str
    down: str
    function: Function
    dropout: str | None = None


@dataclass
class Places:
    """Paths by what becomes of them."""

    linear: list[str] = field(default_factory=list)
    kept_input: list[str] = field(default_factory=list)
    norm: dict[str, NormKind] = field(default_factory=dict)
    activation: dict[str, Function] = field(default_factory=dict)
    gated_mlp: dict[str, GatedPlan] = field(default_factory=dict)
    fallback: list[str] = field(default_factory=list)
    stays: dict[str, str] = field(default_factory=dict)


def find_places(model: nn.Module, skips: Callable[[str], bool], fallback: bool) -> Places:
    """Go through every block's branches.

    Raises:
        AnatomyError: the model has no blocks.
    """
    found = Places()
    for trunk in anatomy.dissect(model).trunks:
        for sublayer in (s for block in trunk.blocks for s in block.sublayers):
            for path in (p for p in sublayer.norms if not skips(p)):
                kind = norm_kind(anatomy.get(model, path))
                if kind is None:
                    found.stays[path] = "neither a layer norm nor an RMS norm over the last dimension"
                else:
                    found.norm[path] = kind
            taken = {*found.norm, *found.stays}
            for path in (p for p in sublayer.parts if not skips(p)):
                _branch(model, path, sublayer.kind, found, skips, fallback, taken)
    inside = tuple(f"{path}." for path in found.fallback)
    found.norm = {path: kind for path, kind in found.norm.items() if not path.startswith(inside)}
    found.stays = {path: why for path, why in found.stays.items() if not path.startswith(inside)}
    return found


def _branch(
    model: nn.Module,
    path: str,
    kind: str,
    found: Places,
    skips: Callable[[str], bool],
    fallback: bool,
    taken: set[str],
) -> None:
    module = anatomy.get(model, path)
    inner = [(f"{path}.{n}".rstrip("."), m) for n, m in module.named_modules() if not skips(f"{path}.{n}".rstrip("."))]
    linears = {p: m for p, m in inner if type(m) is nn.Linear}
    if "attention" in kind:
        out = _output_weight(module)
        found.linear += linears
        found.kept_input += [p for p, m in linears.items() if m.weight is out]
        if not linears:
            found.stays[path] = "an attention without linear layers of its own"
        return
    plan = gated_plan(module)
    if plan is not None and not any(skips(f"{path}.{n}") for n in (plan.gate, plan.up, plan.down)):
        found.gated_mlp[path] = plan
        return
    functions = {p: f for p, m in inner if p != path and (f := activation_of(m)) is not None}
    others = [
        p for p, m in inner if p not in linears and p not in taken and any(True for _ in m.parameters(recurse=False))
    ]
    # A lone linear layer is a half of a network whose activation stands in a part of its own, or between the parts.
    if linears and not others and (functions or type(module) is nn.Linear):
        found.linear += linears
        found.activation.update(functions)
    elif activation_of(module) is not None:
        found.activation[path] = activation_of(module)  # type: ignore[assignment]
    elif fallback and any(p.requires_grad for p in module.parameters()):
        found.fallback.append(path)
    elif any(True for _ in module.parameters()):
        found.stays[path] = f"what {type(module).__name__} computes is not known, and fallback is off"


def _output_weight(attention: nn.Module) -> Tensor | None:
    projections = anatomy.attention_projections(attention)
    return None if projections is None else projections.out.weight


@torch.no_grad()
def norm_kind(module: nn.Module) -> NormKind | None:
    """Say which norm over the last dimension a module is, with its own weight and bias; None where it is neither."""
    if type(module) is nn.LayerNorm or type(module) is nn.RMSNorm:
        # Only over the last dimension.
        named: dict[type, NormKind] = {nn.LayerNorm: "layer_norm", nn.RMSNorm: "rms_norm"}
        return named[type(module)] if len(module.normalized_shape) == 1 else None
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    own = list(module.parameters())
    vectors = isinstance(weight, Tensor) and all(p.dim() == 1 and p is not None for p in own)
    if not vectors or len(own) > 2 or norm_eps(module) is None or any(p.is_meta for p in own):
        return None
    width, eps = len(weight), norm_eps(module)  # type: ignore[arg-type]
    x = torch.randn(2, width + 1, width, generator=torch.Generator().manual_seed(0)).to(weight)
    y = _run(module, x)
    if y is None:
        return None
    if bias is None and _close(y, F.rms_norm(x.float(), (width,), weight.float(), eps)):  # type: ignore[union-attr]
        return "rms_norm"
    shift = None if bias is None else bias.float()
    return "layer_norm" if _close(y, F.layer_norm(x.float(), (width,), weight.float(), shift, eps or 0.0)) else None  # type: ignore[union-attr]


def norm_eps(module: nn.Module) -> float | None:
    """Return a norm's epsilon; a torch RMS norm without one has its weight's machine epsilon."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    if isinstance(module, nn.RMSNorm):
        return float(torch.finfo(torch.float32 if module.weight is None else module.weight.dtype).eps)
    return None


def activation_of(module: nn.Module) -> Function | None:
    """Say which of the functions a module without parameters is, by what it computes; None where it is none."""
    if isinstance(module, (nn.Dropout, nn.Identity)) or any(True for _ in (*module.children(), *module.parameters())):
        return None
    y = _run(module, _PROBE)
    return None if y is None else next((f for f in FUNCTIONS if _close(y, activate(_PROBE, f), 1e-6)), None)  # type: ignore[arg-type, misc]


@torch.no_grad()
def gated_plan(module: nn.Module) -> GatedPlan | None:
    """Say which layers of a network are its gate, its other input and its output; None where it is no gated network."""
    children = dict(module.named_children())
    layers = {n: m for n, m in children.items() if type(m) is nn.Linear}
    dropouts = [n for n, m in children.items() if isinstance(m, nn.Dropout)]
    rest = [m for n, m in children.items() if n not in layers and n not in dropouts]
    if (
        len(layers) != 3
        or len(dropouts) > 1
        or any(True for m in rest for _ in m.parameters())
        or list(module.parameters(recurse=False))
    ):
        return None
    parameter = next(module.parameters())
    # On meta only names can tell the gate.
    trial = next(iter(layers.values())).weight.is_meta
    for gate, up, down in itertools.permutations(layers):
        a, b, c = layers[gate], layers[up], layers[down]
        fits = (a.in_features, a.out_features) == (b.in_features, b.out_features) == (c.out_features, c.in_features)
        if not fits or (trial and "gate" not in gate):
            continue
        if trial:
            function = next((f for m in rest if (f := activation_of(m)) is not None), "silu")
            return GatedPlan(gate, up, down, function, next(iter(dropouts), None))  # type: ignore[arg-type]
        x = torch.randn(2, 3, a.in_features, generator=torch.Generator().manual_seed(0)).to(parameter)
        y = _run(module, x)
        for known in FUNCTIONS if y is not None else ():
            if _close(y, c(activate(a(x), known) * b(x))):  # type: ignore[arg-type]
                return GatedPlan(gate, up, down, known, next(iter(dropouts), None))  # type: ignore[arg-type]
    return None


_PROBE = torch.linspace(-4, 4, 33)


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad(), anatomy.undisturbed(module):
            y: Any = module(x)
    except Exception:
        # Any code may stand in a forward: then it is another kind of module.
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    tolerance = max(tolerance, 4 * torch.finfo(a.dtype).eps)
    return torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(b.abs().max().clamp(min=1e-6)))
