"""Conversions of linear layers and convolutions to hypercomplex ones: by the nearest sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lamina.errors import ShapeError
from lamina.lineage import Lineage
from lamina.nn import PHConv1d, PHConv2d, PHConv3d, PHConvTranspose2d, PHMLinear
from lamina.rewrite.conversion import conversion, take_over

TWINS: dict[type[nn.Module], type[Any]] = {
    nn.Linear: PHMLinear,
    nn.Conv1d: PHConv1d,
    nn.Conv2d: PHConv2d,
    nn.Conv3d: PHConv3d,
    nn.ConvTranspose2d: PHConvTranspose2d,
}
"""torch's layers and their hypercomplex twins."""

HYPERCOMPLEX = tuple(TWINS.values())


def twin(old: nn.Module, **options: Any) -> Any:
    """Build the hypercomplex layer of the same sizes, in the same dtype, with weights of its own.

    Raises:
        ShapeError: n does not divide the sizes, or there are groups. RecipeError: options that do not fit.
    """
    kind, bias = TWINS[type(old)], old.bias is not None
    dtype = old.weight.dtype
    if isinstance(old, nn.Linear):
        return kind(old.in_features, old.out_features, bias=bias, **options).to(dtype=dtype)
    fields = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    geometry = {name: getattr(old, name) for name in fields}
    if isinstance(old, nn.ConvTranspose2d):
        geometry["output_padding"] = old.output_padding
    return kind(old.in_channels, old.out_channels, bias=bias, **geometry, **options).to(dtype=dtype)


def take_nearest(made: Any, old: Any) -> float | None:
    """Bring a hypercomplex layer as near to a plain one's weight as it can come; the relative error, None on meta."""
    for parameter in made.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    if made.A.is_meta or old.weight.is_meta:
        return None
    error: float = made.load_nearest(old.weight)
    return error


@conversion("linear", "phm_linear")
@conversion("conv1d", "ph_conv1d")
@conversion("conv2d", "ph_conv2d")
@conversion("conv3d", "ph_conv3d")
@conversion("conv_transpose2d", "ph_conv_transpose2d")
def nearest_hypercomplex(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the twin, nearest to the old weight; the bias is the old one, with its optimizer state.

    Raises:
        ShapeError: n does not divide the sizes, or there are groups.
    """
    if type(old) not in TWINS:
        raise ShapeError(f"only torch's own linear layers and convolutions become {new}, not a {type(old).__name__}")
    made = twin(old, **options)
    take_nearest(made, old)
    return take_over(made, old, lineage)
