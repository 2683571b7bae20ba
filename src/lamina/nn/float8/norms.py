"""Norms that keep their input in float8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import ShapeError
from lamina.float8 import Format
from lamina.nn._precision import without_autocast
from lamina.nn.float8.rounding import Formats, per_group, restore
from lamina.registry import register

SOURCE = "Xi et al., COAT (2025), arXiv 2410.19313"


@register("norm", "float8_rms_norm", source=SOURCE)
class Float8RMSNorm(nn.RMSNorm):
    """RMS norm that keeps its input for the backward pass in a byte a number, one scale for every 16.

    x (..., normalized_shape) -> same. In training it is computed in float32 from the rounded input; in evaluation it is
    the plain `nn.RMSNorm`. One channel may be a hundred times the others: its group alone is coarse.

    Args:
        normalized_shape: width.
        eps: None = the machine epsilon of x.
        group: numbers with one scale; 0: one scale for the tensor.
        forward: `e4m3` or `e5m2`.
    Raises:
        ShapeError: a norm over more than the last dimension. LaminaError: no such format.
    Source: arXiv 2410.19313, section 5 (per-group scales for what is not linear).
    Example:
        >>> Float8RMSNorm(32)(torch.randn(2, 3, 32)).shape
        torch.Size([2, 3, 32])
    """

    def __init__(
        self, normalized_shape: int, eps: float | None = None, *, group: int = 16, forward: Format = "e4m3"
    ) -> None:
        super().__init__(_width(type(self).__name__, normalized_shape), eps)
        self.formats = Formats(forward, group=group)

    @classmethod
    def of(cls, weight: Parameter | None, width: int, eps: float, formats: Formats) -> Float8RMSNorm:
        """Return a norm with that very weight."""
        with torch.device("meta"):
            made = cls(width, eps)
        made.weight, made.formats = weight, formats  # type: ignore[assignment]
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        if not self.training or not x.numel():
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return float8_norm(x, self.weight, None, eps, self.formats, centred=False)


@register("norm", "float8_layer_norm", source=SOURCE)
class Float8LayerNorm(nn.LayerNorm):
    """Layer norm that keeps its input for the backward pass in a byte a number; see `Float8RMSNorm`.

    x (..., normalized_shape) -> same.

    Args:
        normalized_shape: width.
        group: numbers with one scale; 0: one scale for the tensor.
        forward: `e4m3` or `e5m2`.
    Raises:
        ShapeError: a norm over more than the last dimension. LaminaError: no such format.
    Source: arXiv 2410.19313, section 5, which has RMS norm; the same for a layer norm.
    Example:
        >>> Float8LayerNorm(32)(torch.randn(2, 3, 32)).shape
        torch.Size([2, 3, 32])
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, group: int = 16, forward: Format = "e4m3") -> None:
        super().__init__(_width(type(self).__name__, normalized_shape), eps)
        self.formats = Formats(forward, group=group)

    @classmethod
    def of(
        cls, weight: Parameter | None, bias: Parameter | None, width: int, eps: float, formats: Formats
    ) -> Float8LayerNorm:
        """Return a norm with that very gain and shift."""
        with torch.device("meta"):
            made = cls(width, eps)
        made.weight, made.bias, made.formats = weight, bias, formats  # type: ignore[assignment]
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Normalise."""
        if not self.training or not input.numel():
            return super().forward(input)
        return float8_norm(input, self.weight, self.bias, self.eps, self.formats, centred=True)


def float8_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, formats: Formats, *, centred: bool
) -> Tensor:
    """Layer norm (centred) or RMS norm of the rounded x over its last dimension; float32 inside, x's type outside.

    The gradient goes to x as if it were not rounded.
    """
    codes, scale = per_group(x.detach(), formats.forward, formats.group)
    out: Tensor = _Norm.apply(x, codes, scale, weight, bias, eps, formats.group, centred)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: int,
        centred: bool,
    ) -> Tensor:
        ctx.eps, ctx.group, ctx.centred, ctx.like = eps, group, centred, x.dtype
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(codes, scale, weight)
        with without_autocast(x.device):
            y, _ = _normalized(restore(codes, scale, group), eps, centred)
            y = y if weight is None else y * weight
            return (y if bias is None else y + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, weight = ctx.saved_tensors
        weight_gradient = bias_gradient = None
        with without_autocast(gradient.device):
            y, inverse = _normalized(restore(codes, scale, ctx.group), ctx.eps, ctx.centred)
            g = gradient.float()
            if weight is not None:
                weight_gradient = (g * y).flatten(0, -2).sum(0).to(weight.dtype)
            if ctx.bias is not None:
                bias_gradient = g.flatten(0, -2).sum(0).to(ctx.bias)
            g = g if weight is None else g * weight
            along = g - y * (g * y).mean(-1, keepdim=True)
            if ctx.centred:
                along = along - g.mean(-1, keepdim=True)
            return (along * inverse).to(ctx.like), None, None, weight_gradient, bias_gradient, None, None, None


def _normalized(x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the normalised x and 1 / its deviation (..., 1)."""
    x = x - x.mean(-1, keepdim=True) if centred else x
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * inverse, inverse


def _width(name: str, normalized_shape: Any) -> int:
    sizes = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if len(sizes) != 1 or sizes[0] < 1:
        raise ShapeError(f"{name} normalises over the last dimension, given by one size, got {normalized_shape!r}")
    return int(sizes[0])
