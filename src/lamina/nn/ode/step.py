"""One Runge-Kutta step with its error estimate, as plain functions that go with any solver.

`func(t, z)` takes a time (0-dim) and a state of any shape and returns dz/dt in the state's shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn.ode.tableau import Tableau, rows, tableau_of

SOURCE = "Pal, Edelman, Rackauckas, Locally Regularized Neural Differential Equations (2023), arXiv 2303.02262"

VectorField = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """What one step computed."""

    end: Tensor
    """State after the step."""
    error: Tensor
    """Estimate of its error, element by element: order 5 minus order 4."""
    stages: tuple[Tensor, ...]
    """k_1 ... k_7, derivatives at the stages; the last one is at the end."""
    sixth: Tensor
    """State that k_6 was taken at."""


def rk_step(func: VectorField, u: Tensor, t: Tensor, h: Tensor, k1: Tensor, tableau: Tableau) -> Step:
    """Take one step of size h (negative: backwards in time) from (t, u), where the derivative is k1.

    Six evaluations of func, with gradients to whatever takes part.
    """
    weights = [h * row for row in rows(tableau, u.dtype, u.device)]
    stages, at = [k1], u
    for node, row in zip(tableau.nodes, weights, strict=False):
        before, at = at, _add(u, row, stages)
        stages.append(func(t + node * h, at))
    return Step(at, _add(torch.zeros_like(u), weights[-2], stages), tuple(stages), before)


def inside(step: Step, u: Tensor, h: Tensor, fraction: float, tableau: Tableau) -> Tensor:
    """Return the state at a fraction 0..1 of a step from u, by the quartic through both ends and the middle.

    Source: Shampine, Some practical Runge-Kutta formulas (1986); the dense output of torchdiffeq.
    """
    middle = _add(u, h * rows(tableau, u.dtype, u.device)[-1], step.stages)
    first, last = h * step.stages[0], h * step.stages[-1]
    c4 = 2 * (last - first) - 8 * (step.end + u) + 16 * middle
    c3 = 5 * first - 3 * last + 18 * u + 14 * step.end - 32 * middle
    c2 = last - 4 * first - 11 * u - 5 * step.end + 16 * middle
    return u + fraction * (first + fraction * (c2 + fraction * (c3 + fraction * c4)))


def initial_step(
    func: VectorField,
    u: Tensor,
    t: Tensor,
    k1: Tensor,
    t_end: Tensor,
    rtol: float,
    atol: float,
    order: float = 4.0,
) -> Tensor:
    """Guess the size of a first step from (t, u) towards t_end, with its sign and no longer than that; no gradient.

    One evaluation of func.

    Args:
        order: of the error estimate; 4 for the pairs here.
    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 2nd edition, section II.4.
    """
    with torch.no_grad():
        span = t_end - t
        scale = atol + u.abs() * rtol
        size, speed = rms(u / scale), rms(k1 / scale)
        flat = (size < 1e-5) | (speed < 1e-5)
        first = torch.where(flat, 1e-6, 0.01 * size / torch.where(flat, 1.0, speed)).minimum(span.abs())
        ahead = first * span.sign()
        bend = rms((func(t + ahead, u + ahead * k1) - k1) / scale) / first
        steepest = torch.maximum(speed, bend)
        still = steepest <= 1e-15
        second = (0.01 / torch.where(still, 1.0, steepest)) ** (1.0 / (order + 1.0))
        second = torch.where(still, (first * 1e-3).clamp(min=1e-6), second)
        return torch.minimum(100.0 * first, second).minimum(span.abs()) * span.sign()


def error_ratio(error: Tensor, u: Tensor, end: Tensor, rtol: float, atol: float) -> Tensor:
    """Root mean square of an error over its tolerance, over the whole state; a solver accepts a step at most 1."""
    return rms(error / (atol + torch.maximum(u.abs(), end.abs()) * rtol))


def local_error(
    func: VectorField,
    u: Tensor,
    t: Tensor | float,
    t_end: Tensor | float,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    method: str = "tsit5",
    h: Tensor | float | None = None,
) -> Tensor:
    """Estimate the error that a solver would make in a first step from (t, u): how hard func is to integrate there.

    h * rms(e / (atol + max(|u|, |u1|) * rtol)), the mean over the whole state. The gradient goes to func's parameters
    alone: u, h and the derivative at the start are constants. Seven evaluations of func, one more where h is asked for.

    Args:
        u: state at t, any shape, floating point.
        t_end: end of the interval, before or after t.
        method: "tsit5" or "dopri5".
        h: size of the step, with its sign; None = the solver's own first step.
    Returns:
        0-dim, at least 0.
    Raises:
        LaminaError: t equals t_end, tolerances not above 0, or no such method. ShapeError: func changes shape or dtype.
    Source: arXiv 2303.02262, section 3; the official code's error estimate.
    Example:
        >>> local_error(lambda t, z: -z, torch.ones(2, 3), 0.0, 1.0, rtol=1e-6, atol=1e-6) > 0
        tensor(True)
    """
    u, size, step = _one_step(func, u, t, t_end, rtol, atol, method, h)
    return size.abs() * error_ratio(step.error, u, step.end, rtol, atol)


def local_stiffness(
    func: VectorField,
    u: Tensor,
    t: Tensor | float,
    t_end: Tensor | float,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    method: str = "tsit5",
    h: Tensor | float | None = None,
) -> Tensor:
    """Estimate how stiff func is at (t, u): the largest eigenvalue of its Jacobian, over the method's stability.

    rms(k7 - k6) / rms(u1 - g6) / stability, g6 the state k6 was taken at; 0 where the two are one. For arguments,
    gradients, cost and errors see `local_error`.
    """
    _, _, step = _one_step(func, u, t, t_end, rtol, atol, method, h)
    apart = rms(step.end - step.sixth)
    if not bool(apart > 0):
        return torch.zeros_like(apart)
    eps = torch.finfo(apart.dtype).eps
    return rms(step.stages[-1] - step.stages[-2]) / (apart + eps) / tableau_of(method).stability


def rms(x: Tensor) -> Tensor:
    """Root mean square over everything; its gradient at 0 is 0."""
    square = x.square().mean()
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), square)


def checked_derivative(func: VectorField, t: Tensor, z: Tensor) -> Tensor:
    """Evaluate func, and refuse what is not a derivative of z."""
    found = func(t, z)
    if not isinstance(found, Tensor) or found.shape != z.shape or found.dtype != z.dtype:
        said = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(
            f"func must return the derivative of its state, {z.dtype} {tuple(z.shape)}; it returned {said}"
        )
    return found


def check_tolerances(rtol: float, atol: float) -> None:
    """Refuse tolerances a solver cannot work with."""
    if not (rtol > 0 and atol > 0):
        raise LaminaError(f"rtol and atol must be above 0, got {rtol} and {atol}")


def moments(u: Tensor, t: Tensor | float, t_end: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return both times as 0-dim tensors of the state's dtype.

    Raises:
        LaminaError: they are equal.
    """
    if not u.is_floating_point():
        raise ShapeError(f"a state is floating point, got {u.dtype} {tuple(u.shape)}")
    start, end = (torch.as_tensor(x, dtype=u.dtype, device=u.device) for x in (t, t_end))
    if bool(start == end):
        raise LaminaError(f"an interval needs two times, got {float(start):.6g} twice")
    return start, end


def _one_step(
    func: VectorField,
    u: Tensor,
    t: Tensor | float,
    t_end: Tensor | float,
    rtol: float,
    atol: float,
    method: str,
    h: Tensor | float | None,
) -> tuple[Tensor, Tensor, Step]:
    """Start afresh at (t, u) and take one step with gradients to the parameters of func."""
    tableau = tableau_of(method)
    check_tolerances(rtol, atol)
    u = u.detach()
    start, end = moments(u, t, t_end)
    with torch.no_grad():
        k1 = checked_derivative(func, start, u)
        size = initial_step(func, u, start, k1, end, rtol, atol) if h is None else torch.as_tensor(h).to(u)
    return u, size, rk_step(func, u, start, size, k1, tableau)


def _add(u: Tensor, weights: Tensor, stages: Sequence[Tensor]) -> Tensor:
    """Add the weighted sum of stages to u, in two operations whatever their number."""
    if len(stages) == 1:
        return torch.addcmul(u, weights[0], stages[0])
    return torch.addmv(u.reshape(-1), torch.stack([k.reshape(-1) for k in stages]).T, weights).view_as(u)
