"""Linear and convolution layers whose weights are linear in a condition, another one for every sample.

The weight of condition c is W(c) = W + sum_k c_k V_k: a hypernetwork of one linear layer, for one layer.
Source: Chauhan et al., A Brief Review of Hypernetworks in Deep Learning (2023), arXiv 2306.06955;
dynamic convolution as in Ha et al., HyperNetworks (2016), arXiv 1609.09106.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._inputs import check_features
from lamina.registry import register

SOURCE = "Chauhan et al. 2023, arXiv 2306.06955"


class _Conditioned(nn.Module):
    """A weight and bias, and how they move with a condition of `condition_dim` numbers."""

    def __init__(self, shape: tuple[int, ...], bias: bool, condition_dim: int) -> None:
        super().__init__()
        fan_in = math.prod(shape[1:])
        self.condition_dim = condition_dim
        self.weight = nn.Parameter(torch.empty(shape))
        self.weight_directions = nn.Parameter(torch.empty(condition_dim, *shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.bias_directions = nn.Parameter(torch.zeros(condition_dim, shape[0])) if bias else None
        # Half of the variance of torch's own weights each, for conditions of mean square 1.
        bound = 1 / math.sqrt(2 * fan_in)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.weight_directions, -bound / math.sqrt(condition_dim), bound / math.sqrt(condition_dim))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _check(self, x: Tensor, c: Tensor) -> None:
        if c.dim() not in (1, 2) or c.shape[-1] != self.condition_dim:
            raise ShapeError(
                f"{type(self).__name__} takes conditions ({self.condition_dim},) or (B, {self.condition_dim}), "
                f"got {tuple(c.shape)}"
            )
        if c.dim() == 2 and len(c) != len(x):
            raise ShapeError(f"{len(c)} conditions for an input of shape {tuple(x.shape)}: one a row is needed")

    def _weights(self, c: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight (..., *shape) and bias (..., out) of conditions (..., condition_dim)."""
        weight = self.weight + torch.tensordot(c, self.weight_directions, 1)
        if self.bias is None or self.bias_directions is None:
            return weight, None
        return weight, self.bias + c @ self.bias_directions


@register("layer", source=f"{SOURCE}, data-conditioned, linear generator")
class HyperLinear(_Conditioned):
    """A linear layer whose weight and bias are linear in a condition: one a call, or one a row.

    x (..., in_features), c (condition_dim,) -> (..., out_features); x (B, ..., in_features), c (B, condition_dim) ->
    (B, ..., out_features). At c = 0 an ordinary `nn.Linear`, as `weight` and `bias` say.

    Args:
        condition_dim: numbers a condition has; best of mean square about 1.
        bias: False leaves it out.
    Raises:
        ShapeError: a size below 1, another width of x or c, or not one condition a row.
    Example:
        >>> HyperLinear(8, 4, condition_dim=3)(torch.randn(2, 5, 8), torch.randn(2, 3)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, in_features: int, out_features: int, condition_dim: int, *, bias: bool = True) -> None:
        _check_positive("HyperLinear", in_features=in_features, out_features=out_features, condition_dim=condition_dim)
        super().__init__((out_features, in_features), bias, condition_dim)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Apply each row's own weights."""
        check_features("HyperLinear", x, self.in_features)
        self._check(x, c)
        if c.dim() == 1:
            return F.linear(x, *self._weights(c))
        if x.dim() == 2:
            return self._single_rows(x, c)
        weight, bias = self._weights(c)
        return per_sample_linear(x, weight, bias)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_features}, {self.out_features}, condition_dim={self.condition_dim}"

    def _single_rows(self, x: Tensor, c: Tensor) -> Tensor:
        """One vector a weight: sum_k c_k (V_k x) needs no weight of its own in memory."""
        crossed = (c.unsqueeze(2) * x.unsqueeze(1)).flatten(1)  # (B, condition_dim * in)
        moved = crossed @ self.weight_directions.transpose(1, 2).reshape(-1, self.out_features)
        if self.bias_directions is not None:
            moved = moved + c @ self.bias_directions
        return F.linear(x, self.weight, self.bias) + moved


@register("layer", "hyper_conv2d", source=f"{SOURCE}, data-conditioned, linear generator")
class HyperConv2d(_Conditioned):
    """A 2-d convolution whose kernel and bias are linear in a condition: one a call, or one an image.

    x (B, in_channels, H, W), c (condition_dim,) or (B, condition_dim) -> (B, out_channels, H', W'). At c = 0 an
    ordinary `nn.Conv2d`. Images with kernels of their own run as one grouped convolution.

    Args:
        kernel_size, stride, padding, dilation: square, as in `nn.Conv2d`. groups: divides both channel counts.
        condition_dim: numbers a condition has; best of mean square about 1.
        bias: False leaves it out.
    Raises:
        ShapeError: a size below 1, groups that do not divide, other channels, or not one condition an image.
    Example:
        >>> HyperConv2d(3, 4, 3, condition_dim=2, padding=1)(torch.randn(2, 3, 5, 5), torch.randn(2, 2)).shape
        torch.Size([2, 4, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        condition_dim: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size}
        sizes |= {"condition_dim": condition_dim, "stride": stride, "dilation": dilation, "groups": groups}
        _check_positive("HyperConv2d", **sizes)
        if in_channels % groups or out_channels % groups:
            raise ShapeError(f"groups {groups} does not divide {in_channels} and {out_channels} channels")
        super().__init__((out_channels, in_channels // groups, kernel_size, kernel_size), bias, condition_dim)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Convolve each image with its own kernel."""
        if x.dim() != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:] or not x.is_floating_point():
            raise ShapeError(
                f"HyperConv2d takes floating-point (B, {self.in_channels}, H, W), got {x.dtype} {tuple(x.shape)}"
            )
        self._check(x, c)
        weight, bias = self._weights(c)
        given = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, weight, bias, *given) if c.dim() == 1 else per_sample_conv2d(x, weight, bias, *given)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, condition_dim={self.condition_dim}"


def per_sample_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply weights (B, out, in) and biases (B, out) to x (B, ..., in) row by row, in one batched product."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    found = torch.bmm(rows, weight.transpose(1, 2).to(rows.dtype))
    if bias is not None:
        found = found + bias.unsqueeze(1)
    return found.reshape(*x.shape[:-1], weight.shape[1])


def per_sample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve images (B, in, H, W) with kernels (B, out, in / groups, k, k) of their own: one grouped convolution."""
    flat = None if bias is None else bias.flatten()
    joined = x.reshape(1, -1, *x.shape[2:])
    found = F.conv2d(joined, weight.flatten(0, 1), flat, stride, padding, dilation, groups * len(x))
    return found.reshape(len(x), -1, *found.shape[2:])


def _check_positive(name: str, **sizes: int) -> None:
    for key, value in sizes.items():
        if value < 1:
            raise ShapeError(f"{name}: {key} must be at least 1, got {value}")
