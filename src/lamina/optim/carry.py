"""Let an optimizer follow a rewritten model: its groups hold the new parameters, their state goes along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lamina.lineage import Lineage
from lamina.optim.groups import norms_and_biases

State = dict[str, Any]


@dataclass(frozen=True)
class Carried:
    """What became of each parameter, by name; the trainer logs it."""

    kept: tuple[str, ...]
    """Still in the model: state and group as they were."""
    derived: tuple[str, ...]
    """New, made from old ones: state followed by the lineage, group of the first old one."""
    fresh: tuple[str, ...]
    """New, without a state that could follow."""
    dropped: tuple[str, ...]
    """Gone: removed from the groups and the state."""


def carry(
    optimizer: Optimizer, model: nn.Module, lineage: Lineage, *, old_names: dict[int, str] | None = None
) -> Carried:
    """Make the optimizer follow a rewrite of `model`, in place; return what became of each parameter.

    State tensors shaped like the parameter follow row by row through `lineage.carry`; scalars (`step`) are
    the first old parameter's. State of any other shape (factored moments) cannot follow: that parameter is
    fresh. A fresh gain or bias joins the group without trust ratio or weight decay where there is one, any
    other fresh parameter the first group with them. Learning rates of the groups stay untouched. Parameters
    that were left out of the optimizer before stay out, and so does what was made from them.

    Args:
        model: after the rewrite.
        old_names: `{id(parameter): name}` of the model before. A parameter of the optimizer that is not in it
            is not the model's (an objective's own) and stays. None: all were the model's.
    """
    named = {id(p): (n, p) for n, p in model.named_parameters()}
    held = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    old = old_names if old_names is not None else dict.fromkeys(held, "")
    states = _States(optimizer, lineage)
    role = _role_groups(optimizer, model, {*old, *named})
    kept: list[str] = []
    derived: list[str] = []
    fresh: list[str] = []
    joining: list[tuple[int, Parameter, State | None]] = []
    for name, new in named.values():
        if id(new) in held:
            kept.append(name)
            continue
        if id(new) in old or not new.requires_grad:
            continue
        sources = [p for p in states.roots(new) if id(p) in held]
        if not sources and states.roots(new):
            continue
        state = states.of(new)
        (fresh if state is None else derived).append(name)
        joining.append((held[id(sources[0])] if sources else role(name), new, state))
    names = _given_names(optimizer) | {key: name for key, (name, _) in named.items()}
    dropped = _remove_gone(optimizer, named, old)
    for group, new, state in joining:
        optimizer.param_groups[group]["params"].append(new)
        if state:
            optimizer.state[new] = state
    _sort(optimizer, list(named), names)
    return Carried(tuple(kept), tuple(derived), tuple(fresh), dropped)


class _States:
    """The optimizer state each parameter has or inherits; an intermediate parameter's is worked out on the way."""

    def __init__(self, optimizer: Optimizer, lineage: Lineage) -> None:
        self.optimizer, self.lineage = optimizer, lineage
        self.held = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def roots(self, new: Parameter) -> list[Parameter]:
        """List the old parameters that `new` goes back to, through parameters that lived only inside the pass."""
        found: list[Parameter] = []
        for origin in self.lineage.origins(new):
            inner = [] if id(origin.old) in self.held else self.roots(origin.old)
            found += inner or [origin.old]
        return found

    def of(self, parameter: Parameter) -> State | None:
        """Return the state of a parameter: {} = made from ones that have none yet, None = nothing can follow."""
        if id(parameter) in self.held:
            return self.optimizer.state.get(parameter, {})
        inherited: dict[Parameter, State] = {}
        for origin in self.lineage.origins(parameter):
            state = self.of(origin.old)
            if state is not None:
                inherited[origin.old] = state
        if not inherited:
            return None
        return self._inherit(parameter, inherited)

    def _inherit(self, new: Parameter, inherited: dict[Parameter, State]) -> State | None:
        result: State = {}
        for key in dict.fromkeys(k for state in inherited.values() for k in state):
            having = {p: s[key] for p, s in inherited.items() if key in s}
            first_owner, first = next(iter(having.items()))
            if not isinstance(first, Tensor):
                result[key] = first
            elif first.ndim == 0 and (key == "step" or first_owner.ndim > 0):
                result[key] = first.clone()
            elif all(isinstance(s, Tensor) and s.shape == p.shape for p, s in having.items()):
                result[key] = _to(new, self.lineage.carry(new, having))
            else:
                return None
        return result


def _to(new: Parameter, state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(new.device)


def _role_groups(optimizer: Optimizer, model: nn.Module, models: set[int]) -> Callable[[str], int]:
    """Return which group a fresh parameter of this name joins, among those that hold the model's parameters."""
    plain = norms_and_biases(model)
    groups = optimizer.param_groups
    own = [i for i, g in enumerate(groups) if any(id(p) in models for p in g["params"])] or list(range(len(groups)))

    def group_of(name: str) -> int:
        bare = name in plain
        return min(own, key=lambda i: (_is_bare(groups[i]) != bare, (groups[i].get("weight_decay", 0.0) == 0) != bare))

    return group_of


def _is_bare(group: dict[str, Any]) -> bool:
    return group.get("adapt") is False


def _remove_gone(optimizer: Optimizer, named: dict[int, tuple[str, Parameter]], old: dict[int, str]) -> tuple[str, ...]:
    dropped = []
    for i, group in enumerate(optimizer.param_groups):
        gone = {j: p for j, p in enumerate(group["params"]) if id(p) not in named and id(p) in old}
        for j, p in gone.items():
            optimizer.state.pop(p, None)
            dropped.append(old[id(p)] or f"group {i} parameter {j}")
        group["params"] = [p for j, p in enumerate(group["params"]) if j not in gone]
    return tuple(dropped)


def _given_names(optimizer: Optimizer) -> dict[int, str]:
    """Return the names an optimizer made from `named_parameters()` keeps beside its parameters."""
    groups = optimizer.param_groups
    return {id(p): n for g in groups for p, n in zip(g["params"], g.get("param_names", ()), strict=False)}


def _sort(optimizer: Optimizer, order: list[int], names: dict[int, str]) -> None:
    """Order each group as the model names its parameters, others behind, so that every process agrees."""
    place = {key: i for i, key in enumerate(order)}
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda p: place.get(id(p), len(place)))
        if "param_names" in group:
            group["param_names"] = [names[id(p)] for p in group["params"]]
