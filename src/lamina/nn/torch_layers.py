"""torch's own layers under the names recipes use (linear, convolution, activations, batch norms); torch's options."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamina.registry import register

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
}
"""Layers of any shape."""

NORMS: dict[str, type[nn.Module]] = {
    "batch_norm_1d": nn.BatchNorm1d,
    "batch_norm_2d": nn.BatchNorm2d,
    "batch_norm_3d": nn.BatchNorm3d,
}
"""Norms built from the number of channels, which is dimension 1."""

register("layer", "linear", source="torch")(nn.Linear)
register("layer", "conv2d", source="torch")(nn.Conv2d)
for _name, _cls in ACTIVATIONS.items():
    register("layer", _name, source="torch")(_cls)
for _name, _cls in NORMS.items():
    register("norm", _name, source="torch; Ioffe & Szegedy 2015")(_cls)


def draw(layer: Any, std: float) -> None:
    """Draw the weight of a linear layer or convolution anew, normal with that deviation, and zero its bias.

    A layer of another kind does it by its own `initialise(std)`; without one it keeps how it started.
    """
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif hasattr(layer, "initialise"):
        layer.initialise(std)
