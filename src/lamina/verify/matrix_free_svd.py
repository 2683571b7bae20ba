"""The largest singular triples of a matrix that is only known by what it does to vectors.

block    block power iteration on F^T F, a few vectors more than asked for, orthogonalised at each step
lanczos  Golub-Kahan bidiagonalisation, every new vector orthogonalised against all before
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError, nearest

Apply = Callable[[Tensor], Tensor]
"""(count, n) -> (count, m), one vector a row."""

Method = Literal["block", "lanczos"]

LIMIT = 500
"""Steps after which the iteration ends with a warning."""

FLOOR = 1e-12
"""Part of the largest value below which another one is rounding, and need not settle."""


@dataclass(frozen=True)
class SingularTriples:
    """F is about the sum of values[i] * outer(left[i], right[i])."""

    left: Tensor
    """(k, ...) directions of the output, of length 1."""
    values: Tensor
    """(k,) descending."""
    right: Tensor
    """(k, ...) directions of the input, of length 1."""
    steps: int
    """Of the iteration."""


def matrix_free_svd(
    forward: Apply,
    backward: Apply,
    inputs: int,
    outputs: int,
    k: int,
    *,
    method: Method = "block",
    tolerance: float = 1e-6,
    seed: int = 0,
) -> SingularTriples:
    """Return the k largest singular values with their vectors, as rows in float64.

    Args:
        forward: F, applied to rows: (count, inputs) -> (count, outputs), float64.
        backward: F transposed.
        k: 1..min(inputs, outputs).
        method: "block" costs 2 (k + some) products a step and is robust; "lanczos" costs 2 a step, in fewer steps.
        tolerance: the iteration ends where no value changes by more than this part of itself (and 1e-12 of the largest,
            for values that are 0 but for rounding), and no triple misses F^T u = s v by more than its square root (of
            the largest value); after 500 steps it warns.
        seed: of the start.
    Raises:
        LaminaError: k out of range, a tolerance that is not above 0, an unknown method.
    Source: Golub and Kahan (1965), section 5; block power iteration with the projection of Rayleigh and Ritz.
    Example:
        >>> a = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> matrix_free_svd(lambda x: x @ a.T, lambda y: y @ a, 3, 3, 2).values.round(decimals=4).tolist()
        [3.0, 2.0]
    """
    if not 1 <= k <= min(inputs, outputs):
        raise LaminaError(f"k must be 1..{min(inputs, outputs)} for a map of {inputs} to {outputs} numbers, got {k}")
    if not tolerance > 0:
        raise LaminaError(f"the tolerance must be above 0, got {tolerance}")
    if method not in _METHODS:
        raise LaminaError(
            f"no method is called {method!r}{nearest(method, _METHODS)} (there are: {', '.join(_METHODS)})"
        )
    generator = torch.Generator().manual_seed(seed)
    return _METHODS[method](forward, backward, inputs, outputs, k, tolerance, generator)


def _block(
    forward: Apply, backward: Apply, inputs: int, outputs: int, k: int, tolerance: float, generator: torch.Generator
) -> SingularTriples:
    size = min(2 * k + 4, inputs, outputs)
    right = _orthonormal(torch.randn(size, inputs, generator=generator, dtype=torch.float64))
    last = torch.zeros(k, dtype=torch.float64)
    for step in range(1, LIMIT + 1):  # noqa: B007
        left, values, turn = torch.linalg.svd(forward(right).T, full_matrices=False)
        left, right = left.T, turn @ right
        back = backward(left)
        missed = (back - values[:, None] * right)[:k].norm(dim=1)
        if size == inputs or _settled(values[:k], last, missed, tolerance):
            break
        last, right = values[:k], _orthonormal(back)
    else:
        _warn(tolerance)
    return SingularTriples(left[:k], values[:k], right[:k], step)


def _lanczos(
    forward: Apply, backward: Apply, inputs: int, outputs: int, k: int, tolerance: float, generator: torch.Generator
) -> SingularTriples:
    # Started among the rows of F: as many steps as there are rows then see all of it.
    start = backward(torch.randn(1, outputs, generator=generator, dtype=torch.float64))
    right, _ = _next(start, torch.zeros(0, inputs, dtype=torch.float64), generator)
    left, diagonal = _next(forward(right), torch.zeros(0, outputs, dtype=torch.float64), generator)
    small, last = torch.tensor([[diagonal]], dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for step in range(1, max(LIMIT, k) + 1):
        # F right^T = left^T small, and F^T left^T = right^T small^T but for one vector of length `off`.
        new, off = _next(backward(left[-1:]), right, generator) if step < inputs else (right[:0], 0.0)
        u, values, turn = torch.linalg.svd(small)
        done = step == min(inputs, outputs)
        if done or (step >= k and _settled(values[:k], last, off * u[-1, :k].abs(), tolerance)):
            break
        if step == max(LIMIT, k):
            _warn(tolerance)
            break
        last = values[:k] if step >= k else last
        right = torch.cat([right, new])
        image, diagonal = _next(forward(new), left, generator)
        left = torch.cat([left, image])
        small = torch.nn.functional.pad(small, (0, 1, 0, 1))
        small[-2, -1], small[-1, -1] = off, diagonal
    return SingularTriples((u.T @ left)[:k], values[:k], (turn @ right)[:k], step)


_METHODS = {"block": _block, "lanczos": _lanczos}


def _settled(values: Tensor, last: Tensor, missed: Tensor, tolerance: float) -> bool:
    still = bool(((values - last).abs() <= tolerance * values + FLOOR * values[0]).all())
    return still and bool((missed <= tolerance**0.5 * values[0]).all())


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.T).Q.T


def _next(row: Tensor, basis: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return what a row adds to an orthonormal basis and its length, or a random direction and 0 if it adds nothing."""
    whole = float(row.norm())
    for _ in range(2):
        row = row - (row @ basis.T) @ basis
    length = float(row.norm())
    if length > 1e-12 * whole:
        return row / length, length
    if len(basis) == basis.shape[1]:
        return row, 0.0
    drawn = torch.randn(row.shape, generator=generator, dtype=row.dtype)
    return _next(drawn, basis, generator)[0], 0.0


def _warn(tolerance: float) -> None:
    warnings.warn(f"the singular values have not settled to {tolerance:g} in {LIMIT} steps", stacklevel=4)
