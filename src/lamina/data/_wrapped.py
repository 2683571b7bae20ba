"""Examples round other examples."""

from __future__ import annotations

from typing import Any

from lamina.data.examples import Examples


class Wrapped:
    """Rows of other examples, as many; an order of their own and the epoch are passed on where they take them."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str) -> Any:
        # A loader looks whether these are there.
        if name in ("arrange", "set_epoch"):
            return getattr(self.examples, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
