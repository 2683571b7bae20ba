"""A crew of Ray actors: workers as processes, on this machine or many."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError, require
from lamina.gradients.coding.crew import Delay, Reply, Work, Worker, answered
from lamina.gradients.coding.scheme import Item

log = logging.getLogger(__name__)

CONTROL = "control"
"""Ray's name for the thread of an actor that hears when rounds and runs begin and end."""


class RayCrew:
    """Workers as Ray actors; one that is killed is replaced by a fresh one.

        with RayCrew(8) as crew:
            train_coded(crew, MultiplexedScheme(8, B=1, W=2, lam=3), models, optimizers, objective, data, steps=300)

    A worker keeps replicas of the models and the data, so both must be what Ray can send (cloudpickle), in processes
    that trust each other.

    Args:
        workers: how many.
        delay: (worker, round) -> seconds that it sleeps first, to play stragglers.
        cpus: that Ray reserves for each worker; 0 = as many as one likes on one machine.
        address: of a Ray cluster; None = one of its own on this machine, ended with the crew, unless Ray is running in
            this process already.
    Raises:
        LaminaError: no worker. MissingExtra: Ray is not installed.
    """

    def __init__(
        self, workers: int, delay: Delay | None = None, *, cpus: float = 1.0, address: str | None = None
    ) -> None:
        if workers < 1:
            raise LaminaError(f"a crew has at least 1 worker, got {workers}")
        self.ray: Any = require("ray", "scale")
        self.workers, self.delay, self.cpus = workers, delay, cpus
        self._own = not self.ray.is_initialized()
        if self._own:
            self.ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        self._actors: dict[int, Any] = {}
        self._waiting: dict[Any, tuple[int, int, Any]] = {}
        self._work: Any = None
        self._run = 0
        self._values: dict[int, tuple[int, Any]] = {}

    def begin(self, work: Work, timeout: float = 600.0) -> None:
        """Hand out replicas of the models; the actors are started first where there are none, or where one ended.

        Raises:
            LaminaError: a worker did not begin within the timeout (in seconds); it is named.
        """
        end = time.monotonic() + timeout
        self._work = self.ray.put(work)
        self._run += 1
        self._waiting.clear()
        self._values.clear()
        begun = {w: self._control(actor.begin).remote(self._run, self._work) for w, actor in self._actors.items()}
        for worker in range(self.workers):
            try:
                if worker in begun:
                    self._heard(worker, begun[worker], end, timeout)
                    continue
            except self.ray.exceptions.RayActorError:
                log.warning("worker %d ended between two runs and was replaced", worker)
            self._start(worker)
        for worker, actor in self._actors.items():
            self._heard(worker, self._control(actor.process).remote(), end, timeout)

    def order(self, worker: int, round: int, items: Sequence[Item], values: Mapping[int, tuple[int, Tensor]]) -> None:
        """Have a worker compute the messages of a round; parameters are put into Ray's store once a version."""
        sent = {}
        for model, (version, vector) in values.items():
            if self._values.get(model, (-1, None))[0] != version:
                self._values[model] = version, self.ray.put(vector.numpy())
            sent[model] = self._values[model]
        needed = {item.job % len(values) for item in items}
        versions = {m: sent[m][0] for m in needed}
        future = self._actors[worker].compute.remote(
            self._run, round, list(items), versions, *[sent[m][1] for m in versions]
        )
        self._waiting[future] = worker, round, self._actors[worker]

    def reply(self, timeout: float) -> Reply | None:
        """Return the next reply, or None where none came in time."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            if not self._waiting:
                time.sleep(min(left, 0.01))
                continue
            ready, _ = self.ray.wait(list(self._waiting), num_returns=1, timeout=left)
            if not ready:
                return None
            worker, round, actor = self._waiting.pop(ready[0])
            try:
                messages, problem = self.ray.get(ready[0])
            except self.ray.exceptions.RayActorError:
                first = self._actors[worker] is actor
                if first:
                    self._start(worker)
                return Reply(worker, round, gone=True, replaced=first)
            except self.ray.exceptions.RayError as error:
                return Reply(worker, round, problem=f"failed: {' '.join(str(error).split())[-300:]}")
            return Reply(worker, round, [torch.from_numpy(m.copy()) for m in messages], problem)
        return None

    def end_round(self, round: int) -> None:
        """Tell every worker that a round is over."""
        for actor in self._actors.values():
            self._control(actor.end_round).remote(self._run, round)

    def _start(self, worker: int) -> None:
        options = {"max_concurrency": 3, "concurrency_groups": {CONTROL: 1}}
        remote = self.ray.remote(num_cpus=self.cpus, max_restarts=0, **options)(_Actor)
        self._actors[worker] = remote.remote(worker, self._run, self._work, self.delay)

    def _control(self, method: Any) -> Any:
        """Have a method called by the thread that no computation holds up."""
        return method.options(concurrency_group=CONTROL)

    def _heard(self, worker: int, future: Any, end: float, timeout: float) -> Any:
        try:
            return self.ray.get(future, timeout=max(0.0, end - time.monotonic()))
        except self.ray.exceptions.GetTimeoutError as error:
            raise LaminaError(
                f"worker {worker} did not begin within {timeout:g} s (where Ray has no {self.cpus:g} processors left "
                "for it, it never does)"
            ) from error

    def processes(self) -> dict[int, int]:
        """Return the process id of every worker."""
        return {w: self.ray.get(self._control(actor.process).remote()) for w, actor in self._actors.items()}

    def stop(self) -> None:
        """End all workers, and Ray where this crew began it."""
        self._end()
        if self._own and self.ray.is_initialized():
            self.ray.shutdown()

    def _end(self) -> None:
        for actor in self._actors.values():
            self.ray.kill(actor)
        self._actors.clear()
        self._waiting.clear()
        self._values.clear()

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class _Actor:
    """A worker in a process of its own: one order at a time, while a thread of its own hears that a round is over.

    Its threads take calls in any order, and the last words of one run may come after the next run began: each
    carries the number of its run.
    """

    def __init__(self, number: int, run: int, work: Work, delay: Delay | None) -> None:
        torch.set_num_threads(1)
        self.now = run, Worker(number, work, delay)

    def begin(self, run: int, work: Work) -> None:
        hand = self.now[1]
        hand.end_round(sys.maxsize)
        self.now = run, Worker(hand.number, work, hand.delay)

    def compute(
        self, run: int, round: int, items: Sequence[Item], versions: Mapping[int, int], *vectors: Any
    ) -> tuple[list[Any], str]:
        current, hand = self.now
        if current != run:
            return [], "dropped its messages: the run was over"
        values = {m: (v, torch.from_numpy(a.copy())) for (m, v), a in zip(versions.items(), vectors, strict=True)}
        reply = answered(hand.number, round, lambda: hand.compute(round, items, values))
        return [m.numpy() for m in reply.messages], reply.problem

    def end_round(self, run: int, round: int) -> None:
        current, hand = self.now
        if current == run:
            hand.end_round(round)

    def process(self) -> int:
        return os.getpid()
