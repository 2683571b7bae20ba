"""Fixed points z = f(z) of a whole batch, by plain iteration or Anderson acceleration, without a gradient.

For implicit layers: solve here, then differentiate with the implicit function theorem (`MeanFieldEquilibrium` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError

Solver = Literal["anderson", "splitting"]
GROWTH = 2.0
"""A row whose residual is more than this times its best takes the plain step instead of the accelerated one."""


@dataclass(frozen=True)
class FixedPointInfo:
    """How a solve ended."""

    iterations: int
    """Calls of f."""
    residual: float
    """Largest |f(z) - z| / |f(z)| of a row, Euclidean."""
    converged: bool
    """Whether that is at most the tolerance in every row."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def fixed_point(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    solver: Solver = "anderson",
    tol: float = 1e-5,
    max_iter: int = 200,
    memory: int = 5,
    damping: float = 1e-4,
) -> tuple[Tensor, FixedPointInfo]:
    """Find z = f(z) row by row, starting at z0 (B, ...); a row that has converged stays as it is.

    So what a row ends at does not depend on the others in its batch. Under torch.compile this runs as it is, since the
    length of the loop is known only as it runs.

    Args:
        f: (B, ...) -> the same shape, each row for itself.
        solver: "splitting" iterates f as it is; "anderson" mixes the last `memory` values.
        tol: relative residual at which a row has converged.
        damping: of Anderson's least squares, relative to its mean diagonal; >= 0.
    Returns:
        f at the last iterate, and how it ended.
    Raises:
        LaminaError: an option out of range. ShapeError: f changes the shape.
    Source: Anderson (1965); Walker and Ni, Anderson acceleration for fixed-point iterations (2011), section 2.
    """
    _check(solver, tol, max_iter, memory, damping)
    mixer = _Anderson(z0, memory, damping) if solver == "anderson" else None
    z, done = z0, torch.zeros(len(z0), dtype=torch.bool, device=z0.device)
    residual = torch.full((len(z0),), torch.inf, dtype=z0.dtype, device=z0.device)
    best, iterations = residual, 0
    while iterations < max_iter and not bool(done.all()):
        new = f(z)
        if new.shape != z.shape:
            raise ShapeError(f"f must keep the shape {tuple(z.shape)}, it gave {tuple(new.shape)}")
        iterations += 1
        change = new - z
        size = torch.linalg.vector_norm(new.flatten(1), dim=1).clamp(min=torch.finfo(new.dtype).tiny)
        residual = torch.where(done, residual, torch.linalg.vector_norm(change.flatten(1), dim=1) / size)
        ended = residual <= tol
        ahead = new
        if mixer is not None:
            mixed = mixer(z, change)
            ahead = torch.where(_rows(ended | (residual > GROWTH * best), z), new, mixed)
            best = torch.minimum(best, residual)
        z = torch.where(_rows(done, z), z, ahead)
        done = ended
    return z, FixedPointInfo(iterations, float(residual.max()) if len(z) else 0.0, bool(done.all()))


class _Anderson:
    """The last iterates and their changes, row by row, and the combination whose change would be smallest."""

    def __init__(self, like: Tensor, memory: int, damping: float) -> None:
        rows, width = len(like), like[:1].numel()
        self.shape, self.memory, self.damping, self.seen = like.shape, memory, damping, 0
        self.values = like.new_zeros(rows, memory, width)
        self.changes = like.new_zeros(rows, memory, width)
        self.gram = like.new_zeros(rows, memory, memory, dtype=torch.float64)

    def __call__(self, z: Tensor, change: Tensor) -> Tensor:
        """Remember one more iterate; return the mixed one."""
        at, self.seen = self.seen % self.memory, self.seen + 1
        flat = change.flatten(1)
        self.values[:, at], self.changes[:, at] = z.flatten(1) + flat, flat
        products = torch.bmm(self.changes, flat[:, :, None])[:, :, 0].double()
        self.gram[:, at], self.gram[:, :, at] = products, products
        count = min(self.seen, self.memory)
        weights = self._weights(self.gram[:, :count, :count]).to(z.dtype)
        return torch.bmm(weights[:, None], self.values[:, :count]).view(self.shape)

    def _weights(self, gram: Tensor) -> Tensor:
        """Minimise |sum w_i change_i|^2 with sum w_i = 1."""
        diagonal = torch.diagonal(gram, dim1=1, dim2=2)
        ridge = self.damping * diagonal.mean(1) + torch.finfo(torch.float32).tiny
        system = gram + torch.diag_embed(ridge[:, None].expand_as(diagonal))
        raw = torch.linalg.solve_ex(system, torch.ones_like(diagonal))[0]
        return raw / raw.sum(1, keepdim=True)


@torch.no_grad()
def extreme_eigenvalues(
    operator: Callable[[Tensor], Tensor], size: int, like: Tensor, iterations: int = 10
) -> tuple[float, float]:
    """Estimate the smallest and largest eigenvalue of a symmetric operator on (1, size), by Lanczos.

    The estimates lie inside the spectrum: a negative smallest one proves that the operator is not positive.

    Args:
        operator: (1, size) -> (1, size).
        like: a tensor with the dtype and device to work in.
        iterations: products; with `size` of them both are exact up to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, size, generator=generator, dtype=torch.float64).to(like)
    basis = [vector / torch.linalg.vector_norm(vector)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for i in range(min(iterations, size)):
        image = operator(basis[i])
        diagonal.append((image * basis[i]).sum())
        # Orthogonal to all, twice: three terms alone lose it to rounding.
        known = torch.cat(basis)
        for _ in range(2):
            image = image - (image @ known.T) @ known
        length = torch.linalg.vector_norm(image)
        if i + 1 == min(iterations, size) or not bool(length > 1e-6 * diagonal[0].abs()):
            break
        beside.append(length)
        basis.append(image / length)
    middle = torch.diag(torch.stack(diagonal))
    if beside:
        sides = torch.diag(torch.stack(beside), 1)
        middle = middle + sides + sides.T
    values = torch.linalg.eigvalsh(middle.double().cpu())
    return float(values[0]), float(values[-1])


def _rows(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.dim() - 1))


def _check(solver: str, tol: float, max_iter: int, memory: int, damping: float) -> None:
    if solver not in ("anderson", "splitting"):
        raise LaminaError(f"solver must be 'anderson' or 'splitting', got {solver!r}")
    if not tol > 0 or max_iter < 1 or memory < 1 or not damping >= 0:
        raise LaminaError(
            f"a solve needs tol > 0, max_iter >= 1, memory >= 1 and damping >= 0, got {tol=}, {max_iter=}, {memory=}, "
            f"{damping=}"
        )
