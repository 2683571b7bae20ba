"""Conversion of a linear layer, such as a model's head, to one that settles with hidden variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lamina.errors import LaminaError
from lamina.lineage import Lineage
from lamina.nn import EquilibriumHead
from lamina.rewrite.conversion import conversion, take_over


@conversion("linear", "equilibrium_head")
def linear_to_equilibrium_head(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the head that computes exactly what the linear layer did, with a bias where it has one.

    Raises:
        LaminaError: the old layer is no plain `nn.Linear`.
    """
    if not isinstance(old, nn.Linear):
        raise LaminaError(f"only an nn.Linear becomes {new!r}, and this is a {type(old).__name__}")
    made = EquilibriumHead(old.in_features, old.out_features, **{"bias": old.bias is not None, **options})
    return take_over(made.to(dtype=old.weight.dtype), old, lineage)
