"""The convolutional monotone coupling: variables on grids of several sizes, as pixels and what stands above them.

Source: Feng, Winston, Kolter, Monotone deep Boltzmann machines (2023), arXiv 2307.04990, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._state_blocks import Run, StateBlocks
from lamina.nn.monotone_coupling import SOURCE, MonotoneCoupling, check_margin, symmetric_scale
from lamina.registry import register

Tier = tuple[int, int, int, int]
"""(channels, height, width, groups): each group of channels / groups states is a variable at every cell."""


@dataclass(frozen=True)
class Link:
    """One convolution of A, from a tier to itself or to a later one."""

    source: int
    target: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int, int, int]
    """left, right, top, bottom, as in `F.pad`; negative where cells at the border reach nothing."""


@register("layer", source=f"{SOURCE}, section 5 and appendix; scaled symmetrically")
class MonotoneHollowConv(MonotoneCoupling):
    """Couple variables on grids by convolutions: q -> Phi q with I - Phi >= m I, for any weights.

    q (B, dim) -> same; q is the tiers one after the other, each (channels, height, width) flattened. A maps each tier
    to itself and to every later one (stride = ratio of their sizes); a tier of one cell, such as a label, is reached
    from the tier before it alone, by a kernel of that tier's size. As in `MonotoneHollow`,
    Phi = blkdiag(A_i^T A_i) - A^T A with A_i scaled down, here for each variable at each cell: exact at the borders
    too. Neither Phi nor A is ever built. float32 inside.

    Args:
        tiers: (channels, height, width, groups), finest first; a variable has channels / groups states.
        m: margin of monotonicity, strictly between 0 and 1.
        kernel_size: side of the kernels between grids; odd or even.
    Raises:
        ShapeError: channels that the groups do not divide, less than 2 states, sizes below 1.
        LaminaError: m out of range.
    Source: section 5. Deviations: as in `MonotoneHollow`; the block diagonal is computed for every kind of cell,
        those at the border included, not for the inner ones alone.
    Example:
        >>> MonotoneHollowConv([(2, 4, 4, 1), (6, 2, 2, 2), (3, 1, 1, 1)])(torch.ones(1, 59)).shape
        torch.Size([1, 59])
    """

    def __init__(self, tiers: Sequence[Tier], m: float = 0.1, kernel_size: int = 3) -> None:
        super().__init__()
        self.m, self.tiers, self.kernel_size = check_margin(m), [_checked(t) for t in tiers], kernel_size
        if kernel_size < 1:
            raise ShapeError(f"kernel_size must be at least 1, got {kernel_size}")
        self.blocks = StateBlocks(tuple(Run(g, c // g, h * w) for c, h, w, g in self.tiers))
        self.links = _links(self.tiers, kernel_size)
        shapes = [(self.tiers[k.target][0], self.tiers[k.source][0], *k.kernel) for k in self.links]
        self.kernels = nn.ParameterList(_drawn(shape) for shape in shapes)
        self._kinds = [_kinds_of_cells(i, self.tiers, self.links) for i in range(len(self.tiers))]

    def prepare(self) -> tuple[Tensor, ...]:
        """Return the kernels, then for each tier the factors (channels, cells) and the scaled A_i^T A_i."""
        kernels = [k if k.dtype == torch.float64 else k.float() for k in self.kernels]
        scales: list[Tensor] = []
        grams: list[Tensor] = []
        for tier, run in enumerate(self.blocks.runs):
            reach, kinds = self._kinds[tier]
            taps = [_tap_grams(k, run) for k, link in zip(kernels, self.links, strict=True) if link.source == tier]
            # (kinds of cells, outer, states, states)
            found = torch.einsum("kt,tgij->kgij", torch.tensor(reach).to(kernels[0]), torch.cat(taps))
            scale = symmetric_scale(found, self.m)
            cells = torch.tensor(kinds, device=scale.device)
            grams.append((found * scale.square()[..., None, None])[cells])
            scales.append(scale[cells].T[:, None, :].expand(-1, run.states, -1).reshape(run.outer * run.states, -1))
        return (*kernels, *scales, *grams)

    def product(self, q: Tensor, *prepared: Tensor) -> Tensor:
        """Return Phi q."""
        links, tiers = len(self.links), len(self.tiers)
        kernels, scales, grams = prepared[:links], prepared[links : links + tiers], prepared[links + tiers :]
        pieces = self.blocks.split(q)
        planes = [
            (p.flatten(1, 2) * s).unflatten(2, t[1:3]) for p, s, t in zip(pieces, scales, self.tiers, strict=True)
        ]
        back = self._adjoint(self._forward(planes, kernels), kernels)
        made = [
            torch.einsum("bgjp,pgij->bgip", p, g) - (b.flatten(2) * s).view(p.shape)
            for p, g, b, s in zip(pieces, grams, back, scales, strict=True)
        ]
        return self.blocks.join(made)

    def _forward(self, planes: Sequence[Tensor], kernels: Sequence[Tensor]) -> list[Tensor]:
        """Apply A to the scaled tiers: each result (B, channels, height, width) of a tier."""
        out: dict[int, Tensor] = {}
        for kernel, link in zip(kernels, self.links, strict=True):
            image = F.conv2d(F.pad(planes[link.source], link.pad), kernel, stride=link.stride)
            out[link.target] = image if link.target not in out else out[link.target] + image
        return [out[i] for i in range(len(self.tiers))]

    def _adjoint(self, images: Sequence[Tensor], kernels: Sequence[Tensor]) -> list[Tensor]:
        """Apply the transpose of A."""
        out: dict[int, Tensor] = {}
        for kernel, link in zip(kernels, self.links, strict=True):
            plane = F.conv_transpose2d(images[link.target], kernel, stride=link.stride)
            plane = F.pad(plane, [-p for p in link.pad])
            out[link.source] = plane if link.source not in out else out[link.source] + plane
        return [out[i] for i in range(len(self.tiers))]


def _checked(tier: Tier) -> Tier:
    channels, height, width, groups = (int(v) for v in tier)
    if min(channels, height, width, groups) < 1 or channels % groups:
        raise ShapeError(
            f"a tier is (channels, height, width, groups), all at least 1, groups dividing channels, got {tuple(tier)}"
        )
    return channels, height, width, groups


def _links(tiers: Sequence[Tier], kernel_size: int) -> list[Link]:
    links = []
    for target, (_, height, width, _) in enumerate(tiers):
        single = height == width == 1
        for source in range(max(target - 1, 0) if single else 0, target + 1):
            sizes = tiers[source][1:3]
            kernel = sizes if single else (kernel_size, kernel_size)
            rows, columns = (_along(a, b, k) for a, b, k in zip(sizes, (height, width), kernel, strict=True))
            links.append(Link(source, target, kernel, (rows[0], columns[0]), (*columns[1:], *rows[1:])))
    return links


def _along(size: int, target: int, kernel: int) -> tuple[int, int, int]:
    """Stride and padding on both sides with which a kernel maps `size` cells to `target`."""
    stride = max(1, (2 * size + target) // (2 * target))
    padding = (target - 1) * stride + kernel - size
    return stride, padding // 2, padding - padding // 2


def _drawn(shape: tuple[int, ...]) -> nn.Parameter:
    kernel = torch.empty(shape)
    nn.init.kaiming_uniform_(kernel, a=5**0.5)
    return nn.Parameter(kernel)


def _tap_grams(kernel: Tensor, run: Run) -> Tensor:
    """Multiply each tap's part of a variable with itself: (target, source, kh, kw) -> (kh * kw, outer, k, k)."""
    taps = kernel.flatten(2).permute(2, 0, 1).unflatten(2, (run.outer, run.states)).transpose(1, 2)
    return taps.mT @ taps


def _kinds_of_cells(source: int, tiers: Sequence[Tier], links: Sequence[Link]) -> tuple[list[list[float]], list[int]]:
    """Which taps of the links from a tier reach an output from a cell, for each kind of cell, and the cells' kinds.

    Inside, the pattern repeats with the stride; at the border some taps fall outside.
    """
    _, height, width, _ = tiers[source]
    patterns = [
        [
            float(a and b)
            for link in links
            if link.source == source
            for a in _reached(row, link.kernel[0], link.stride[0], link.pad[2], tiers[link.target][1])
            for b in _reached(column, link.kernel[1], link.stride[1], link.pad[0], tiers[link.target][2])
        ]
        for row in range(height)
        for column in range(width)
    ]
    known: dict[tuple[float, ...], int] = {}
    kinds = [known.setdefault(tuple(p), len(known)) for p in patterns]
    return [list(p) for p in known], kinds


def _reached(cell: int, kernel: int, stride: int, pad: int, outputs: int) -> list[bool]:
    """For each tap, whether some output looks at the cell through it."""
    places = [cell + pad - tap for tap in range(kernel)]
    return [p % stride == 0 and 0 <= p // stride < outputs for p in places]
