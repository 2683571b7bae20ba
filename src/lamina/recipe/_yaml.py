"""YAML for recipes: YAML-1.2 scalars, no code, no aliases, no key twice; every error names file and line.

PyYAML's own loaders read `1e-3` as text, `12:30:00` as 45000 and `no` as False, and let a second key win silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lamina.errors import RecipeError, nearest

CHOICES = ("oneof", "floatv", "intv")
"""The only tags: `!oneof [a, b]`, `!floatv {min: 0.1, max: 1}`, `!intv {min: 1, max: 8}`."""

MAX_DEPTH = 50
"""Nesting beyond this is refused (a recipe that deep is a mistake or an attack)."""


@dataclass(frozen=True)
class Choice:
    """A value left open: one of several candidates, or a number from a range. A recipe with one is a search space.

    Raises:
        ValueError: no candidate, or a range that is none.
    """

    kind: Literal["oneof", "floatv", "intv"]
    arguments: Any
    """oneof: the list of candidates; floatv, intv: a mapping with min, max (both included) and, floatv, scale."""

    def __post_init__(self) -> None:
        if self.kind not in CHOICES:
            raise ValueError(f"no choice is called {self.kind!r}{nearest(self.kind, CHOICES)}")
        if self.kind == "oneof":
            if not isinstance(self.arguments, list) or not self.arguments:
                raise ValueError(f"!oneof takes a list of at least one candidate, got {self.arguments!r}")
        else:
            self._check_range()

    def candidates(self) -> list[Any]:
        """Return the candidates, or the two ends of the range."""
        if self.kind == "oneof":
            return list(self.arguments)
        return [self.arguments["min"], self.arguments["max"]]

    def _check_range(self) -> None:
        number = "number" if self.kind == "floatv" else "whole number"
        known = ("min", "max", "scale") if self.kind == "floatv" else ("min", "max")
        if not isinstance(self.arguments, dict):
            raise ValueError(f"!{self.kind} takes a mapping {{min: ..., max: ...}}, got {self.arguments!r}")
        for key in self.arguments:
            if key not in known:
                raise ValueError(f"!{self.kind} takes {', '.join(known)}, got {key!r}{nearest(str(key), known)}")
        for key in ("min", "max"):
            value = self.arguments.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float) if self.kind == "floatv" else int):
                raise ValueError(f"!{self.kind} takes a {number} as {key}, got {value!r}")
        low, high, scale = self.arguments["min"], self.arguments["max"], self.arguments.get("scale", "linear")
        if not low < high:
            raise ValueError(f"!{self.kind} needs min below max, got min {low} and max {high}")
        if scale not in ("linear", "log", "rlog"):
            raise ValueError(f"!{self.kind} takes scale linear, log or rlog, got {scale!r}")
        if scale == "log" and low <= 0:
            raise ValueError(f"!{self.kind} on a log scale needs min above 0, got {low}")


def read(text: str, source: str) -> tuple[Any, dict[str, str]]:
    """Parse one YAML document.

    Args:
        source: what to call the text in errors, usually the file's name.
    Returns:
        the value, and the `source:line` of every dotted path in it (`rewrite[1].count`).
    Raises:
        RecipeError: not YAML, or YAML that a recipe does not allow.
    """
    places: dict[str, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _construct(node, "", source, places)), places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{source}:{mark.line + 1 if mark else 1}: {what}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{source}:{line}: the character {chr(error.character)!r} is not allowed in YAML") from error


def write(value: Any, *, flow: bool = False) -> str:
    """Write plain values (and choices) as YAML that `read` turns back into the very same values.

    Args:
        flow: on one line, `{a: [1, 2]}`.
    """
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=10**6, allow_unicode=True
    ).removesuffix("...\n")


_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


def scalar(text: str) -> bool | int | float | str | None:
    """Read an unquoted scalar by YAML 1.2's core schema (section 10.3.2); `010` is ten."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return float(infinite[1] + "inf")
    return float("nan") if _NAN.fullmatch(text) else text


_UNTAGGED = "?"


class _Loader(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer):
    """PyYAML's parser and composer without its constructors: nothing here can build an object."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases (& and *) are not allowed: write the node out",
                                       problem_mark=event.start_mark)  # fmt: skip
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    # What the composer asks of a resolver: every node without a tag of its own is just that.
    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        return _UNTAGGED

    def descend_resolver(self, current: Any, index: Any) -> None: ...

    def ascend_resolver(self) -> None: ...


def _construct(node: yaml.Node, path: str, source: str, places: dict[str, str]) -> Any:
    place = places[path] = f"{source}:{node.start_mark.line + 1}"
    if node.tag != _UNTAGGED:
        return _construct_choice(node, path, source, places)
    if isinstance(node, yaml.MappingNode):
        return dict(_pairs(node, path, source, places))
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, f"{path}[{i}]", source, places) for i, item in enumerate(node.value)]
    try:
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return scalar(node.value) if plain else node.value
    except ValueError as error:
        raise RecipeError(f"{place}: a number of {len(node.value)} digits is too long to read") from error


def _pairs(node: yaml.MappingNode, path: str, source: str, places: dict[str, str]) -> Iterator[tuple[str | int, Any]]:
    seen: dict[str | int, str] = {}
    for key_node, value_node in node.value:
        place = f"{source}:{key_node.start_mark.line + 1}"
        key = _construct(key_node, "", source, {})
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise RecipeError(f"{place}: a key must be a name or a whole number, got {key!r}")
        if key in seen:
            raise RecipeError(f"{place}: the key {key!r} stands twice in one mapping (first at {seen[key]})")
        seen[key] = place
        below = f"{path}.{key}" if path else str(key)
        yield key, _construct(value_node, below, source, places)
        places[below] = place


def _construct_choice(node: yaml.Node, path: str, source: str, places: dict[str, str]) -> Choice:
    place, name = f"{source}:{node.start_mark.line + 1}", node.tag.removeprefix("!")
    if node.tag != f"!{name}" or name not in CHOICES:
        shown = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise RecipeError(
            f"{place}: the tag {shown!r} is not allowed, only !oneof, !floatv, !intv{nearest(name, CHOICES)}"
        )
    node.tag = _UNTAGGED
    try:
        return Choice(name, _construct(node, path, source, places))  # type: ignore[arg-type]
    except ValueError as error:
        raise RecipeError(f"{place}: {error}") from error


class _Dumper(yaml.SafeDumper):
    """Writes a string unquoted only where `scalar` reads it back as that string."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.SequenceNode:
            return "tag:yaml.org,2002:seq"
        if kind is yaml.MappingNode:
            return "tag:yaml.org,2002:map"
        if not implicit[0]:
            return "tag:yaml.org,2002:str"
        ours = type(_read_back(value))
        # Text that a YAML 1.1 reader would misread (`yes`, `12:30:00`) is quoted too, for the other tools' sake.
        return super().resolve(kind, value, implicit) if ours is str else _TAGS[ours]

    def ignore_aliases(self, data: Any) -> bool:
        return True


_TAGS = {type(None): "tag:yaml.org,2002:null", bool: "tag:yaml.org,2002:bool"}
_TAGS |= {int: "tag:yaml.org,2002:int", float: "tag:yaml.org,2002:float"}


def _read_back(text: str) -> bool | int | float | str | None:
    try:
        return scalar(text)
    except ValueError:
        # More digits than Python reads: certainly not the same string once it is a number.
        return 0


def _represent_float(dumper: _Dumper, value: float) -> yaml.Node:
    text = repr(value)
    special = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}
    return dumper.represent_scalar("tag:yaml.org,2002:float", special.get(text, text))


def _represent_choice(dumper: _Dumper, choice: Choice) -> yaml.Node:
    if choice.kind == "oneof":
        return dumper.represent_sequence("!oneof", choice.arguments, flow_style=True)
    return dumper.represent_mapping(f"!{choice.kind}", choice.arguments, flow_style=True)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Unusual spaces and line breaks only survive as escapes.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(Choice, _represent_choice)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
_Dumper.add_multi_representer(Mapping, yaml.SafeDumper.represent_dict)  # type: ignore[type-abstract]
_Dumper.add_multi_representer(Path, lambda dumper, path: dumper.represent_str(str(path)))
