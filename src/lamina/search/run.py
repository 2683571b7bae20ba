"""Run a search: one training run a trial, each in a folder of its own; a table, and a report with the front."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lamina.data import Data
from lamina.errors import LaminaError
from lamina.recipe import Recipe, build, check, dump
from lamina.search import report
from lamina.search.measure import latency, peak_bytes, rows_of
from lamina.search.space import Point
from lamina.search.trial import Trial
from lamina.train.metrics import Metrics, read
from lamina.train.outcome import Run, count
from lamina.train.run import train, write_recipe

RECIPE, RESULTS, TRIALS = "recipe.yaml", "results.jsonl", "trials"
"""What a search's folder holds, beside the report."""


def search(
    recipe: Recipe,
    *,
    algorithm: Any = "sweep",
    trials: int | None = None,
    folder: str | Path | None = None,
) -> list[Trial]:
    """Train the points of a search space and return what each gave.

    The folder holds the space (`recipe.yaml`), a row a trial (`results.jsonl`), the run folders (`trials/000`, ...) and
    `report.html`. Called again with the same folder it goes on: finished trials are not run again, a killed one
    continues from its last checkpoint. A trial whose choices do not fit together is a row with an error.

    Args:
        recipe: with choices left open.
        algorithm: which point comes next, a node of kind `algorithm`.
        trials: stop when so many are done; None = the algorithm says.
        folder: None = `runs/<recipe>-search`.
    Raises:
        LaminaError: nothing is open, an option does not fit, or the folder holds another search.
    """
    recipe, chooser = check(recipe), build(algorithm, "algorithm")
    if trials is not None and trials < 1:
        raise LaminaError(f"a search has at least one trial, got {trials}")
    path = Path("runs", f"{_stem(recipe)}-search") if folder is None else Path(folder)
    _refuse_another(recipe, path)
    results, done = Metrics(path / RESULTS), load(path)
    results.drop_torn()
    while (trials is None or len(done) < trials) and (point := chooser.propose(recipe, done)) is not None:
        # Only now: a space that cannot be searched leaves nothing behind.
        write_recipe(recipe, path / RECIPE)
        done.append(run_trial(point, len(done), path / TRIALS / f"{len(done):03d}"))
        results.append(asdict(done[-1]))
    report.show(done, report.write(path, done))
    return done


def run_trial(point: Point, number: int, folder: Path) -> Trial:
    """Train one point in its folder (going on, if it was begun) and measure what came out."""
    try:
        run = train(point.recipe, folder=folder, resume=(folder / RECIPE).exists())
    except LaminaError as error:
        return Trial(number=number, chosen=dict(point.chosen), error=str(error))
    return measure(run, point, number)


def measure(run: Run, point: Point, number: int) -> Trial:
    """Make the row of a run that is over."""
    data: Data = build(point.recipe.data, "data")
    one, many = rows_of(data, 1), rows_of(data, 32)
    return Trial(
        number=number,
        chosen=dict(point.chosen),
        loss=run.loss if run.evaluation is None else run.evaluation,
        metrics=run.measured,
        parameters=count(run.model),
        latency_1=latency(run.model, one),
        latency_32=latency(run.model, many),
        peak_bytes=peak_bytes(run.model, many),
        seconds=sum(stage.seconds for stage in run.stages),
    )


def _stem(recipe: Recipe) -> str:
    """Name the recipe by the file it came from."""
    places = (p.rpartition(":")[0] for p in recipe.places.values() if not p.startswith("override"))
    return Path(next(places, "")).stem or "recipe"


def _refuse_another(recipe: Recipe, folder: Path) -> None:
    kept = folder / RECIPE
    if kept.exists() and kept.read_text(encoding="utf-8") != dump(recipe):
        raise LaminaError(f"{kept} is another search space: choose another folder with --folder, or remove that one")


def load(folder: str | Path) -> list[Trial]:
    """Read the trials of a search that was run, or begun; none where there is none."""
    path = Path(folder) / RESULTS
    return [Trial(**row) for row in read(path)] if path.exists() else []
