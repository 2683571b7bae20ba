"""A whole training run from a recipe: build every part, train, save the model, write the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from lamina import io
from lamina.data import Data
from lamina.errors import LaminaError
from lamina.objectives import WeightedSum
from lamina.objectives.objective import Objective
from lamina.optim import parameter_groups
from lamina.parallel.data_parallel import Placement
from lamina.recipe import Recipe, build, check, dump, factory, frame, load, objectives, placed
from lamina.recipe._options import signature_of
from lamina.registry import find
from lamina.train import distributed, report, state
from lamina.train.distributed import World
from lamina.train.folder import MAY_DIFFER
from lamina.train.options import TrainOptions
from lamina.train.outcome import Run
from lamina.train.phases import Scheduled
from lamina.train.preflight import refuse_batch, refuse_misfits, refuse_objective
from lamina.train.trainer import Trainer

RECIPE, MODEL = "recipe.yaml", "model"
"""What a run folder holds beside metrics and checkpoints."""


def train(recipe: Recipe, *, folder: str | Path | None = None, resume: bool = False) -> Run:
    """Train what a recipe says and return the result; the folder holds everything else.

    Under torchrun every process calls this; a worker group that torchrun restarted goes on by itself.

    Args:
        folder: of the run; None = the next free `runs/<recipe>-001` (with `resume`: the last one).
        resume: go on from the folder's last checkpoint.
    Raises:
        LaminaError: something does not fit, the folder holds another recipe's run, or training cannot go on.
    """
    recipe = check(recipe, choices_allowed=False)
    options = TrainOptions(**recipe.train)
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = distributed.start(options.device)
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with distributed.lost_peers_told(world):
        path = Path(folder) if folder is not None else _default_folder(recipe, world, resume)
        _keep_recipe(recipe, path, world, resume)
        with placed(recipe):
            done = trainer(recipe, world, path).fit(resume)
        state.together(world, path, "the trained model", lambda: _leave(done, recipe, path) if world.first else None)
    if not joined:
        distributed.finish()
    return done


run = train


def _leave(done: Run, recipe: Recipe, path: Path) -> None:
    io.save(done.model, path / MODEL, base=_base(done.model, recipe, done))
    pictures: Any = getattr(done.model, "pictures", dict)
    title = recipe.report.get("title")
    _show(done, report.write(path, done.stages, title=title, unit=done.unit, pictures=pictures()))


def trainer(recipe: Recipe, world: World, folder: Path | None) -> Trainer:
    """Build everything a checked recipe names; the weights are drawn from the seed of `train`."""
    options = TrainOptions(**recipe.train)
    data: Data = build(recipe.data, "data")
    torch.manual_seed(options.seed)
    model: nn.Module = build(recipe.model, "model", **data.sizes)
    refuse_batch(recipe.model, model, data)
    refuse_misfits(model, data.sizes, [build(node, "pass", f"rewrite[{i}]") for i, node in enumerate(recipe.rewrite)])
    objective = _objective(recipe, model, data.sizes)
    refuse_objective(objective, model, data, recipe.rewrite)
    reducer = None
    if recipe.gradients is not None:
        reducer = build(recipe.gradients, "reducer", world=world.size, workers=world.size)
    return Trainer(
        model,
        data,
        objective,
        _optimizer(recipe),
        options=options,
        rewrites=[
            Scheduled(build(node, "pass", f"rewrite[{i}]"), frame(node, "pass")["at"])
            for i, node in enumerate(recipe.rewrite)
        ],
        reducer=reducer,
        placement=_placement(recipe.parallel, world),
        folder=folder,
        schedule=factory("schedule", frame(recipe.optimizer, "optimizer")["schedule"]),
    )


def _objective(recipe: Recipe, model: nn.Module, sizes: Mapping[str, Any]) -> Objective:
    nodes = objectives(recipe)
    many = isinstance(recipe.objective, (list, tuple))
    parts = [
        build(node, "objective", f"objective[{i}]" if many else None, model=model, **sizes)
        for i, node in enumerate(nodes)
    ]
    weights = [float(frame(node, "objective")["weight"]) for node in nodes]
    if len(parts) == 1 and weights == [1.0]:
        only: Objective = parts[0]
        return only
    names = [node["name"].rpartition(":")[2] for node in nodes]
    unique = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]
    return WeightedSum(list(zip(weights, parts, strict=True)), unique)


def _optimizer(recipe: Recipe) -> Callable[[nn.Module], Optimizer]:
    node = recipe.optimizer
    decay = node.get("weight_decay") or 0.0
    exclude = frame(node, "optimizer")["exclude"]

    def make(model: nn.Module) -> Optimizer:
        made: Optimizer = build(node, "optimizer", params=parameter_groups(model, decay, exclude), model=model)
        return made

    return make


def _placement(node: Any, world: World) -> Placement:
    if node == "auto":
        return Placement(data=world.size)
    return Placement(data=node["data"], shard=node["shard"])


def _default_folder(recipe: Recipe, world: World, resume: bool) -> Path:
    """Number the runs of a recipe; the first process counts, the others hear of it."""
    place = next(iter(recipe.places.values()), "")
    stem = Path(place.rpartition(":")[0]).stem or "run"
    taken = sorted(p for p in Path("runs").glob(f"{stem}-*") if p.name.removeprefix(f"{stem}-").isdigit())
    last = int(taken[-1].name.rpartition("-")[2]) if taken else 0
    if resume and not last:
        raise LaminaError(f"there is no run runs/{stem}-... to resume: name its folder")
    chosen = Path("runs", f"{stem}-{last if resume else last + 1:03d}")
    return Path(world.everyone(str(chosen))[0])


def _keep_recipe(recipe: Recipe, folder: Path, world: World, resume: bool) -> None:
    """Write the recipe into the folder, or see that the one there is the same.

    Raises:
        LaminaError: another one is there (the first differing key is named), or a run that is not to be resumed.
    """
    kept = folder / RECIPE
    there = kept.exists()
    # Nobody may look any more when the first process writes.
    world.agree(None)
    if there and not resume:
        raise LaminaError(f"{folder} holds a run already: resume it, or choose another folder")
    if there:
        for key, old, new in differences(check(load(kept)), recipe):
            if key.split(".")[0] not in ("parallel", "report") and key.removeprefix("train.") not in MAY_DIFFER:
                raise LaminaError(f"{kept} is another recipe: {key} is {old!r} there and {new!r} here")
        return
    state.together(world, folder, str(kept), lambda: write_recipe(recipe, kept) if world.first else None)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe, fully spelled out; the folder is made where there is none."""
    text = dump(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Aside and renamed: half a recipe would be another run's.
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def differences(one: Recipe, other: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value in one, value in the other) of everything in which two checked recipes differ."""
    for key in ("model", "data", "objective", "optimizer", "rewrite", "gradients", "parallel", "train", "report"):
        yield from _differences(key, getattr(one, key), getattr(other, key))


def _differences(path: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys((*one, *other)):
            yield from _differences(f"{path}.{key}", one.get(key), other.get(key))
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}[{i}]", a, b)
    elif one != other:
        yield path, one, other


def _base(model: nn.Module, recipe: Recipe, done: Run) -> dict[str, Any] | None:
    """Return the node that builds the model before its rewrites; None where the model knows it itself."""
    try:
        io.base_node(model)
    except LaminaError:
        known = signature_of(find("model", recipe.model["name"])).options
        return {**{k: v for k, v in done.sizes.items() if k in known}, **recipe.model}
    return None


def _show(done: Run, path: Path) -> None:
    """Print the models that the rewrites made, side by side, and where the report is."""
    # Without borders it fits 80 columns; the longest names of passes go on in a second line.
    table = Table(*report.header(done.unit), title=str(done.folder), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for stage in done.stages:
        table.add_row(*report.stage_cells(stage))
    Console().print(table)
    # Not through the console, which would break a long path.
    print(f"report: {path}")
