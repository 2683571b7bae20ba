"""Which part of an elastic model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lamina.errors import LaminaError, nearest


@dataclass(frozen=True)
class Subnet:
    """One sub-network: a value for every elastic place, in the order of the model's module tree."""

    depth: tuple[int, ...] = ()
    """How many blocks of each stage run, the first ones."""
    expand: tuple[float, ...] = ()
    """Hidden channels of each block: times what the block reads, or as a ratio of what it has (0..1)."""
    kernel: tuple[int, ...] = ()
    """Kernel size of each elastic depthwise convolution."""

    def to_dict(self) -> dict[str, list[float]]:
        """Return it as a recipe has it."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def of(cls, value: Subnet | Mapping[str, Any]) -> Subnet:
        """Read one out of a recipe's mapping.

        Raises:
            LaminaError: a key that is none of the three axes, or something that is no list of numbers.
        """
        if isinstance(value, Subnet):
            return value
        known = [f.name for f in fields(cls)]
        for name, numbers in value.items():
            if name not in known:
                raise LaminaError(f"a sub-network has no axis {name!r}{nearest(str(name), known)}")
            if not isinstance(numbers, (list, tuple)) or not all(isinstance(n, (int, float)) for n in numbers):
                raise LaminaError(f"{name} of a sub-network is a list of numbers, one a place, got {numbers!r}")
        axes: dict[str, Any] = {name: tuple(map(_whole, numbers)) for name, numbers in value.items()}
        return cls(**axes)


def _whole(number: float) -> float:
    """Return 2.0 as 2: a file may have made real numbers of all."""
    return int(number) if number == int(number) else number
