"""Cut a map into patches and embed them, with wider views of every patch beside it.

Source: Tatsunami, Taki, RaftMLP (2021), arXiv 2108.04384, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.registry import register


@register("layer", source="Tatsunami & Taki 2021, arXiv 2108.04384, section 3.3")
class MultiScalePatchEmbed(nn.Module):
    """Embed the patches of a map, seen through windows of several sizes around the same centres.

    x (B, in_channels, H, W) -> (B, width, H / stride, W / stride). One linear layer of all windows' numbers, computed
    as a sum of strided convolutions: no window is ever copied out. One kernel, the stride, is the plain embedding.

    Args:
        kernels: sides of the windows, each a multiple of the stride; the first is the stride. Outside the map is 0.
        stride: side of a patch.
    Raises:
        ShapeError: kernels that are no multiples of the stride or cannot be centred on a patch, sizes below 1; at the
            call, a map of other channels, or that the stride does not divide.
    Source: section 3.3, "multi-scale patch embedding" (the official code's cross-scale MLP). Deviation: the weight is
        held kernel by kernel, (width, in_channels, k, k); torch's start for the one linear layer.
    Example:
        >>> MultiScalePatchEmbed(3, 8, (4, 8), stride=4)(torch.randn(2, 3, 16, 24)).shape
        torch.Size([2, 8, 4, 6])
    """

    def __init__(self, in_channels: int, width: int, kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        _check(in_channels, width, kernels, stride)
        self.in_channels, self.stride = in_channels, stride
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, width, k, stride, (k - stride) // 2, bias=i == 0) for i, k in enumerate(kernels)
        )
        bound = 1 / math.sqrt(in_channels * sum(k * k for k in kernels))
        for parameter in self.convs.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Embed (B, in_channels, H, W)."""
        if x.dim() != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ShapeError(
                f"MultiScalePatchEmbed takes floating-point maps (B, {self.in_channels}, H, W), got {x.dtype} "
                f"{tuple(x.shape)}"
            )
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ShapeError(f"a map of {tuple(x.shape[2:])} does not divide into patches of {self.stride}")
        embedded: Tensor = self.convs[0](x)
        for conv in self.convs[1:]:
            embedded = embedded + conv(x)
        return embedded


def _check(in_channels: int, width: int, kernels: Sequence[int], stride: int) -> None:
    if not kernels or min(in_channels, width, stride, *kernels) < 1:
        raise ShapeError(f"sizes must be at least 1, got {in_channels=}, {width=}, kernels={[*kernels]}, {stride=}")
    for kernel in kernels:
        if kernel % stride:
            raise ShapeError(f"every kernel must be a multiple of the stride {stride}, got a kernel of {kernel}")
        if (kernel - stride) % 2:
            raise ShapeError(f"a kernel of {kernel} cannot be centred on a patch of {stride}: their difference is odd")
    if kernels[0] != stride:
        raise ShapeError(
            f"the first kernel must be the stride {stride}, so that a patch is seen whole, got {kernels[0]}"
        )
