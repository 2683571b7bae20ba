"""`lamina reproduce`: run experiments, judge them, write their evidence."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lamina.data import noting_files
from lamina.errors import LaminaError
from lamina.experiments import evidence, picture
from lamina.experiments.harness import (
    SMOKE,
    Experiment,
    Measurement,
    experiments,
    figures,
    find,
    interval_lines,
    paper_figures,
    reported,
    verdict,
)

console = Console()


def main(
    slugs: Sequence[str] = (),
    *,
    smoke: bool = False,
    check: bool = False,
    allow_stale: bool = False,
    into: Path | None = None,
) -> int:
    """Reproduce the named methods (all of them without a name); return the exit code.

    One failing experiment never hides the others; the code is 1 if any failed to run or, with `check`, if any
    evidence is stale, edited or has another verdict than it says.

    Args:
        smoke: a tenth of the budget, one seed, no evidence written.
        check: train nothing; recompute verdicts, code hashes and digests.
        allow_stale: with `check`, stale evidence is printed and not counted.
        into: folder for the evidence; default the source tree's.
    Raises:
        LaminaError: options that exclude each other, or no experiment is called so.
    """
    if check and smoke:
        raise LaminaError("--smoke runs the experiments and --check runs nothing: give one of them")
    if allow_stale and not check:
        raise LaminaError("--allow-stale belongs to --check")
    chosen = [find(s) for s in dict.fromkeys(slugs)] if slugs else list(experiments().values())
    if check:
        return _check(chosen, allow_stale, into)
    failed = [e.slug for e in chosen if not _attempt(e, smoke, into)]
    if failed:
        console.print(f"failed to run: {', '.join(failed)}", style="red")
    return int(bool(failed))


def reproduce(experiment: Experiment, *, into: Path | None = None) -> Path:
    """Run every seed of one experiment; write `evidence/<slug>.json`, `.svg`, and `-picture.svg` where it draws one.

    Return the JSON's path.
    """
    started = time.perf_counter()
    with noting_files() as files:
        measurements = [run_seed(experiment, seed) for seed in experiment.seeds]
    where, seconds = into or evidence.folder(), time.perf_counter() - started
    path = evidence.write(experiment, measurements, seconds, where, files)
    picture.draw(experiment, measurements, where / f"{experiment.slug}.svg")
    picture.draw_own(experiment, _device(), where / f"{experiment.slug}-picture.svg")
    show(experiment, measurements)
    return path


def run_seed(experiment: Experiment, seed: int) -> Measurement:
    """Run one seed with torch's global generator set to it."""
    device = _device()
    torch.manual_seed(seed)
    started = time.perf_counter()
    measurement = experiment.run(seed, device)
    console.print(
        f"{experiment.slug} seed {seed}: ours {_words(figures(measurement.ours))} | baseline "
        f"{_words(figures(measurement.baseline))} ({time.perf_counter() - started:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
    return measurement


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_one(experiment: Experiment, where: Path | None = None) -> list[str]:
    """List what is wrong with an experiment's stored evidence, stale evidence included; empty = nothing."""
    aged, wrong = findings(experiment, where)
    return aged + wrong


def findings(experiment: Experiment, where: Path | None = None) -> tuple[list[str], list[str]]:
    """Return what makes an experiment's stored evidence stale, and what is wrong with it whatever the code says now."""
    slug = experiment.slug
    try:
        found = evidence.read(slug, where)
        if found is None:
            return [], [f"{slug}: no evidence (lamina reproduce {slug})"]
        aged = [f"{slug}: stale: {name} changed since the run" for name in evidence.stale(experiment, found)]
        judged = evidence.judge(found)
    except LaminaError as error:
        return [], [str(error)]
    stored = found.content["status"]
    wrong = [] if judged.status == stored else [f"{slug}: field 'status' says {stored}, the bar says {judged.status}"]
    return aged, wrong


def show(experiment: Experiment, measurements: Sequence[Measurement]) -> None:
    """Print the table of one experiment: ours, baseline, paper, and the verdict."""
    judged = verdict(measurements, experiment.bar)
    table = Table(title=f"{experiment.slug}: {experiment.bar.text}", title_justify="left")
    for column in ("figure", "ours", "baseline", "paper"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name in figures(measurements[0].ours):
        ours = [figures(m.ours)[name] for m in measurements]
        base = [figures(m.baseline)[name] for m in measurements if name in figures(m.baseline)]
        paper = paper_figures(measurements[0].paper).get(name)
        table.add_row(name, _spread(ours), _spread(base), "-" if paper is None else f"{paper:g}")
    for name, values in reported(measurements).items():
        table.add_row(f"{name} (reported)", _spread(values), "-", "-")
    console.print(table)
    for line in interval_lines(judged, experiment.bar):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{judged.status or 'no verdict'}: {judged.reason}", style="bold")


def _check(chosen: Sequence[Experiment], allow_stale: bool, into: Path | None) -> int:
    found = [findings(e, into) for e in chosen]
    aged, problems = ([line for both in found for line in both[k]] for k in (0, 1))
    for line in aged:
        console.print(line, style="yellow" if allow_stale else "red", highlight=False, soft_wrap=True)
    for line in problems:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    if allow_stale:
        stale = sum(bool(lines) for lines, _ in found)
        console.print(f"{len(chosen)} experiments checked, {stale} stale, {len(problems)} problems")
        return int(bool(problems))
    console.print(f"{len(chosen)} experiments checked, {len(aged) + len(problems)} problems")
    return int(bool(aged or problems))


def _attempt(experiment: Experiment, smoke: bool, into: Path | None) -> bool:
    try:
        if smoke:
            os.environ[SMOKE] = "1"
            run_seed(experiment, experiment.seeds[0])
        else:
            reproduce(experiment, into=into)
    except LaminaError as error:
        console.print(f"{experiment.slug} failed: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return False
    except Exception:
        console.print(f"{experiment.slug} failed:", style="red")
        console.print(traceback.format_exc(), highlight=False, markup=False)
        return False
    finally:
        os.environ.pop(SMOKE, None)
    return True


def _words(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" if k != "value" else f"{v:.4g}" for k, v in values.items())


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return f"{mean:.4g} ({min(values):.4g} .. {max(values):.4g})" if len(values) > 1 else f"{mean:.4g}"
