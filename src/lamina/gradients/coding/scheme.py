"""What a coding scheme is: who computes what in a round, whom it may lose, and how a job's sum comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.coding.matrix import CodingMatrix, Kind
from lamina.gradients.coding.tolerance import History, PerRound, Tolerance


class Item(NamedTuple):
    """One message that a worker is to send: the gradient of a chunk, or a coded combination of several."""

    job: int
    """Which gradient it is for, 0, 1, ..."""
    kind: Literal["D1", "D2", "code"]
    """`D1`: one of the worker's own chunks, sent as it is; `D2`: the coded combination of a group; `code`: of all."""
    part: int
    """Of D1 the worker's chunk, of D2 the group."""


Plan = Mapping[int, Sequence[Item]]
"""By worker, in the order in which the items are computed."""


class Scheme(ABC):
    """A way to share out jobs, one full gradient each, so that stragglers need not be waited for.

    Job t starts in round t and can be decoded after round t + `delay`. It consists of `len(sizes)` chunks of the data.

    Args:
        n: workers.
        s: of the code inside: messages of a group that may be missing.
        kind: of the code, see `CodingMatrix`.
        seed: of the code.
    """

    def __init__(self, n: int, s: int, kind: Kind = "auto", seed: int = 0) -> None:
        if n < 1:
            raise LaminaError(f"a scheme takes at least 1 worker, got n={n}")
        self.n, self.s, self.kind, self.seed = n, s, kind, seed

    @cached_property
    def code(self) -> CodingMatrix:
        """The code inside, made when it is first needed."""
        return CodingMatrix(self.n, self.s, self.kind, self.seed)

    @property
    @abstractmethod
    def delay(self) -> int:
        """Rounds from a job's first to its last, T; T + 1 jobs are in flight."""

    @property
    @abstractmethod
    def load(self) -> float:
        """Share of a job's data that one worker computes in one round."""

    @property
    @abstractmethod
    def model(self) -> Tolerance:
        """Which stragglers every job survives."""

    @property
    def sizes(self) -> list[float]:
        """Share of the data in every chunk; they sum to 1."""
        return [1 / self.n] * self.n

    @abstractmethod
    def start(self, jobs: int | None = None) -> Progress:
        """Return the bookkeeping of a run, before its first round; `jobs` None = without end."""

    def plan(self, history: History, round: int, jobs: int | None = None) -> Plan:
        """Return what every worker does in a round, from who straggled in the rounds before.

        Args:
            history: stragglers of rounds 0, 1, ...; rounds before `round` that it does not reach had none.
            jobs: how many there are in all; None = without end.
        """
        progress = self.start(jobs)
        for past in range(round):
            progress.record(history[past] if past < len(history) else ())
        return progress.plan()

    def chunks(self, worker: int, item: Item) -> list[int]:
        """Return the chunks whose gradients an item needs, in the order that `encode` wants."""
        return self.code.assignment()[worker]

    def encode(self, worker: int, item: Item, gradients: Tensor) -> Tensor:
        """Combine the gradients of an item's chunks into its message: (chunks, ...) -> (...)."""
        return self.code.encode(worker, gradients)

    def parts(self) -> tuple[frozenset[tuple[int, int]], int]:
        """Return what a job's sum takes: (worker, chunk) of every D1 message, and how many coded groups."""
        return frozenset(), 1


class Progress(ABC):
    """Who straggled so far, as far as it still matters: the same on every worker.

    Args:
        jobs: how many there are in all; None = without end.
    """

    memory = 0
    """Past rounds that are kept."""

    def __init__(self, scheme: Scheme, jobs: int | None) -> None:
        self.n, self.delay, self.jobs = scheme.n, scheme.delay, jobs
        self.round = 0
        self.late: dict[int, frozenset[int]] = {}
        """Stragglers of the rounds that are kept."""
        self._planned: tuple[int, Plan] | None = None

    @property
    def due(self) -> int | None:
        """The job that is decoded after this round; None where there is none yet."""
        return self.round - self.delay if self.round >= self.delay else None

    @property
    def over(self) -> bool:
        """Whether every job is done."""
        return self.jobs is not None and self.round >= self.jobs + self.delay

    def plan(self) -> Plan:
        """Return what every worker does in this round."""
        if self._planned is None or self._planned[0] != self.round:
            self._planned = self.round, {w: self.items(w) for w in range(self.n)}
        return self._planned[1]

    def exists(self, job: int) -> bool:
        """Say whether there is such a job."""
        return job >= 0 and (self.jobs is None or job < self.jobs)

    @abstractmethod
    def items(self, worker: int) -> list[Item]:
        """Return what one worker does in this round."""

    @abstractmethod
    def tolerates(self, stragglers: Collection[int]) -> bool:
        """Say whether the round may end without these workers' messages: no job is lost, whatever comes."""

    def record(self, stragglers: Collection[int]) -> None:
        """End the round: the messages of these workers did not arrive. On to the next."""
        self.late[self.round] = frozenset(stragglers)
        self.round += 1
        self.late.pop(self.round - 1 - self.memory, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the round and the history that still matters."""
        return {"round": self.round, "late": [[r, sorted(who)] for r, who in sorted(self.late.items())]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.round = int(state["round"])
        self.late = {int(r): frozenset(who) for r, who in state["late"]}
        self._planned = None


class UncodedScheme(Scheme):
    """No redundancy: n chunks, one a worker, and everyone is waited for.

    Example:
        >>> UncodedScheme(4).load
        0.25
    """

    def __init__(self, n: int) -> None:
        super().__init__(n, 0)

    @property
    def delay(self) -> int:
        """None."""
        return 0

    @property
    def load(self) -> float:
        """Return 1 / n."""
        return 1 / self.n

    @property
    def model(self) -> PerRound:
        """Nobody may straggle."""
        return PerRound(0)

    def start(self, jobs: int | None = None) -> Progress:
        """Return the bookkeeping of a run."""
        return _OneRound(self, jobs)


class GradientCodingScheme(Scheme):
    """(n, s) gradient coding in every round by itself: any s workers may straggle; every worker computes s + 1 chunks.

    Args:
        n: workers.
        s: stragglers a round, 0..n-1.
    Example:
        >>> GradientCodingScheme(256, 15).load
        0.0625
    """

    def __init__(self, n: int, s: int, kind: Kind = "auto", seed: int = 0) -> None:
        super().__init__(n, s, kind, seed)
        if not 0 <= s < n:
            raise LaminaError(f"s={s} takes at least {s + 1} workers, got {n}")

    @property
    def delay(self) -> int:
        """None."""
        return 0

    @property
    def load(self) -> float:
        """Return (s + 1) / n."""
        return (self.s + 1) / self.n

    @property
    def model(self) -> PerRound:
        """At most s a round."""
        return PerRound(self.s)

    def start(self, jobs: int | None = None) -> Progress:
        """Return the bookkeeping of a run."""
        return _OneRound(self, jobs)


class _OneRound(Progress):
    """Every job in a round of its own."""

    def __init__(self, scheme: Scheme, jobs: int | None) -> None:
        super().__init__(scheme, jobs)
        self.model = scheme.model

    def items(self, worker: int) -> list[Item]:
        return [Item(self.round, "code", 0)] if self.exists(self.round) else []

    def tolerates(self, stragglers: Collection[int]) -> bool:
        return self.model.allows([stragglers])


def least_load(n: int, B: int, W: int, lam: int) -> float:
    """Return the load below which no scheme survives (B, W, lam)-bursty stragglers (theorem 4.1)."""
    return (W - 1 + B) / (n * (W - 1) + B * (n - lam))
