"""Neural SDE: a layer that follows a stochastic differential equation, on torchsde."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, require
from lamina.nn._precision import without_autocast
from lamina.nn.ode.block import ContinuousBlock, Estimate, LocalCost, evaluate, rising_times, vector_field
from lamina.nn.ode.field import takes_time
from lamina.nn.ode.sde_step import local_sde_error, order_of
from lamina.nn.ode.solve import Adjoint, Request, Solution
from lamina.nn.ode.step import SOURCE, VectorField, checked_derivative, initial_step
from lamina.recipe import Node
from lamina.registry import Slot, register

LIBRARY_NAMES = {"sri2w1": ("srk", "ito"), "euler_heun": ("euler_heun", "stratonovich")}
"""What torchsde calls each method, and which calculus it is for."""
REMEMBERED = 12
"""Evaluations kept for when the solver asks again: it does, several times in a step."""


@register("layer", "neural_sde", source=f"Li et al. 2020, arXiv 2001.01328; {SOURCE}")
class NeuralSDE(ContinuousBlock):
    """Follow dz = drift(t, z) dt + diffusion(t, z) dW from the input to the end of an interval, on one noise path.

    z0 (B, ...) -> z at the last time, same shape; with `all_times` at every time, (len(times), B, ...). Diagonal noise:
    an element has a Brownian motion of its own. torchsde solves, its steps chosen for the batch as a whole by comparing
    one step with two halves on the same path. In training each call follows a new path, drawn with torch's generator;
    in evaluation all follow the one of `seed`, so that evaluations can be compared. float32 at least inside, outside
    autocast; under torch.compile the solve stays as it is. `solution` tells how the last solve went.

    Args:
        drift: module called as drift(t, z) or drift(z), that returns the shape of z; or the recipe node of one.
        diffusion: likewise.
        times: at least two, rising.
        method: "sri2w1" (Ito, order 1.5) or "euler_heun" (Stratonovich, order 1).
        rtol: tolerance relative to the state. atol: absolute; the paper has 0.14 for both.
        adjoint: "discrete" differentiates the steps taken; "backsolve" solves backwards, in constant memory, and needs
            "euler_heun" (torchsde's adjoint of an Ito equation was found to be 6 % to 25 % off at any step size).
        max_steps: trials of a solve, after which it is given up.
        all_times: return the state at every time.
        seed: of the path in evaluation mode.
        width: handed on to drift and diffusion where those are recipe nodes.
    Raises:
        LaminaError: an option out of range, more than max_steps steps, NaN or inf. ShapeError: no floating-point batch,
            or drift or diffusion change shape or dtype. MissingExtra: torchsde is not installed.
    Source: Li et al., Scalable Gradients for Stochastic Differential Equations (2020), arXiv 2001.01328; Roessler
        (2010) for the method. Deviation: torchsde's control of the steps, in place of the embedded error estimate.
    Example:
        >>> block = NeuralSDE(nn.Linear(4, 4), nn.Linear(4, 4), rtol=0.1, atol=0.1)
        >>> block(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        drift: Annotated[nn.Module | Node, Slot("layer")],
        diffusion: Annotated[nn.Module | Node, Slot("layer")],
        times: Sequence[float] = (0.0, 1.0),
        method: Literal["sri2w1", "euler_heun"] = "sri2w1",
        rtol: float = 1e-2,
        atol: float = 1e-2,
        adjoint: Adjoint = "discrete",
        max_steps: int = 10_000,
        *,
        all_times: bool = False,
        seed: int = 0,
        width: int | None = None,
    ) -> None:
        super().__init__(rising_times(times), rtol, atol, adjoint, max_steps, all_times=all_times)
        order_of(method)
        if adjoint == "backsolve" and method == "sri2w1":
            raise LaminaError(
                "adjoint='backsolve' takes method='euler_heun': torchsde's backward solve of an Ito equation does not "
                "converge to the gradient"
            )
        self.method, self.seed = method, seed
        self.drift, self.diffusion = vector_field(drift, width, "drift"), vector_field(diffusion, width, "diffusion")
        self._takes_time = takes_time(self.drift), takes_time(self.diffusion)

    def forward(self, z0: Tensor, times: Sequence[float] | None = None, seed: int | None = None) -> Tensor:
        """Return the state at the end, or at every time.

        Args:
            times: instead of the block's own.
            seed: of the path; None = a new one in training, the block's own in evaluation.
        """
        return self._solve(z0, self.times if times is None else rising_times(times), seed)

    def drift_at(self, t: Tensor, z: Tensor) -> Tensor:
        """Evaluate the drift, in the precision of its weights; returns what z is in."""
        return evaluate(self.drift, t, z, with_time=self._takes_time[0])

    def diffusion_at(self, t: Tensor, z: Tensor) -> Tensor:
        """Evaluate the diffusion, likewise."""
        return evaluate(self.diffusion, t, z, with_time=self._takes_time[1])

    def local_cost(
        self,
        state: Tensor,
        time: float,
        end: float,
        estimate: Estimate = "error",
        generator: torch.Generator | None = None,
    ) -> LocalCost:
        """Estimate the cost of a step from (time, state) with fresh noise; 6 evaluations of the drift (euler_heun: 4).

        Raises:
            LaminaError: the stiffness is asked for, which the stochastic methods do not estimate.
        """
        if estimate != "error":
            raise LaminaError(f"a {type(self).__name__} has the estimate 'error' only, not {estimate!r}")
        with without_autocast(state.device):
            value = local_sde_error(
                self.drift_at,
                self.diffusion_at,
                state,
                time,
                end,
                self.rtol,
                self.atol,
                self.method,
                generator=generator,
            )
        return LocalCost(value, 6 if self.method == "sri2w1" else 4)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _solve(self, z0: Tensor, times: tuple[float, ...], seed: int | None) -> Tensor:
        z = self.check_state(z0)
        if seed is None:
            # On the CPU, whatever the device: a path is named by a number.
            seed = int(torch.randint(2**31 - 1, (), device="cpu")) if self.training else self.seed
        with without_autocast(z.device):
            if z.is_meta or not z.numel():
                t = z.new_tensor(times[0])
                end = z + 0.0 * (self.drift_at(t, z) + self.diffusion_at(t, z))
                states, self.solution = end.expand(len(times), *z.shape), Solution(times=[times[0], times[-1]])
            else:
                states, self.solution = self._follow(z, times, seed)
        return (states if self.all_times else states[-1]).to(z0.dtype)

    def _follow(self, z: Tensor, times: tuple[float, ...], seed: int) -> tuple[Tensor, Solution]:
        library = require("torchsde", "ode")
        watch = _Watch(self, z.shape, times)
        name, watch.sde_type = LIBRARY_NAMES[self.method]
        flat = z.flatten(1)
        path = _path_class()(
            t0=times[0],
            t1=times[-1],
            size=tuple(flat.shape),
            dtype=z.dtype,
            device=z.device,
            entropy=seed,
            levy_area_approximation="space-time" if name == "srk" else "none",
        )
        path.watch = watch
        smallest = 1e-5 * (times[-1] - times[0])
        given: dict[str, Any] = {"bm": path, "method": name, "adaptive": True, "rtol": self.rtol, "atol": self.atol}
        first = watch.first_step(flat)
        if not math.isfinite(first):
            raise watch.failure()
        given |= {"dt_min": smallest, "dt": max(first, smallest)}
        if self.adjoint == "backsolve":
            weights = (*self.drift.parameters(), *self.diffusion.parameters())
            given |= {"adjoint_params": weights, "adjoint_adaptive": True}
            given |= {"adjoint_rtol": self.rtol, "adjoint_atol": self.atol}
        solve = library.sdeint_adjoint if self.adjoint == "backsolve" else library.sdeint
        t = torch.tensor(times, dtype=torch.float64, device=z.device)
        try:
            found = solve(watch, flat, t, **given)
        except AssertionError as error:
            if watch.asserted:
                raise
            raise watch.failure() from error
        if not bool(torch.isfinite(found[-1]).all()):
            raise watch.failure()
        return found.view(len(times), *z.shape), watch.finish(found[-1])

    def extra_repr(self) -> str:
        """Show the options."""
        return f"method={self.method}, {super().extra_repr()}"


class _Watch:
    """The equation as torchsde sees it: flat states, evaluations counted and not made twice, steps noted.

    A trial asks the path three times: for the whole step, and for its halves. The state it starts at is the next one
    that the drift is asked for, and it was accepted if the next trial starts where it ended.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, block: NeuralSDE, shape: torch.Size, times: tuple[float, ...]) -> None:
        self.block, self.shape, self.request = block, shape, block.request or Request()
        self.solution, self.interval = Solution(), (times[0], times[-1])
        if self.request.fraction is not None:
            self.solution.save_time = times[0] + self.request.fraction * (times[-1] - times[0])
        self.queries, self.trial, self.starting, self.closed = 0, self.interval, False, False
        self.asserted = False
        self.around: list[tuple[float, Tensor]] = []
        self.known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift of a flat state."""
        if self.starting:
            self.starting = False
            if self.trial[0] != (self.solution.times[-1] if self.solution.times else None):
                self.solution.times.append(self.trial[0])
                self._keep(self.trial[0], y.detach())
        return self._evaluate("nfe", self.block.drift_at, t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """Diffusion of a flat state."""
        return self._evaluate("diffusion_nfe", self.block.diffusion_at, t, y)

    def asked(self, start: float, end: float) -> None:
        """Note that the solver asked for the path between two times."""
        if self.closed:
            return
        if self.queries % 3 == 0:
            if self.queries and self.trial[1] != start:
                self.solution.rejected += 1
            if self.queries // 3 >= self.block.max_steps:
                raise LaminaError(
                    f"the solve is at t={start:.6g} after max_steps={self.block.max_steps} steps: the tolerances are "
                    "too tight for this noise"
                )
            self.trial, self.starting = (start, end), True
        self.queries += 1

    def first_step(self, flat: Tensor) -> float:
        """Guess the first step from the drift."""
        start, end = (flat.new_tensor(t) for t in self.interval)
        with torch.no_grad():
            k = self._evaluate("nfe", self.block.drift_at, start, flat, keep=False)
            field: VectorField = lambda t, y: self._evaluate("nfe", self.block.drift_at, t, y, keep=False)  # noqa: E731
            order = order_of(self.block.method)
            return float(initial_step(field, flat, start, k, end, self.block.rtol, self.block.atol, order))

    def finish(self, last: Tensor) -> Solution:
        """Close the books."""
        solution, self.closed = self.solution, True
        solution.times.append(self.interval[1])
        solution.steps = len(solution.times) - 1
        if solution.save_time is not None:
            solution.state_at_save = self._between(solution.save_time, last.detach()).view(self.shape)
        self.around, self.known = [], {}
        return solution

    def _keep(self, time: float, state: Tensor) -> None:
        """Keep of an accepted state what is asked for: memory does not grow with the steps otherwise."""
        if self.request.keep_steps:
            self.solution.states.append(state.view(self.shape))
        save = self.solution.save_time
        if save is not None and time <= save:
            self.around = [(time, state)]
        elif save is not None and len(self.around) == 1:
            self.around.append((time, state))

    def _between(self, time: float, last: Tensor) -> Tensor:
        """State at a time, on the line between the accepted ones around it, as torchsde itself has it."""
        (start, before), (end, after) = [*self.around, (self.interval[1], last)][:2]
        return torch.lerp(before, after, (time - start) / (end - start))

    def failure(self) -> LaminaError:
        """Word why the solver gave up."""
        return LaminaError(
            f"the solve stopped at t={self.trial[0]:.6g} after {self.queries // 3} trials: the state, the drift or the "
            "diffusion holds NaN or inf"
        )

    def _evaluate(self, counter: str, func: VectorField, t: Tensor, y: Tensor, *, keep: bool = True) -> Tensor:
        known = self.known.get((counter, id(y)))
        if known is not None and known[0] is y:
            return known[1]
        if self.closed:
            self.solution.backward_nfe += counter == "nfe"
        else:
            setattr(self.solution, counter, getattr(self.solution, counter) + 1)
        try:
            found = checked_derivative(func, t.to(y.dtype), y.view(self.shape)).flatten(1)
        except AssertionError:
            # The user's own, and none of the solver's.
            self.asserted = True
            raise
        if keep and not self.closed:
            # The state is kept beside its value, so that its id names no other tensor meanwhile.
            self.known[counter, id(y)] = y, found
            while len(self.known) > REMEMBERED:
                del self.known[next(iter(self.known))]
        return found


@functools.cache
def _path_class() -> Any:
    library = require("torchsde", "ode")

    class Path(library.BrownianInterval):  # type: ignore[name-defined]
        """A Brownian path that tells who watches what it was asked for."""

        watch: _Watch

        def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
            """Return the increment between two times."""
            self.watch.asked(float(ta), float(tb))
            return super().__call__(ta, tb, return_U, return_A)

    return Path
