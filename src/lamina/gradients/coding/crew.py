"""Workers of a master that trains with a code: what one does, and a crew of them as threads of this process."""

from __future__ import annotations

import copy
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.gradients.coding.interleave import Jobs, task_vector
from lamina.gradients.coding.scheme import Item, Scheme
from lamina.gradients.coding.tasks import Objective, trained

Delay = Callable[[int, int], float]
"""Seconds that a worker sleeps before a round: (worker, round) -> seconds; to play stragglers."""


@dataclass(frozen=True)
class Work:
    """What the workers of one run share."""

    models: Sequence[nn.Module]
    objective: Objective
    data: Jobs
    scheme: Scheme
    seed: int = 0
    """Of what random layers draw."""


@dataclass(frozen=True)
class Reply:
    """What became of one worker's round."""

    worker: int
    round: int
    messages: Sequence[Tensor] = ()
    problem: str = ""
    """Why there are no messages."""
    gone: bool = False
    """The worker ended before it could reply; a fresh one has its place."""
    replaced: bool = False
    """This is the first word of that."""


class Crew(Protocol):
    """Some workers that a master gives orders to; `LocalCrew` and `RayCrew`."""

    workers: int

    def begin(self, work: Work, timeout: float = 600.0) -> None:
        """Hand out what the workers of a run need, in so many seconds at most."""

    def order(self, worker: int, round: int, items: Sequence[Item], values: Mapping[int, tuple[int, Tensor]]) -> None:
        """Have a worker compute the messages of a round; `values` are parameters by model, with their version."""

    def reply(self, timeout: float) -> Reply | None:
        """Return the next reply, or None where none came in time."""

    def end_round(self, round: int) -> None:
        """Tell every worker that a round is over: it drops what it has of it."""

    def stop(self) -> None:
        """End all workers."""


class Worker:
    """One worker: replicas of the models, and the rows.

    Args:
        number: 0..n-1.
        work: of the run.
        delay: to play a straggler.
    """

    def __init__(self, number: int, work: Work, delay: Delay | None = None) -> None:
        self.number, self.work, self.delay = number, work, delay
        self.models = [copy.deepcopy(m) for m in work.models]
        self.versions = [-1] * len(self.models)
        self.closed = -1
        self._one = threading.Lock()

    def end_round(self, round: int) -> None:
        """Note that the round is over: whatever is still computed for it is dropped."""
        self.closed = max(self.closed, round)

    def compute(
        self, round: int, items: Sequence[Item], values: Mapping[int, tuple[int, Tensor]]
    ) -> list[Tensor] | None:
        """Return the round's messages, one an item; None where the round was over before they were done."""
        with self._one:
            return self._compute(round, items, values) if self._slept(round) else None

    def _compute(
        self, round: int, items: Sequence[Item], values: Mapping[int, tuple[int, Tensor]]
    ) -> list[Tensor] | None:
        work, messages = self.work, []
        for item in items:
            number = item.job % len(self.models)
            self._load(number, *values[number])
            rows = []
            for chunk in work.scheme.chunks(self.number, item):
                if self.closed >= round:
                    return None
                rows.append(
                    task_vector(
                        self.models[number], work.objective, work.data, item.job, chunk, work.scheme.sizes, work.seed
                    )
                )
            messages.append(work.scheme.encode(self.number, item, torch.stack(rows).cpu()))
        return messages

    def _load(self, number: int, version: int, vector: Tensor) -> None:
        if self.versions[number] != version:
            load_vector(self.models[number], vector)
            self.versions[number] = version

    def _slept(self, round: int) -> bool:
        """Sleep as long as the delay says; say whether the round still lasts."""
        end = time.monotonic() + (0.0 if self.delay is None else self.delay(self.number, round))
        while self.closed < round and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.01))
        return self.closed < round


def save_vector(model: nn.Module) -> Tensor:
    """Return a copy of the trained parameters as one vector: float64 where any is, else float32."""
    parts = [p.detach().reshape(-1) for p in trained(model).values()]
    kind = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
    return torch.cat([p.to("cpu", kind) for p in parts])


def load_vector(model: nn.Module, vector: Tensor) -> None:
    """Undo `save_vector`, in place."""
    at = 0
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(vector[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()


class LocalCrew:
    """Workers as threads of this process: no protection from a crash, but sleeps and orders as anywhere.

    Args:
        workers: how many.
        delay: (worker, round) -> seconds that it sleeps first, to play stragglers.
    """

    def __init__(self, workers: int, delay: Delay | None = None) -> None:
        if workers < 1:
            raise LaminaError(f"a crew has at least 1 worker, got {workers}")
        self.workers, self.delay = workers, delay
        self.replies: queue.Queue[Reply] = queue.Queue()
        self.hands: dict[int, Worker] = {}
        self.orders: dict[int, queue.Queue[Any]] = {}
        self.threads: list[threading.Thread] = []

    def begin(self, work: Work, timeout: float = 600.0) -> None:
        """Start the threads anew, with replicas of the models."""
        self.stop()
        self.replies = queue.Queue()
        for worker in range(self.workers):
            self._start(worker, work)

    def order(self, worker: int, round: int, items: Sequence[Item], values: Mapping[int, tuple[int, Tensor]]) -> None:
        """Have a worker compute the messages of a round."""
        self.orders[worker].put((round, items, values))

    def reply(self, timeout: float) -> Reply | None:
        """Return the next reply, or None where none came in time."""
        try:
            return self.replies.get(timeout=timeout)
        except queue.Empty:
            return None

    def end_round(self, round: int) -> None:
        """Tell every worker that a round is over."""
        for hand in self.hands.values():
            hand.end_round(round)

    def _start(self, worker: int, work: Work) -> None:
        hand, orders = Worker(worker, work, self.delay), queue.Queue[Any]()
        self.hands[worker], self.orders[worker] = hand, orders
        replies = self.replies

        def serve() -> None:
            while (order := orders.get()) is not None:
                replies.put(answered(worker, order[0], lambda order=order: hand.compute(*order)))  # type: ignore[misc]

        self.threads.append(threading.Thread(target=serve, daemon=True, name=f"lamina-worker-{worker}"))
        self.threads[-1].start()

    def stop(self) -> None:
        """End all workers, each after the chunk it is at."""
        for worker, orders in self.orders.items():
            self.hands[worker].end_round(sys.maxsize)
            orders.put(None)
        for thread in self.threads:
            thread.join(10.0)
        self.threads.clear()
        self.hands.clear()
        self.orders.clear()

    def __enter__(self) -> LocalCrew:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def answered(worker: int, round: int, compute: Callable[[], list[Tensor] | None]) -> Reply:
    """Word what a computation gave, or why it failed; a round that was over gives an empty reply."""
    try:
        messages = compute()
    except Exception as error:
        return Reply(worker, round, problem=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if messages is None:
        return Reply(worker, round, problem="dropped its messages: the round was over")
    if not all(bool(torch.isfinite(m).all()) for m in messages):
        return Reply(worker, round, problem="computed a gradient with NaN or infinity")
    return Reply(worker, round, messages)
