"""A master that trains several models in turns on a crew of workers, by a code: real delays, real losses."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from lamina.errors import LaminaError
from lamina.gradients.coding.crew import Crew, Reply, Work, save_vector
from lamina.gradients.coding.interleave import Jobs, check
from lamina.gradients.coding.ledger import Ledger
from lamina.gradients.coding.scheme import Progress, Scheme
from lamina.gradients.coding.tasks import Objective, set_mean, trained
from lamina.gradients.coding.waiting import Waiting

log = logging.getLogger(__name__)

TRIES = 2
"""How often a worker's round is ordered again, after it ended or sent what cannot be used."""


@dataclass(frozen=True)
class Report:
    """How a coded run went, round by round."""

    times: NDArray[np.float64]
    """Seconds each worker took: (workers, rounds), for `select_parameters`; NaN where its messages did not come."""
    rounds: Sequence[float]
    """Seconds of each round, decoding and optimizer step among them."""
    stragglers: Sequence[frozenset[int]]
    waits: int
    """Rounds that lasted longer than the patience because the code did not bear those who were missing."""
    replaced: Sequence[tuple[int, int]]
    """(round, worker) of every worker that ended, and was replaced."""
    bytes_received: int
    """Of the messages that came in."""

    @property
    def seconds(self) -> float:
        """All rounds together."""
        return sum(self.rounds)


def train_coded(
    crew: Crew,
    scheme: Scheme,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    objective: Objective,
    data: Jobs,
    steps: int,
    *,
    wait: float = 1.0,
    timeout: float = 600.0,
    seed: int = 0,
    decoded: Callable[[int, Tensor], None] | None = None,
) -> Report:
    """Train models in turns: job t is a step of model t modulo their number, its gradient computed by the crew.

    The master keeps the models and optimizers; workers get parameters with every order and hold nothing of their own,
    so a worker that ends is replaced, and its round ordered again. Call it once uncoded to measure, choose a scheme
    (`select_parameters` on `report.times`), and call it again on the same crew and models to go on with that.

    Args:
        crew: as many workers as the scheme has.
        models: at least the scheme's delay + 1; trained in place.
        data: all rows of a job, or a function of the job's number (what a crew can hand to its workers).
        steps: jobs in all.
        wait: patience: a round ends at (1 + wait) times the fastest worker's time if the code bears the others.
        timeout: seconds after which a round that cannot end fails, and workers that do not begin.
        decoded: is called with each job and its summed gradient (the count last), to look on.
    Raises:
        LaminaError: too few models or workers, a batch norm in training mode, fewer rows than chunks, a worker that
            fails `TRIES` times more in one round, or a round beyond the timeout.
    """
    if crew.workers != scheme.n:
        raise LaminaError(f"the scheme is for {scheme.n} workers, the crew has {crew.workers}")
    check(models, optimizers, scheme.delay, steps)
    crew.begin(Work(models, objective, data, scheme, seed), timeout)
    progress, ledger = scheme.start(steps), Ledger(scheme)
    values = {m: (0, save_vector(model)) for m, model in enumerate(models)}
    rounds, late, columns, waits, received = [], [], [], 0, 0
    replaced: list[tuple[int, int]] = []
    while not progress.over:
        begun, plan = time.monotonic(), progress.plan()
        waiting = Waiting(progress, begun, wait, timeout)
        for worker, items in plan.items():
            if items:
                crew.order(worker, progress.round, items, values)
        missing = {w for w, items in plan.items() if items}
        tries: Counter[int] = Counter()
        while not waiting.over(missing):
            reply = crew.reply(waiting.left())
            if reply is not None and reply.replaced:
                replaced.append((progress.round, reply.worker))
            if reply is None or reply.round != progress.round or reply.worker not in missing:
                continue
            if reply.problem or reply.gone:
                _count(reply, progress, tries)
                crew.order(reply.worker, progress.round, plan[reply.worker], values)
                continue
            waiting.arrived(reply.worker, time.monotonic())
            missing.discard(reply.worker)
            for item, message in zip(plan[reply.worker], reply.messages, strict=True):
                received += message.nbytes
                ledger.add(reply.worker, item, message)
        crew.end_round(progress.round)
        job = progress.due
        progress.record(missing)
        if job is not None and progress.exists(job):
            vector = ledger.decode(job)
            if decoded is not None:
                decoded(job, vector)
            number = job % len(models)
            set_mean(trained(models[number]), vector)
            optimizers[number].step()
            values[number] = values[number][0] + 1, save_vector(models[number])
        rounds.append(time.monotonic() - begun)
        late.append(frozenset(missing))
        waits += waiting.waited
        columns.append([waiting.seconds.get(w, np.nan) for w in range(scheme.n)])
    return Report(np.array(columns).T, rounds, late, waits, replaced, received)


def _count(reply: Reply, progress: Progress, tries: Counter[int]) -> None:
    """Count a failed try, or give up."""
    tries[reply.worker] += 1
    if tries[reply.worker] > TRIES:
        raise LaminaError(
            f"worker {reply.worker} {reply.problem or 'ended'}, {tries[reply.worker]} times in round {progress.round}; "
            "nothing was combined"
        )
    log.warning("worker %d %s: its round is ordered again", reply.worker, reply.problem or "ended and was replaced")
