"""Blocks that can be left out, and what each of them knows about its elastic places."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamina.nn.elastic.layers import Mode
from lamina.nn.elastic.reclass import Reclassed, reclassed


@dataclass(frozen=True)
class GroupPlan:
    """Hidden channels that are made, changed one by one, and read inside one block."""

    hidden: int
    choices: tuple[int, ...]
    """How many run at each of the block's widths, the last = all."""
    members: int
    """How many layers have a part in it; where one is missing, another pass took it and the width stays whole."""


@dataclass(frozen=True)
class BlockPlan:
    """The elastic places of one block."""

    name: str
    """Path when it became elastic; ids of its groups begin with it."""
    widths: tuple[float, ...] = ()
    """What it can be asked for, the whole last; empty = it has one width."""
    groups: dict[str, GroupPlan] = field(default_factory=dict)
    stage: str | None = None
    """Name of the run of blocks of which the first ones can run alone; None = it always runs."""
    depths: tuple[int, ...] = ()
    """How many blocks of the stage may run."""
    compound: bool = False
    """Whether samples couple the depth of a stage with the width of its blocks."""
    mode: Mode = "slice"


class ElasticBlock(Reclassed, nn.Module):
    """A block that hands its first tensor on unchanged while `elastic_skipped`."""

    elastic_plan: BlockPlan
    elastic_skipped: bool
    elastic_tuple: bool
    """Whether its output is a tuple of one tensor."""
    elastic_gate: Tensor | None
    """Whether it runs, as a number on the device (mode "mask")."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or hand its input on."""
        if self.elastic_skipped:
            x = _first(args, kwargs)
            return (x,) if self.elastic_tuple else x
        result = super().forward(*args, **kwargs)
        if self.elastic_gate is None:
            return result
        x = torch.where(self.elastic_gate, result[0] if self.elastic_tuple else result, _first(args, kwargs))
        return (x,) if self.elastic_tuple else x


def elastic_block(module: nn.Module, plan: BlockPlan, *, returns_tuple: bool = False) -> ElasticBlock:
    """Return the block with its plan, sharing everything; for now it runs whole.

    Args:
        returns_tuple: whether its output is a tuple of one tensor.
    """
    new = reclassed(module, ElasticBlock)
    new.elastic_plan, new.elastic_skipped, new.elastic_tuple = plan, False, returns_tuple
    new.register_buffer("elastic_gate", None, persistent=False)
    return new


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = kwargs.get("hidden_states")
    found = (
        named
        if isinstance(named, Tensor)
        else next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    )
    if found is None:
        raise TypeError("a block that is left out was called without a tensor")
    return found
