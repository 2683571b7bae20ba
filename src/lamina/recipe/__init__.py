"""Recipes: a whole training run as one value, read from YAML or written in Python, checked before anything is built.

load, dump, override    YAML <-> Recipe, exactly
check                   every option against the signature it is for; the recipe fully spelled out
build, factory          a node -> the part it names, now or later with more values
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.errors import LaminaError, RecipeError, nearest
from lamina.recipe import _yaml
from lamina.recipe._building import FRAME as FRAME
from lamina.recipe._building import OFFERED as OFFERED
from lamina.recipe._building import Node as Node
from lamina.recipe._building import blamed, look_up, refuse_choice, spell
from lamina.recipe._building import build as build
from lamina.recipe._building import factory as factory
from lamina.recipe._building import open_choice as open_choice
from lamina.recipe._options import Misfit, fit, is_plain, plain, show, variants
from lamina.recipe._yaml import Choice as Choice

VERSION = 1
"""The recipe language this Lamina reads (top-level key `lamina`)."""

DEGREES = ("data", "shard", "tensor", "pipeline", "sequence")
"""Keys of `parallel`: how many parts each dimension of the mesh has."""

RUNNABLE_DEGREES = ("data", "shard")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. A node is `"part"` or `{"name": "part", "option": value}`; `check` says whether all fits."""

    lamina: int = VERSION
    model: Any
    data: Any
    objective: Any
    """One node, or a list of nodes, each with a `weight` (default 1)."""
    optimizer: Any = "adamw"
    """Its node also takes `schedule` (a node) and `exclude` ("norms_and_biases" | "nothing") from weight decay."""
    rewrite: Any = field(default_factory=list)
    """Passes in the order they run, each with `at`: "before" (default), a fraction of training, or "after"."""
    gradients: Any = None
    """A reducer, or None: torch's own all-reduce."""
    parallel: Any = "auto"
    train: Any = field(default_factory=dict)
    """Options of `lamina.train.options.TrainOptions`."""
    report: Any = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """`file:line` of each dotted path, for errors; empty for a recipe made in Python."""

    def __post_init__(self) -> None:
        """Hold what YAML would: a list for a tuple, text for a path; so that `load(dump(recipe)) == recipe`."""
        for key in KEYS:
            object.__setattr__(self, key, plain(getattr(self, key)))


KEYS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name != "places")
"""The top-level keys of a recipe."""


def load(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, from YAML text, or from a mapping; options are checked later, by `check`.

    Args:
        source: a path, or YAML text (a string with a line break or `: ` in it).
        overrides: `"optimizer.lr=1e-3"`, applied in order; see `override`.
    Raises:
        RecipeError: no such file, not a recipe's YAML, an unknown or missing top-level key.
    """
    places: dict[str, str] = {}
    if isinstance(source, Mapping):
        name, values = "the recipe", plain(source)
    elif isinstance(source, str) and ("\n" in source or ": " in source):
        name = "recipe"
        values, places = _yaml.read(source, name)
    else:
        name = str(source)
        values, places = _yaml.read(_read_file(Path(source)), Path(source).name)
    if not isinstance(values, Mapping):
        raise RecipeError(f"{name}:1: a recipe is a mapping with the keys {', '.join(KEYS)}, got {show(values)}")
    values = dict(values)
    for text in overrides:
        _override(values, text, places)
    return _from_mapping(values, places, name)


def dump(recipe: Recipe) -> str:
    """Write a recipe as YAML; `load` gives the very same recipe back.

    Raises:
        RecipeError: it holds Python objects that YAML has no words for.
    """
    for key, value in _mapping(recipe).items():
        if not is_plain(_close(value)):
            raise RecipeError(f"{key}: the recipe holds a Python object, which YAML cannot: {show(value)}")
    return _yaml.write(_mapping(recipe))


def override(recipe: Recipe, text: str) -> Recipe:
    """Return a copy with one value set: `path=value`, the value in YAML (`rewrite[0].count=2`, `model.norm=evonorm`).

    Mappings on the way are made where they are missing, and a node that is a bare name becomes one with options.

    Raises:
        RecipeError: not `path=value`, an unknown top-level key, or a path through something without parts.
    """
    values, places = copy.deepcopy(_mapping(recipe)), dict(recipe.places)
    _override(values, text, places)
    return _from_mapping(values, places, "the recipe")


def check(recipe: Recipe, *, choices_allowed: bool = True) -> Recipe:
    """Check every option of every part and return the recipe fully spelled out; checking that again changes nothing.

    Defaults of a part inside another part (a norm in a model) stay unsaid: the outer part may set them.

    Args:
        choices_allowed: False refuses a search space.
    Raises:
        RecipeError: one sentence with the place (file:line and dotted path), what was given and what was expected.
    """
    with placed(recipe):
        return _check(recipe, choices_allowed)


@contextlib.contextmanager
def placed(recipe: Recipe) -> Iterator[None]:
    """Add the place in the recipe's file to the error of whatever is built from the recipe inside.

    Raises:
        RecipeError: the one raised inside, with `file:line`.
    """
    try:
        yield
    except Misfit as error:
        place = _place(recipe.places, error.path)
        if error.place or not place:
            raise
        raise Misfit(error.path, error.sentence, place) from error


def objectives(recipe: Recipe) -> list[Any]:
    """Return the nodes of the objective, one or more."""
    return list(recipe.objective) if isinstance(recipe.objective, (list, tuple)) else [recipe.objective]


def frame(node: Any, kind: str) -> dict[str, Any]:
    """Return what the frame takes from a top-level node, defaults included: `at`, `weight`, `schedule`, `exclude`.

    Raises:
        RecipeError: the node does not fit.
    """
    taken = look_up(node, kind, kind, framed=True).frame
    return {key: taken[key] for key in (*FRAME.get(kind, ()), "seed") if key in taken}


def _check(recipe: Recipe, choices: bool) -> Recipe:
    if not choices:
        refuse_choice(_mapping(recipe))
    _check_version(recipe.lamina)

    def one(node: Any, kind: str, path: str) -> Any:
        return spell(node, kind, path, framed=True, choices=choices)

    def several(nodes: Any, kind: str, path: str) -> list[Any]:
        if not isinstance(nodes, (list, tuple)):
            raise Misfit(path, f"expected a list of {kind} nodes, got {show(nodes)}")
        return [one(node, kind, f"{path}[{i}]") for i, node in enumerate(nodes)]

    many = isinstance(recipe.objective, (list, tuple))
    if many and not recipe.objective:
        raise Misfit("objective", "expected at least one objective, got an empty list")
    spelled = dataclasses.replace(
        recipe,
        model=one(recipe.model, "model", "model"),
        data=one(recipe.data, "data", "data"),
        objective=(several if many else one)(recipe.objective, "objective", "objective"),
        optimizer=one(recipe.optimizer, "optimizer", "optimizer"),
        rewrite=several(recipe.rewrite, "pass", "rewrite"),
        gradients=None if recipe.gradients is None else one(recipe.gradients, "reducer", "gradients"),
        parallel=_check_parallel(recipe.parallel),
        train=_check_train(recipe.train),
        report=_check_report(recipe.report),
    )
    _check_passes(spelled.rewrite)
    _check_schedule(spelled.optimizer)
    if spelled.gradients is not None and open_choice(spelled.gradients) is None:
        build(spelled.gradients, "reducer")
    return spelled


def _check_passes(nodes: list[Any]) -> None:
    """Build the passes, which refuse bad numbers, and ask whether each may follow those before it."""
    if not nodes or open_choice(nodes) is not None:
        return
    passes = [build(node, "pass", f"rewrite[{i}]") for i, node in enumerate(nodes)]
    when = [{"before": 0.0, "after": 1.0}.get(node["at"], node["at"]) for node in nodes]
    for i in range(1, len(when)):
        if when[i] < when[i - 1]:
            raise Misfit(
                f"rewrite[{i}].at",
                f"passes stand in the order they run, but this one (at {nodes[i]['at']!r}) follows one at "
                f"{nodes[i - 1]['at']!r}",
            )
    # By name, because this module stands below the passes.
    try:
        importlib.import_module("lamina.rewrite").check_order(passes)
    except LaminaError as error:
        raise Misfit("rewrite", str(error)) from error


def _check_schedule(optimizer: Any) -> None:
    """Ask the schedule for three rates: it refuses its bad numbers when it is called."""
    if open_choice(optimizer) is not None:
        return
    for fraction in (0.0, 0.5, 1.0):
        build(optimizer["schedule"], "schedule", "optimizer.schedule", fraction=fraction)


def _check_parallel(value: Any) -> Any:
    if value == "auto" or isinstance(value, Choice):
        return value
    if not isinstance(value, Mapping):
        raise Misfit("parallel", f"expected 'auto' or a mapping with {', '.join(DEGREES)}, got {show(value)}")
    for key, degree in value.items():
        path = f"parallel.{key}"
        if key not in DEGREES:
            raise Misfit(path, f"no dimension is called {key!r}{nearest(str(key), DEGREES)} (there are: {', '.join(DEGREES)})")  # fmt: skip  # noqa: E501
        if isinstance(degree, Choice):
            continue
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise Misfit(path, f"expected a whole number of at least 1, got {show(degree)}")
        if degree != 1 and key not in RUNNABLE_DEGREES:
            raise Misfit(path, f"training runs over {' and '.join(RUNNABLE_DEGREES)} only so far, so {key} must be 1, got {degree}")  # fmt: skip  # noqa: E501
    return {key: value.get(key, 1) for key in DEGREES}


def _check_train(value: Any) -> dict[str, Any]:
    # By name, because this module stands below the trainer.
    options: Any = importlib.import_module("lamina.train.options").TrainOptions
    if not isinstance(value, Mapping):
        raise Misfit("train", f"expected a mapping of options, got {show(value)}")
    known = [f.name for f in dataclasses.fields(options) if f.init]
    hints = typing.get_type_hints(options, include_extras=True)
    handed = {}
    for key, given in value.items():
        if key not in known:
            raise Misfit(f"train.{key}", f"training has no option {key!r}{nearest(str(key), known)} (it takes: {', '.join(known)})")  # fmt: skip  # noqa: E501
        handed[key] = fit(given, hints[key], f"train.{key}")
    still_open = {key: given for key, given in handed.items() if open_choice(given) is not None}
    required = [n for n, p in inspect.signature(options).parameters.items() if p.default is p.empty]
    missing = [n for n in required if n not in handed]
    if missing:
        raise Misfit("train", f"training needs {', '.join(map(repr, missing))}")
    # An option without a default is closed by its first candidate.
    closed = {n: variants(handed[n])[0] for n in required if n in still_open}
    try:
        built = options(**{key: given for key, given in handed.items() if key not in still_open}, **closed)
    except (LaminaError, ValueError) as error:
        named = blamed(str(error), handed, known)
        raise Misfit(f"train.{named}" if named else "train", str(error)) from error
    return {key: still_open.get(key, plain(getattr(built, key))) for key in known}


def _check_report(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Misfit("report", f"expected a mapping of options, got {show(value)}")
    for key, given in value.items():
        if key != "title":
            raise Misfit(f"report.{key}", f"the report has no option {key!r}{nearest(str(key), ['title'])} (it takes: title)")  # fmt: skip  # noqa: E501
        fit(given, str, "report.title")
    return dict(value)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        reason = "is a folder" if path.is_dir() else "cannot be read" if path.exists() else "does not exist"
        raise RecipeError(f"the recipe {str(path)!r} {reason}{nearest(path.name, beside)}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {str(path)!r} is not UTF-8 text (byte {error.start})") from error


def _check_version(given: Any, place: str = "") -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given != VERSION:
        raise Misfit("lamina", f"this Lamina reads recipes of version {VERSION}, got {show(given)}", place)


def _from_mapping(values: Mapping[str, Any], places: Mapping[str, str], name: str) -> Recipe:
    # First, because a newer language may have other keys.
    _check_version(values.get("lamina", VERSION), _place(places, "lamina"))
    for key in values:
        if key not in KEYS:
            raise Misfit(str(key), f"a recipe has no key {key!r}{nearest(str(key), KEYS)} (keys: {', '.join(KEYS)})", _place(places, str(key)))  # fmt: skip  # noqa: E501
    for key in ("model", "data", "objective"):
        if values.get(key) is None:
            raise Misfit(key, f"{name} names no {key}", _place(places, ""))
    # A key left empty in YAML (`rewrite:`) is the same as a key left out.
    return Recipe(**{k: v for k, v in values.items() if v is not None}, places=places)


def _mapping(recipe: Recipe) -> dict[str, Any]:
    return {key: getattr(recipe, key) for key in KEYS}


def _close(value: Any) -> Any:
    """Replace choices by their arguments."""
    if isinstance(value, Choice):
        return _close(value.arguments)
    if isinstance(value, Mapping):
        return {k: _close(v) for k, v in value.items()}
    return [_close(v) for v in value] if isinstance(value, (list, tuple)) else value


def _place(places: Mapping[str, str], path: str) -> str:
    """Return the `file:line` of a path, or of the nearest thing around it that stands in the file."""
    while path and path not in places:
        path = re.sub(r"(^|\.)[^.\[\]]*$|\[[^\[\]]*\]$", "", path)
    return places.get(path, "")


_STEP = re.compile(r"(?:^|\.)([^.\[\]=]+)|\[(\d+)\]")


def _override(values: dict[str, Any], text: str, places: dict[str, str]) -> None:
    path, equals, value_text = text.partition("=")
    path = path.strip()
    steps = [int(m[2]) if m[2] else int(m[1]) if m[1].isdigit() else m[1] for m in _STEP.finditer(path)]
    if not equals or not path or "".join(m[0] for m in _STEP.finditer(path)) != path:
        raise RecipeError(f"an override is written path=value (optimizer.lr=1e-3), got {text!r}")
    if steps[0] not in KEYS:
        raise RecipeError(f"override {text!r}: a recipe has no key {steps[0]!r}{nearest(str(steps[0]), KEYS)}")
    value, _ = _yaml.read(value_text, f"override {text!r}")
    holder: Any = values
    step: Any
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(holder, list):
            step = _check_index(holder, step, text)
            if step == len(holder):
                holder.append(None)
        elif not isinstance(holder, dict):
            raise RecipeError(f"override {text!r}: {show(holder)} has no parts that {step!r} could be")
        if last:
            holder[step] = value
            break
        below = holder[step] if isinstance(holder, list) else holder.get(step)
        if below is None:
            below = _default(str(step)) if i == 0 else [] if isinstance(steps[i + 1], int) else {}
        if isinstance(below, str):
            # Of the top-level keys only `parallel` is no node: `auto` is not its name.
            below = {} if steps[0] == "parallel" else {"name": below}
        holder[step] = below
        holder = below
    _remember_override(places, "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps)[1:], text)


def _default(key: str) -> Any:
    """Return what a top-level key that is not set stands for."""
    found = next(f for f in dataclasses.fields(Recipe) if f.name == key)
    if found.default_factory is not dataclasses.MISSING:
        return found.default_factory()
    return {} if found.default is dataclasses.MISSING or found.default is None else found.default


def _check_index(holder: list[Any], step: int | str, text: str) -> int:
    if not isinstance(step, int) or step > len(holder):
        raise RecipeError(f"override {text!r}: expected a place in the list, 0..{len(holder)}, got {step!r}")
    return step


def _remember_override(places: dict[str, str], path: str, text: str) -> None:
    for known in [p for p in places if p.startswith((f"{path}.", f"{path}["))]:
        del places[known]
    places[path] = f"override {text!r}"
