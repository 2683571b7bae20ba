"""abc-parametrizations: how multipliers, initial values and learning rates depend on width, and what that leads to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from lamina.errors import LaminaError

SOURCE = "Yang & Hu, Feature Learning in Infinite-Width Neural Networks (2021), arXiv 2011.14522"

_SLACK = 1e-9


class Class(TypedDict):
    """What `ABC.classify` finds."""

    stable: bool
    """Nothing blows up with width, at the start or in training."""
    trivial: bool
    """Of the stable: the function does not move in training (at infinite width)."""
    regime: Literal["feature learning", "kernel", "none"]
    """Of the stable and non-trivial: whether the hidden layers move too; else "none"."""
    r: float
    """The hidden layers move by n^-r."""


@dataclass(frozen=True)
class ABC:
    """A parametrization of a perceptron with L hidden layers of width n, under SGD.

    Weight l = 1..L+1 is n^-a_l w_l, w_l starts with a deviation of n^-b_l (times a constant), the rate is lr n^-c.
    Layer 1 is (n, inputs), layers 2..L are (n, n), layer L+1 is (outputs, n).

    Raises:
        LaminaError: a and b are not two or more numbers each, equally many.
    Source: Yang & Hu (2021), arXiv 2011.14522, definition 3.1, table 1, theorems 3.8, 3.9 and corollary 3.10.
    Example:
        >>> ABC.mup(3).classify()["regime"], ABC.ntk(3).classify()["regime"]
        ('feature learning', 'kernel')
    """

    a: tuple[float, ...]
    """Exponents of the multipliers, one a layer."""
    b: tuple[float, ...]
    """Exponents of the initial deviations."""
    c: float
    """Exponent of the learning rate."""

    def __post_init__(self) -> None:
        """Refuse other lengths."""
        if len(self.a) != len(self.b) or len(self.a) < 2:
            raise LaminaError(f"ABC: a and b have an exponent a layer, two at least: got {self.a} and {self.b}")

    @property
    def hidden(self) -> int:
        """L, how many hidden layers there are."""
        return len(self.a) - 1

    @classmethod
    def standard(cls, hidden: int, c: float = 0.0) -> ABC:
        """Return what torch does; with c = 0 it blows up under SGD, c = 1 is the largest stable rate."""
        return cls(_layers(hidden, 0.0, 0.0, 0.0), _layers(hidden, 0.0, 0.5, 0.5), c)

    @classmethod
    def ntk(cls, hidden: int) -> ABC:
        """Return the neural-tangent parametrization: at infinite width a kernel machine."""
        return cls(_layers(hidden, 0.0, 0.5, 0.5), _layers(hidden, 0.0, 0.0, 0.0), 0.0)

    @classmethod
    def mean_field(cls) -> ABC:
        """Return the mean-field parametrization, of one hidden layer."""
        return cls((0.0, 1.0), (0.0, 0.0), -1.0)

    @classmethod
    def mup(cls, hidden: int) -> ABC:
        """Return the maximal-update parametrization: every layer moves as much as it can without blowing up."""
        return cls(_layers(hidden, -0.5, 0.0, 0.5), _layers(hidden, 0.5, 0.5, 0.5), 0.0)

    def shift(self, theta: float) -> ABC:
        """Return another parametrization of the very same training: a + theta, b - theta, c - 2 theta."""
        return ABC(tuple(a + theta for a in self.a), tuple(b - theta for b in self.b), self.c - 2 * theta)

    def classify(self) -> Class:
        """Say what infinite width makes of it (tanh or a smooth GELU, SGD, any fixed number of steps)."""
        a, b, c = self.a, self.b, self.c
        inner = [2 * x + (layer == 0) for layer, x in enumerate(a[:-1])]
        r = min(a[-1] + b[-1], 2 * a[-1] + c) + c - 1 + min(inner)
        start, moved, followed = a[-1] + b[-1], 2 * a[-1] + c, a[-1] + b[-1] + r
        keeps = _is(a[0] + b[0], 0.0) and all(_is(x + y, 0.5) for x, y in zip(a[1:-1], b[1:-1], strict=True))
        stable = keeps and min(start - 0.5, r, moved - 1, followed - 1) >= -_SLACK
        trivial = stable and not (_is(moved, 1.0) or _is(followed, 1.0))
        regime: Literal["feature learning", "kernel", "none"] = "none"
        if stable and not trivial:
            regime = "feature learning" if _is(r, 0.0) else "kernel"
        return Class(stable=stable, trivial=trivial, regime=regime, r=r)


def _layers(hidden: int, first: float, inner: float, last: float) -> tuple[float, ...]:
    if hidden < 1:
        raise LaminaError(f"ABC: a network has at least one hidden layer, got {hidden}")
    exponents: Sequence[float] = [first, *[inner] * (hidden - 1), last]
    return tuple(exponents)


def _is(value: float, other: float) -> bool:
    return abs(value - other) <= _SLACK
