"""Real spherical harmonics of unit directions: how colours depend on where one looks from."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.errors import ShapeError


def spherical_harmonics(d: Tensor, bands: int) -> Tensor:
    """Return the basis (N, bands^2) of unit directions d (N, 3), float32; band l has 2 l + 1 of them, m = -l..l.

    Orthonormal on the sphere; signs follow the convention of computer graphics (Condon-Shortley phase kept).

    Raises:
        ShapeError: bands outside 1..4.
    Source: Sloan, Stupid spherical harmonics (SH) tricks (2008), appendix A2.
    Example:
        >>> spherical_harmonics(torch.tensor([[0.6, 0.0, 0.8]]), 2)
        tensor([[ 0.2821, -0.0000,  0.3909, -0.2932]])
    """
    if not 1 <= bands <= 4:
        raise ShapeError(f"spherical harmonics have 1 to 4 bands here, got {bands}")
    x, y, z = d.float().unbind(-1)
    found = [torch.full_like(x, 0.28209479177387814)]
    if bands > 1:
        found += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if bands > 2:
        found += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (3 * z * z - 1),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if bands > 3:
        found += [
            0.5900435899266435 * y * (y * y - 3 * x * x),
            2.890611442640554 * x * y * z,
            0.4570457994644658 * y * (1 - 5 * z * z),
            0.3731763325901154 * z * (5 * z * z - 3),
            0.4570457994644658 * x * (1 - 5 * z * z),
            1.445305721320277 * z * (x * x - y * y),
            0.5900435899266435 * x * (3 * y * y - x * x),
        ]
    return torch.stack(found, dim=-1)
