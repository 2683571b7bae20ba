"""Codes over time: what a straggler did not deliver is done again rounds later, or only if it must be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.coding.matrix import Kind
from lamina.gradients.coding.scheme import Item, Progress, Scheme
from lamina.gradients.coding.tolerance import Bursty, BurstyOrFew


class SelectiveRepetitionScheme(Scheme):
    """SR-SGC: (n, s) gradient coding with a small s; where more straggled, some repeat that task B rounds later.

    Survives every pattern of which each window of W rounds is (B, W, lam)-bursty or has at most s stragglers a round
    (with the repetition code: is bursty), where s = ceil(B lam / (W - 1 + B)). Delay B.

    Args:
        n: workers.
        B: longest burst, in rounds, >= 1.
        W: rounds of a window; B divides W - 1.
        lam: distinct stragglers in a window, 0..n.
    Raises:
        LaminaError: parameters out of their ranges.
    Source: Krishnan, Ebrahimi, Khisti, Sequential Gradient Coding For Straggler Mitigation (ICLR 2023), algorithm 1.
    Example:
        >>> scheme = SelectiveRepetitionScheme(256, B=2, W=3, lam=23)
        >>> scheme.s, scheme.load, scheme.delay
        (12, 0.05078125, 2)
    """

    def __init__(self, n: int, B: int, W: int, lam: int, kind: Kind = "auto", seed: int = 0) -> None:
        _check(n, B, W, lam)
        if (W - 1) % B:
            raise LaminaError(f"selective repetition takes a B that divides W - 1, got B={B} and W={W}")
        s = -(-B * lam // (W - 1 + B))
        super().__init__(n, s, kind, seed)
        if s >= n:
            raise LaminaError(
                f"lam={lam} makes a code for s={s} stragglers, which takes at least {s + 1} workers, got {n}"
            )
        self.B, self.W, self.lam = B, W, lam

    @property
    def delay(self) -> int:
        """Return B."""
        return self.B

    @property
    def load(self) -> float:
        """Return (s + 1) / n."""
        return (self.s + 1) / self.n

    @property
    def model(self) -> BurstyOrFew:
        """Windows that are bursty, or have few stragglers a round."""
        return BurstyOrFew(Bursty(self.B, self.W, self.lam), self.s)

    def start(self, jobs: int | None = None) -> Progress:
        """Return the bookkeeping of a run."""
        return _Repeating(self, jobs)


class _Repeating(Progress):
    def __init__(self, scheme: SelectiveRepetitionScheme, jobs: int | None) -> None:
        super().__init__(scheme, jobs)
        self.B, self.W, self.lam, self.s = scheme.B, scheme.W, scheme.lam, scheme.s
        self.scheme = scheme
        self.memory = max(self.W - 1, self.B)
        self.repeats: dict[int, frozenset[int]] = {}
        """Who repeated an earlier task in the rounds that are kept."""

    def again(self) -> frozenset[int]:
        """Return who repeats the task of B rounds ago in this round."""
        job = self.round - self.B
        if not self.exists(job):
            return frozenset()
        late = self.late[job]
        without = sorted(late | self.repeats[job])
        if self.scheme.code.kind == "cyclic":
            return frozenset(without[: max(0, len(without) - self.s)])
        # One of each group that gave no answer; one that straggled then cannot do so now.
        span = self.s + 1
        groups = {w // span for w in without}
        silent = [[w for w in without if w // span == g] for g in groups]
        return frozenset(
            next((w for w in members if w in late), members[0]) for members in silent if len(members) == span
        )

    def items(self, worker: int) -> list[Item]:
        if worker in self._again:
            return [Item(self.round - self.B, "code", 0)]
        return [Item(self.round, "code", 0)] if self.exists(self.round) else []

    @property
    def _again(self) -> frozenset[int]:
        if self.round not in self.repeats:
            self.repeats[self.round] = self.again()
        return self.repeats[self.round]

    def tolerates(self, stragglers: Collection[int]) -> bool:
        now = frozenset(stragglers)
        counted = {r: who for r, who in self.late.items() if len(who) > self.s or self.repeats[r]}
        return _bursty(now, counted, self.round, self.B, self.W, self.lam)

    def record(self, stragglers: Collection[int]) -> None:
        # Those who had nothing to do did not fail to deliver.
        busy = {w for w, items in self.plan().items() if items}
        self.repeats[self.round] = self._again
        super().record(frozenset(stragglers) & busy)
        self.repeats.pop(self.round - 1 - self.memory, None)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"repeats": [[r, sorted(w)] for r, w in sorted(self.repeats.items())]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.repeats = {int(r): frozenset(who) for r, who in state["repeats"]}


class MultiplexedScheme(Scheme):
    """M-SGC: most chunks are sent uncoded and, if lost, sent again rounds later; only what is left is coded.

    A job's data are W - 1 chunks of each worker's own (D1) and B groups of n smaller chunks (D2), each group in an
    (n, lam) code. In every round a worker does W - 1 + B pieces of equal cost, for as many jobs: first tries of its
    own chunks, then another try of a lost one, or a group's coded combination where none was lost. Survives
    (B, W, lam)-bursty stragglers and (B, W + B - 1, lam)-arbitrary ones, with a load close to 1 / n. Delay W - 2 + B.

    Args:
        n: workers.
        B: longest burst, in rounds, 1..W-1.
        W: rounds of a window.
        lam: distinct stragglers in a window, 0..n; n = no coded part at all.
    Raises:
        LaminaError: parameters out of their ranges.
    Source: Krishnan, Ebrahimi, Khisti, Sequential Gradient Coding For Straggler Mitigation (ICLR 2023), section 3.3,
        algorithm 2.
    Example:
        >>> scheme = MultiplexedScheme(256, B=1, W=2, lam=27)
        >>> round(scheme.load, 7), scheme.delay
        (0.0075431, 1)
    """

    def __init__(self, n: int, B: int, W: int, lam: int, kind: Kind = "auto", seed: int = 0) -> None:
        _check(n, B, W, lam)
        super().__init__(n, min(lam, n - 1), kind, seed)
        self.B, self.W, self.lam = B, W, lam
        self.groups = B if lam < n else 0
        """Coded groups of a job."""

    @property
    def delay(self) -> int:
        """Return W - 2 + B."""
        return self.W - 2 + self.B

    @property
    def load(self) -> float:
        """Return the share of one round: W - 1 + B pieces of one own chunk's size."""
        return (self.W - 1 + self.B) * self.sizes_of[0]

    @property
    def sizes_of(self) -> tuple[float, float]:
        """Share of an own chunk, and of a coded one."""
        if not self.groups:
            return 1 / (self.n * (self.W - 1)), 0.0
        small = 1 / (self.n * ((self.W - 1) * (self.lam + 1) + self.B))
        return (self.lam + 1) * small, small

    @cached_property
    def sizes(self) -> list[float]:
        """Share of every chunk: the workers' own, worker by worker, then the groups'."""
        own, coded = self.sizes_of
        return [own] * (self.n * (self.W - 1)) + [coded] * (self.groups * self.n)

    @property
    def model(self) -> Bursty:
        """(B, W, lam)-bursty."""
        return Bursty(self.B, self.W, self.lam)

    def start(self, jobs: int | None = None) -> Progress:
        """Return the bookkeeping of a run."""
        return _Multiplexed(self, jobs)

    def chunks(self, worker: int, item: Item) -> list[int]:
        """Return the chunks whose gradients an item needs, in the order that `encode` wants."""
        if item.kind == "D1":
            return [worker * (self.W - 1) + item.part]
        before = self.n * (self.W - 1) + item.part * self.n
        return [before + c for c in self.code.assignment()[worker]]

    def encode(self, worker: int, item: Item, gradients: Tensor) -> Tensor:
        """Combine the gradients of an item's chunks into its message: (chunks, ...) -> (...)."""
        return gradients[0] if item.kind == "D1" else self.code.encode(worker, gradients)

    def parts(self) -> tuple[frozenset[tuple[int, int]], int]:
        """Return what a job's sum takes: every worker's own chunks, and the groups."""
        return frozenset((w, k) for w in range(self.n) for k in range(self.W - 1)), self.groups


class _Multiplexed(Progress):
    def __init__(self, scheme: MultiplexedScheme, jobs: int | None) -> None:
        super().__init__(scheme, jobs)
        self.B, self.W, self.lam, self.groups = scheme.B, scheme.W, scheme.lam, scheme.groups
        self.memory = self.W - 2 + self.B
        self._hit: tuple[int, frozenset[int]] = (-1, frozenset())

    def items(self, worker: int) -> list[Item]:
        found = []
        for slot in range(self.W - 1 + self.B):
            job = self.round - slot
            if not self.exists(job):
                continue
            if slot < self.W - 1:
                found.append(Item(job, "D1", slot))
            elif lost := self._lost(worker, job):
                found.append(Item(job, "D1", lost[0]))
            elif self.groups:
                found.append(Item(job, "D2", slot - (self.W - 1)))
        return found

    def _lost(self, worker: int, job: int) -> list[int]:
        """Return the own chunks of a job that a worker has not delivered yet, its first tries being over."""
        if worker not in self._recent():
            return []
        missed = [worker in self.late.get(r, ()) for r in range(job, self.round)]
        lost = [k for k in range(self.W - 1) if missed[k]]
        done = sum(not again for again in missed[self.W - 1 :])
        return lost[done:]

    def _recent(self) -> frozenset[int]:
        if self._hit[0] != self.round:
            self._hit = self.round, frozenset().union(*self.late.values())
        return self._hit[1]

    def tolerates(self, stragglers: Collection[int]) -> bool:
        return _bursty(frozenset(stragglers), self.late, self.round, self.B, self.W, self.lam)


def _bursty(now: frozenset[int], late: Mapping[int, frozenset[int]], round: int, B: int, W: int, lam: int) -> bool:
    """Say whether the window of W rounds that ends now stays bursty: the master's rule."""
    if not now:
        return True
    window = {r: who for r, who in late.items() if r > round - W}
    if len(now.union(*window.values())) > lam:
        return False
    return not any(now & who for r, who in window.items() if r <= round - B)


def _check(n: int, B: int, W: int, lam: int) -> None:
    if not 1 <= B < W:
        raise LaminaError(f"B must be in 1..W-1, got B={B} and W={W}")
    if lam < 0:
        raise LaminaError(f"lam must be at least 0, got {lam}")
    if lam > n:
        raise LaminaError(f"lam={lam} takes at least {lam} workers, got {n}")
