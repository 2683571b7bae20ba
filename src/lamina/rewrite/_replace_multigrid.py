"""Conversion of a convolution to a V-cycle that starts as that convolution, and can learn to reach the whole grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lamina.errors import ShapeError
from lamina.lineage import Lineage
from lamina.nn.multigrid import MultigridLinear
from lamina.rewrite.conversion import conversion, take_over

KINDS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@conversion("conv1d", "multigrid_linear")
@conversion("conv2d", "multigrid_linear")
@conversion("conv3d", "multigrid_linear")
def conv_to_multigrid(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the V-cycle around the convolution: its first smoothing step is the old layer, with its optimizer state.

    All that would change the outputs of the finest level (the way up to it, and its other smoothing steps) starts at
    zero, so that without a norm the function is the old one.

    Raises:
        ShapeError: another kernel than 3, a stride, dilation, groups, or a padding that changes the size.
    """
    assert isinstance(old, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    dim = KINDS[type(old)]
    ones = (1,) * dim
    geometry = (tuple(old.kernel_size), tuple(old.stride), tuple(old.dilation), old.groups)
    same = old.padding == "same" or tuple(old.padding) == ones
    if geometry != ((3,) * dim, ones, ones, 1) or not same or old.padding_mode not in ("zeros", "circular", "reflect"):
        raise ShapeError(
            f"a V-cycle is built around a convolution with a kernel of 3, padding 1, stride and dilation 1 and one "
            f"group, whose padding is zeros, circular or reflect, and this is {old}: choose others by match="
        )
    given = {"dim": dim, "padding_mode": old.padding_mode, "bias": old.bias is not None, **options}
    made = MultigridLinear(old.in_channels, old.out_channels, **given).to(dtype=old.weight.dtype)
    finest: Any = made.levels[0]
    first, *others = (step.smoother for step in (*finest.pre, *finest.post))
    with torch.no_grad():
        for layer in others if finest.prolongation is None else (*others, finest.prolongation.conv):
            for parameter in layer.parameters():
                parameter.zero_()
    for parameter in made.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    take_over(first, old, lineage)
    return made
