"""Messages point to point: a thread for each worker at the master, so that none waits for another one's straggler.

    worker -> master   head: round, checksum, what is to come
    master -> worker   send it, or keep it: the round is over
    worker -> master   the messages of the round
    master -> worker   which rounds are over, who straggled, and the decoded gradient of an earlier job, or of this one

A straggler hears that its round is over before it sends anything, and gets the outcome of every round, in order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.reducer import Group

MASTER = 0
NOTHING, GRADIENT, FAILED = 0, 1, 2
FINE, NOT_FINITE, UNFIT = 0, 1, 2
TEXT = 600
"""Bytes of a failure's words."""


class Link(Protocol):
    """Blocking messages between two workers; the receiver brings a tensor of the right shape."""

    rank: int
    workers: int

    def send(self, tensor: Tensor, peer: int) -> None:
        """Send to a worker."""

    def receive(self, tensor: Tensor, peer: int) -> None:
        """Fill the tensor by what a worker sends."""


class ProcessLink:
    """Messages over a process group; tensors on the CPU (gloo)."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.workers = dist.get_rank(group), dist.get_world_size(group)

    def send(self, tensor: Tensor, peer: int) -> None:
        """Send to a worker, by its rank in the group."""
        work: Any = dist.isend(tensor, group=self.group, group_dst=peer)
        work.wait()

    def receive(self, tensor: Tensor, peer: int) -> None:
        """Fill the tensor by what a worker sends, by its rank in the group."""
        work: Any = dist.irecv(tensor, group=self.group, group_src=peer)
        work.wait()


@dataclass(frozen=True)
class Arrival:
    """What a thread tells the master of a worker's round."""

    worker: int
    round: int
    when: float
    """`time.monotonic()`."""
    messages: Sequence[Tensor] = ()
    problem: str = ""
    """Why the messages cannot be used; they were not asked for."""
    gone: bool = False
    """The worker ended, or the link to it."""


@dataclass(frozen=True)
class Outcome:
    """How a round ended, for every worker."""

    round: int
    stragglers: frozenset[int]
    gradient: Tensor | None = None
    failure: str = ""
    closed: int = -1
    """Rounds up to this one are over, as a straggler hears."""


class Desk:
    """The master's side: one thread a worker, orders in, arrivals out.

    Args:
        link: to the workers.
    """

    def __init__(self, link: Link) -> None:
        self.link, self.workers = link, link.workers
        self.arrivals: queue.Queue[Arrival] = queue.Queue()
        self.gone: set[int] = set()
        self.closed = -1
        """Rounds up to this one are over."""
        self.sent = 0
        self._orders = {w: queue.Queue[Any]() for w in range(self.workers) if w != MASTER}
        self._threads = [
            threading.Thread(target=self._serve, args=(w,), daemon=True, name=f"lamina-worker-{w}")
            for w in self._orders
        ]
        for thread in self._threads:
            thread.start()

    def collect(self, worker: int, round: int, checksum: int, shapes: Sequence[Tensor]) -> None:
        """Have a worker's messages of a round fetched; `shapes` are tensors to fill."""
        self._orders[worker].put((round, checksum, shapes))

    def end(self, outcome: Outcome) -> None:
        """Tell every worker, each as soon as it asks."""
        self.closed = outcome.round
        for worker, orders in self._orders.items():
            if worker not in self.gone:
                orders.put(outcome)

    def close(self, timeout: float) -> list[int]:
        """Wait until every worker got every outcome, and end the threads; return the workers that did not."""
        for orders in self._orders.values():
            orders.put(None)
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return [w for w, t in zip(self._orders, self._threads, strict=True) if t.is_alive()]

    def _serve(self, worker: int) -> None:
        round = -1
        try:
            while (order := self._orders[worker].get()) is not None:
                if isinstance(order, Outcome):
                    self.sent += _tell(self.link, worker, replace(order, closed=self.closed))
                    continue
                round, checksum, shapes = order
                arrival = self._fetch(worker, round, checksum, shapes)
                if arrival is not None:
                    self.arrivals.put(arrival)
        except (RuntimeError, ValueError) as error:
            self.gone.add(worker)
            words = str(error).splitlines()[0][:120]
            self.arrivals.put(Arrival(worker, round, time.monotonic(), problem=words, gone=True))

    def _fetch(self, worker: int, round: int, checksum: int, shapes: Sequence[Tensor]) -> Arrival | None:
        head = torch.zeros(4, dtype=torch.int64)
        self.link.receive(head, worker)
        problem = _problem(head.tolist(), round, checksum)
        wanted = not problem and self.closed < round
        self.link.send(torch.tensor([int(wanted)]), worker)
        if wanted:
            for tensor in shapes:
                self.link.receive(tensor, worker)
        if not wanted and not problem:
            return None
        return Arrival(worker, round, time.monotonic(), messages=shapes, problem=problem)


def report(link: Link, round: int, checksum: int, state: int, messages: Sequence[Tensor]) -> int:
    """Tell the master that a worker is done with its round, and send the messages if they are wanted; the bytes."""
    head = torch.tensor([round, checksum, state, len(messages)])
    link.send(head, MASTER)
    word = torch.zeros(1, dtype=torch.int64)
    link.receive(word, MASTER)
    if not word.item():
        return head.nbytes
    for message in messages:
        link.send(message, MASTER)
    return head.nbytes + sum(m.nbytes for m in messages)


def listen(link: Link, round: int, like: Tensor) -> Outcome:
    """Wait for the outcome of a round.

    Raises:
        LaminaError: what the master says went wrong.
    """
    reply = torch.zeros(3 + link.workers, dtype=torch.int64)
    link.receive(reply, MASTER)
    told, state, closed, *late = reply.tolist()
    if state == FAILED:
        text = torch.zeros(TEXT, dtype=torch.uint8)
        link.receive(text, MASTER)
        raise LaminaError(bytes(text.tolist()).rstrip(b"\0").decode(errors="replace"))
    if told != round:
        raise LaminaError(f"the master is in round {told}, this worker in {round}: they began at different steps")
    gradient = None
    if state == GRADIENT:
        gradient = torch.empty_like(like)
        link.receive(gradient, MASTER)
    return Outcome(round, frozenset(w for w, is_late in enumerate(late) if is_late), gradient, closed=closed)


def _tell(link: Link, worker: int, outcome: Outcome) -> int:
    state = FAILED if outcome.failure else NOTHING if outcome.gradient is None else GRADIENT
    late = [int(w in outcome.stragglers) for w in range(link.workers)]
    reply = torch.tensor([outcome.round, state, outcome.closed, *late])
    link.send(reply, worker)
    if state == FAILED:
        text = outcome.failure.encode()[:TEXT].ljust(TEXT, b"\0")
        link.send(torch.tensor(list(text), dtype=torch.uint8), worker)
        return reply.nbytes + TEXT
    if outcome.gradient is not None:
        link.send(outcome.gradient, worker)
        return reply.nbytes + outcome.gradient.nbytes
    return reply.nbytes


def _problem(head: Sequence[int], round: int, checksum: int) -> str:
    told, theirs, state, _ = head
    if told != round:
        return f"is in round {told}, the master in {round}: they began at different steps"
    if state == NOT_FINITE:
        return "computed a gradient with NaN or infinity"
    if state == UNFIT:
        return "could not use its own gradients (its own output says why)"
    if theirs != checksum:
        return "has gradients of other names, shapes or types, or another code"
    return ""
