"""Which point of a search space comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lamina.recipe import Recipe
from lamina.registry import register
from lamina.search.space import Point, points
from lamina.search.trial import Trial


class Algorithm(Protocol):
    """Says what to try next, from the space and what was tried; it keeps nothing, so a killed search goes on."""

    def propose(self, space: Recipe, trials: Sequence[Trial]) -> Point | None:
        """Return the next point; None = the search is over."""
        ...


@register("algorithm")
class Sweep:
    """Every combination of the choices once, in order: for small spaces, and for tables that compare.

    Choices are `!oneof [...]` and short `!intv`; a range of real numbers is refused.
    """

    def propose(self, space: Recipe, trials: Sequence[Trial]) -> Point | None:
        """Return the first combination that no trial has."""
        tried = [dict(t.chosen) for t in trials]
        return next((p for p in points(space) if dict(p.chosen) not in tried), None)
