"""Named parts: every layer, model, data set, pass ... that a recipe can name.

A kind names the package its parts live in, so looking a name up imports that one package and nothing else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from lamina.errors import LaminaError, nearest

KINDS: dict[str, str] = {
    "norm": "lamina.nn",
    "mixer": "lamina.nn",
    "layer": "lamina.nn",
    "field": "lamina.nn",
    "model": "lamina.models",
    "data": "lamina.data",
    "objective": "lamina.objectives",
    "optimizer": "lamina.optim",
    "schedule": "lamina.optim",
    "reducer": "lamina.gradients",
    "pass": "lamina.rewrite",
    "cluster": "lamina.parallel",
    "space": "lamina.search",
    "algorithm": "lamina.search",
    "backend": "lamina.verify",
}
"""The fifteen kinds (closed) and the package that holds the parts of each."""

ENTRY_POINTS = "lamina.parts"
"""Entry-point group of other people's parts; an entry is named `kind.name`."""

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Part:
    """One registered part: what it is called, what builds it, and where it comes from."""

    kind: str
    name: str
    target: Callable[..., Any]
    source: str | None
    """The paper or library it implements, in a few words."""
    place: str
    """`module:qualified name` of the registered object."""


@dataclass(frozen=True)
class Slot:
    """Marks an argument that takes another part: `norm: Annotated[Node, Slot("norm")] = "layer_norm"`.

    The recipe checker follows the mark into the nested node; the part turns the value into a
    constructor with `lamina.recipe.factory(kind, value)`.
    """

    kind: str


_parts: dict[tuple[str, str], Part] = {}


def snake_case(name: str) -> str:
    """`LayerNormLSTM` -> `layer_norm_lstm`."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


def register(kind: str, name: str | None = None, *, source: str | None = None) -> Callable[[T], T]:
    """Register the decorated class or function as a part that recipes can name.

    Args:
        kind: one of `KINDS`.
        name: default is the snake case of the object's name.
        source: paper or library behind it.
    Raises:
        LaminaError: the kind is unknown, or the name is taken (both places are named).
    """
    _check_kind(kind)

    def add(target: T) -> T:
        part_name = name or snake_case(target.__name__)
        place = f"{target.__module__}:{target.__qualname__}"
        taken = _parts.get((kind, part_name))
        if taken is not None and taken.place != place:
            raise LaminaError(f"the {kind} name {part_name!r} is taken: {taken.place} and {place} both register it")
        _parts[kind, part_name] = Part(kind, part_name, target, source, place)
        if kind == "model" and isinstance(target, type):
            _remember_arguments(target, part_name)
        return target

    return add


def find(kind: str, name: str) -> Callable[..., Any]:
    """Return what builds the part: a registered name, `module:Name`, or an entry point.

    Raises:
        LaminaError: no such part; the message lists the nearest names.
    """
    return describe(kind, name).target


def describe(kind: str, name: str) -> Part:
    """Return the `Part` record behind a name; see `find`."""
    _load(kind)
    if (kind, name) in _parts:
        return _parts[kind, name]
    if ":" in name:
        return Part(kind, name, _import_object(kind, name), None, name)
    for entry in entry_points(group=ENTRY_POINTS, name=f"{kind}.{name}"):
        return Part(kind, name, entry.load(), None, entry.value)
    raise LaminaError(
        f"no {kind} is called {name!r}{nearest(name, names(kind))} (`lamina methods --parts` lists all parts)"
    )


def names(kind: str) -> list[str]:
    """List the registered names of a kind, sorted."""
    _load(kind)
    return sorted(n for k, n in _parts if k == kind)


def parts_of(kind: str) -> list[Part]:
    """List the registered parts of a kind, sorted by name."""
    return [_parts[kind, name] for name in names(kind)]


def parts() -> list[Part]:
    """List every registered part of every kind, sorted by kind and name."""
    for kind in KINDS:
        _load(kind)
    return [_parts[key] for key in sorted(_parts)]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise LaminaError(f"no kind of part is called {kind!r}{nearest(kind, KINDS)}; kinds: {', '.join(KINDS)}")


def _load(kind: str) -> None:
    _check_kind(kind)
    package = KINDS[kind]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        # Packages of later stages need not exist yet; a missing dependency inside one must still be seen.
        if error.name != package:
            raise


def _import_object(kind: str, name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for step in attribute.split("."):
            target = getattr(target, step)
    except (ImportError, AttributeError) as error:
        raise LaminaError(f"the {kind} {name!r} cannot be imported: {error}") from error
    if not callable(target):
        raise LaminaError(f"the {kind} {name!r} is a {type(target).__name__}, not something that can be called")
    return target


def _remember_arguments(cls: Any, name: str) -> None:
    """Wrap `__init__` so that an instance knows its own recipe node (`io.save` writes it)."""
    original = cls.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:
            given = signature.bind(self, *args, **kwargs).arguments
            given.pop("self", None)
            self.lamina_node = {"name": name, **given}

    cls.__init__ = init
