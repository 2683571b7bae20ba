"""The options of a part, read off its signature, and whether a value fits one."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import json
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from lamina.errors import RecipeError, nearest
from lamina.recipe._yaml import Choice
from lamina.registry import Slot

REQUIRED: Any = inspect.Parameter.empty
"""The default of an option that has none."""

LARGEST = 2**63
"""Whole numbers from here on fit no tensor and no generator's seed."""


class Misfit(RecipeError):
    """A mistake at one place of a recipe; `path` is dotted (`rewrite[1].count`), empty = the whole recipe."""

    def __init__(self, path: str, sentence: str, place: str = "") -> None:
        self.path, self.sentence, self.place = path, sentence, place
        super().__init__(": ".join(part for part in (place, path, sentence) if part))


@dataclass(frozen=True)
class Option:
    """One argument of a part's constructor."""

    name: str
    hint: Any
    """Its annotation; `Any` where there is none, or none that can be read."""
    default: Any
    """`REQUIRED` where there is none."""
    slot: str | None
    """The kind of the part it takes, from `Annotated[..., Slot(kind)]`."""
    many: bool
    """True for a slot that takes a list of parts."""
    positional: bool
    """True where it may be handed over by position."""


@dataclass(frozen=True)
class Signature:
    """What a part can be given."""

    options: Mapping[str, Option]
    open_ended: bool
    """True where the part takes any keyword (`**options`)."""
    variadic: bool
    """True where values by position have no names (`*values`)."""


@functools.lru_cache(maxsize=1024)
def signature_of(target: Callable[..., Any]) -> Signature:
    """Read the signature of a class or function.

    Raises:
        RecipeError: it has none that Python can read.
    """
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError as error:
        raise RecipeError(f"{target!r} has no signature that can be read, so its options cannot be checked") from error
    hints = _hints(target)
    options = {}
    for p in parameters:
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            hint = hints.get(p.name, Any)
            slot, many = _find_slot(hint)
            options[p.name] = Option(p.name, hint, p.default, slot, many, p.kind is p.POSITIONAL_OR_KEYWORD)
    # torch's Module takes any keyword in order to refuse it: a module without a constructor of its own has no options.
    # Compared by identity, because torch.compile wraps that constructor the first time it runs.
    torch_nn = sys.modules.get("torch.nn")
    bare = torch_nn is not None and getattr(target, "__init__", None) is torch_nn.Module.__init__
    kinds = {p.kind for p in parameters}
    nameless = inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.POSITIONAL_ONLY in kinds
    return Signature(options, inspect.Parameter.VAR_KEYWORD in kinds and not bare, nameless and not bare)


def fit(value: Any, hint: Any, path: str) -> Any:
    """Check a value against a type hint strictly and return what to hand over (a list where a tuple is asked: a tuple).

    "3" is no whole number, 3 is a fine number, true is neither.

    Raises:
        Misfit: says what was given and what was expected.
    """
    if closed := variants(value):
        for variant in closed:
            fit(variant, hint, path)
        return value
    if isinstance(value, float) and value != value:
        raise Misfit(path, f"expected {describe(hint)}, got .nan")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise Misfit(path, f"expected {describe(hint)} below 2^63, got {show(value)}")
    adapter = _adapter(hint)
    if adapter is None:
        return value
    try:
        if is_plain(value):
            # JSON mode lets a list stand for a tuple and text for a path, and is strict about the rest.
            return adapter.validate_json(json.dumps(value), strict=True)
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise Misfit(path, _sentence(value, hint, error)) from error


def variants(value: Any) -> list[Any]:
    """Close the choices in a value: as many variants as the longest has candidates; none where nothing is open."""
    sizes = list(_choice_sizes(value))
    return [_pick(value, i) for i in range(max(sizes))] if sizes else []


def _choice_sizes(value: Any) -> Iterator[int]:
    if isinstance(value, Choice):
        yield len(value.candidates())
        value = value.candidates()
    for below in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        yield from _choice_sizes(below)


def _pick(value: Any, index: int) -> Any:
    if isinstance(value, Choice):
        return _pick(value.candidates()[min(index, len(value.candidates()) - 1)], index)
    if isinstance(value, Mapping):
        return {k: _pick(v, index) for k, v in value.items()}
    return [_pick(v, index) for v in value] if isinstance(value, (list, tuple)) else value


def is_plain(value: Any) -> bool:
    """Tell whether a value is made of YAML's own types only."""
    if isinstance(value, Mapping):
        return all(isinstance(k, (str, int)) and not isinstance(k, bool) and is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def plain(value: Any) -> Any:
    """Turn tuples into lists, paths into text and NumPy's numbers into Python's, all the way down, as YAML does."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    return str(value) if isinstance(value, Path) else value


def show(value: Any) -> str:
    """Word a given value: YAML's spelling, its type where that is the surprise, cut to a readable length."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else repr(plain(value))
    text = text if len(text) <= 60 else text[:57] + "..."
    kinds: dict[type, str] = {str: "the text ", dict: "the mapping ", list: "the list "}
    return kinds.get(type(value), "") + text


def describe(hint: Any) -> str:
    """Word a type hint for someone who does not read Python: `int` is "a whole number"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(show_literal(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in arguments if describe(a)))
    if origin is tuple:
        return _describe_tuple(arguments)
    if origin in (list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection):
        return f"a list, each {describe(arguments[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"a mapping, each value {describe(arguments[1])}"
    if origin is collections.abc.Callable:
        return "a function"
    return f"a {getattr(hint, '__name__', None) or hint}"


def show_literal(value: Any) -> str:
    """Word one value of a `Literal`."""
    return repr(value) if isinstance(value, str) else show(value)


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
    None: "null",
    Any: "anything",
    list: "a list",
    dict: "a mapping",
    tuple: "a list",
}


def _describe_tuple(arguments: tuple[Any, ...]) -> str:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list, each {describe(arguments[0])}"
    if len(set(arguments)) == 1:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    return f"a list of {len(arguments)}: {', '.join(describe(a) for a in arguments)}"


def _sentence(value: Any, hint: Any, error: ValidationError) -> str:
    first = error.errors()[0]
    hinted = nearest(value, _literals(hint)) if isinstance(value, str) else ""
    # A bound (`Field(gt=0)`) is in pydantic's words; a plain wrong type is in ours.
    bound = "greater_than", "less_than", "multiple_of", "too_short", "too_long", "string_pattern", "value_error"
    counted = first.get("ctx", {}).get("field_type") == "Tuple"
    why = f" ({first['msg']})" if first["type"].startswith(bound) and not counted else ""
    return f"expected {describe(hint)}, got {show(value)}{why}{hinted}"


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [a for a in typing.get_args(hint) if isinstance(a, str)]
    return [name for a in typing.get_args(hint) for name in _literals(a)]


@functools.lru_cache(maxsize=1024)
def _adapter_of(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return None
    except PydanticUserError:
        # Dataclasses and typed dictionaries bring their own configuration.
        return TypeAdapter(hint)


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    """Return the checker of a hint; None where pydantic has none (then the part itself has to check)."""
    try:
        hash(hint)
    except TypeError:
        return None
    return None if hint is Any else _adapter_of(hint)


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, TypeError):
        # A name that exists for type checkers only: read the others one by one, leave that one unchecked.
        return _hints_one_by_one(inspect.unwrap(function))


def _hints_one_by_one(function: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(function).items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            found |= typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}), include_extras=True)
        except (NameError, AttributeError, TypeError):
            continue
    return found


def _find_slot(hint: Any) -> tuple[str | None, bool]:
    """Look for `Slot` in a hint, inside unions and lists too; return its kind, and whether a list of parts fits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    inner = [_find_slot(a) for a in arguments if not isinstance(a, (str, int))]
    found = next((i for i in inner if i[0] is not None), (None, False))
    if origin is Annotated:
        marks = [m.kind for m in hint.__metadata__ if isinstance(m, Slot)]
        if marks:
            return marks[0], _takes_list(arguments[0])
    if origin in (list, tuple, collections.abc.Sequence) and found[0] is not None:
        return found[0], True
    return found


def _takes_list(hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_takes_list(a) for a in arguments)
    return hint in (list, tuple) or origin in (list, tuple, collections.abc.Sequence)
