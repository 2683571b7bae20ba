"""The mathematics of folding: a norm with fixed statistics is `scale * y + shift` per channel, and goes into a layer.

Shared by the passes that fold at every step (`conv_bn`) and once and for all (`fold`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def fold_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to fold in: float32, or float64 where any tensor is.

    In half precision a folded weight is off by up to a hundredth; a variance below 1e-6 overflows.
    """
    found = torch.float32
    for tensor in tensors:
        if tensor is not None:
            found = torch.promote_types(found, tensor.dtype)
    return found


def norm_scale_and_shift(norm: nn.modules.batchnorm._BatchNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `scale_and_shift` of a batch norm module that has running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return scale_and_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, dtype)
