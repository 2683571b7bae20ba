"""Conversion of a convolution to one whose kernel is a function of the place in it, as near as the slow net comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lamina.errors import ShapeError
from lamina.lineage import Lineage
from lamina.nn import CoordinateConv2d
from lamina.nn.hyper_convolution.convolution import GEOMETRY
from lamina.rewrite.conversion import conversion, take_over


@conversion("conv2d", "coordinate_conv2d")
def nearest_coordinate_conv(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the twin, nearest to the old kernel (the same where hidden + 1 >= its points); the bias is the old one.

    Raises:
        ShapeError: no plain `nn.Conv2d`.
    """
    if type(old) is not nn.Conv2d:
        raise ShapeError(f"only torch's own Conv2d becomes {new}, not a {type(old).__name__}")
    geometry: dict[str, Any] = {name: getattr(old, name) for name in (*GEOMETRY, "kernel_size")}
    made = CoordinateConv2d(old.in_channels, old.out_channels, bias=old.bias is not None, **geometry, **options)
    made = made.to(dtype=old.weight.dtype)
    made.load_weight(old.weight)
    for parameter in made.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    return take_over(made, old, lineage)
