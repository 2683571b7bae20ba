"""The options of a hypernetwork: which there are, which go together, and the condition built from its node."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lamina.errors import LaminaError, ShapeError, nearest
from lamina.nn.hypernetwork_conditions import (
    Condition,
    JointCondition,
    NoiseCondition,
    TaskCondition,
    VectorCondition,
)
from lamina.recipe import factory

Init = Literal["hyperfan_in", "hyperfan_out", "residual", "zero"]

CHOICES = {
    "generation": ("chunk", "once", "multihead", "component"),
    "base": ("none", "frozen", "trainable"),
    "init": ("hyperfan_in", "hyperfan_out", "residual", "zero"),
    "batch_norm": ("refuse", "per_condition", "batch"),
}


def make_condition(given: Any) -> Condition:
    """Build the condition from parts or their nodes; several become one.

    Raises:
        LaminaError: something that is no condition.
    """
    several = isinstance(given, (list, tuple))
    found = []
    for one in given if several else [given]:
        built = one if isinstance(one, nn.Module) else factory("layer", one)()
        if not isinstance(built, Condition):
            raise LaminaError(f"a condition is a TaskCondition, VectorCondition, ..., got a {type(built).__name__}")
        found.append(built)
    return JointCondition(found) if several else found[0]


def members(condition: Condition) -> list[nn.Module]:
    """List the single conditions of one."""
    return list(condition.conditions) if isinstance(condition, JointCondition) else [condition]


def stacked(condition: Condition, value: Any, rows: int) -> list[Tensor]:
    """Return the values of the single conditions, each with `rows` in its first dimension."""
    found = []
    for member, given in zip(
        members(condition), value if isinstance(condition, JointCondition) else [value], strict=True
    ):
        tensor = torch.as_tensor(given)
        if isinstance(member, TaskCondition):
            tensor = tensor.reshape(-1)
        elif isinstance(member, VectorCondition):
            tensor = tensor.reshape(-1, member.dim)
        elif isinstance(member, NoiseCondition):
            tensor = tensor.reshape(-1, member.width)
        found.append(tensor if len(tensor) == rows else tensor.expand(rows, *tensor.shape[1:]))
    return found


def as_batch(conditions: Any) -> Any:
    """Make a batch of conditions of a list of numbers; a tuple is one value a condition."""
    return torch.as_tensor(conditions) if isinstance(conditions, (list, range)) else conditions


def without_row(output: Any) -> Any:
    """Take away the batch of one that a row was run as."""
    return output.squeeze(1) if isinstance(output, Tensor) and output.dim() > 1 else output


def check_rows(rows: int, inputs: Any) -> None:
    """Refuse input tensors that have not a row a condition."""
    for leaf in tree_flatten(inputs)[0]:
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != rows):
            raise ShapeError(f"{rows} conditions for an input of shape {tuple(leaf.shape)}: they must be as many as its rows")  # fmt: skip  # noqa: E501


def check_choices(**given: str) -> None:
    """Refuse a word that is no choice."""
    for key, value in given.items():
        if value not in CHOICES[key]:
            known = CHOICES[key]
            raise LaminaError(f"{key} must be one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")


def check_positive(**sizes: int) -> None:
    """Refuse sizes below 1."""
    for key, value in sizes.items():
        if value < 1:
            raise ShapeError(f"HyperNetwork: {key} must be at least 1, got {value}")


def check_together(base: str, init: str, rank: int | None) -> None:
    """Refuse a start that needs a base it has not, or that would never move."""
    if base == "none" and init in ("residual", "zero"):
        raise LaminaError(f"init={init!r} adds to a base, and base is 'none': pass base='frozen' or 'trainable'")
    if init == "zero" and rank is not None:
        raise LaminaError("init='zero' with rank would never move, for both factors are zero: use init='residual'")
