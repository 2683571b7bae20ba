"""What an experiment is: a claim, ours and the baseline measured in one run, and a bar set before it.

    @experiment("hopfield", source="table 2", bar="accuracy(ours) - accuracy(baseline) >= 0.02, 3 seeds")
    def run(seed: int, device: torch.device) -> Measurement: ...

The verdict is computed from the measurements (`verdict`), never typed.
Source: Banna et al., An Experience Report on Machine Learning Reproducibility (2021), arXiv 2107.00821.
"""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from lamina.errors import LaminaError, nearest
from lamina.experiments.bars import Bar, parse_bar

Figures = float | Mapping[str, float]
Status = Literal["reproduced", "direction only", "not reproduced"]
Run = Callable[[int, torch.device], "Measurement"]

SMOKE = "LAMINA_SMOKE"
"""Environment variable that `lamina reproduce --smoke` sets for the runs it starts."""


@dataclass(frozen=True)
class Measurement:
    """What one seed of an experiment measured; ours and baseline come from the same call."""

    ours: Figures
    """One number, or several by name."""
    baseline: Figures
    """Of the peer or the plain way, same names."""
    paper: Figures | str | None = None
    """The paper's own figures, to print beside ours."""
    unit: str = ""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Reported beside, no part of the bar."""


@dataclass(frozen=True)
class Experiment:
    """One registered experiment."""

    slug: str
    source: str
    """Table, figure or section of the paper the claim is from."""
    bar: Bar
    """What counts as reproduced."""
    run: Run
    seeds: tuple[int, ...]
    budget: str
    """Expected time of the whole run on two cores, for people."""


@dataclass(frozen=True)
class Verdict:
    """What the measurements say about the bar."""

    status: Status | None
    """None: no verdict, see `reason`."""
    reason: str
    intervals: tuple[tuple[float, float, float], ...]
    """Low, mean, high of the left side of each clause of the bar."""


_experiments: dict[str, Experiment] = {}


def experiment(
    slug: str, *, source: str, bar: str, seeds: Sequence[int] = (0, 1, 2), budget: str = "3m"
) -> Callable[[Run], Run]:
    """Register the decorated `run(seed, device)` as the experiment of a method.

    Args:
        slug: the method's name as `lamina methods` lists it.
        bar: such as `accuracy(ours) - accuracy(baseline) >= 0.02, 3 seeds`; parsed at import, so that a
            bar that cannot be computed is an error before the run.
    """

    def add(run: Run) -> Run:
        parsed = parse_bar(bar)
        if len(set(seeds)) < parsed.seeds:
            raise LaminaError(f"the experiment {slug!r} has {len(set(seeds))} seeds, its bar asks for {parsed.seeds}")
        taken = _experiments.get(slug)
        if taken is not None and taken.run.__module__ != run.__module__:
            raise LaminaError(f"two experiments are called {slug!r}: in {taken.run.__module__} and {run.__module__}")
        _experiments[slug] = Experiment(slug, source, parsed, run, tuple(seeds), budget)
        return run

    return add


def experiments() -> dict[str, Experiment]:
    """Return every experiment of the package by slug (its modules are imported now)."""
    import lamina.experiments as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"lamina.experiments.{module.name}")
    return dict(sorted(_experiments.items()))


def find(slug: str) -> Experiment:
    """Return one experiment.

    Raises:
        LaminaError: there is none; the message lists the nearest.
    """
    known = experiments()
    if slug not in known:
        meant = nearest(slug.lower().replace("_", "-"), known)
        raise LaminaError(f"no experiment is called {slug!r}{meant}; known: {', '.join(known)}")
    return known[slug]


def smoke() -> bool:
    """Say whether this is a smoke run: an experiment then takes about a tenth of its budget."""
    return os.environ.get(SMOKE) == "1"


def verdict(measurements: Sequence[Measurement], bar: Bar) -> Verdict:
    """Judge the measurements of all seeds against the bar.

    Fewer seeds than asked, or a NaN: no status. The whole interval of every clause's left side satisfies the
    bar: reproduced. Its mean satisfies it with the margin taken away (0 for a difference, 1 for a ratio): direction
    only. Else not reproduced. Interval: 95 % percentile bootstrap over the per-seed values.
    """
    if len(measurements) < bar.seeds:
        return Verdict(None, f"{len(measurements)} seeds measured, the bar asks for {bar.seeds}", ())
    intervals = []
    for clause in bar.clauses:
        values = [clause.value(figures(m.ours), figures(m.baseline), paper_figures(m.paper)) for m in measurements]
        if any(not math.isfinite(v) for v in values):
            return Verdict(None, f"a measured value of {clause.text!r} is not finite: {values}", ())
        intervals.append(interval(values))
    pairs = list(zip(bar.clauses, intervals, strict=True))
    if all(c.holds(low) and c.holds(high) for c, (low, _, high) in pairs):
        return Verdict("reproduced", "the whole interval meets the bar", tuple(intervals))
    if all(c.direction(mean) for c, (_, mean, _) in pairs):
        return Verdict(
            "direction only", "the mean points the claimed way, the interval misses the bar", tuple(intervals)
        )
    return Verdict("not reproduced", "the mean does not point the claimed way", tuple(intervals))


def interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float, float]:
    """Return (low, mean, high): the 95 % percentile bootstrap of the mean, with a fixed seed."""
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) == 1 or float(np.ptp(sample)) == 0.0:
        return mean, mean, mean
    drawn = np.random.default_rng(0).integers(0, len(sample), size=(resamples, len(sample)))
    low, high = np.percentile(sample[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), mean, float(high)


def interval_lines(judged: Verdict, bar: Bar) -> list[str]:
    """Word what the verdict rests on: a line a clause, with mean and interval of its left side."""
    return [
        f"{clause.text}: {mean:.4g} [{low:.4g}, {high:.4g}]"
        for clause, (low, mean, high) in zip(bar.clauses, judged.intervals, strict=False)
    ]


def figures(value: Figures) -> dict[str, float]:
    """Return measured figures by name; a single number is called `value`."""
    return {str(k): float(v) for k, v in value.items()} if isinstance(value, Mapping) else {"value": float(value)}


def reported(measurements: Sequence[Measurement]) -> dict[str, list[float]]:
    """Return what was measured beside the bar, by name: of every seed that has it, for a run may do more on one."""
    names = dict.fromkeys(name for m in measurements for name in m.extra)
    return {name: [float(m.extra[name]) for m in measurements if name in m.extra] for name in names}


def paper_figures(value: Figures | str | None) -> dict[str, float]:
    """Return the paper's figures by name; text and None have none."""
    return {} if value is None or isinstance(value, str) else figures(value)
