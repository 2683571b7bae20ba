"""What coded reducers share: rank 0 waits for as few workers as the code bears, decodes, and tells everyone."""

from __future__ import annotations

import logging
import queue
import time
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from lamina.errors import LaminaError, ShapeError
from lamina.gradients.coding.exchange import (
    FINE,
    MASTER,
    NOT_FINITE,
    UNFIT,
    Desk,
    Link,
    Outcome,
    ProcessLink,
    listen,
    report,
)
from lamina.gradients.coding.ledger import Ledger
from lamina.gradients.coding.matrix import Kind
from lamina.gradients.coding.scheme import Item, Progress, Scheme, UncodedScheme
from lamina.gradients.coding.waiting import Waiting
from lamina.gradients.lost_worker import named
from lamina.gradients.reducer import Group, Stateless, size

log = logging.getLogger(__name__)

PARTING = 5.0
"""Seconds in which workers may hear why a round failed, before rank 0 raises."""


class CodedReducer(Stateless):
    """What the coded reducers share: tasks by the scheme's plan, messages to rank 0, its waiting rule, the outcome.

    `tasks(step, rank, world)` names this worker's chunks of the round as job * chunks + chunk, in the order in which
    they are to be computed; a straggler is told nothing to do in rounds that are over. `reduce` takes their gradients
    stacked in that order on a new first dimension, sums over the chunk's rows, and returns the sum over all of job
    step - delay's rows: {} while there is none. Alone, a process has nobody to code with: its gradients come back as
    they are.

    The round ends when every worker's messages are in, or at (1 + wait) times the fastest worker's time if the code
    bears those who are not done: then they are stragglers, which keep what they have and go on. Rank 0 is a worker,
    too, and waits for itself. Whoever ends for good counts as a straggler in every round.

    Attributes:
        stragglers: of the last round.
        seconds: that the last round's workers took from its beginning, by worker (rank 0 alone knows).
        decoded: the job of the last gradient that `reduce` returned.
    """

    granularity: ClassVar[Literal["bucket", "model"]] = "model"

    def __init__(self, kind: Kind = "auto", seed: int = 0, wait: float = 1.0, timeout: float = 600.0) -> None:
        super().__init__()
        if kind not in ("auto", "cyclic", "repetition"):
            raise LaminaError(f"kind must be 'auto', 'cyclic' or 'repetition', got {kind!r}")
        if not wait >= 0:
            raise LaminaError(f"wait must be at least 0 (times the fastest worker's time), got {wait!r}")
        if not timeout > 0:
            raise LaminaError(f"timeout must be above 0 seconds, got {timeout!r}")
        self.kind, self.seed, self.wait, self.timeout = kind, seed, wait, timeout
        self.jobs: int | None = None
        """How many there are in all; None = without end."""
        self.stragglers: frozenset[int] = frozenset()
        self.seconds: dict[int, float] = {}
        self.decoded: int | None = None
        self._scheme: Scheme | None = None
        self._progress: Progress | None = None
        self._ledger: Ledger | None = None
        self._desk: Desk | None = None
        self._link: Link | None = None
        self._shapes: dict[str, torch.Size] = {}
        self._begun = 0.0
        self._closed = -1
        """Rounds up to this one are over: there is nothing left to do in them."""
        self._restored: Mapping[str, Any] | None = None

    @abstractmethod
    def scheme(self, workers: int) -> Scheme:
        """Return the scheme among so many workers.

        Raises:
            LaminaError: too few of them.
        """

    @property
    @abstractmethod
    def delay(self) -> int:
        """Steps from a job's first round to the one in which it is decoded, among more than one worker."""

    def round(self, world: int) -> int:
        """Return the number of the next round: how many there were, those before a resume among them."""
        return self._ready(world)[1].round

    def chunks(self, world: int) -> int:
        """Return into how many chunks a job's rows are cut."""
        return len(self.sizes(world))

    def sizes(self, world: int) -> list[float]:
        """Return the share of a job's rows in each chunk."""
        return self._ready(world)[0].sizes

    def tasks(self, step: int, rank: int, world: int) -> Sequence[int]:
        """Name the chunks this worker computes in this round: job * chunks + chunk, in this order.

        For another step than the next one, as if nobody had straggled so far.
        """
        scheme, progress = self._ready(world)
        self._begun = time.monotonic()
        if step == progress.round <= self._closed:
            return ()
        plan = progress.plan() if step == progress.round else scheme.plan((), step, self.jobs)
        chunks = len(scheme.sizes)
        return [item.job * chunks + c for item in plan[rank] for c in scheme.chunks(rank, item)]

    def follow(self, parameters: Mapping[str, Parameter]) -> None:
        """Learn the parameters' shapes, so that a gradient that is not stacked is told from one that is."""
        self._shapes = {n: p.shape for n, p in parameters.items()}

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Send what this round's tasks gave, and return the sum that could be decoded, or {}.

        Raises:
            LaminaError: too few workers; a worker's gradient is not finite, does not fit, or is missing for longer than
                the timeout (it is named, on all of them); rank 0 is gone.
            ShapeError: the gradients are not stacked, one slice a task.
        """
        link = self._connected(group)
        scheme, progress = self._ready(1 if link is None else link.workers)
        if link is None:
            self.decoded = progress.round
            progress.record(())
            return dict(gradients)
        rank = link.rank
        planned = progress.plan()[rank]
        items = planned if progress.round > self._closed else []
        problem: LaminaError | None = None
        try:
            messages, like = self._encoded(gradients, scheme, rank, items)
            state = FINE if all(bool(torch.isfinite(m).all()) for m in messages) else NOT_FINITE
        except LaminaError as error:
            problem, messages, like, state = error, [], torch.empty(0), UNFIT
        checksum = self._checksum(gradients, scheme)
        if rank == MASTER:
            outcome = self._lead(link, progress, scheme, messages, like, state, checksum, problem)
        else:
            outcome = self._take_part(link, progress, bool(planned), messages, like, state, checksum, problem)
        self.stragglers, self._closed = outcome.stragglers, outcome.closed
        self.decoded = progress.due if outcome.gradient is not None else self.decoded
        progress.record(outcome.stragglers)
        self._begun = time.monotonic()
        return {} if outcome.gradient is None else _unpacked(outcome.gradient, gradients)

    def close(self) -> None:
        """After the last round: wait until every worker heard of it. Any later round opens anew.

        Raises:
            LaminaError: a worker did not ask for it within the timeout.
        """
        if self._desk is not None:
            desk, self._desk = self._desk, None
            slow = set(desk.close(self.timeout)) - desk.gone
            self.sent += desk.sent
            if slow:
                raise LaminaError(f"workers {sorted(slow)} did not ask for the last outcome within {self.timeout} s")

    def bytes_sent(self) -> int:
        """Return the bytes this rank sent so far: a worker its messages, rank 0 the outcomes."""
        return self.sent + (0 if self._desk is None else self._desk.sent)

    def state_dict(self) -> dict[str, Any]:
        """Return the bytes, the history that still matters, and (rank 0) the messages of jobs in flight."""
        if self._progress is None or self._ledger is None:
            return dict(self._restored) if self._restored is not None else {"sent": self.sent, "workers": 0}
        return {
            "sent": self.bytes_sent(),
            "workers": self._progress.n,
            "progress": self._progress.state_dict(),
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.sent = int(state["sent"])
        self._scheme, self._restored = None, dict(state) if state["workers"] else None

    def _connected(self, group: Group) -> Link | None:
        """Return the link to the others; None = there are none."""
        if isinstance(self._link, ProcessLink) and self._link.group is not group:
            self.close()
            self._link = None
        if self._link is None and size(group) > 1:
            self._link = ProcessLink(group)
        return self._link

    def _ready(self, world: int) -> tuple[Scheme, Progress]:
        """Return the scheme and where it stands; begun anew for another number of workers."""
        if self._scheme is None or self._progress is None or self._scheme.n != world:
            self._scheme = UncodedScheme(1) if world == 1 else self.scheme(world)
            self._progress = self._scheme.start(self.jobs)
            self._ledger = Ledger(self._scheme)
            state, self._restored = self._restored, None
            if state is not None:
                if int(state["workers"]) != world:
                    raise LaminaError(f"the reducer's state is of {state['workers']} workers, this run has {world}")
                self._progress.load_state_dict(state["progress"])
                self._ledger.load_state_dict(state["ledger"])
        self._progress.jobs = self.jobs
        return self._scheme, self._progress

    def _encoded(
        self, gradients: Mapping[str, Tensor], scheme: Scheme, rank: int, items: Sequence[Item]
    ) -> tuple[list[Tensor], Tensor]:
        """Return a message an item, and a vector like the decoded one."""
        if not gradients:
            raise LaminaError("no parameter has a gradient to send")
        wanted = [len(scheme.chunks(rank, item)) for item in items]
        for name, gradient in gradients.items():
            known = self._shapes.get(name)
            fits = gradient.ndim > 0 and len(gradient) == sum(wanted)
            if not fits or (known is not None and gradient.shape[1:] != known):
                raise ShapeError(
                    f"{type(self).__name__} takes the gradients of this round's {sum(wanted)} tasks stacked, one a "
                    f"task (see `tasks`), but that of {name!r} has shape {tuple(gradient.shape)}"
                )
        kind = torch.float64 if any(g.dtype == torch.float64 for g in gradients.values()) else torch.float32
        flat = torch.cat([g.detach().reshape(sum(wanted), g.shape[1:].numel()) for g in gradients.values()], 1)
        flat = flat.to("cpu", kind)
        parts = flat.split(wanted)
        messages = [scheme.encode(rank, item, part) for item, part in zip(items, parts, strict=True)]
        return [m.contiguous() for m in messages], torch.empty(flat.shape[1], dtype=kind)

    def _checksum(self, gradients: Mapping[str, Tensor], scheme: Scheme) -> int:
        shapes = [(n, tuple(g.shape[1:]), str(g.dtype)) for n, g in gradients.items()]
        return zlib.crc32(repr((shapes, type(scheme).__name__, len(scheme.sizes), scheme.s, scheme.seed)).encode())

    def _take_part(
        self,
        link: Link,
        progress: Progress,
        planned: bool,
        messages: list[Tensor],
        like: Tensor,
        state: int,
        checksum: int,
        problem: LaminaError | None,
    ) -> Outcome:
        try:
            if planned:
                self.sent += report(link, progress.round, checksum, state, messages)
            if problem is not None:
                raise problem
            return listen(link, progress.round, like)
        except RuntimeError as error:
            raise LaminaError(
                f"worker 0, which decodes, ended or did not answer within the process group's timeout "
                f"[{str(error).splitlines()[0][:120]}]: start again from the last checkpoint"
            ) from error

    def _lead(
        self,
        link: Link,
        progress: Progress,
        scheme: Scheme,
        messages: list[Tensor],
        like: Tensor,
        state: int,
        checksum: int,
        problem: LaminaError | None,
    ) -> Outcome:
        """Wait for the workers, decode, and tell them; a failure is told to all before it is raised."""
        assert self._ledger is not None
        if self._desk is None:
            self._desk = Desk(link)
        usable = problem is None and state == FINE
        if not usable:
            # Nobody is to send what will not be used.
            self._desk.closed = progress.round
        for worker, items in progress.plan().items():
            if items and worker != MASTER and worker not in self._desk.gone:
                shapes = [torch.empty_like(like, dtype=_dtype(scheme, item, like)) for item in items]
                self._desk.collect(worker, progress.round, checksum, shapes)
        try:
            if problem is not None:
                raise problem
            if not usable:
                raise LaminaError("worker 0 computed a gradient with NaN or infinity; nothing was combined")
            late = self._gather(self._desk, progress, messages)
            due = progress.due
            gradient = None
            if due is not None and progress.exists(due):
                gradient = self._ledger.decode(due).to(like.dtype)
        except LaminaError as error:
            desk, self._desk = self._desk, None
            desk.end(Outcome(progress.round, frozenset(), failure=str(error)))
            # This process may end now: first let whoever listens hear why.
            desk.close(PARTING)
            self.sent += desk.sent
            raise
        outcome = Outcome(progress.round, late, gradient)
        self._desk.end(outcome)
        return outcome

    def _gather(self, desk: Desk, progress: Progress, messages: Sequence[Tensor]) -> frozenset[int]:
        """Take in the messages of one round; return whose did not come."""
        assert self._ledger is not None
        plan, round = progress.plan(), progress.round
        open_ = {w for w, items in plan.items() if items and w != MASTER}
        for item, message in zip(plan[MASTER], messages, strict=True):
            self._ledger.add(MASTER, item, message)
        waiting = Waiting(progress, self._begun, self.wait, self.timeout)
        self.seconds = waiting.seconds
        if plan[MASTER]:
            waiting.arrived(MASTER, time.monotonic())
        while not waiting.over(open_):
            if open_ <= desk.gone:
                self._refuse(open_, progress)
                break
            try:
                arrival = desk.arrivals.get(timeout=waiting.left())
            except queue.Empty:
                continue
            if arrival.gone:
                log.warning("worker %d ended [%s]: a straggler from now on", arrival.worker, arrival.problem)
            elif arrival.round == round:
                if arrival.problem:
                    raise LaminaError(f"worker {arrival.worker} {arrival.problem}; nothing was combined")
                for item, message in zip(plan[arrival.worker], arrival.messages, strict=True):
                    self._ledger.add(arrival.worker, item, message)
                waiting.arrived(arrival.worker, arrival.when)
                open_.discard(arrival.worker)
        return frozenset(open_)

    def _refuse(self, gone: set[int], progress: Progress) -> None:
        if not progress.tolerates(gone):
            raise LaminaError(
                f"{named(sorted(gone))} ended, which the code does not bear in round {progress.round}; nothing was "
                "combined: start again from the last checkpoint, or with a code for more"
            )


def _dtype(scheme: Scheme, item: Item, like: Tensor) -> torch.dtype:
    return torch.float64 if item.kind != "D1" and scheme.code.exact else like.dtype


def _unpacked(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    at, found = 0, {}
    for name, gradient in like.items():
        shape = gradient.shape[1:]
        found[name] = vector[at : at + shape.numel()].view(shape).to(gradient)
        at += shape.numel()
    return found
