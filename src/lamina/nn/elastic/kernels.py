"""A smaller kernel out of a larger one: its centre, and a learned linear map of the taps for every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def centre(weight: Tensor, size: int) -> Tensor:
    """Cut the middle out of a kernel (..., K, K) or (..., K): -> (..., size, size) or (..., size)."""
    edge = (weight.shape[-1] - size) // 2
    for dim in range(2, weight.dim()):
        weight = weight.narrow(dim, edge, size)
    return weight


def cropped(weight: Tensor, maps: Sequence[Tensor] | nn.ParameterList, sizes: Sequence[int], size: int) -> Tensor:
    """Go from the largest kernel to `size` step by step: crop, then map the taps, the same for all channels.

    Args:
        weight: (channels, 1, K, K), or with another number of dimensions.
        maps: one (taps, taps) matrix for every size but the largest, the smallest first.
        sizes: the smallest first.
    Source: Cai et al., Once-for-All (2020), arXiv 1908.09791, section 3.3, figure 4.
    """
    for step in range(len(sizes) - 2, -1, -1):
        if sizes[step] < size:
            break
        small = centre(weight, sizes[step])
        # Rows of taps: each new tap is a row of the map times the old ones.
        weight = (small.reshape(len(small), -1) @ maps[step].T).view_as(small)
    return weight


def identity_maps(sizes: Sequence[int], weight: Tensor) -> nn.ParameterList:
    """Make the maps of a kernel's smaller sizes, the identity at first."""
    taps = [size ** (weight.dim() - 2) for size in sizes[:-1]]
    return nn.ParameterList(
        nn.Parameter(torch.eye(n, dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad)
        for n in taps
    )
