"""Fields of a partial differential equation and their solutions: solved here, or read from a file.

Source: He, Liu, Xu, MgNO (ICLR 2024), arXiv 2310.19809 (Darcy); Li et al. (2021), arXiv 2010.08895.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lamina.data._arrays import Array, npz
from lamina.data._files import existing
from lamina.data.examples import Columns, Data
from lamina.errors import LaminaError, require
from lamina.registry import register

Boundary = Literal["dirichlet", "periodic", "neumann"]


@register("data")
def flows(
    source: str | Path = "darcy",
    batch: int = 16,
    *,
    grid: int | None = None,
    train: int = 400,
    test: int = 100,
    seed: int = 0,
    boundary: Boundary = "dirichlet",
    dim: Literal[1, 2, 3] = 2,
    inputs: str = "x",
    targets: str = "y",
) -> Data:
    """Pairs of fields for an operator to learn: `inputs` (B, channels, *grid) -> `targets` (B, channels, *grid).

    "darcy": pressure u of -div(a grad u) = 1, u = 0 at the boundary of the unit square; a is 12 or 3, by the sign of a
    random field. "poisson": u of -laplace(u) = f for a smooth random f, with any boundary. Both float32, in their
    units, on grid x grid cells.

    Args:
        source: "darcy", "poisson", or an .npz file with both arrays, (N, *grid) or (N, channels, *grid).
        batch: global batch size.
        grid: cells an axis of what is solved here; None = 32. A file has its own.
        train: rows to train on.
        test: rows of the evaluation; 0 = none.
        seed: of the random fields; of a file: of which rows are for what.
        boundary: of "poisson".
        dim: axes of the grid of a file: says whether arrays of dim + 1 dimensions have no channels. What is solved here
            is of planes.
        inputs, targets: names of the arrays of a file.
    Raises:
        LaminaError: no such source or file, a file with too few rows, a grid below 4, a boundary or grid that the
            source does not leave open. MissingExtra: scipy is not installed (extra experiments).
    """
    if train < 1 or test < 0:
        raise LaminaError(f"train must be at least 1 and test not negative, got {train} and {test}")
    if dim not in (1, 2, 3):
        raise LaminaError(f"dim must be 1, 2 or 3, got {dim}")
    kind = str(source)
    if boundary != "dirichlet" and kind != "poisson":
        raise LaminaError(f"boundary is for source 'poisson'; {kind!r} has the one it has")
    if kind in ("darcy", "poisson"):
        if dim != 2:
            raise LaminaError(f"dim is for files; {kind!r} is solved on planes, dim 2")
        side = 32 if grid is None else grid
        if side < 4:
            raise LaminaError(f"grid must be at least 4, got {side}")
        count = train + test
        fields = darcy_flow(count, side, seed) if kind == "darcy" else poisson(count, side, seed, boundary)
    else:
        if grid is not None:
            raise LaminaError(f"grid is for what is solved here ('darcy', 'poisson'); the file {kind!r} has its own")
        path = existing(source, "the file of fields (there are also 'darcy' and 'poisson')")
        fields = _chosen([channels_first(a, dim) for a in npz(path, [inputs, targets])], train + test, seed, path)
    return from_fields(fields[0][:train], fields[1][:train], fields[0][train:], fields[1][train:], batch, "flows")


def from_fields(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, batch: int, name: str) -> Data:
    """Make a data set of fields (N, channels, *grid) and their targets; an empty evaluation is none."""
    held = Columns({"inputs": test_x, "targets": test_y}) if len(test_x) else None
    shape = tuple(x.shape[2:])
    sizes = {"channels": x.shape[1], "image": shape[0] if len(set(shape)) == 1 and len(shape) == 2 else shape}
    return Data(Columns({"inputs": x, "targets": y}), held, batch, sizes, name)


def channels_first(values: Array, dim: int = 2) -> Tensor:
    """Return fields on grids of `dim` axes as (N, channels, *grid) in float32; those without channels get one.

    Raises:
        LaminaError: neither (N, *grid) nor (N, channels, *grid).
    """
    found = torch.from_numpy(np.ascontiguousarray(values)).float()
    if found.dim() not in (dim + 1, dim + 2):
        given = f"on grids of {dim} axes (option dim), got {tuple(found.shape)}"
        raise LaminaError(f"fields must be (N, *grid) or (N, channels, *grid) {given}")
    return found[:, None] if found.dim() == dim + 1 else found


def darcy_flow(count: int, grid: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return coefficients a and pressures u of Darcy flow, both (count, 1, grid, grid).

    Finite volumes on grid^2 inner points at a distance of 1 / (grid + 1), the coefficient of a face the harmonic mean
    of its two sides; solved directly.
    """
    sparse = require("scipy.sparse", "experiments")
    solve = require("scipy.sparse.linalg", "experiments").spsolve
    fields = random_fields(count, grid, seed)
    coefficients = np.where(fields >= 0, 12.0, 3.0)
    cells = np.arange(grid * grid).reshape(grid, grid)
    found, ones = np.empty_like(coefficients), np.ones(grid * grid)
    for row, a in enumerate(coefficients):
        down, across = _harmonic(a[:-1], a[1:]), _harmonic(a[:, :-1], a[:, 1:])
        centre = np.zeros_like(a)
        for axis, faces in ((0, down), (1, across)):
            # Beyond the boundary the coefficient is that of the cell itself.
            edge = [np.take(a, [0], axis), np.take(a, [-1], axis)]
            centre += np.concatenate((edge[0], faces), axis) + np.concatenate((faces, edge[1]), axis)
        i = np.concatenate((cells[:-1].ravel(), cells[:, :-1].ravel()))
        j = np.concatenate((cells[1:].ravel(), cells[:, 1:].ravel()))
        off = -np.concatenate((down.ravel(), across.ravel()))
        diagonal = cells.ravel()
        values = np.concatenate((centre.ravel(), off, off))
        where = np.concatenate((diagonal, i, j)), np.concatenate((diagonal, j, i))
        matrix = sparse.csc_matrix((values, where), shape=(grid * grid, grid * grid))
        found[row] = solve(matrix * (grid + 1) ** 2, ones, permc_spec="MMD_AT_PLUS_A").reshape(grid, grid)
    return channels_first(coefficients), channels_first(found)


def poisson(count: int, grid: int, seed: int, boundary: Boundary = "dirichlet") -> tuple[Tensor, Tensor]:
    """Return sources f and solutions u of -laplace(u) = f, both (count, 1, grid, grid); solved by frequencies.

    Points as in `darcy_flow` ("dirichlet"), at the middle of cells ("neumann") or with period 1; where constants are in
    the kernel, f and u have mean zero.
    """
    if boundary not in ("dirichlet", "periodic", "neumann"):
        raise LaminaError(f"boundary must be 'dirichlet', 'periodic' or 'neumann', got {boundary!r}")
    there, back, angles = _waves(boundary, grid)
    f = random_fields(count, grid, seed, periodic=boundary == "periodic")
    if boundary != "dirichlet":
        f = f - f.mean((1, 2), keepdims=True)
    one = (2 - 2 * np.cos(angles)) * (grid + 1 if boundary == "dirichlet" else grid) ** 2
    values = one[:, None] + one[None]
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)
    return channels_first(f), channels_first(back(there(f) * inverse).real)


def _waves(boundary: Boundary, grid: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array], Array]:
    """Return the transform that makes the Laplacian of a boundary diagonal, its inverse, and its angles an axis."""
    fft, k = require("scipy.fft", "experiments"), np.arange(grid)
    if boundary == "periodic":
        return partial(fft.fftn, axes=(1, 2)), partial(fft.ifftn, axes=(1, 2)), 2 * np.pi * k / grid
    if boundary == "neumann":
        return partial(fft.dctn, axes=(1, 2)), partial(fft.idctn, axes=(1, 2)), np.pi * k / grid
    sines = {"type": 1, "axes": (1, 2)}
    return partial(fft.dstn, **sines), partial(fft.idstn, **sines), np.pi * (k + 1) / (grid + 1)


def random_fields(count: int, grid: int, seed: int, *, periodic: bool = False) -> Array:
    """Draw smooth fields (count, grid, grid): waves with amplitudes N(0, 1) / (pi^2 |k|^2 + 9), mean zero.

    The waves are cosines without slope at the boundary (k half periods a side), or those of period 1.
    """
    fft, k = require("scipy.fft", "experiments"), np.arange(grid)
    if periodic:
        k = 2 * np.minimum(k, grid - k)
    decay = 1 / (math.pi**2 * (k[:, None] ** 2 + k[None] ** 2) + 9.0)
    decay[0, 0] = 0.0
    drawn = np.random.default_rng(seed).standard_normal((count, grid, grid))
    found: Array
    if periodic:
        found = fft.ifftn(fft.fftn(drawn, axes=(1, 2)) * decay, axes=(1, 2)).real * grid
    else:
        found = fft.idctn(drawn * decay, axes=(1, 2), norm="ortho") * grid
    return found


def _harmonic(a: Array, b: Array) -> Array:
    return 2 * a * b / (a + b)


def _chosen(fields: list[Tensor], count: int, seed: int, path: Path) -> tuple[Tensor, Tensor]:
    x, y = fields
    if len(x) != len(y) or len(x) < count:
        raise LaminaError(
            f"{str(path)!r} has {len(x)} inputs and {len(y)} targets; asked for are {count} pairs (train + test)"
        )
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    return x[rows], y[rows]
