"""Neural ODE: a layer whose depth is an adaptive solver's business."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError, nearest
from lamina.nn._precision import without_autocast
from lamina.nn.ode.field import takes_time
from lamina.nn.ode.solve import Adjoint, Request, Solution, solve_ode
from lamina.nn.ode.step import SOURCE, VectorField, check_tolerances, local_error, local_stiffness
from lamina.nn.ode.tableau import tableau_of
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

Estimate = Literal["error", "stiffness"]


class LocalCost(NamedTuple):
    """What a step from some state would cost a solver, and what it took to find out."""

    value: Tensor
    """0-dim; its gradient goes to the block's parameters."""
    nfe: int


class ContinuousBlock(nn.Module):
    """What neural ODEs and SDEs share: the interval, the tolerances, and the books of the last solve."""

    step_errors: ClassVar[bool] = False
    """Whether a solve can tell the error of each of its steps, with a gradient."""

    def __init__(
        self, times: Sequence[float], rtol: float, atol: float, adjoint: Adjoint, max_steps: int, *, all_times: bool
    ) -> None:
        super().__init__()
        check_tolerances(rtol, atol)
        if adjoint not in ("discrete", "backsolve"):
            raise LaminaError(
                f"adjoint must be 'discrete' (through the solver's steps) or 'backsolve' (by a second solve, in "
                f"constant memory), got {adjoint!r}{nearest(str(adjoint), ('discrete', 'backsolve'))}"
            )
        if max_steps < 1:
            raise LaminaError(f"max_steps must be at least 1, got {max_steps}")
        self.times = checked_times(times)
        self.rtol, self.atol, self.adjoint, self.max_steps, self.all_times = rtol, atol, adjoint, max_steps, all_times
        self.solution: Solution | None = None
        self.request: Request | None = None

    def local_cost(
        self,
        state: Tensor,
        time: float,
        end: float,
        estimate: Estimate = "error",
        generator: torch.Generator | None = None,
    ) -> LocalCost:
        """Estimate what a step from a state at a time costs; `generator` draws where something is to be drawn."""
        raise NotImplementedError

    def check_state(self, z0: Tensor) -> Tensor:
        """Return the state in the precision of the solve: float32 at least.

        Raises:
            ShapeError: it is no batch of floating-point states.
        """
        if not isinstance(z0, Tensor) or z0.dim() < 2 or not z0.is_floating_point():
            said = f"{z0.dtype} {tuple(z0.shape)}" if isinstance(z0, Tensor) else type(z0).__name__
            raise ShapeError(f"{type(self).__name__} takes floating-point states (B, ...), got {said}")
        return z0.to(torch.promote_types(z0.dtype, torch.float32))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"times={self.times}, rtol={self.rtol}, atol={self.atol}, adjoint={self.adjoint}"


@register("layer", "neural_ode", source=f"Chen et al. 2018, arXiv 1806.07366; {SOURCE}")
class NeuralODE(ContinuousBlock):
    """Follow dz/dt = func(t, z) from the input to the end of an interval: a residual network of adaptive depth.

    z0 (B, ...) -> z at the last time, same shape; with `all_times` at every time, (len(times), B, ...). torchdiffeq
    solves; steps are chosen for the batch as a whole, so the error norm mixes its rows. float32 at least inside,
    outside autocast. After each call `solution` tells how the solve went: `nfe`, `steps`, `rejected`, `times`.

    The model around it may be compiled, the solve stays as it is, as its length is known only as it runs:
    `NeuralODE(torch.compile(func))` compiles what is worth it. The way to keep solves short is
    `lamina.objectives.LocalSolverCost`.

    Args:
        func: module called as func(t, z), or as func(z), that returns dz/dt in the shape of z; or the recipe node of
            one, such as `{name: time_mlp, width: 64}` or `feed_forward`.
        times: at least two, rising or falling; the state given is the one at the first.
        method: "tsit5" or "dopri5".
        rtol: tolerance relative to the state. atol: absolute. The solver keeps a step whose error is below their sum.
        adjoint: "discrete" differentiates the steps taken; "backsolve" solves backwards, in constant memory, with
            gradients as exact as the tolerances. Of func's parameters and z0 only.
        max_steps: trials of a solve, after which it is given up.
        all_times: return the state at every time.
        increment: return z(end) - z0 instead, to stand in a residual branch: x + block(x) is then z(end).
        width: handed on to func where that is a recipe node; for slots that offer it.
    Raises:
        LaminaError: an option out of range, a method without error estimate, more than max_steps steps, NaN or inf
            (the time is named). ShapeError: no floating-point batch, or func changes shape or dtype. MissingExtra:
            torchdiffeq is not installed.
    Source: Chen et al., Neural Ordinary Differential Equations (2018), arXiv 1806.07366.
    Example:
        >>> block = NeuralODE(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)))
        >>> block(torch.randn(2, 4)).shape
        torch.Size([2, 4])
        >>> block.solution.nfe > 0
        True
    """

    step_errors: ClassVar[bool] = True

    def __init__(
        self,
        func: Annotated[nn.Module | Node, Slot("layer")],
        times: Sequence[float] = (0.0, 1.0),
        method: Literal["tsit5", "dopri5"] = "tsit5",
        rtol: float = 1e-4,
        atol: float = 1e-4,
        adjoint: Adjoint = "discrete",
        max_steps: int = 10_000,
        *,
        all_times: bool = False,
        increment: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__(times, rtol, atol, adjoint, max_steps, all_times=all_times)
        self.method = tableau_of(method).name
        self.func = vector_field(func, width)
        self.increment = increment
        self._takes_time = takes_time(self.func)

    def forward(self, z0: Tensor, times: Sequence[float] | None = None) -> Tensor:
        """Return the state at the end, or at every time.

        Args:
            times: instead of the block's own.
        """
        return self._solve(z0, self.times if times is None else checked_times(times))

    def derivative(self, t: Tensor, z: Tensor) -> Tensor:
        """Evaluate func, in the precision of its weights; returns what z is in."""
        return evaluate(self.func, t, z, with_time=self._takes_time)

    def local_cost(
        self,
        state: Tensor,
        time: float,
        end: float,
        estimate: Estimate = "error",
        generator: torch.Generator | None = None,
    ) -> LocalCost:
        """Estimate the cost of a fresh start at (time, state) towards end; 8 evaluations of func."""
        measure = local_error if estimate == "error" else local_stiffness
        with without_autocast(state.device):
            value = measure(self.derivative, state, time, end, self.rtol, self.atol, self.method)
        return LocalCost(value, 8)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _solve(self, z0: Tensor, times: tuple[float, ...]) -> Tensor:
        z = self.check_state(z0)
        with without_autocast(z.device):
            if z.is_meta or not z.numel():
                # Nothing to choose steps by: shapes and gradients as they would be.
                end = z + 0.0 * self.derivative(z.new_tensor(times[0]), z)
                states, self.solution = end.expand(len(times), *z.shape), Solution(times=[times[0], times[-1]])
            else:
                states, self.solution = solve_ode(
                    self.derivative,
                    z,
                    times,
                    method=self.method,
                    rtol=self.rtol,
                    atol=self.atol,
                    adjoint=self.adjoint,
                    max_steps=self.max_steps,
                    parameters=tuple(self.func.parameters()),
                    request=self.request,
                )
        states = states - z if self.increment else states
        return (states if self.all_times else states[-1]).to(z0.dtype)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"method={self.method}, {super().extra_repr()}"


def vector_field(func: Any, width: int | None, name: str = "func") -> nn.Module:
    """Build a vector field from its node, or take the module that it is.

    Raises:
        LaminaError: it is neither.
    """
    if isinstance(func, nn.Module):
        return func
    made = field_of(func, width)
    if not isinstance(made, nn.Module):
        raise LaminaError(f"{name} must be a module, got a {type(made).__name__}")
    return made


def field_of(node: Any, width: int | None, hidden: int | None = None) -> Any:
    """Build what a node names, told the sizes that are given."""
    sizes = {"width": width, "hidden": hidden}
    return factory("layer", node)(**{name: size for name, size in sizes.items() if size is not None})


def evaluate(func: nn.Module, t: Tensor, z: Tensor, *, with_time: bool) -> Tensor:
    """Call a vector field on a float32 state even where its own weights are bf16."""
    of_weights = next((p.dtype for p in func.parameters() if p.is_floating_point()), z.dtype)
    call: VectorField = func if with_time else lambda t, z: func(z)
    if of_weights == z.dtype:
        return call(t, z)
    found = call(t.to(of_weights), z.to(of_weights))
    return found.to(z.dtype) if isinstance(found, Tensor) and found.dtype == of_weights else found


def checked_times(times: Sequence[float]) -> tuple[float, ...]:
    """Return the times as numbers.

    Raises:
        LaminaError: fewer than two, or not strictly rising or falling.
    """
    found = tuple(float(t) for t in times)
    pairs = list(itertools.pairwise(found))
    if not pairs or not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
        raise LaminaError(f"times must be at least two, strictly rising or strictly falling, got {list(found)}")
    return found


def rising_times(times: Sequence[float]) -> tuple[float, ...]:
    """Return the times as numbers, where time runs forward.

    Raises:
        LaminaError: fewer than two, or not strictly rising.
    """
    found = checked_times(times)
    if found[0] > found[-1]:
        raise LaminaError(f"time runs forward here: times must be strictly rising, got {list(found)}")
    return found
