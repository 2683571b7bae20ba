"""How many workers may be faulty: the number that most rules are told, and how many workers it takes."""

from __future__ import annotations

from lamina.errors import LaminaError


def checked_f(f: int) -> int:
    """Return a number of faulty workers; refuse what is none."""
    if isinstance(f, bool) or not isinstance(f, int) or f < 0:
        raise LaminaError(f"f, the number of workers that may be faulty, must be a whole number >= 0, got {f!r}")
    return f


def left_faulty(f: int, failed: int) -> int:
    """Return how many faulty workers may be among those that are left."""
    return max(0, f - failed)


def refuse_fewer(rule: object, workers: int, failed: int, f: int, needed: int, needed_left: int, words: str) -> None:
    """Refuse too few workers, all of them or those that are left.

    Raises:
        LaminaError: says how many it takes.
    """
    name = type(rule).__name__
    if workers < max(2, needed):
        raise LaminaError(f"{name} with f = {f} needs at least {words} = {needed} workers, got {workers}")
    if workers - failed < needed_left:
        raise LaminaError(
            f"{name} with f = {f} has {workers - failed} of {workers} workers left, and needs {needed_left} beside the "
            f"{failed} that failed"
        )
