"""torch's own linear layer, activations and batch norms under the names recipes use; their options are torch's."""

from __future__ import annotations

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
for _name, _cls in ACTIVATIONS.items():
    register("layer", _name, source="torch")(_cls)
for _name, _cls in NORMS.items():
    register("norm", _name, source="torch; Ioffe & Szegedy 2015")(_cls)
