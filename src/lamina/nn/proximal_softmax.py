"""The softmax's proximal operator: the map between a softmax (alpha = 1) and a projection on the simplex (alpha -> 0).

Source: Feng, Winston, Kolter, Monotone deep Boltzmann machines (2023), arXiv 2307.04990, section 4 and appendix.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn._precision import without_autocast
from lamina.registry import register

SOURCE = "Feng, Winston, Kolter, Monotone deep Boltzmann machines (2023), arXiv 2307.04990"

COMPILED_STEPS = 16
"""Newton steps in a compiled or exported graph, which cannot stop by what it sees; enough for alpha >= 0.001."""


@register("layer", source=f"{SOURCE}, section 4")
class ProxSoftmax(nn.Module):
    """Map scores to a distribution: the minimiser over the simplex of alpha * sum z log z + (1 - alpha)/2 |z|^2 - x.z.

    x (..., k, ...) -> the same shape, non-negative, sum 1 over `dim`. alpha = 1 is the softmax; a smaller alpha makes a
    sharper one that reacts at most 1-Lipschitz to x. float32 inside; under torch.compile and torch.export a fixed
    number of Newton steps.

    Args:
        alpha: step of the proximal operator, above 0 and at most 1.
        dim: over which the distribution runs.
    Raises:
        LaminaError: alpha out of range, or NaN in x.
    Source: section 4: the softmax is the prox of f(z) = sum z log z - |z|^2/2 with step 1.
    Example:
        >>> ProxSoftmax(0.5)(torch.tensor([2.0, 0.0])).sum()
        tensor(1.)
    """

    def __init__(self, alpha: float = 1.0, dim: int = -1) -> None:
        super().__init__()
        self.alpha, self.dim = check_alpha(alpha), dim

    def forward(self, x: Tensor) -> Tensor:
        """Apply along `dim`."""
        return prox_softmax(x, self.alpha, self.dim)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"alpha={self.alpha}, dim={self.dim}"


def prox_softmax(
    x: Tensor,
    alpha: float,
    dim: int = -1,
    tol: float | None = None,
    max_iter: int = 50,
    start: Tensor | None = None,
) -> Tensor:
    """Return the z on the simplex with alpha * log z + (1 - alpha) * z = x + constant, along `dim`.

    x of any shape -> the same; -inf excludes a state. float32 inside for half precision. Differentiable twice.

    Args:
        alpha: above 0, at most 1.
        tol: largest error of z that is left, before z is normalised; None = 1e-10 in float64, 1e-6 else.
        max_iter: Newton steps; a warning where they do not do.
        start: a distribution near the answer (the same shape); None = softmax(x). The answer does not depend on it.
    Raises:
        LaminaError: alpha out of range, or NaN in x. ShapeError: `start` of another shape.
    """
    check_alpha(alpha)
    if start is not None and start.shape != x.shape:
        raise ShapeError(f"start must have the shape of x, {tuple(x.shape)}, got {tuple(start.shape)}")
    if not x.is_floating_point():
        raise LaminaError(f"prox_softmax needs floating-point scores, got {x.dtype}")
    wide = x if x.dtype == torch.float64 else x.float()
    with without_autocast(x.device):
        made: Tensor = _ProxSoftmax.apply(wide, alpha, dim, tol, max_iter, start)
    return made.to(x.dtype)


class _ProxSoftmax(torch.autograd.Function):
    """The Newton iteration forward, the implicit function theorem backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: float, dim: int, tol: float | None, max_iter: int, start: Tensor | None
    ) -> Tensor:
        z = solve(x, alpha, dim, tol, max_iter, start)
        ctx.save_for_backward(z)
        ctx.alpha, ctx.dim = alpha, dim
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        slope = z / (ctx.alpha + (1 - ctx.alpha) * z)
        pulled = slope * grads[0]
        mean = pulled.sum(ctx.dim, keepdim=True) / slope.sum(ctx.dim, keepdim=True)
        return pulled - slope * mean, None, None, None, None, None


def solve(
    x: Tensor, alpha: float, dim: int, tol: float | None = None, max_iter: int = 50, start: Tensor | None = None
) -> Tensor:
    """Compute `prox_softmax` without a gradient, in the dtype of x."""
    if alpha == 1.0:
        return x.softmax(dim)
    # States first: what is summed over is then a handful of long rows, however few states there are.
    first = x.movedim(dim, 0)
    rows = first.reshape(first.shape[0], -1)
    near = None if start is None else start.to(x.dtype).movedim(dim, 0).reshape(rows.shape)
    z = _newton(rows, alpha, tol if tol is not None else 1e-10 if x.dtype == torch.float64 else 1e-6, max_iter, near)
    return z.view(first.shape).movedim(0, dim)


def _newton(x: Tensor, alpha: float, tol: float, max_iter: int, start: Tensor | None) -> Tensor:
    """Newton on (log z, nu) of the conditions alpha log z + (1 - alpha) z = x + nu, sum z = 1; x (k, rows) -> z.

    With the largest x at 0, log z <= 0 and nu stays between its values where the largest z is 1/k and where it is 1;
    kept inside those, the iteration ends within 16 steps from any start.
    """
    beta, states = 1.0 - alpha, x.shape[0]
    # Shifted, nothing cancels; the bound stands for -inf, whose z is 0 long before.
    x = (x - x.amax(0)).clamp_(min=-1e30)
    lowest, highest = beta / states - alpha * math.log(states), beta
    tiny = torch.finfo(x.dtype).tiny
    log_z = x.log_softmax(0) if start is None else start.clamp(tiny, 1.0).log_()
    z = log_z.exp()
    compiling = torch.compiler.is_compiling()
    for _ in range(COMPILED_STEPS if compiling else max_iter):
        slope = alpha + beta * z
        residual = x - alpha * log_z - beta * z
        weight = z / slope
        nu = ((1.0 - z.sum(0) - (weight * residual).sum(0)) / weight.sum(0)).clamp(lowest, highest)
        step = (residual + nu) / slope
        log_z = (log_z + step).clamp(max=0.0)
        linear, z = z + z * step, log_z.exp()
        # What the linear step left over, which is both the error of the sum and of each condition.
        if not compiling:
            left = float((z - linear).abs().max()) if z.numel() else 0.0
            if left <= tol:
                break
            if math.isnan(left):
                raise LaminaError("prox_softmax got NaN (or +inf) among its scores")
    else:
        if not compiling:
            warnings.warn(f"prox_softmax stopped after {max_iter} steps with an error of {left:.1e}", stacklevel=2)
    return z / z.sum(0)


def softmax_jacobian(q: Tensor, v: Tensor, dim: int) -> Tensor:
    """Apply diag(q) - q q^T, the derivative of the softmax whose value is q, to v along `dim`."""
    weighted = q * v
    return weighted - q * weighted.sum(dim, keepdim=True)


def check_alpha(alpha: float) -> float:
    """Return alpha, or refuse it.

    Raises:
        LaminaError: not above 0 and at most 1.
    """
    if not 0.0 < alpha <= 1.0:
        raise LaminaError(f"alpha must be above 0 and at most 1, got {alpha}")
    return float(alpha)
