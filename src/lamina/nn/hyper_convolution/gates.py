"""Gates whose scores are slow kernels times squared means, and the recursive gated unit.

Source: Zhang, HyperZ.Z.W Operator (2024), arXiv 2401.17948: HCI, HI and RGU there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.hyper_convolution.coordinate_kernel import CoordinateKernel, resized_positions
from lamina.nn.hyper_convolution.global_product import check_square, two_product
from lamina.nn.hyper_convolution.group_norm import instance_standardize


class HyperChannelInteraction(nn.Module):
    """Gate channels: x * sigmoid(W * mean(x)^2), W one number a channel, computed from the channel's place.

    In place of squeeze-and-excitation, with weights that do not grow with the square of the channels.
    x (B, C, H, W) -> same; every output lies between 0 and x.

    Args:
        width: C. hidden, layers, omega0: of the slow net, see `CoordinateKernel`.
    Raises:
        ShapeError: sizes below 1; at the call, other channels.
    Example:
        >>> HyperChannelInteraction(8)(torch.ones(1, 8, 2, 2)).shape
        torch.Size([1, 8, 2, 2])
    """

    def __init__(self, width: int, hidden: int = 32, layers: int = 2, omega0: float = 10.0) -> None:
        super().__init__()
        self.kernel = CoordinateKernel(1, width, 1, hidden, layers, omega0)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels of (B, C, H, W)."""
        _check_maps("HyperChannelInteraction", x, self.kernel.size[0])
        return x * torch.sigmoid(channel_score(self.kernel, x)).to(x.dtype)


class HyperInteraction(nn.Module):
    """Gate one map by another: x * sigmoid(score of y's channels * score of y's positions).

    y, x (B, C, S, S) -> (B, C, S, S), between 0 and x; x None: y gates itself. The scores are slow kernels times the
    squared mean of y over positions, and over channels.

    Args:
        width: C. size: S; at another the kernel of the positions is asked for on that grid.
        omega0: of both slow nets, see `CoordinateKernel`.
    Raises:
        ShapeError: sizes below 1; at the call, other channels, maps that are not square or differ.
    Example:
        >>> HyperInteraction(8, 4)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, width: int, size: int, omega0: float = 10.0) -> None:
        super().__init__()
        self.channels = CoordinateKernel(1, width, 1, hidden=16, omega0=omega0)
        self.positions = CoordinateKernel(2, size, 1, hidden=64, omega0=omega0)

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """Gate x (or y itself) by y."""
        side = check_square("HyperInteraction", y, self.channels.size[0])
        x = y if x is None else x
        if x.shape != y.shape:
            raise ShapeError(f"HyperInteraction takes two maps of one shape, got {tuple(y.shape)} and {tuple(x.shape)}")
        places = two_product(self.positions(size=side), y.mean(1, keepdim=True))
        return x * torch.sigmoid(channel_score(self.channels, y) * places).to(x.dtype)


class RecursiveGatedUnit(nn.Module):
    """A gated pointwise network: out(gelu(standardised(key(x) * query(value(x)))) + a bias of each position).

    x (B, in_channels, S, S) -> (B, out_channels, S, S). key, value, query and out are 1 x 1 convolutions.

    Args:
        size: S, of the bias; at another it is interpolated.
    Raises:
        ShapeError: sizes below 1; at the call, other channels, maps that are not square or of one position.
    Example:
        >>> RecursiveGatedUnit(8, 6, 4)(torch.randn(1, 8, 4, 4)).shape
        torch.Size([1, 6, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__()
        if min(in_channels, out_channels, size) < 1:
            raise ShapeError(f"RecursiveGatedUnit: sizes must be at least 1, got {in_channels}, {out_channels}, {size}")
        self.key = nn.Conv2d(in_channels, out_channels, 1)
        self.value = nn.Conv2d(in_channels, out_channels, 1)
        self.query = nn.Conv2d(out_channels, out_channels, 1)
        self.out = nn.Conv2d(out_channels, out_channels, 1)
        self.position_bias = nn.Parameter(torch.zeros(size, size))
        for conv in (self.key, self.value, self.query, self.out):
            nn.init.kaiming_uniform_(conv.weight, nonlinearity="linear")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Apply it at every position."""
        side = check_square("RecursiveGatedUnit", x, self.key.in_channels)
        gated = self.key(x) * self.query(self.value(x))
        bias = resized_positions(self.position_bias, (side, side)).to(gated.dtype)
        return self.out(F.gelu(instance_standardize(gated)) + bias)


def channel_score(kernel: CoordinateKernel, x: Tensor) -> Tensor:
    """Return W * mean(x)^2 per channel, W from the place of the channel: (B, C, H, W) -> (B, C, 1, 1)."""
    return two_product(kernel()[0].unsqueeze(-1).unsqueeze(-1), x.mean((2, 3), keepdim=True))


def _check_maps(name: str, x: Tensor, width: int) -> None:
    if x.dim() != 4 or x.shape[1] != width or not x.is_floating_point():
        raise ShapeError(f"{name} takes floating-point maps (B, {width}, H, W), got {x.dtype} {tuple(x.shape)}")
