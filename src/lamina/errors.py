"""The errors Lamina raises for a user's mistake, and the helpers that word them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class LaminaError(Exception):
    """Root of Lamina's own errors: the message is one plain sentence a user can act on."""


class RecipeError(LaminaError):
    """A recipe, or one option of a part, is not what the part's signature asks for."""


class ShapeError(LaminaError, ValueError):
    """A tensor or a size does not fit the part it was given to."""


class AnatomyError(LaminaError):
    """A model has no place (trunk, block, sublayer, path) for what was asked."""


class PlanError(LaminaError):
    """A placement over devices cannot be carried out as asked."""


class MissingExtra(LaminaError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Word the nearest known names, whatever their case: `"; did you mean 'adam', 'adamw'?"`, or an empty string."""
    spellings: dict[str, list[str]] = {}
    for one in sorted(known):
        spellings.setdefault(one.lower(), []).append(one)
    close = difflib.get_close_matches(name.lower(), spellings, n=count, cutoff=0.5)
    found = [one for lower in close for one in spellings[lower]][:count]
    return f"; did you mean {', '.join(repr(f) for f in found)}?" if found else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise `MissingExtra` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        if missing != module.partition(".")[0]:
            raise
        raise MissingExtra(f'{module} is not installed: pip install "lamina[{extra}]"') from error
