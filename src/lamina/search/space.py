"""What a recipe leaves open: its choices as a space of points, each of them a recipe that can be trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lamina.errors import RecipeError
from lamina.recipe import KEYS, Choice, Recipe, open_choice

MOST_WHOLE_NUMBERS = 1000
"""Whole numbers that a range is counted out to."""


@dataclass(frozen=True)
class Point:
    """One way to close all choices of a recipe."""

    chosen: Mapping[str, Any]
    """Dotted path -> value, of what was open. Of a choice between nodes: the options in which these differ."""
    recipe: Recipe


def points(recipe: Recipe) -> Iterator[Point]:
    """Yield every combination of the choices, the last choice changing fastest.

    Raises:
        RecipeError: nothing is open, or a range of real numbers is, which nothing can count out.
    """
    values = {key: getattr(recipe, key) for key in KEYS}
    if open_choice(values) is None:
        raise RecipeError(
            "the recipe leaves nothing open: write a choice where a value stands, as in "
            "optimizer.lr='!oneof [1e-3, 3e-3]', or ask for --aspect-ratios"
        )
    for chosen, closed in _closed(values, ""):
        yield Point(chosen, dataclasses.replace(recipe, **closed))


def _closed(value: Any, path: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield (what was chosen, the value without choices) for every combination below a value."""
    if isinstance(value, Choice):
        for candidate in _candidates(value, path):
            for chosen, closed in _closed(candidate, path):
                yield {**_label(value, candidate, path), **chosen}, closed
    elif isinstance(value, (Mapping, list, tuple)) and open_choice(value) is not None:
        keys = list(value) if isinstance(value, Mapping) else range(len(value))
        below = [list(_closed(value[k], _below(path, k))) for k in keys]
        for combination in itertools.product(*below):
            chosen = {p: v for c, _ in combination for p, v in c.items()}
            parts = [closed for _, closed in combination]
            yield chosen, dict(zip(keys, parts, strict=True)) if isinstance(value, Mapping) else parts
    else:
        yield {}, value


def _below(path: str, key: Any) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def _candidates(choice: Choice, path: str) -> list[Any]:
    if choice.kind == "oneof":
        return choice.candidates()
    low, high = choice.candidates()
    if choice.kind == "floatv" or high - low >= MOST_WHOLE_NUMBERS:
        raise RecipeError(
            f"{path}: a sweep runs every candidate, and !{choice.kind} from {low} to {high} has too many: "
            "write !oneof [...]"
        )
    return list(range(low, high + 1))


def _label(choice: Choice, candidate: Any, path: str) -> dict[str, Any]:
    """Say which candidate it is: of nodes, by the options in which they differ."""
    others = choice.candidates()
    if choice.kind != "oneof" or not all(isinstance(c, Mapping) for c in others):
        return {path: candidate}
    keys = dict.fromkeys(k for c in others for k in c)
    differing = [k for k in keys if any(c.get(k) != others[0].get(k) for c in others)]
    # What is itself open speaks for itself.
    return {f"{path}.{k}": candidate.get(k) for k in differing if open_choice(candidate.get(k)) is None}
