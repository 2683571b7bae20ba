"""Layers whose input or output is scaled as muP asks: read-outs, and the queries of attentions."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class _Readout(nn.Module):
    """The one deviation from the layer it is mixed with: x times output_mult / width_multiplier goes in."""

    width_multiplier: float = 1.0
    output_mult: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the scaled input; its bias is not scaled."""
        if self.width_multiplier != 1.0 or self.output_mult != 1.0:
            x = x * (self.output_mult / self.width_multiplier)
        out: Tensor = super().forward(x)
        return out

    def extra_repr(self) -> str:
        """Show the scales beside the sizes."""
        return f"{super().extra_repr()}, width_multiplier={self.width_multiplier:g}, output_mult={self.output_mult:g}"


class MuReadout(_Readout, nn.Linear):
    """Linear read-out of a network in muP: its input is divided by how much wider it is than the base's.

    x (..., in_features) -> (..., out_features). `MuP` puts it in place of a linear layer that leads from the width to
    a fixed number of outputs; by hand, start its weight as in the base model, not smaller.

    Args:
        width_multiplier: in_features over the base's.
        output_mult: a factor to tune, of the input too.
    Source: Yang et al., Tensor Programs V (2022), arXiv 2203.03466, table 8.
    Example:
        >>> import torch
        >>> MuReadout(128, 10, width_multiplier=4.0)(torch.randn(2, 128)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        width_multiplier: float = 1.0,
        output_mult: float = 1.0,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias)
        self.width_multiplier, self.output_mult = width_multiplier, output_mult


class _MuReadoutConv1d(_Readout, nn.Conv1d): ...


class _MuReadoutConv2d(_Readout, nn.Conv2d): ...


class _MuReadoutConv3d(_Readout, nn.Conv3d): ...


class _MuQuery(nn.Linear):
    """Query projection whose output is scaled, so that logits are divided by the head width, not by its root."""

    logit_factor: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Project and scale."""
        return F.linear(x, self.weight, self.bias) * self.logit_factor

    def extra_repr(self) -> str:
        """Show the factor beside the sizes."""
        return f"{super().extra_repr()}, logit_factor={self.logit_factor:g}"


READOUTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MuReadout,
    nn.Conv1d: _MuReadoutConv1d,
    nn.Conv2d: _MuReadoutConv2d,
    nn.Conv3d: _MuReadoutConv3d,
}
"""What a layer becomes as a read-out."""


def as_readout(layer: nn.Module, width_multiplier: float, output_mult: float) -> nn.Module:
    """Return a read-out with the very parameters of a layer."""
    new: Any = _as(layer, READOUTS[type(layer)])
    new.width_multiplier, new.output_mult = width_multiplier, output_mult
    made: nn.Module = new
    return made


def as_query(layer: nn.Module, factor: float) -> nn.Module:
    """Return a query projection with the very parameters of a layer."""
    new: Any = _as(layer, _MuQuery)
    new.logit_factor = factor
    made: nn.Module = new
    return made


def is_parametrized(layer: nn.Module) -> bool:
    """Say whether muP made this layer."""
    return isinstance(layer, (_Readout, _MuQuery))


def _as(layer: nn.Module, cls: type[nn.Module]) -> nn.Module:
    new = copy.copy(layer)
    # A shallow copy shares these tables with the old layer.
    new._parameters, new._buffers = dict(layer._parameters), dict(layer._buffers)
    new.__class__ = cls
    return new
