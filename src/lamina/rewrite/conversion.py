"""Conversions: how one layer becomes another, for `Replace`. A method adds its own with `@conversion(old, new)`.

Without one, a `Linear` (or the head) becomes any registered layer that is called like `nn.Linear(in, out)`, and a norm
any registered norm: what has the same name and shape in both is copied, the rest is fresh.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina import registry
from lamina.errors import LaminaError
from lamina.lineage import Lineage
from lamina.nn import TokenBatchNorm

Conversion = Callable[[nn.Module, str, Mapping[str, Any], Lineage], nn.Module]
"""Builds the successor of a module: (module, registered name of the new one, its options, lineage)."""

C = TypeVar("C", bound=Conversion)

ROLES: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv1d": (nn.Conv1d,),
    "conv2d": (nn.Conv2d,),
    "conv3d": (nn.Conv3d,),
    "conv_transpose2d": (nn.ConvTranspose2d,),
    "multihead_attention": (nn.MultiheadAttention,),
    "lstm": (nn.LSTM,),
    "gru": (nn.GRU,),
    "rnn": (nn.RNN,),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, TokenBatchNorm),
    "group_norm": (nn.GroupNorm,),
}
"""What may be replaced under a name that is not a registered norm's own; exact types, as a subclass may differ."""

HEAD = "head"
"""The role of the last projection: found by anatomy, not by type."""

_conversions: dict[tuple[str, str], Conversion] = {}


def conversion(old: str, new: str) -> Callable[[C], C]:
    """Register how a layer in the role `old` (a key of `ROLES`, or `head`) becomes the registered part `new`.

    The function returns the new module with whatever weights the mathematics lets it take over, and says to the
    lineage which those are; it runs on the meta device too (that is how `decide` tries it).

    Raises:
        LaminaError: there is one already, or no such role.
    """
    if old not in ROLES and old != HEAD:
        raise LaminaError(f"no role of a layer is called {old!r}; roles: {', '.join((*ROLES, HEAD))}")

    def add(function: C) -> C:
        known = _conversions.setdefault((old, new), function)
        if known is not function and known.__qualname__ != function.__qualname__:
            raise LaminaError(f"two conversions of {old} to {new}: {known.__module__} and {function.__module__}")
        return function

    return add


def find_conversion(role: str, new: str) -> Conversion | None:
    """Return what turns a layer in this role into the part `new`: its own conversion, or the plain one of a Linear."""
    roles = (role, "linear") if role == HEAD else (role,)
    exact = next((c for r in roles if (c := _conversions.get((r, new))) is not None), None)
    if exact is None and role in ("linear", HEAD) and (":" in new or new in _like_linear()):
        return linear_to_layer
    return exact


def targets(role: str) -> set[str]:
    """Name the parts that a layer in this role can become."""
    own = {new for old, new in _conversions if old == role or (role == HEAD and old == "linear")}
    return own | _like_linear() if role in ("linear", HEAD) else own


def role_of(module: nn.Module) -> str:
    """Return the role a module has by its type; empty where it has none."""
    return next((role for role, types in ROLES.items() if type(module) in types), "")


def _like_linear() -> set[str]:
    """Name the registered layers that are called like `nn.Linear`: `in_features` first, then how many come out."""
    known = [p for p in registry.parts_of("layer") if _gives_tensor(p.target)]
    return {p.name for p in known if next(iter(inspect.signature(p.target).parameters), "") == "in_features"}


def _gives_tensor(target: Callable[..., Any]) -> bool:
    """Whether a layer says that it returns a tensor, or nothing (a distribution is no successor of a linear layer)."""
    said = inspect.signature(getattr(target, "forward", target)).return_annotation
    return said in (Tensor, "Tensor", inspect.Signature.empty)


def linear_to_layer(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build a registered layer that is called like `nn.Linear(in_features, out_features)`.

    Raises:
        LaminaError: the old layer is no plain `nn.Linear`.
    """
    if not isinstance(old, nn.Linear):
        raise LaminaError(f"only an nn.Linear becomes {new!r}, and this is a {type(old).__name__}")
    made: nn.Module = registry.find("layer", new)(old.in_features, old.out_features, **options)
    return take_over(made.to(dtype=old.weight.dtype), old, lineage)


def take_over(made: nn.Module, old: nn.Module, lineage: Lineage) -> nn.Module:
    """Copy `weight` and `bias` where both modules have them in one shape; return the new one."""
    for name in ("weight", "bias"):
        new_value, old_value = getattr(made, name, None), getattr(old, name, None)
        if isinstance(new_value, Parameter) and isinstance(old_value, Parameter) and new_value.shape == old_value.shape:
            with torch.no_grad():
                new_value.copy_(old_value)
            new_value.requires_grad_(old_value.requires_grad)
            lineage.derive(new_value, old_value)
    return made
