"""The local operator: a depthwise kernel computed from coordinates and from what the maps hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.hyper_convolution.convolution import depthwise_convolution
from lamina.nn.hyper_convolution.coordinate_kernel import SOURCE, CoordinateKernel
from lamina.nn.hyper_convolution.group_norm import GroupInstanceBatchNorm
from lamina.nn.progressive_norm import token_moments
from lamina.registry import register


@register("layer", "hyper_zzw_local", source=f"{SOURCE}, equation 4")
class HyperZZWLocal(nn.Module):
    """Convolve depthwise with a kernel that a slow net makes of the maps, mix channels, standardise, GELU.

    x (B, width, H, W) says what the kernel is, y (the same; None: x) is convolved -> (B, width, H, W), any H and W.

    Args:
        width: C. kernel_size: odd.
        hidden, layers, omega0: of the slow net, see `CoordinateKernel`.
        per_sample: a kernel for every image; False (the paper's): one kernel from the mean over the batch, so that an
            answer depends on what is beside it.
        track_stats: running statistics in evaluation, see `GroupInstanceBatchNorm`.
        sync: in training, means over all data-parallel processes; in evaluation those of each process.
    Raises:
        ShapeError: an even kernel_size, sizes below 1; at the call, other channels, or x and y of different shapes.
    Source: equation 4; with one input used as both, x is convolved by a kernel of its own.
    Example:
        >>> HyperZZWLocal(8, 5)(torch.randn(2, 8, 6, 7)).shape
        torch.Size([2, 8, 6, 7])
    """

    def __init__(
        self,
        width: int,
        kernel_size: int,
        hidden: int = 32,
        layers: int = 2,
        per_sample: bool = False,
        *,
        omega0: float = 10.0,
        track_stats: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ShapeError(f"kernel_size must be odd and positive, so that a kernel has a middle, got {kernel_size}")
        self.width, self.per_sample, self.sync = width, per_sample, sync
        self.kernel = CoordinateKernel(2, kernel_size, width, hidden, layers, omega0, context=hidden)
        self.context_in = nn.Conv2d(width, hidden, 1)
        self.context_out = nn.Conv2d(hidden, hidden, 1)
        self.mix = nn.Conv2d(width, width, 1)
        self.norm = GroupInstanceBatchNorm(width, 1, track_stats, sync=sync)
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.kaiming_normal_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Convolve y by the kernel that x makes."""
        y = x if y is None else y
        fits = x.dim() == 4 and x.shape[1] == self.width and x.shape == y.shape
        if not fits or not x.is_floating_point():
            what = f"takes floating-point maps (B, {self.width}, H, W), got {x.dtype} {tuple(x.shape)}"
            raise ShapeError(f"HyperZZWLocal {what}" + ("" if x.shape == y.shape else f" and {tuple(y.shape)}"))
        kernel = self.kernel(self.context(x))
        mixed = self.mix(depthwise_convolution(y, kernel if self.per_sample else kernel[0]))
        return F.gelu(self.norm(mixed)) + self.bias.to(mixed.dtype)

    def context(self, x: Tensor) -> Tensor:
        """Return what the slow net is told of the maps: (1, or B with per_sample, hidden, kernel_size, kernel_size)."""
        side = self.kernel.size[0]
        pooled = F.adaptive_avg_pool2d(
            x if self.per_sample else batch_mean(x, self.sync and self.training), (side, side)
        )
        # The mean over the batch comes first: the convolution is linear.
        return F.gelu(self.context_out(self.context_in(pooled)))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"per_sample={self.per_sample}"


def batch_mean(x: Tensor, sync: bool = False) -> Tensor:
    """Return the mean over the batch: (B, ...) -> (1, ...); with sync, that of all processes."""
    if not sync:
        return x.mean(0, keepdim=True)
    mean, _, _ = token_moments(x.flatten(1), sync=True)
    return mean.to(x.dtype).view(1, *x.shape[1:])
