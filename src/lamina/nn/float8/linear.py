"""A linear layer that multiplies float8 numbers and keeps its input in float8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.float8 import Format
from lamina.nn._precision import autocasts, without_autocast
from lamina.nn.float8.rounding import Formats, per_tensor, per_tensor_once, restore
from lamina.registry import register


@register("layer", source="Xi et al., COAT (2025), arXiv 2410.19313")
class Float8Linear(nn.Linear):
    """Linear layer that trains on float8 numbers: its input is kept for the backward pass in one byte a number.

    x (..., in_features) -> (..., out_features). In training, input and weight are rounded to `forward`, the incoming
    gradient to `backward`, with one scale each, found just in time; sums are float32, the weight's gradient of its own
    type. Layers that read the same tensor keep its codes once. In evaluation it is the plain `nn.Linear`.
    Products are computed from the float8 numbers in float32, the reference for hardware that multiplies float8: on any
    device memory is saved, and not time.

    Args:
        forward, backward: `e4m3` or `e5m2`.
        keep_input: keep the input itself instead of its codes: for one that is kept anyway (attention's output).
    Raises:
        LaminaError: no such format.
    Source: arXiv 2410.19313, section 5 (per-tensor scales for linear layers).
    Example:
        >>> Float8Linear(8, 4)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        forward: Format = "e4m3",
        backward: Format = "e5m2",
        keep_input: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.formats, self.keep_input = Formats(forward, backward), keep_input

    @classmethod
    def of(cls, layer: nn.Linear, formats: Formats, *, keep_input: bool = False) -> Float8Linear:
        """Return a layer with the very parameters of a plain one."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        made.weight, made.bias = layer.weight, layer.bias
        made.formats, made.keep_input = formats, keep_input
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        if not self.training or not input.numel():
            return super().forward(input)
        # Codes that are made once live as long as their tensor: beside an input that is kept they would be kept too.
        rounded = per_tensor(input.detach(), self.formats.forward) if self.keep_input else None
        codes, scale = rounded or per_tensor_once(input, self.formats.forward)
        return float8_linear(input, codes, scale, self.weight, self.bias, self.formats, self.keep_input)

    def extra_repr(self) -> str:
        """Say sizes and formats."""
        return f"{super().extra_repr()}, forward={self.formats.forward}, backward={self.formats.backward}"


def float8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    formats: Formats,
    keep_input: bool = False,
) -> Tensor:
    """Multiply the codes of x (..., n) with the weight (m, n); the gradient goes to x as if it were not rounded.

    Source: arXiv 2410.19313, section 5 and figure 4.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype
    out: Tensor = _Linear.apply(x, codes, scale, weight, bias, formats, keep_input, dtype)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        formats: Formats,
        keep_input: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.formats, ctx.keep_input, ctx.like = formats, keep_input, x.dtype
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x if keep_input else codes, scale, weight)
        with without_autocast(x.device):
            y = F.linear(restore(codes, scale), restore(*per_tensor(weight, formats.forward)))
            return (y if bias is None else y + bias).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, weight = ctx.saved_tensors
        x = weight_gradient = x_gradient = bias_gradient = None
        with without_autocast(gradient.device):
            rounded = restore(*per_tensor(gradient, ctx.formats.backward))
            if ctx.needs_input_grad[0]:
                x_gradient = (rounded @ restore(*per_tensor(weight, ctx.formats.forward))).to(ctx.like)
            if ctx.needs_input_grad[3]:
                x = restore(*per_tensor(kept, ctx.formats.forward)) if ctx.keep_input else restore(kept, scale)
                weight_gradient = (rounded.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
            if ctx.bias is not None and ctx.needs_input_grad[4]:
                bias_gradient = gradient.float().flatten(0, -2).sum(0).to(ctx.bias)
        return x_gradient, None, None, weight_gradient, bias_gradient, None, None, None
