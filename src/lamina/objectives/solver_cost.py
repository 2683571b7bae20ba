"""Train neural ODEs and SDEs to dynamics that are cheap to solve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lamina.batches import bare
from lamina.errors import LaminaError
from lamina.nn.ode.recording import Recorded, Solve, recording
from lamina.nn.ode.step import SOURCE
from lamina.objectives._penalized import PenalizedByWatching
from lamina.objectives.objective import Losses
from lamina.registry import Slot, register

LATEST = 1.0 - 1e-4
"""Last fraction of an interval that is drawn: a step needs somewhere to go."""


@dataclass
class Watched:
    """One forward pass of a model."""

    recorded: Recorded
    draw: torch.Generator | None = None
    """Of whatever this pass still has to draw; None in evaluation, where solves are only counted."""


class SolverCost(PenalizedByWatching[Watched]):
    """What the two costs share: a coefficient that decays over training, and none of it in evaluation."""

    def __init__(self, base: Any, start: float, end: float, decay: Literal["exponential", "constant"]) -> None:
        super().__init__(base)
        if decay not in ("exponential", "constant"):
            raise LaminaError(f"decay must be 'exponential' or 'constant', got {decay!r}")
        if not (start >= 0 and end >= 0):
            raise LaminaError(f"start and end must be at least 0, got {start} and {end}")
        if decay == "exponential" and start != end and not (start > 0 and end > 0):
            raise LaminaError(f"an exponential decay needs start and end above 0, got {start} and {end}")
        self.start, self.end, self.decay = start, end, decay
        self.fraction = 0.0

    @property
    def coefficient(self) -> float:
        """Weight of the cost now: from start to end over training where it decays, else start."""
        if self.decay == "constant" or self.start == self.end:
            return float(self.start)
        return float(self.start * (self.end / self.start) ** self.fraction)

    def set_progress(self, fraction: float) -> None:
        """Note how far training is, and tell the base."""
        self.fraction = fraction
        super().set_progress(fraction)

    def ask(self, model: nn.Module, draw: torch.Generator) -> Any:
        """Return the recording of a training pass."""
        raise NotImplementedError

    def cost(self, seen: Recorded, draw: torch.Generator) -> tuple[Tensor, int]:
        """Return the cost of what was recorded, 0-dim, and the evaluations that it took."""
        raise NotImplementedError

    def generator(self) -> torch.Generator:
        """Return the generator of this pass."""
        return torch.Generator()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Watched]:
        """Record the solves of a model in training; of one in evaluation, only count what they cost."""
        draw = self.generator() if bare(model).training else None
        with recording(model, None) if draw is None else self.ask(model, draw) as recorded:
            yield Watched(recorded, draw)

    def complete(self, losses: Losses, seen: Watched) -> Losses:
        """Add the cost to the base's loss."""
        loss, recorded = losses["loss"], seen.recorded
        value, coefficient = torch.zeros_like(loss), 0.0
        nfe = sum(s.solution.nfe + s.solution.save_nfe for s in recorded.solves)
        if seen.draw is not None and recorded.blocks:
            if not recorded.solves:
                raise LaminaError(f"none of the continuous blocks ran on this batch: {', '.join(recorded.blocks)}")
            found, extra = self.cost(recorded, seen.draw)
            value, coefficient, nfe = found.to(loss), self.coefficient, nfe + extra
        logged = {"regulariser": value.detach(), "coefficient": torch.full_like(loss.detach(), coefficient)}
        total = loss + coefficient * value if coefficient else loss
        return {**losses, "loss": total, **logged, "nfe": torch.full_like(loss.detach(), float(nfe))}


@register("objective", source=f"{SOURCE}, sections 3.1 and 3.2")
class LocalSolverCost(SolverCost):
    """Another objective, plus the solver's own error (or stiffness) estimate at one random time of every solve.

    loss = base + coefficient * the mean of `NeuralODE.local_cost` over the model's solves. One time a call, for the
    whole batch; its state is a constant, so the cost is one step's, whatever the adjoint, and steers the parameters of
    the vector field alone. For a model in evaluation mode: the base's loss, the solves as they are. The estimate is
    measured in tolerances: with a tolerance ten times tighter the coefficient must be about ten times smaller.

    Logs `task` (the base's loss), `regulariser` (without the coefficient), `coefficient`, and `nfe`: evaluations of the
    vector field by all solves and the extra steps. A model without neural ODE or SDE, as before a pass puts one there,
    has the base alone. Over data-parallel processes it is the mean of their costs; all draw the same time.

    Args:
        base: objective of the task at hand, or its recipe node.
        estimate: "error", or "stiffness" (neural ODEs only; start with 0.1 and "constant").
        sampling: "unbiased", a time uniform over the interval; "biased", one of the times between accepted steps but
            the last, so that where the solver works hardest is drawn most often.
        start: coefficient at the start of training, >= 0.
        end: at its end; not read with "constant".
        decay: "exponential" from start to end, or "constant" at start.
        seed: of the times; call k draws the same one on every process.
    Raises:
        LaminaError: an option out of range; at the call, a model none of whose blocks ran.
    Example:
        >>> from lamina.nn import NeuralODE
        >>> model = nn.Sequential(NeuralODE(nn.Linear(4, 4)), nn.Linear(4, 2))
        >>> batch = {"inputs": torch.randn(3, 4), "labels": torch.tensor([0, 1, 1])}
        >>> sorted(LocalSolverCost()(model, batch))
        ['coefficient', 'count', 'loss', 'measure', 'nfe', 'regulariser', 'task', 'task.accuracy']
    """

    calls: Tensor

    def __init__(
        self,
        base: Annotated[Any, Slot("objective")] = "classification",
        estimate: Literal["error", "stiffness"] = "error",
        sampling: Literal["unbiased", "biased"] = "unbiased",
        start: float = 100.0,
        end: float = 10.0,
        decay: Literal["exponential", "constant"] = "exponential",
        seed: int = 0,
    ) -> None:
        super().__init__(base, start, end, decay)
        if estimate not in ("error", "stiffness"):
            raise LaminaError(f"estimate must be 'error' or 'stiffness', got {estimate!r}")
        if sampling not in ("unbiased", "biased"):
            raise LaminaError(f"sampling must be 'unbiased' or 'biased', got {sampling!r}")
        self.estimate, self.sampling, self.seed = estimate, sampling, seed
        # Saved, so that a resumed run draws the times that are next.
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def generator(self) -> torch.Generator:
        """Return the generator of this call: a function of the seed and of how many calls there were."""
        made = torch.Generator().manual_seed((self.seed * 1_000_003 + int(self.calls)) % 2**63)
        self.calls += 1
        return made

    def ask(self, model: nn.Module, draw: torch.Generator) -> Any:
        """Ask for one point of every solve, or for all of them to choose from."""
        if self.sampling == "biased":
            return recording(model, None, keep_steps=True)
        return recording(model, min(float(torch.rand((), generator=draw)), LATEST))

    def cost(self, seen: Recorded, draw: torch.Generator) -> tuple[Tensor, int]:
        """Take one step in every block from the state it had at the time drawn."""
        place = float(torch.rand((), generator=draw))
        found = []
        for solve in seen.solves:
            time, state = self.place(solve, place)
            if state is not None:
                found.append(solve.block.local_cost(state, time, solve.solution.times[-1], self.estimate, draw))
        if not found:
            return torch.zeros(()), 0
        return torch.stack([f.value for f in found]).mean(), sum(f.nfe for f in found)

    def place(self, solve: Solve, place: float) -> tuple[float, Tensor | None]:
        """Return the time, and the state there (None: there is none), of one solve; `place` is uniform over 0..1."""
        solution = solve.solution
        if self.sampling == "biased":
            if not solution.states:
                return solution.times[0], None
            at = min(int(place * len(solution.states)), len(solution.states) - 1)
            return solution.times[at], solution.states[at]
        time = solution.times[0] if solution.save_time is None else solution.save_time
        return time, solution.state_at_save


@register("objective", source="Pal et al., Opening the Blackbox (2021), arXiv 2105.03918: the global predecessor")
class GlobalSolverCost(SolverCost):
    """Another objective, plus the error estimates of all steps of every neural ODE, each times its step size.

    The baseline of `LocalSolverCost`: it needs the solver's own estimates and gradients through all of its steps, so
    `adjoint="discrete"` only, and no neural SDEs. Logs what `LocalSolverCost` logs.

    Args:
        base: objective of the task at hand, or its recipe node.
        start: coefficient at the start of training, >= 0.
        end: at its end; not read with "constant".
        decay: "exponential" from start to end, or "constant" at start.
    Raises:
        LaminaError: an option out of range; at the call, a block that cannot tell, or a model none of whose blocks ran.
    """

    def __init__(
        self,
        base: Annotated[Any, Slot("objective")] = "classification",
        start: float = 100.0,
        end: float = 10.0,
        decay: Literal["exponential", "constant"] = "exponential",
    ) -> None:
        super().__init__(base, start, end, decay)

    def ask(self, model: nn.Module, draw: torch.Generator) -> Any:
        """Ask for the errors of all steps."""
        return recording(model, None, keep_errors=True)

    def cost(self, seen: Recorded, draw: torch.Generator) -> tuple[Tensor, int]:
        """Add the errors up; the mean over the solves."""
        if not seen.errors:
            return torch.zeros(()), 0
        return torch.stack(seen.errors).sum() / len(seen.solves), 0
