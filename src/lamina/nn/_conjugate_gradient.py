"""The linear system behind the gradient of a mean field, by conjugate gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lamina.nn._state_blocks import StateBlocks
from lamina.nn.proximal_softmax import softmax_jacobian


@torch.no_grad()
def mean_field_adjoint(
    product: Callable[[Tensor], Tensor],
    blocks: StateBlocks,
    q: Tensor,
    marked: Tensor | None,
    grad: Tensor,
    *,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, int]:
    """Pull a gradient at the equilibrium q back to the scores Phi q + b; all (B, dim).

    With P the softmax's derivative at q (zero where clamped), w = P (grad + Phi w). On the range of P this is the
    symmetric system (P^+ - Phi) w = grad, which is positive where I - Phi is, as P <= I; P is its preconditioner.
    P^+ of a direction follows by the same recurrence as the direction, so that nothing is divided by q.

    Args:
        max_iter: steps; 0 = P grad, the gradient of one step from q.
    Returns:
        w, and the number of steps. A RuntimeWarning where they did not do.
    """

    def derivative(v: Tensor) -> Tensor:
        made = blocks.join([softmax_jacobian(a, b, 2) for a, b in zip(blocks.split(q), blocks.split(v), strict=True)])
        return made if marked is None else made.masked_fill(marked, 0.0)

    residual, scaled = grad, derivative(grad)
    if max_iter == 0:
        return scaled, 0
    direction, pseudo = scaled, residual
    solution = torch.zeros_like(grad)
    size = (residual * scaled).sum(1)
    first = size
    steps, open_rows = 0, size > 0
    while steps < max_iter and bool(open_rows.any()):
        steps += 1
        image = pseudo - product(direction)
        curvature = (direction * image).sum(1)
        if bool((open_rows & ~(curvature > 0)).any()):
            break  # not a positive system, so not a monotone coupling: said below
        length = torch.where(open_rows, size / curvature, 0.0)[:, None]
        solution = solution + length * direction
        residual = residual - length * image
        scaled = derivative(residual)
        new = (residual * scaled).sum(1)
        ratio = torch.where(open_rows, new / size, 0.0)[:, None]
        direction, pseudo, size = scaled + ratio * direction, residual + ratio * pseudo, new
        open_rows = open_rows & (new > first * tol**2)
    if bool(open_rows.any()):
        left = float((size / first)[open_rows].max().sqrt())
        warnings.warn(
            f"the gradient of the mean field is not exact: residual {left:.2g} after {steps} steps, tol {tol:.2g}",
            RuntimeWarning,
            stacklevel=2,
        )
    return solution, steps
