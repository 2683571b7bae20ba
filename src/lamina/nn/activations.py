"""torch's activations under the names recipes use."""

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
"""Registered name -> torch class; each keeps torch's own options."""

for _name, _cls in ACTIVATIONS.items():
    register("layer", _name, source="torch")(_cls)
