"""Which workers may straggle when: models of stragglers, and whether a history is one of a model's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lamina.errors import LaminaError

History = Sequence[Collection[int]]
"""The workers that straggled, round by round."""


@dataclass(frozen=True)
class PerRound:
    """At most `s` workers straggle in a round."""

    s: int
    """Workers, >= 0."""

    @property
    def window(self) -> int:
        """Rounds that are looked at together."""
        return 1

    def allows(self, rounds: History) -> bool:
        """Say whether the rounds of one window are as the model says."""
        return all(len(set(r)) <= self.s for r in rounds)


@dataclass(frozen=True)
class Bursty:
    """In any W rounds at most `lam` workers straggle, and one that does at round r does not at r+B .. r+W-1."""

    B: int
    """Longest burst of one worker, in rounds, 1 <= B <= W."""
    W: int
    """Rounds of a window."""
    lam: int
    """Distinct stragglers in a window, >= 0."""

    def __post_init__(self) -> None:
        """Refuse what is no model."""
        if not 1 <= self.B <= self.W or self.lam < 0:
            raise LaminaError(
                f"a bursty model takes 1 <= B <= W and lam >= 0, got B={self.B}, W={self.W}, lam={self.lam}"
            )

    @property
    def window(self) -> int:
        """Rounds that are looked at together."""
        return self.W

    def allows(self, rounds: History) -> bool:
        """Say whether the rounds of one window are as the model says."""
        sets = [frozenset(r) for r in rounds]
        if len(frozenset().union(*sets)) > self.lam:
            return False
        return all(not a & b for i, a in enumerate(sets) for b in sets[i + self.B : i + self.W])


@dataclass(frozen=True)
class Arbitrary:
    """In any W rounds at most `lam` workers straggle, each in at most N of them."""

    N: int
    """Rounds in which one worker may straggle, >= 0."""
    W: int
    """Rounds of a window, >= 1."""
    lam: int
    """Distinct stragglers in a window, >= 0."""

    @property
    def window(self) -> int:
        """Rounds that are looked at together."""
        return self.W

    def allows(self, rounds: History) -> bool:
        """Say whether the rounds of one window are as the model says."""
        sets = [frozenset(r) for r in rounds]
        everyone = frozenset().union(*sets)
        return len(everyone) <= self.lam and all(sum(w in r for r in sets) <= self.N for w in everyone)


@dataclass(frozen=True)
class BurstyOrFew:
    """Any W rounds are bursty, or have at most `s` stragglers each: what selective repetition tolerates."""

    bursty: Bursty
    s: int
    """Workers, >= 0."""

    @property
    def window(self) -> int:
        """Rounds that are looked at together."""
        return self.bursty.W

    def allows(self, rounds: History) -> bool:
        """Say whether the rounds of one window are as the model says."""
        return self.bursty.allows(rounds) or PerRound(self.s).allows(rounds)


Tolerance = PerRound | Bursty | Arbitrary | BurstyOrFew


def conforms(history: History, model: Tolerance) -> bool:
    """Say whether every window of a history is as the model says.

    Example:
        >>> conforms([{0}, {1}, {0}], Bursty(B=1, W=2, lam=2))
        True
        >>> conforms([{0}, {0}], Bursty(B=1, W=2, lam=2))
        False
    """
    last = max(0, len(history) - model.window)
    return all(model.allows(history[start : start + model.window]) for start in range(last + 1))
