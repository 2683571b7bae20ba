"""The mathematics of folding: a norm with fixed statistics is `scale * y + shift` per channel, and goes into a layer.

Shared by the passes that fold at every step (`conv_bn`) and once and for all (`fold`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.nn.progressive_norm import PRepBN, RepBN


class ChannelAffine(nn.Module):
    """What is left of a norm that could go into no layer: weight * x + bias for every feature; (..., C) -> same."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = Parameter(weight), Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift the last dimension."""
        return torch.addcmul(self.bias, x, self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{len(self.weight)}"


def scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the per-channel (scale, shift) of a batch norm that uses its running statistics; differentiable.

    scale = weight / sqrt(var + eps), shift = bias - scale * mean; all (C,), computed in `dtype`.
    """
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -scale * mean.to(dtype)
    return scale, shift if bias is None else shift + bias.to(dtype)


def scale_outputs(weight: Tensor, scale: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Scale every output channel of a layer's weight by its (C,) factor.

    Args:
        weight: (C, ...) of a linear layer or convolution; (in, C / groups, ...) where `transposed`.
    """
    if not transposed:
        return weight * scale.view(-1, *[1] * (weight.dim() - 1))
    rows, columns = weight.shape[:2]
    grouped = weight.reshape(groups, rows // groups, columns, *weight.shape[2:])
    return (grouped * scale.view(groups, 1, columns, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def fold_into_producer(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (weight, bias) of the layer that computes `scale * layer(x) + shift`; in the dtype of scale."""
    new = scale_outputs(weight.to(scale.dtype), scale, transposed=transposed, groups=groups)
    return new, shift if bias is None else shift + scale * bias.to(scale.dtype)


def fold_into_consumer(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (weight, bias) of the layer that computes `layer(scale * x + shift)`; in the dtype of scale.

    Exact for a convolution only where it does not pad with zeros, or shift is zero.

    Args:
        weight: (out, C / groups, ...) of a linear layer or convolution; (C, out) where `transposed`.
    """
    wide = (weight.T if transposed else weight).to(scale.dtype)
    rows = wide.reshape(groups, -1, *wide.shape[1:])  # (groups, out / groups, C / groups, ...)
    spread = (groups, 1, wide.shape[1], *[1] * (wide.dim() - 2))
    moved = (rows * shift.view(spread)).flatten(2).sum(-1).flatten()
    new = (rows * scale.view(spread)).reshape(wide.shape)
    return new.T if transposed else new, moved if bias is None else moved + bias.to(scale.dtype)


def fold_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to fold in: float32, or float64 where any tensor is.

    In half precision a folded weight is off by up to a hundredth; a variance below 1e-6 overflows.
    """
    found = torch.float32
    for tensor in tensors:
        if tensor is not None:
            found = torch.promote_types(found, tensor.dtype)
    return found


def norm_scale_and_shift(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the per-channel (scale, shift) that a norm with running statistics is in evaluation."""
    if isinstance(norm, PRepBN):
        norm = norm.rep
    if isinstance(norm, RepBN):
        return norm.scale_and_shift(dtype)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return scale_and_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, dtype)
