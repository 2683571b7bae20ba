"""Conversion of the last linear layer to a Fourier head: of the same number of outputs, with weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lamina.errors import LaminaError, ShapeError
from lamina.lineage import Lineage
from lamina.nn import FourierHead
from lamina.rewrite.conversion import conversion


@conversion("linear", "fourier_head")
def linear_to_fourier_head(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the head. The scores of extra classes are linear in both, so their rows are kept, the last of the old.

    Raises:
        LaminaError: the old layer is no plain `nn.Linear`. ShapeError: more extra classes than outputs.
    """
    if not isinstance(old, nn.Linear):
        raise LaminaError(f"only an nn.Linear becomes {new!r}, and this is a {type(old).__name__}")
    extra = int(options.get("extra_classes", 0))
    if extra > old.out_features - 2:
        raise ShapeError(f"extra_classes={extra} of {old.out_features} outputs leaves fewer than 2 ordered bins")
    made = FourierHead(old.in_features, old.out_features - extra, **options).to(dtype=old.weight.dtype)
    if made.extra is not None:
        _take_rows(made.extra, old, extra, lineage)
    return made


def _take_rows(made: nn.Linear, old: nn.Linear, extra: int, lineage: Lineage) -> None:
    """Take the last `extra` rows; the first row, the score of the ordered part, is new."""
    index = [-1, *range(old.out_features - extra, old.out_features)]
    with torch.no_grad():
        for name in ("weight", "bias"):
            new_value, old_value = made.get_parameter(name), getattr(old, name)
            if old_value is None:
                new_value[1:].zero_()
                continue
            new_value[1:].copy_(old_value[-extra:])
            lineage.derive(new_value, old_value, index)
