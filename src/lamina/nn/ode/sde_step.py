"""One step of a stochastic Runge-Kutta method with diagonal noise, and its error estimate, as plain functions.

`drift(t, z)` and `diffusion(t, z)` return tensors in the state's shape; dz = drift dt + diffusion dW, each element
with a dW of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamina.errors import LaminaError, nearest
from lamina.nn.ode.step import VectorField, check_tolerances, checked_derivative, error_ratio, initial_step, moments
from lamina.nn.ode.tableau import SRI2W1

ORDERS = {"sri2w1": 1.5, "euler_heun": 1.0}
"""Strong order of each method with diagonal noise."""


def sri2w1_step(
    drift: VectorField, diffusion: VectorField, u: Tensor, t: Tensor, h: Tensor, dw: Tensor, dz: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one Ito step of size h > 0 with increments dw, dz ~ N(0, h); return its end and two parts of its error.

    The parts are E1, of the drift, and E2, of the noise. Four evaluations each of drift and diffusion.

    Source: Roessler (2010), SRI2W1; the split of the error: Rackauckas, Nie, Adaptive methods for stochastic
    differential equations (2017).
    """
    root = h.sqrt()
    double, mixed = (dw.square() - h) / (2 * root), (dw + dz / math.sqrt(3.0)) / 2
    triple = (dw**3 - 3 * h * dw) / (6 * h)
    ks: list[Tensor] = []
    gs: list[Tensor] = []
    (a_first, a_second), (b_first, b_second) = SRI2W1.drift, SRI2W1.noise
    for i in range(4):
        first, second = u, u
        if i:
            first = u + h * _sum(a_first[i - 1], ks, u) + mixed * _sum(b_first[i - 1], gs, u)
            second = u + h * _sum(a_second[i - 1], ks, u) + root * _sum(b_second[i - 1], gs, u)
        ks.append(drift(t + SRI2W1.nodes[0][i] * h, first))
        gs.append(diffusion(t + SRI2W1.nodes[1][i] * h, second))
    b1, b2, b3, b4 = (_sum(row, gs, u) for row in SRI2W1.beta)
    of_noise = b3 * mixed + b4 * triple
    end = u + h * _sum(SRI2W1.alpha, ks, u) + b1 * dw + b2 * double + of_noise
    return end, h * _sum((1.0, 1.0, 1.0, 1.0), ks, u), of_noise


def euler_heun_step(
    drift: VectorField, diffusion: VectorField, u: Tensor, t: Tensor, h: Tensor, dw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one Stratonovich step of size h > 0 with increments dw ~ N(0, h); return its end and two parts of its error.

    Two evaluations of drift and three of diffusion.

    Source: An adaptive timestepping algorithm for stochastic differential equations (2003), as StochasticDiffEq.jl has
    it. The step itself is torchsde's `euler_heun`, in which the drift is taken once.
    """
    k, g, root = drift(t, u), diffusion(t, u), h.sqrt()
    end = u + h * k + (g + diffusion(t + h, u + g * dw)) * dw / 2
    of_drift = h * (drift(t + h, u + h * k) - k) / 2
    slope = (diffusion(t, u + g * root) - g) / root
    return end, of_drift, slope * dw.square() / 2


def local_sde_error(
    drift: VectorField,
    diffusion: VectorField,
    u: Tensor,
    t: Tensor | float,
    t_end: Tensor | float,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    method: str = "sri2w1",
    h: Tensor | float | None = None,
    *,
    noise: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    delta: float = 1.0,
) -> Tensor:
    """Estimate the error of a solver's first step from (t, u) with fresh noise: `local_error` for an SDE.

    h * rms((delta * E1 + E2) / (atol + max(|u|, |u1|) * rtol)). The gradient goes to the parameters of drift and
    diffusion alone. Without h the first step is chosen as for the drift alone.

    Args:
        u: state at t, any shape.
        t_end: end of the interval, after t.
        method: "sri2w1" (Ito) or "euler_heun" (Stratonovich).
        h: size of the step, above 0.
        noise: dW and dZ, each ~ N(0, h) in the shape of u; None = drawn from `generator` (None: torch's own).
        delta: weight of the drift's part.
    Raises:
        LaminaError: t_end is not after t, h or a tolerance not above 0, or no such method. ShapeError: drift or
            diffusion change shape or dtype.
    Source: arXiv 2303.02262, section 3.
    Example:
        >>> local_sde_error(lambda t, z: -z, lambda t, z: 0.1 * z, torch.ones(2, 3), 0.0, 1.0) > 0
        tensor(True)
    """
    order = order_of(method)
    check_tolerances(rtol, atol)
    u = u.detach()
    start, end_time = moments(u, t, t_end)
    if not bool(end_time > start):
        raise LaminaError(f"an SDE runs forward in time, got the interval {float(start):.6g} to {float(end_time):.6g}")
    with torch.no_grad():
        k = checked_derivative(drift, start, u)
        size = initial_step(drift, u, start, k, end_time, rtol, atol, order) if h is None else torch.as_tensor(h).to(u)
    if h is not None and not bool(size > 0):
        raise LaminaError(f"the step of an SDE must be above 0, got h={float(size):.6g}")
    checked: VectorField = lambda t, z: checked_derivative(diffusion, t, z)  # noqa: E731
    dw, dz = noise if noise is not None else (draw(u, size, generator), draw(u, size, generator))
    if method == "sri2w1":
        end, of_drift, of_noise = sri2w1_step(drift, checked, u, start, size, dw, dz)
    else:
        end, of_drift, of_noise = euler_heun_step(drift, checked, u, start, size, dw)
    return size * error_ratio(delta * of_drift + of_noise, u, end, rtol, atol)


def order_of(method: str) -> float:
    """Return the strong order of a method.

    Raises:
        LaminaError: there is no such method.
    """
    if method not in ORDERS:
        known = ", ".join(map(repr, ORDERS))
        raise LaminaError(f"method must be one of {known}, got {method!r}{nearest(str(method), ORDERS)}")
    return ORDERS[method]


def draw(like: Tensor, variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw normal numbers in the shape of a state; with a generator the same ones on every device."""
    if generator is None:
        return torch.randn_like(like) * variance.sqrt()
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device) * variance.sqrt()


def _sum(weights: tuple[float, ...], values: list[Tensor], like: Tensor) -> Tensor:
    """Weighted sum, without what weighs nothing."""
    terms = [w * v for w, v in zip(weights, values, strict=False) if w]
    return torch.stack(terms).sum(0) if terms else torch.zeros_like(like)
