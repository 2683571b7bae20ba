"""Adaptive solves by torchdiffeq, watched from outside: what each one cost, which steps it took, what it saw there."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from lamina.errors import LaminaError, require
from lamina.nn.ode.step import VectorField, checked_derivative, inside, rk_step, rms
from lamina.nn.ode.tableau import TABLEAUS, Tableau, tableau_of

Adjoint = Literal["discrete", "backsolve"]


@dataclass
class Solution:
    """How a solve went; nothing in it carries a gradient."""

    nfe: int = 0
    """Evaluations of the vector field (of the drift, for an SDE) in the forward pass, rejected steps included."""
    steps: int = 0
    """Steps accepted."""
    rejected: int = 0
    times: list[float] = field(default_factory=list)
    """Times between the accepted steps, the interval's two ends included."""
    save_time: float | None = None
    """The extra time asked for by `recording`, and below the state there."""
    state_at_save: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)
    """States at `times` but the last; only where `recording` asks for them."""
    save_nfe: int = 0
    """Evaluations spent on the extra time alone: none, but for adjoint="backsolve"."""
    backward_nfe: int = 0
    """Evaluations in the backward pass so far; adjoint="backsolve" only."""
    diffusion_nfe: int = 0
    """Evaluations of the diffusion, for an SDE."""


@dataclass
class Request:
    """What `recording` asks of every solve."""

    fraction: float | None = None
    keep_steps: bool = False
    keep_errors: bool = False
    errors: list[Tensor] = field(default_factory=list)
    """Of every accepted step of every solve: |h| times its error ratio, with the gradient of the solve."""


def solve_ode(
    func: VectorField,
    z0: Tensor,
    times: Sequence[float],
    *,
    method: str,
    rtol: float,
    atol: float,
    adjoint: Adjoint,
    max_steps: int,
    parameters: Sequence[Parameter],
    request: Request | None = None,
) -> tuple[Tensor, Solution]:
    """Solve dz/dt = func(t, z) from z0 at times[0]; return the states at `times`, stacked, and how it went.

    Raises:
        LaminaError: more than max_steps steps, or a state or derivative that is not finite. MissingExtra: no
            torchdiffeq.
    """
    library = solvers()
    request = request or Request()
    watch = _Watch(func, times, max_steps, request, tableau_of(method), by_hand=adjoint == "backsolve")
    points = watch.points()
    given: dict[str, Any] = {"rtol": rtol, "atol": atol, "method": method}
    if request.keep_errors:
        # The norm of each step's error over its tolerance is the ratio that decides about it.
        given["options"] = {"norm": watch.norm}
    t = torch.tensor(points, dtype=torch.float64, device=z0.device)
    try:
        if adjoint == "backsolve":
            found = library.odeint_adjoint(watch, z0, t, adjoint_params=tuple(parameters), **given)
        else:
            found = library.odeint(watch, z0, t, **given)
    except AssertionError as error:
        if watch.asserted:
            raise
        raise watch.failure() from error
    if not bool(torch.isfinite(found[-1]).all()):
        raise watch.failure()
    return watch.finish(found, points)


class _Watch:
    """The vector field as the solver sees it; counts its calls and notes the steps."""

    def __init__(
        self,
        func: VectorField,
        times: Sequence[float],
        max_steps: int,
        request: Request,
        tableau: Tableau,
        *,
        by_hand: bool,
    ) -> None:
        self.func, self.times, self.max_steps, self.request = func, tuple(times), max_steps, request
        self.tableau, self.by_hand = tableau, by_hand
        self.solution = Solution(times=[self.times[0]])
        if request.fraction is not None:
            self.solution.save_time = self.times[0] + request.fraction * (self.times[-1] - self.times[0])
        self.trials, self.last, self.closed, self.asserted = 0, self.times[0], False, False
        self.before: tuple[float, float, Tensor] | None = None
        self.ratio: Tensor | None = None
        self.state: Tensor | None = None

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        if self.closed:
            self.solution.backward_nfe += 1
        else:
            self.solution.nfe += 1
        try:
            return checked_derivative(self.func, t, z)
        except AssertionError:
            # The user's own, and none of the solver's, which gives up by one.
            self.asserted = True
            raise

    def callback_step(self, t: Tensor, z: Tensor, h: Tensor) -> None:
        """Called by the solver before it tries a step of size h > 0 from (t, z)."""
        if self.closed:
            return
        self.last, self.state = float(t.detach()), z
        if self.trials >= self.max_steps:
            raise LaminaError(
                f"the solve is at t={self.last:.6g} after max_steps={self.max_steps} steps: func is stiff there, or "
                "the tolerances are too tight"
            )
        self.trials += 1

    def callback_accept_step(self, t: Tensor, z: Tensor, h: Tensor) -> None:
        """Called by the solver when the step is taken."""
        if self.closed:
            return
        start, size, solution = float(t.detach()), float(h.detach()), self.solution
        direction = 1.0 if self.times[-1] > self.times[0] else -1.0
        solution.steps += 1
        solution.times.append(start + direction * size)
        if self.request.keep_steps:
            solution.states.append(z.detach())
        if self.request.keep_errors and self.ratio is not None:
            self.request.errors.append(h.detach().to(self.ratio) * self.ratio)
        if self.by_hand and solution.save_time is not None and direction * (solution.save_time - start) >= 0:
            self.before = start, direction * size, z.detach()

    def callback_reject_step(self, t: Tensor, z: Tensor, h: Tensor) -> None:
        """Called by the solver when the step is not taken."""
        if not self.closed:
            self.solution.rejected += 1

    def norm(self, x: Tensor) -> Tensor:
        """Root mean square, remembered."""
        self.ratio = rms(x)
        return self.ratio

    def points(self) -> list[float]:
        """Times to ask the solver for: those wanted, and the extra one where the solver gives it for nothing.

        The adjoint of a continuous solve would start afresh at every point, so there the state is found afterwards.
        """
        save = self.solution.save_time
        extra = () if save is None or self.by_hand else (save,)
        return sorted({*self.times, *extra}, reverse=self.times[-1] < self.times[0])

    def finish(self, found: Tensor, points: list[float]) -> tuple[Tensor, Solution]:
        """Take the extra point out again and close the books; the last step ends at the end of the interval."""
        solution = self.solution
        self.closed = True
        solution.times[-1] = self.times[-1]
        if solution.save_time is not None:
            solution.state_at_save = self._inside() if self.by_hand else found[points.index(solution.save_time)]
            solution.state_at_save = solution.state_at_save.detach()
        self.before = self.ratio = self.state = None
        if len(points) == len(self.times):
            return found, solution
        return found[[points.index(t) for t in self.times]], solution

    def _inside(self) -> Tensor:
        """Take the step around the extra time again, and read the state there off its interpolant."""
        assert self.before is not None
        assert self.solution.save_time is not None
        start, size, z = self.before
        t, h = (torch.as_tensor(x, dtype=z.dtype, device=z.device) for x in (start, size))
        self.solution.save_nfe += 7
        with torch.no_grad():
            step = rk_step(self.func, z, t, h, self.func(t, z), self.tableau)
            return inside(step, z, h, (self.solution.save_time - start) / size, self.tableau)

    def failure(self) -> LaminaError:
        """Word why the solver gave up."""
        where = f"the solve stopped at t={self.last:.6g} after {self.trials} steps"
        if self.state is not None and not bool(torch.isfinite(self.state).all()):
            return LaminaError(f"{where}: the state holds NaN or inf")
        return LaminaError(f"{where}: func gives NaN or inf, or so large values that no step is short enough")


@functools.cache
def solvers() -> Any:
    """Return torchdiffeq, which knows Tsitouras's pair from here on.

    torchdiffeq steps by whatever tableau a solver class holds, but has no public way to name one more.
    """
    library = require("torchdiffeq", "ode")
    known = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    inner = importlib.import_module("torchdiffeq._impl.rk_common")
    for tableau in TABLEAUS.values():
        if tableau.name not in known:
            known[tableau.name] = _solver_class(inner, tableau)
    return library


def _solver_class(inner: Any, tableau: Tableau) -> type:
    def row(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    body = {
        "order": tableau.order,
        "mid": row(tableau.middle),
        "tableau": inner._ButcherTableau(
            alpha=row(tableau.nodes),
            beta=[row(r) for r in tableau.stages],
            c_sol=row((*tableau.stages[-1], 0.0)),
            c_error=row(tableau.error),
        ),
    }
    return type(f"{tableau.name.capitalize()}Solver", (inner.RKAdaptiveStepsizeODESolver,), body)
