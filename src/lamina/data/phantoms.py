"""Phantoms: volumes of a made-up brain whose anatomy is known exactly, because it was drawn before they were."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.errors import LaminaError

MEASURES = ("thickness", "volume", "area")
"""Last axis of `Phantoms.measures`: mm, mm^3, mm^2."""

MILLIMETRES = 64.0
"""Side of the cube."""


@dataclass(frozen=True)
class Phantoms:
    """Subjects of a made-up population; N of them, R regions."""

    volumes: Tensor
    """(N, 1, S, S, S) float32: share of grey matter in every voxel, as the site's scanner shows it."""
    measures: Tensor
    """(N, R, 3) thickness, volume and area of every region: what the volume was rendered from."""
    age: Tensor
    """(N,) years, 20..80."""
    site: Tensor
    """(N,) int64: which scanner."""
    diagnosis: Tensor
    """(N,) int64: 1 = ill."""
    diseased: Tensor
    """(k,) int64: the regions that the disease thins."""


def phantoms(
    subjects: int = 600,
    size: int = 32,
    regions: int = 12,
    *,
    sites: int = 4,
    share: float = 0.15,
    diseased: int = 3,
    thinning: float = 0.5,
    scanner: float = 1.0,
    seed: int = 0,
) -> Phantoms:
    """Draw subjects whose grey matter is a layer around each of some ellipsoids, and render them.

    Thickness (2.8 to 4.2 mm) falls with age at a pace of the region's own, and varies with three factors of the
    subject and a rest of the region's own; the size of a region varies by itself. Disease thins some regions more, at
    any age and site. A site has a gain, an offset, a slow field over the volume and a noise of its own. Regions, their
    paces and loadings, the sites and what disease does are the same for every seed: seeds draw subjects.

    Args:
        subjects: how many.
        size: voxels a side, at least 16; the cube is 64 mm.
        regions: how many.
        sites: how many, drawn evenly.
        share: of the subjects that is ill, 0..1.
        diseased: regions that the disease thins.
        thinning: of those, mm on average.
        scanner: factor of all that sites do; 0 = the grey matter as it is.
        seed: of the subjects.
    Raises:
        LaminaError: a number out of range.
    Example:
        >>> phantoms(4, size=16).measures.shape
        torch.Size([4, 12, 3])
    """
    _check(subjects, size, regions, sites, share, diseased, thinning, scanner)
    world, draw = (torch.Generator().manual_seed(s) for s in (20240807, seed))
    centres, axes = _places(regions, world)
    base, pace = _uniform((regions,), 2.8, 4.2, world), _uniform((regions,), 0.1, 0.8, world)
    loadings = 0.2 * torch.randn(3, regions, generator=world)
    ill_regions = torch.randperm(regions, generator=world)[:diseased].sort().values

    age = _uniform((subjects,), 20.0, 80.0, draw)
    site = torch.randint(sites, (subjects,), generator=draw)
    diagnosis = (torch.rand(subjects, generator=draw) < share).long()
    thickness = base - pace * ((age[:, None] - 50) / 30)
    thickness += torch.randn(subjects, 3, generator=draw) @ loadings
    thickness += 0.15 * torch.randn(subjects, regions, generator=draw)
    lost = thinning * _uniform((subjects, diseased), 0.5, 1.5, draw)
    thickness[:, ill_regions] -= diagnosis[:, None] * lost
    thickness = thickness.clamp(0.5, 5.0)
    scale = (1 + 0.05 * torch.randn(subjects, regions, generator=draw)).clamp(0.85, 1.15)

    grey = _render(size, centres, axes, scale, thickness)
    shown = _scan(grey, site, sites, scanner, world, draw)
    return Phantoms(shown.unsqueeze(1), measure(axes, scale, thickness), age, site, diagnosis, ill_regions)


def measure(axes: Tensor, scale: Tensor, thickness: Tensor) -> Tensor:
    """Return thickness, volume and area (N, R, 3) of layers inside ellipsoids; axes (R, 3) mm, scale, thickness (N, R).

    The area is Thomsen's approximation of an ellipsoid's (1 % at most); the inner wall is the outer one, shrunk.
    """
    mean = axes.mean(1) * scale
    outer = 4 / 3 * math.pi * axes.prod(1) * scale**3
    volume = outer * (1 - (1 - thickness / mean).clamp(min=0) ** 3)
    power = 1.6075
    pairs = (axes * axes.roll(1, 1)) ** power
    area = 4 * math.pi * (pairs.sum(1) / 3) ** (1 / power) * scale**2
    return torch.stack([thickness, volume, area], dim=-1)


def _render(size: int, centres: Tensor, axes: Tensor, scale: Tensor, thickness: Tensor) -> Tensor:
    """Return the share of grey matter (N, S, S, S); edges are as wide as a voxel."""
    step = MILLIMETRES / size
    line = (torch.arange(size) + 0.5) * step - MILLIMETRES / 2
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), dim=-1).reshape(-1, 3)
    grey = torch.zeros(len(scale), size**3)
    for region, (centre, axis) in enumerate(zip(centres, axes, strict=True)):
        radius = ((grid - centre) / axis).norm(dim=1)
        near = (radius < 1.15 + 2 * step / float(axis.min())).nonzero().squeeze(1)
        mean = float(axis.mean())
        depth = mean * (scale[:, region, None] - radius[near])
        layer = torch.minimum(depth, thickness[:, region, None] - depth)
        grey[:, near] += (layer / step + 0.5).clamp(0, 1)
    return grey.clamp_(max=1).reshape(-1, size, size, size)


def _scan(
    grey: Tensor, site: Tensor, sites: int, strength: float, world: torch.Generator, draw: torch.Generator
) -> Tensor:
    """Show the grey matter as each subject's site does."""
    gain = 1 + strength * _uniform((sites,), -0.2, 0.2, world)[site, None, None, None]
    offset = strength * _uniform((sites,), -0.05, 0.05, world)[site, None, None, None]
    slope = strength * _uniform((sites, 3), -0.1, 0.1, world)[site]
    noise = strength * _uniform((sites,), 0.03, 0.08, world)[site, None, None, None]
    line = torch.linspace(-1, 1, grey.shape[-1])
    field = sum(slope[:, k, None, None, None] * line.reshape(-1, *(1,) * (2 - k)) for k in range(3))
    return grey * (gain + field) + offset + noise * torch.randn(grey.shape, generator=draw)


def _places(regions: int, world: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spread ellipsoids over a sphere (a Fibonacci lattice), as large as the nearest two leave room for; mm."""
    number = torch.arange(regions, dtype=torch.float32) + 0.5
    polar, turn = torch.acos(1 - 2 * number / regions), math.pi * (1 + 5**0.5) * number
    centres = torch.stack([turn.cos() * polar.sin(), turn.sin() * polar.sin(), polar.cos()], dim=1)
    centres = centres * (0.31 * MILLIMETRES)
    apart = torch.cdist(centres, centres).fill_diagonal_(0.34 * MILLIMETRES)
    room = 0.5 * float(apart.min())
    return centres, room / 1.15 * _uniform((regions, 3), 0.8, 1.0, world)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _check(
    subjects: int, size: int, regions: int, sites: int, share: float, diseased: int, thinning: float, scanner: float
) -> None:
    if min(subjects, regions, sites) < 1 or size < 16:
        raise LaminaError(
            f"phantoms need a subject, a region and a site, and 16 voxels a side, got {subjects=}, {regions=}, "
            f"{sites=}, {size=}"
        )
    if regions > 24:
        raise LaminaError(f"phantoms have room for 24 regions at most, got {regions}")
    if not 0 <= share <= 1 or not 0 <= diseased <= regions or not thinning >= 0 or not scanner >= 0:
        raise LaminaError(
            f"share must be in 0..1, diseased in 0..{regions}, thinning and scanner at least 0, got {share}, "
            f"{diseased}, {thinning}, {scanner}"
        )
