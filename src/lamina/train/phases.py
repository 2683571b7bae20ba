"""Rewriting while training: when a pass runs, what it looks at, and what became of the optimizer's state."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lamina.batches import Batch, to_device
from lamina.data import Data, Loader, one_pass
from lamina.errors import LaminaError
from lamina.rewrite.rewriting import Pass, Record, history, pass_name, replay, rewrite
from lamina.train.distributed import World
from lamina.train.options import TrainOptions

CALIBRATION_BATCHES = 4
"""Batches of training data that a pass may look at, unless it says how many it needs."""


@dataclass(frozen=True)
class Scheduled:
    """A pass and when it runs."""

    one: Pass[Any]
    at: Literal["before", "after"] | float = "before"
    """`before` the optimizer exists, at a fraction of the steps (0..1), or `after` the last one."""

    def __post_init__(self) -> None:
        """Refuse another time."""
        number = isinstance(self.at, (int, float)) and not isinstance(self.at, bool)
        if not (self.at in ("before", "after") or (number and 0 <= float(self.at) <= 1)):
            raise LaminaError(f"at must be 'before', 'after' or a fraction of training within 0..1, got {self.at!r}")

    @property
    def fraction(self) -> float:
        """Fraction of training that is over when it runs."""
        return {"before": 0.0, "after": 1.0}[self.at] if isinstance(self.at, str) else float(self.at)

    def due(self, steps: int) -> int:
        """Return the number of steps done when it runs; -1 = before."""
        if self.at == "before":
            return -1
        return steps if self.at == "after" else round(float(self.at) * steps)


def in_order(rewrites: Sequence[Scheduled | Pass[Any]], steps: int) -> list[Scheduled]:
    """Sort by time; a bare pass runs before."""
    timed = [r if isinstance(r, Scheduled) else Scheduled(r) for r in rewrites]
    return sorted(timed, key=lambda r: (r.due(steps), r.at == "after"))


def carry_out(
    scheduled: Scheduled,
    model: nn.Module,
    objective: Any,
    *,
    data: Data,
    seed: int,
    device: torch.device,
    optimizer: Optimizer | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Rewrite a bare model; return it with a row for the metrics.

    The objective is told first (`before_rewrite`), then the pass how far training is, if it asks (`set_progress`); the
    pass sees a few fixed batches of the training data, or as many as its attribute `batches` says.
    """
    progress = getattr(scheduled.one, "set_progress", None)
    if progress is not None:
        progress(scheduled.fraction)
    told = getattr(objective, "before_rewrite", None)
    if told is not None:
        told(model)
    before = {id(p): n for n, p in model.named_parameters()}
    model.eval()
    count = getattr(scheduled.one, "batches", CALIBRATION_BATCHES)
    result = rewrite(model, scheduled.one, data=Calibration(data, seed, device, count), optimizer=optimizer)
    result.to(device)
    record = history(result)[-1]
    row = {
        "event": "rewrite",
        "pass": pass_name(scheduled.one),
        "at": scheduled.at,
        "parameters_before": record.parameters_before,
        "parameters_after": record.parameters_after,
    }
    if optimizer is not None:
        _states_to(optimizer)
        row.update(fate_of_states(optimizer, result, before))
    return result, row


def replay_training(model: nn.Module, objective: Any, records: Sequence[Record]) -> nn.Module:
    """Do the recorded rewrites again on the model they started from, telling the objective before each.

    Rewrites that the model has behind it already are left out.

    Raises:
        LaminaError: the model's own history is another one.
    """
    own = history(model)
    if [asdict(r) for r in own] != [asdict(r) for r in records[: len(own)]]:
        raise LaminaError(
            f"the model was rewritten by {[r.name for r in own]}, the checkpoint's by {[r.name for r in records]}: "
            "resume with the model that the run began with"
        )
    told = getattr(objective, "before_rewrite", None)
    for record in records[len(own) :]:
        if told is not None:
            told(model)
        model = replay(model, [record])
    return model


class Calibration:
    """A few fixed batches of the training data; drawn apart from the training loader, which they do not move."""

    def __init__(self, data: Data, seed: int, device: torch.device, count: int = CALIBRATION_BATCHES) -> None:
        self.data, self.seed, self.device, self.count = data, seed, device, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = Loader(self.data.train, self.data.batch, seed=self.seed)
        for _ in range(self.count):
            yield to_device(next(loader), self.device)


def held_out(data: Data, options: TrainOptions, world: World) -> Iterable[Batch]:
    """Return this process's share of the evaluation set; where there is none, a few batches of the training data."""
    if data.evaluation is None:
        return Calibration(data, options.seed, world.device)
    batches = one_pass(data.evaluation, data.batch, rank=world.rank, world=world.size)
    return itertools.islice(batches, options.evaluate_batches)


def fate_of_states(optimizer: Optimizer, model: nn.Module, before: dict[int, str]) -> dict[str, Any]:
    """Say what became of each parameter in the optimizer: kept (a count), derived, fresh, dropped (names)."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    now = {n: p for n, p in model.named_parameters() if id(p) in held}
    new = {n: p for n, p in now.items() if id(p) not in before}
    alive = {id(p) for p in model.parameters()}
    return {
        "kept": len(now) - len(new),
        "derived": [n for n, p in new.items() if optimizer.state.get(p)],
        "fresh": [n for n, p in new.items() if not optimizer.state.get(p)],
        "dropped": [n for key, n in before.items() if key not in alive],
    }


def listeners(model: nn.Module, objective: Any) -> list[Any]:
    """List what wants to be told how far training is."""
    return [m for m in (*model.modules(), objective) if hasattr(m, "set_progress")]


def _states_to(optimizer: Optimizer) -> None:
    """Put state that followed a parameter where that parameter is now; counters stay where they are."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                state[key] = value.to(parameter.device)
