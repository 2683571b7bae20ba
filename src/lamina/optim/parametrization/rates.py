"""Learning rates and decays in muP: for any of torch's optimizers, ours, or one of your own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lamina.batches import bare
from lamina.errors import LaminaError, nearest
from lamina.optim.groups import parameter_groups
from lamina.optim.kar import Kar2, Kar3
from lamina.optim.lamb import LAMB
from lamina.optim.lars import LARS, adapts
from lamina.optim.parametrization.widths import MUP_NAME, Width, Widths, read, widths_of
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SOURCE = "Yang et al., Tensor Programs V (2022), arXiv 2203.03466"

logger = logging.getLogger(__name__)

Rule = Literal["adam", "sgd", "lamb", "lars", "adafactor"]
"""How an optimizer's step depends on the size of the gradient and of the parameter."""

RULES: dict[type[Optimizer], Rule] = {
    **dict.fromkeys((Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, RMSprop, Kar2, Kar3), "adam"),
    SGD: "sgd",
    LAMB: "lamb",
    LARS: "lars",
    Adafactor: "adafactor",
}
"""Optimizers whose rule is known."""


@register("optimizer", "mup", source=SOURCE)
def mup(
    model: nn.Module | None,
    base: Annotated[Node, Slot("optimizer")] = "adamw",
    *,
    params: Iterable[Any] | None = None,
    widths: Widths | Mapping[str, Any] | None = None,
    rule: Rule | None = None,
) -> Optimizer:
    """Make an optimizer whose learning rates and decays suit each parameter's width; the rates given are the base's.

    Returns the base optimizer itself, its groups split; schedules, checkpoints and rewrites work as ever. The group of
    the hidden weights comes first: there a rewrite puts new parameters, and a logged rate is theirs.

    Args:
        model: in muP (`parametrize`, `MuP`); the bare one, before it is wrapped. None: no rate is scaled (for a look at
            what the optimizer keeps).
        base: the optimizer, with its options: `{name: adamw, lr: 4e-3, weight_decay: 0.1}`. Its own weight decay is
            that of all groups that have none of their own and are not marked `adapt=False` (gains and biases).
        params: parameters or groups, as of `parameter_groups`; None = that function's.
        widths: what `MuP` decided; None = from the model's history.
        rule: of an optimizer that is not known: how its steps scale, by the name of one that is.
    Raises:
        LaminaError: a model that does not know its widths or whose widths have changed, an optimizer that is not known.
    Source: Yang et al. (2022), arXiv 2203.03466, table 8 (Adam, SGD). LAMB, LARS and Adafactor: derived here: a step as
        long as the tensor's own norm is sqrt(n) for a hidden weight, where muP asks for 1, so lr / sqrt(k_in).
    Example:
        >>> from lamina.optim.parametrization import parametrize
        >>> def make(width): return nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 2))
        >>> optimizer = mup(parametrize(make(64), base=lambda: make(16)), {"name": "adam", "lr": 0.1})
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.025, 0.1, 0.1]
    """
    make: Callable[..., Optimizer] = factory("optimizer", base)
    if model is None:
        return make(params)
    model = bare(model)
    groups = _groups(parameter_groups(model, 0.0) if params is None else list(params))
    for group in groups:
        if not group.get("weight_decay") and group.get("adapt") is not False:
            # Then the base optimizer fills in its own.
            group.pop("weight_decay", None)
    known = checked_widths(model, widths)
    optimizer = make(groups)
    chosen = _rule_of(optimizer) if rule is None else _checked_rule(rule)
    optimizer.param_groups[:] = [part for g in optimizer.param_groups for part in _split(model, g, known, chosen)]
    return optimizer


def param_groups(
    model: nn.Module,
    widths: Widths | Mapping[str, Any] | None = None,
    rule: Rule = "adam",
    *,
    lr: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    exclude: Literal["norms_and_biases", "nothing"] = "norms_and_biases",
) -> list[dict[str, Any]]:
    """Return a model's parameters as groups with the rates of muP, for any torch optimizer.

    Args:
        widths: what `MuP` decided; None = from the model's history.
        rule: how the optimizer's steps scale: "adam" for everything that divides gradients by their size, "sgd", ...
        lr, weight_decay: at the base's width.
        decoupled: the decay is not multiplied by the learning rate, and stays as it is; torch's AdamW does multiply.
        exclude: from decay, see `parameter_groups`.
    Raises:
        LaminaError: a model that does not know its widths or whose widths have changed, an unknown rule.
    """
    model = bare(model)
    known, rule = checked_widths(model, widths), _checked_rule(rule)
    groups = [{**g, "lr": lr} for g in parameter_groups(model, weight_decay, exclude)]
    return [part for g in groups for part in _split(model, g, known, rule, decoupled=decoupled)]


def rates(width: Width, rule: Rule) -> tuple[float, float]:
    """Return the factors of learning rate and weight decay (which the rate multiplies) of a parameter.

    Source: Yang et al. (2022), arXiv 2203.03466, table 8, and what PyPI's `mup` does about decay: rate times decay is
        the same at any width.
    """
    k_in, k_out, kind = width
    if kind == "fixed":
        return 1.0, 1.0
    if rule == "sgd":
        lr = {"vector": k_in * k_out, "matrix": k_out / k_in, "normalized": 1.0}[kind]
        return lr, 1.0 / lr
    if kind == "vector":
        # LARS divides by the gradient's norm, and decays along with that.
        return 1.0, 1.0 / (k_in * k_out) if rule == "lars" else 1.0
    root = k_in**0.5
    if rule == "adam":
        lr = 1.0 / (k_in if kind == "matrix" else root)
        return lr, 1.0 / lr
    if kind == "normalized":
        return 1.0 / root, {"lamb": root, "lars": 1.0, "adafactor": root}[rule]
    return 1.0 / root, {"lamb": k_in, "lars": 1.0, "adafactor": root}[rule]


def checked_widths(model: nn.Module, widths: Widths | Mapping[str, Any] | None) -> Widths:
    """Return a model's widths, held against its parameters as they are now.

    Raises:
        LaminaError: a parameter that no rewrite brought has no width, or a dimension of width has changed.
    """
    known = widths_of(model) if widths is None else read(widths)
    for name, parameter in model.named_parameters():
        if name not in known.parameters and not rewritten_since(model):
            raise LaminaError(f"{name} has no width: it was added after MuP had decided. Add it first, then decide")
        then, now = list(known.shapes.get(name, ())), list(parameter.shape)
        if any(d >= len(now) or now[d] != then[d] for d in known.growing.get(name, ())):
            raise LaminaError(
                f"{name} is {tuple(now)}, and was {tuple(then)} when MuP decided: a pass changed its width, so the "
                "rates no longer hold. Change the width first, and let MuP decide after that"
            )
    return known


def rewritten_since(model: nn.Module) -> bool:
    """Say whether a pass came after `MuP`."""
    records = list(getattr(model, "lamina_history", ()))
    return bool(records) and records[-1].name != MUP_NAME


def _groups(params: list[Any]) -> list[dict[str, Any]]:
    return [dict(g) for g in params] if params and isinstance(params[0], Mapping) else [{"params": params}]


def _split(
    model: nn.Module, group: Mapping[str, Any], widths: Widths, rule: Rule, *, decoupled: bool = False
) -> list[dict[str, Any]]:
    """Split a group by the factors its parameters need, the smallest rate first.

    Which groups there are does not depend on what passes have taken away since: a run that is resumed has the same.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    bare = group.get("adapt") is False
    decided = [
        rates(width, _own_rule(len(widths.shapes[name]), group, rule))
        for name, width in widths.parameters.items()
        if (len(widths.shapes[name]) < 2) == bare
    ]
    parts: dict[tuple[float, float], list[Parameter]] = {factors: [] for factors in sorted(decided)}
    late: list[Parameter] = []
    for parameter in group["params"]:
        name = names.get(id(parameter))
        if name is not None and name not in widths.parameters:
            late.append(parameter)
            continue
        # A parameter that is not the model's (an objective's) has no width.
        width: Width = (1.0, 1.0, "fixed") if name is None else widths.parameters[name]
        parts.setdefault(rates(width, _own_rule(parameter.ndim, group, rule)), []).append(parameter)
    if late:
        logger.info("mup: %s came after MuP had decided and get the smallest rate", [names[id(p)] for p in late])
        parts.setdefault(min(parts, default=(1.0, 1.0)), []).extend(late)
    result = []
    for (lr, decay), members in sorted(parts.items(), key=lambda item: item[0][0]):
        scaled = {**group, "params": members, "lr": group["lr"] * lr if lr != 1.0 else group["lr"]}
        if group.get("weight_decay") and not decoupled:
            scaled["weight_decay"] = group["weight_decay"] * decay
        result.append(scaled)
    return result


def _own_rule(dimensions: int, group: Mapping[str, Any], rule: Rule) -> Rule:
    """Return the rule of one parameter: LAMB leaves some to Adam, LARS to SGD, each by its own flags."""
    if rule == "lamb":
        adapt = group.get("adapt")
        scaled = (group.get("always_adapt", True) or group.get("weight_decay", 0) != 0) if adapt is None else adapt
        return "lamb" if scaled else "adam"
    if rule == "lars" and "variant" in group:
        return "lars" if adapts(torch.empty((1,) * dimensions), dict(group)) else "sgd"
    return rule


def _rule_of(optimizer: Optimizer) -> Rule:
    for cls in type(optimizer).__mro__:
        if cls in RULES:
            return RULES[cls]
    raise LaminaError(
        f"mup does not know how the steps of {type(optimizer).__name__} scale (it knows "
        f"{', '.join(c.__name__ for c in RULES)}): say so (rule='adam' for what divides gradients by their size)"
    )


def _checked_rule(rule: Rule) -> Rule:
    if rule not in get_args(Rule):
        raise LaminaError(
            f"mup: rule is one of {', '.join(get_args(Rule))}, got {rule!r}{nearest(str(rule), get_args(Rule))}"
        )
    return rule
