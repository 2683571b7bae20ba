"""How alike the rows of a batch are by what is known of them: weights from 0 to 1 for a contrastive loss.

A value that is NaN, not known, is like nothing: weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn._kept_float32 import wide

CHUNK = 1 << 22
"""Numbers held at a time where vectors are compared one by one."""


def rbf(values: Tensor, width: float = 1.0) -> Tensor:
    """exp(-d^2 / (2 width^2)) of the distance d of two numbers: (N,) -> (N, N), 1 on the diagonal.

    Args:
        width: distance at which the weight is 0.61, in the unit of the values; above 0.
    """
    _check_width(width)
    return _known(torch.exp(-_distances(values).square() / (2 * width**2)))


def gaussian(values: Tensor, width: float = 1.0) -> Tensor:
    """The density of a normal distribution, exp(-d^2 / (2 width^2)) / (sqrt(2 pi) width): (N,) -> (N, N).

    What the official code calls gaussian: 0.4 / width on the diagonal, not 1. See `rbf`, which differs by the factor.

    Args:
        width: at least 0.4, or weights would pass 1.
    """
    _check_width(width)
    peak = 1 / (math.sqrt(2 * math.pi) * width)
    if peak > 1:
        raise LaminaError(f"a gaussian of width {width} gives weights up to {peak:.3g}, above 1: rbf stays below")
    return rbf(values, width) * peak


def cauchy(values: Tensor, width: float = 1.0) -> Tensor:
    """1 / (1 + (d / width)^2) of the distance d of two numbers: (N,) -> (N, N), 1 on the diagonal; slow to fall.

    Args:
        width: distance at which the weight is a half; the official gamma is 1 / width^2.
    """
    _check_width(width)
    return _known(1 / (1 + (_distances(values) / width).square()))


def same(values: Tensor) -> Tensor:
    """1 where two labels are equal, else 0: (N,) -> (N, N) float32."""
    _one_each("same", values)
    return (values[:, None] == values).float()


def identity(values: Tensor) -> Tensor:
    """1 for a row and itself alone, so that only its views attract each other: (N, ...) -> (N, N) float32."""
    return torch.eye(len(values), device=values.device)


def anatomical(
    values: Tensor, by: Literal["region", "measure"] = "region", map: Literal["clamp", "affine"] = "clamp"
) -> Tensor:
    """Mean cosine similarity of two subjects' measurements (N, R, M): R regions, M measures of each -> (N, N).

    A measurement that is NaN is left out of every comparison it would be in; a region (or measure) of which nothing is
    common to the two is left out of their mean, and a pair without anything in common has weight 0.

    Args:
        values: standardised, each measure over the training set; as they come, all cosines would be near 1.
        by: "region": the M measures of each region are compared, and regions averaged (local, AnatCL-L3). "measure":
            the R regions of each measure are compared, and measures averaged (global, AnatCL-G3).
        map: of a cosine to 0..1: "clamp" (negative ones are 0) or "affine", (1 + cosine) / 2.
    Raises:
        ShapeError: no floating-point (N, R, M).
    """
    if by not in ("region", "measure") or map not in ("clamp", "affine"):
        raise LaminaError(f"anatomical takes by='region' or 'measure' and map='clamp' or 'affine', got {by!r}, {map!r}")
    if values.dim() != 3 or not values.is_floating_point():
        raise ShapeError(
            f"anatomical takes floating-point measurements (N, regions, measures), got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    vectors = wide(values).permute(1, 0, 2) if by == "region" else wide(values).permute(2, 0, 1)
    total = vectors.new_zeros(values.shape[0], values.shape[0])
    held = torch.zeros_like(total)
    for part in vectors.split(max(CHUNK // max(values.shape[0] ** 2, 1), 1)):
        cosine, common = _cosines(part)
        mapped = cosine.clamp(0, 1) if map == "clamp" else (1 + cosine.clamp(-1, 1)) / 2
        total += torch.where(common, mapped, 0.0).sum(0)
        held += common.sum(0)
    return total / held.clamp(min=1)


SIMILARITIES: dict[str, Callable[..., Tensor]] = {
    "rbf": rbf,
    "gaussian": gaussian,
    "cauchy": cauchy,
    "same": same,
    "identity": identity,
    "anatomical": anatomical,
}
"""What an attribute of `weighted_contrastive` can be compared by, and its options."""


def _cosines(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Compare (K, N, L) pair by pair over what both have: cosines (K, N, N), and whether there is anything common."""
    known = ~vectors.isnan()
    filled, seen = torch.where(known, vectors, 0.0), known.to(vectors.dtype)
    squares = filled.square() @ seen.mT
    # The length of each over what the other has; equal vectors give exactly 1 but for rounding.
    lengths = (squares * squares.mT).sqrt()
    cosine = (filled @ filled.mT) / lengths.clamp(min=torch.finfo(vectors.dtype).tiny)
    return cosine, seen @ seen.mT > 0


def _distances(values: Tensor) -> Tensor:
    _one_each("a kernel", values)
    values = wide(values)
    return values[:, None] - values


def _known(weights: Tensor) -> Tensor:
    return torch.where(weights.isnan(), 0.0, weights)


def _one_each(name: str, values: Tensor) -> None:
    if values.dim() != 1:
        raise ShapeError(f"{name} compares one number a row, (N,), got {tuple(values.shape)}")


def _check_width(width: float) -> None:
    if not width > 0:
        raise LaminaError(f"the width of a kernel must be above 0, got {width}")
