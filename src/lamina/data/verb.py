"""`data.load`: a data set by its name."""

from __future__ import annotations

import inspect
from typing import Any

from lamina.data.examples import Data
from lamina.errors import LaminaError
from lamina.registry import find


def load(name: str, **options: Any) -> Data:
    """Build the registered data set `name` (or `module:function`) with its own options.

    Raises:
        LaminaError: no data set is called so (the nearest names are given), or it refuses an option.
    Example:
        >>> load("text", context=64, limit=20_000).sizes
        {'vocabulary': 256, 'context': 64}
    """
    part = find("data", name)
    try:
        inspect.signature(part).bind(**options)
    except TypeError as error:
        raise LaminaError(f"the data set {name!r} takes {inspect.signature(part)}: {error}") from error
    result = part(**options)
    if not isinstance(result, Data):
        raise LaminaError(f"the data set {name!r} returned a {type(result).__name__}, not a lamina.data.Data")
    return result
