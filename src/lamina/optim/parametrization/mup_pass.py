"""The pass that puts a freshly initialised model into muP, by comparing it with a narrower one."""

from __future__ import annotations

import fnmatch
import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import Parameter

from lamina import anatomy
from lamina.batches import Batch
from lamina.errors import AnatomyError, LaminaError, nearest
from lamina.lineage import Lineage
from lamina.optim.groups import is_norm
from lamina.optim.parametrization.initial import initial_factors
from lamina.optim.parametrization.readout import READOUTS, as_query, as_readout, is_parametrized
from lamina.optim.parametrization.widths import MUP_NAME, Role, Widths, compare
from lamina.recipe import build

Base = nn.Module | Mapping[str, Any] | Callable[[], nn.Module]
"""A narrower model; what makes one; or the options in which its recipe node (or Hugging Face config) differs."""

_HEAD_WIDTHS = ("head_width", "head_dim", "attention_head_size", "head_size")
_LOGIT_SCALES = ("scaling", "scale", "softmax_scale")


class MuP:
    """Put a freshly initialised model into muP: what is tuned at the base's width holds at this one.

    Every parameter's shape is compared with that of a narrower model of the same kind. Dimensions that differ grow
    with the width; from them follow the first values (hidden weights shrink with the root of the width, nothing else
    does), the multiplier of each read-out (its input is divided by how much wider it is), the scale of attention
    logits (one over the head width, where that grows), and, with the optimizer `mup`, the learning rates. At the base's
    own width nothing changes. Replayed at load from the history, where the weights come from the file.

    Args:
        base: a narrower model of the same depth; a function that makes one; or a mapping of the options in which it
            differs: `{width: 64}` of one of our models, `{hidden_size: 64, ...}` of a Hugging Face model.
        delta: the same at yet another width, to tell dimensions that grow from those that do not at the base's own
            width. None: of a mapping, with its whole numbers doubled, where that can be built; else the model itself.
        output_mult: factor of every read-out, to tune.
        zero: patterns of parameter names that start at zero; read-outs and queries are recommended (`["head.*"]`).
        roles: by pattern of parameter names, what cannot be read off a layer that is not torch's: "input", "hidden",
            "readout", or "normalized": out of the width into scores that are normalised at once, as the keys of a
            Pattention (`{"*.key": "normalized", "*.value": "input"}`).
    Raises:
        LaminaError: other parameters, depth or groups than the base; a layer from the width to a fixed size in the
            middle of the network; what cannot be read off; a model in muP already.
    Source: Yang et al., Tensor Programs V (2022), arXiv 2203.03466, tables 3 and 8. Deviation: first values are
        measured in both models, not taken for torch's, so that a rule of its own (0.02 at any width) scales.
    Example:
        >>> from lamina.rewrite import rewrite
        >>> def make(width): return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        >>> rewrite(make(64), MuP(lambda: make(16)))[2]
        MuReadout(in_features=64, out_features=2, bias=True, width_multiplier=4, output_mult=1)
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        base: Base,
        delta: Base | None = None,
        *,
        output_mult: float = 1.0,
        zero: Sequence[str] = (),
        roles: Mapping[str, Role] | None = None,
    ) -> None:
        if not (math.isfinite(output_mult) and output_mult > 0):
            raise LaminaError(f"MuP: output_mult must be > 0 and finite, got {output_mult}")
        if isinstance(base, Mapping) and not base:
            raise LaminaError("MuP: base names no option in which it differs, such as {width: 64}")
        self.base, self.delta, self.output_mult = base, delta, output_mult
        self.zero, self.roles = tuple(zero), dict(roles or {})

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> Widths:
        """Compare; the data is not looked at."""
        if any(r.name == MUP_NAME for r in getattr(model, "lamina_history", ())) or any(
            map(is_parametrized, model.modules())
        ):
            raise LaminaError(f"{type(model).__name__} is in muP already: its first values cannot be rescaled twice")
        base = _made(self.base, model, "cpu")
        delta = None if self.delta is None else _made(self.delta, model, "meta")
        if delta is None and isinstance(self.base, Mapping):
            delta = _doubled(self.base, model)
        widths, growing, readouts = compare(model, base, delta, self.roles)
        if all(kind == "fixed" for _, _, kind in widths.values()):
            readouts = _head_alone(model)
        names = {id(p): n for n, p in model.named_parameters()}
        weights = {path: model.get_submodule(path).weight for path in readouts}
        _warn_deep(model, widths)
        return Widths(
            parameters=widths,
            shapes={n: tuple(p.shape) for n, p in model.named_parameters()},
            growing={n: dimensions for n, dimensions in growing.items() if dimensions},
            readouts=readouts,
            tied=[path for path, w in weights.items() if names[id(w)] != f"{path}.weight"],
            factors=initial_factors(model, base, widths) | _zeros(self.zero, names.values()),
            logits=_logits(model, base),
            output_mult=self.output_mult,
        )

    def apply(self, model: nn.Module, decision: Widths, lineage: Lineage) -> nn.Module:
        """Rescale the first values and swap the read-outs; the parameters stay the same objects."""
        _rescale(model, decision.factors)
        for path, k in decision.readouts.items():
            old = anatomy.get(model, path)
            new = as_readout(old, k, decision.output_mult)
            if not path:
                model = new
                continue
            anatomy.swap(model, path, new, all=True)
        for path, factor in decision.logits.items():
            module = anatomy.get(model, path)
            scale = _scale_name(module)
            if scale is None:
                anatomy.swap(model, path, as_query(module, factor), all=True)
            else:
                setattr(module, scale, getattr(module, scale) * factor)
        if not decision.readouts:
            _renew(model, decision.factors, lineage)
        return model


def parametrize(
    model: nn.Module,
    name: Literal["mup"] = "mup",
    *,
    base: Base,
    delta: Base | None = None,
    **options: Any,
) -> nn.Module:
    """Put a freshly initialised model into a parametrization, in place; return it. See `MuP` for the options.

    The learning rates follow with the optimizer: `mup(model, base="adamw")`, or `param_groups` for any of torch's.

    Raises:
        LaminaError: no such parametrization; and what `MuP` raises.
    """
    if name != "mup":
        raise LaminaError(f"parametrize knows 'mup', got {name!r}{nearest(str(name), ['mup'])} (theory of others: ABC)")
    # By name, because this module stands below the passes.
    rewritten: nn.Module = importlib.import_module("lamina.rewrite").rewrite(model, MuP(base, delta, **options))
    return rewritten


def _made(base: Base, model: nn.Module, device: str) -> nn.Module:
    """Build the narrower model, and leave the global generator as it was."""
    if isinstance(base, nn.Module):
        return base
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        if callable(base):
            made = base()
        elif isinstance(node := getattr(model, "lamina_node", None), Mapping):
            made = build(_merged(node, base), "model")
        else:
            made = _from_config(model, base)
    if not isinstance(made, nn.Module):
        raise LaminaError(f"MuP: base must make a module, it made a {type(made).__name__}")
    return made


def _merged(node: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change some options of a model node; those of a Hugging Face model stand in its config."""
    config = node.get("config")
    if isinstance(config, Mapping) and not changes.keys() & {"config", "path", "task"}:
        return {**node, "config": _narrowed(config, changes)}
    return {**node, **changes}


def _from_config(model: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise LaminaError(
            f"{type(model).__name__} does not know how it was built, so base={dict(changes)} says too little: pass a "
            "model or a function that makes one"
        )
    settings = config.to_dict()  # type: ignore[union-attr]
    for key in changes:
        if key not in settings and key not in getattr(config, "attribute_map", {}):
            raise LaminaError(f"MuP: {type(config).__name__} has no option {key!r}{nearest(key, settings)}")
    make: Any = type(config)
    made: nn.Module = type(model)(make(**_narrowed(settings, changes)))
    return made


def _narrowed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change a Hugging Face config; what it had worked out from the changed options is worked out again."""
    kept = {k: v for k, v in config.items() if k not in changes}
    heads = config.get("num_attention_heads")
    if heads and kept.get("num_key_value_heads") == heads and "num_attention_heads" in changes:
        kept["num_key_value_heads"] = changes["num_attention_heads"]
    if heads and kept.get("head_dim") == config.get("hidden_size", 0) // heads:
        del kept["head_dim"]
    return {**kept, **changes}


def _doubled(base: Mapping[str, Any], model: nn.Module) -> nn.Module | None:
    wider = {k: 2 * v if isinstance(v, int) and not isinstance(v, bool) else v for k, v in base.items()}
    try:
        return _made(wider, model, "meta")
    except (LaminaError, ValueError, NotImplementedError):
        # Not every size can be doubled: then the model itself has to do.
        return None


def _head_alone(model: nn.Module) -> dict[str, float]:
    """Name the head of a model that is as wide as its base, so that it is in muP as the wider ones are."""
    try:
        path = anatomy.find_head(model)
    except AnatomyError:
        return {}
    return {path: 1.0} if type(anatomy.get(model, path)) in READOUTS else {}


def _zeros(patterns: Sequence[str], names: Iterable[str]) -> dict[str, float]:
    known = list(names)
    found: dict[str, float] = {}
    for pattern in patterns:
        fitting = fnmatch.filter(known, pattern)
        if not fitting:
            raise LaminaError(f"MuP: no parameter fits the pattern {pattern!r} of zero{nearest(pattern, known)}")
        found |= dict.fromkeys(fitting, 0.0)
    return found


def _logits(model: nn.Module, base: nn.Module) -> dict[str, float]:
    """Find the attentions whose heads are wider than the base's: the module that can be told, and the factor."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        attribute = next((a for a in _HEAD_WIDTHS if isinstance(getattr(module, a, None), int)), None)
        if attribute is None:
            continue
        narrow = anatomy.get(base, path)
        k = getattr(module, attribute) / getattr(narrow, attribute)
        scale = _scale_name(module)
        if k == 1.0:
            continue
        if scale is not None:
            # One over the head width in the end, whatever power of it the scale has already.
            found[path] = getattr(narrow, scale) / getattr(module, scale) / k
        elif (projections := anatomy.attention_projections(module)) is not None:
            found[_query_path(path, module, projections.query.weight)] = k**-0.5
    return {path: factor for path, factor in found.items() if not math.isclose(factor, 1.0, rel_tol=1e-9)}


def _query_path(path: str, attention: nn.Module, weight: Parameter) -> str:
    for name, layer in attention.named_modules():
        if type(layer) is nn.Linear and layer.weight is weight and not _holds_keys(attention, weight):
            return f"{path}.{name}".lstrip(".")
    raise AnatomyError(
        f"MuP: the heads of {path or type(attention).__name__} are wider than the base's, and their logits cannot be "
        f"rescaled in a {type(attention).__name__}: keep the head width and let the number of heads grow"
    )


def _holds_keys(attention: nn.Module, weight: Parameter) -> bool:
    projections = anatomy.attention_projections(attention)
    return projections is not None and projections.key.weight is weight


def _scale_name(module: nn.Module) -> str | None:
    return next((a for a in _LOGIT_SCALES if isinstance(getattr(module, a, None), float)), None)


@torch.no_grad()
def _rescale(model: nn.Module, factors: Mapping[str, float]) -> None:
    parameters = dict(model.named_parameters())
    for name, factor in factors.items():
        parameters[name].mul_(factor)


def _renew(model: nn.Module, factors: Mapping[str, float], lineage: Lineage) -> None:
    """Make the rescaled parameters new objects, so that a rewrite without any other trace shows."""
    held = dict(model.named_parameters())
    fresh = {id(held[n]): Parameter(held[n].detach(), held[n].requires_grad) for n in factors}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in fresh:
                module._parameters[name] = fresh[id(parameter)]
    for name in factors:
        lineage.derive(fresh[id(held[name])], held[name])


def _warn_deep(model: nn.Module, widths: Mapping[str, Any]) -> None:
    matrices = [k for k, _, kind in widths.values() if kind == "matrix"]
    if len(matrices) > 4 and max(matrices) > 64 and not any(map(is_norm, model.modules())):
        warnings.warn(
            f"{type(model).__name__} has {len(matrices)} hidden weights {max(matrices):g} times as wide as the base's "
            "and no norm: rates may not carry over that far",
            stacklevel=4,
        )
