"""The slow-fast block: a global slow kernel, gates, four local operators, and one projection of all they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.nn.hyper_convolution.coordinate_kernel import CoordinateKernel
from lamina.nn.hyper_convolution.gates import HyperChannelInteraction, HyperInteraction, RecursiveGatedUnit
from lamina.nn.hyper_convolution.global_product import check_square, global_product
from lamina.nn.hyper_convolution.group_norm import GroupInstanceBatchNorm, instance_standardize
from lamina.nn.hyper_convolution.local import HyperZZWLocal

BRANCHES = ("global", "local")


class SFNEBlock(nn.Module):
    """A block of Terminator ("slow-fast neural encoding"): full context without attention and without a residual.

    x (B, width, S, S) -> (B, width * bottleneck, S, S). The maps go through a gated unit, a projection and a channel
    gate; a slow kernel times x multiplies the three as matrices; four local operators take turns in making kernels of
    one and convolving another; all is projected, standardised in groups, GELU.

    Args:
        width: channels in. bottleneck: by how much they widen.
        size: S it is trained on; any other at the call (slow kernels and biases on that grid).
        slow_layers: products in the global slow net.
        local_kernels: sides of the four local operators, odd: x -> gated, gated -> x, projected -> x, x -> projected.
        groups: of the last standardisation, divide width * bottleneck.
        dropout: of whole channels, in training; 0..1 (1 excluded).
        skips: channels of the outputs of earlier blocks that are read too (at the call, in this order).
        branches: without "global" the products of matrices are left out (the last gate then reads the gated unit),
            without "local" the local operators.
        omega0: of all slow nets, see `CoordinateKernel`.
        track_stats, per_sample: see `HyperZZWLocal`; both True: an answer in evaluation depends on its image alone.
        sync: batch means over all data-parallel processes.
    Raises:
        ShapeError: sizes, groups or even kernels that do not fit; at the call, other channels, maps not square.
        RecipeError: an unknown branch, or none.
    Source: Zhang (2024), arXiv 2401.17948, figure 2 and the released definitions. Deviation: earlier outputs are not
        tiled to `width` channels before the projection; it has the weights for that, and those of equal channels are
        added up, which is the same.
    Example:
        >>> SFNEBlock(6, 4, 8)(torch.randn(2, 6, 8, 8)).shape
        torch.Size([2, 24, 8, 8])
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        size: int,
        *,
        slow_layers: int = 2,
        local_kernels: Sequence[int] = (3, 9, 5, 7),
        groups: int = 12,
        dropout: float = 0.0,
        skips: Sequence[int] = (),
        branches: Sequence[str] = BRANCHES,
        omega0: float = 10.0,
        track_stats: bool = False,
        per_sample: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check(width, bottleneck, size, local_kernels, dropout, branches)
        for channels in skips:
            if channels < 1 or width % channels:
                raise ShapeError(f"an earlier output of {channels} channels cannot be tiled to the block's {width}")
        self.width, self.size, self.skips, self.dropout = width, size, tuple(skips), dropout
        self.crosses = "global" in branches
        self.slow = CoordinateKernel(2, size, width, 64, slow_layers, omega0)
        self.unit_of_slow = RecursiveGatedUnit(width, width, size)
        self.unit = RecursiveGatedUnit(width, width, size)
        self.project = nn.Conv2d(width, width, 1)
        self.channel_gate = HyperChannelInteraction(width, omega0=omega0)
        self.gate = HyperInteraction(width, size, omega0)
        local: dict[str, Any] = {"omega0": omega0, "per_sample": per_sample, "track_stats": track_stats, "sync": sync}
        kernels = local_kernels if "local" in branches else ()
        self.locals = nn.ModuleList(HyperZZWLocal(width, k, **local) for k in kernels)
        self.parts = 2 + 4 * self.crosses + len(self.locals)
        out = width * bottleneck
        self.join = nn.Conv2d((self.parts + len(self.skips)) * width, out, 1)
        self.norm = GroupInstanceBatchNorm(out, groups, track_stats, sync=sync)
        self.bias = nn.Parameter(torch.zeros(()))
        for conv in (self.project, self.join):
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, *skips: Tensor) -> Tensor:
        """Return the block's output for x and the outputs of earlier blocks it was built for."""
        side = check_square("SFNEBlock", x, self.width)
        if tuple(s.shape[1] for s in skips) != self.skips:
            given = [tuple(s.shape) for s in skips]
            raise ShapeError(f"this SFNEBlock reads earlier outputs of {self.skips} channels, got {given}")
        slow = x * self.slow(size=side).to(x.dtype)
        fast = instance_standardize(self.unit_of_slow(slow) + self.unit(x))
        projected = instance_standardize(self.project(x))
        gated = instance_standardize(self.channel_gate(x))
        made = [fast]
        crossed = fast
        if self.crosses:
            crossed = global_product(slow, fast)
            made += [crossed, global_product(slow, projected), torch.sigmoid(crossed) * crossed]
            made.append(global_product(slow, gated))
        pairs = ((x, gated), (gated, x), (projected, x), (x, projected))
        made += [local(*pair) for local, pair in zip(self.locals, pairs, strict=False)]
        made.append(self.gate(crossed, x))
        y = F.gelu(self.norm(self._joined(made, skips))) + self.bias.to(x.dtype)
        return F.dropout2d(y, self.dropout, self.training)

    def _joined(self, made: list[Tensor], skips: Sequence[Tensor]) -> Tensor:
        """Project everything at once; of tiled channels the weights are added up, not the channels repeated."""
        if not skips:
            return self.join(torch.cat(made, dim=1))
        weight = self.join.weight
        parts = [weight[:, : len(made) * self.width]]
        for place, channels in enumerate(self.skips, start=len(made)):
            own = weight[:, place * self.width : (place + 1) * self.width]
            parts.append(own.unflatten(1, (-1, channels)).sum(1))
        return F.conv2d(torch.cat([*made, *skips], dim=1), torch.cat(parts, dim=1), self.join.bias)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.width} -> {self.join.out_channels}, size={self.size}, skips={self.skips}, dropout={self.dropout}"


def _check(
    width: int, bottleneck: int, size: int, kernels: Sequence[int], dropout: float, branches: Sequence[str]
) -> None:
    if min(width, bottleneck) < 1 or size < 2:
        raise ShapeError(
            f"SFNEBlock: width and bottleneck must be at least 1 and size 2, got {width}, {bottleneck} and {size}"
        )
    if len(kernels) != 4:
        raise ShapeError(f"an SFNEBlock has four local operators, got local_kernels={list(kernels)}")
    if not 0.0 <= dropout < 1.0:
        raise ShapeError(f"dropout must be at least 0 and below 1, got {dropout}")
    if not branches or not set(branches) <= set(BRANCHES):
        raise RecipeError(f"branches are 'global', 'local' or both, got {list(branches)}")
