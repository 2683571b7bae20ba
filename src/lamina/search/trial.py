"""What one trial of a search gave, and what several with other seeds say together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COSTS = ("parameters", "latency_1", "latency_32", "peak_bytes")
"""What a summary is compared by besides its score: the fewer the better."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the space, trained; a row of results.jsonl."""

    number: int
    chosen: Mapping[str, Any]
    """Dotted path -> value."""
    loss: float | None = None
    """Of the evaluation set; of the last training steps where there is none. None: the trial failed."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the objective logs besides (accuracy), over the same rows."""
    parameters: int = 0
    latency_1: float = 0.0
    """Seconds of a forward pass of one row, without gradients; median."""
    latency_32: float = 0.0
    """Seconds of 32 rows (or the whole evaluation set, where it is smaller)."""
    peak_bytes: int = 0
    """Weights and live tensors at the worst moment of the forward pass of 32 rows."""
    seconds: float = 0.0
    """Spent in training steps, before a kill too."""
    error: str | None = None
    """Why the trial could not be run."""

    @property
    def score(self) -> float | None:
        """What is to be high: accuracy, or the loss below zero. None: failed."""
        return self.metrics.get("accuracy", None if self.loss is None else -self.loss)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The trials that differ in seeds alone."""

    chosen: Mapping[str, Any]
    """Without the seeds."""
    trials: int
    score: float | None
    """Mean; None where all failed."""
    spread: float
    """Standard deviation of the score over seeds (n - 1); 0 for one."""
    loss: float | None
    costs: Mapping[str, float]
    """Means of `COSTS`."""
    seconds: float
    dominated: bool
    """Another one is at least as good in score and all costs, and better in one."""


def is_seed(path: str) -> bool:
    """Say whether a dotted path ends in `seed`."""
    return path.rpartition(".")[2] == "seed"


def summaries(trials: Sequence[Trial]) -> list[Summary]:
    """Put the trials together that differ in seeds alone, in the order they first came; mark the dominated ones."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(repr(_without_seeds(trial)), []).append(trial)
    rows = [_summary(group) for group in groups.values()]
    return [Summary(**{**vars(row), "dominated": any(_dominates(other, row) for other in rows)}) for row in rows]


def _without_seeds(trial: Trial) -> dict[str, Any]:
    return {path: value for path, value in trial.chosen.items() if not is_seed(path)}


def _summary(group: Sequence[Trial]) -> Summary:
    good = [t for t in group if t.score is not None and t.loss is not None]
    scores = [t.score for t in good if t.score is not None]

    def mean(name: str) -> float:
        return statistics.fmean(getattr(t, name) for t in good) if good else 0.0

    return Summary(
        chosen=_without_seeds(group[0]),
        trials=len(good),
        score=statistics.fmean(scores) if scores else None,
        spread=statistics.stdev(scores) if len(scores) > 1 else 0.0,
        loss=mean("loss") if good else None,
        costs={name: mean(name) for name in COSTS},
        seconds=mean("seconds"),
        dominated=False,
    )


def _dominates(one: Summary, other: Summary) -> bool:
    if one.score is None or other.score is None:
        return False
    ours, theirs = ([-s.score, *(s.costs[c] for c in COSTS)] for s in (one, other) if s.score is not None)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))
