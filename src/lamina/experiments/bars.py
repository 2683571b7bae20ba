"""The small language in which an experiment's bar is written, parsed by hand (never `eval`).

    bar    = clause {"and" clause} ["," count "seeds"]
    clause = sum (">=" | "<=" | ">" | "<") sum
    sum    = term {("+" | "-") term};  term = factor {("*" | "/") factor}
    factor = number | name "(" arm ")" | arm | "(" sum ")" | "-" factor;  arm = ours | baseline | paper

A name is one the measurement uses; a bare arm stands for a measurement that is one number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lamina.errors import LaminaError, nearest

Figures = Mapping[str, float]
_Value = Callable[[Mapping[str, Figures]], float]
_ARMS = ("ours", "baseline", "paper")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)|(?P<name>[A-Za-z_]\w*)|(?P<sign>>=|<=|[-+*/()<>,]))"
)


@dataclass(frozen=True)
class Clause:
    """One comparison of a bar: `left` against `right`."""

    text: str
    left: _Value
    sign: str
    right: _Value
    neutral: float
    """What the left side is where ours equals the baseline: 0 for a difference, 1 for a quotient."""
    threshold: float
    """The right side, a constant."""

    def value(self, ours: Figures, baseline: Figures, paper: Figures) -> float:
        """Return the left side for one seed's figures."""
        return self.left({"ours": ours, "baseline": baseline, "paper": paper})

    def holds(self, value: float) -> bool:
        """Say whether a value of the left side meets the bar."""
        return _compare(value, self.sign, self.threshold)

    def direction(self, value: float) -> bool:
        """Say whether a value points the claimed way: it meets the bar with the margin taken away.

        The neutral point never makes a bar harder: a bar that allows a loss is its own direction.
        """
        easier = (min if self.sign[0] == ">" else max)(self.threshold, self.neutral)
        return _compare(value, self.sign[0] if easier == self.neutral != self.threshold else self.sign, easier)


@dataclass(frozen=True)
class Bar:
    """A parsed bar: all clauses must hold."""

    text: str
    clauses: tuple[Clause, ...]
    seeds: int


def parse_bar(text: str) -> Bar:
    """Parse a bar.

    Raises:
        LaminaError: says where the text stops making sense.
    """
    return _Parser(text).bar()


def _neutral(left: _Value) -> float:
    """Return the left side's value where all arms measure the same, 0 if it then still depends on how much."""
    first, *others = (left(dict.fromkeys(_ARMS, _Alike(figure))) for figure in (1.0, 2.0, 5.0))
    return first if all(math.isclose(first, v, abs_tol=1e-9) for v in others) else 0.0


class _Alike(dict[str, float]):
    """Figures of any name, all of one value."""

    def __init__(self, figure: float) -> None:
        self.figure = figure

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> float:
        return self.figure


def _compare(left: float, sign: str, right: float) -> bool:
    return {">=": left >= right, "<=": left <= right, ">": left > right, "<": left < right}[sign]


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error("does not know", text[position:].strip()[0])
            token = match.group().strip()
            self.tokens.append((token, match.end() - len(token), match.end()))
            position = match.end()
        self.at = 0

    def error(self, problem: str, token: str | None) -> LaminaError:
        return LaminaError(f"the bar {self.text!r} {problem} {token or 'its end'}")

    def peek(self) -> str | None:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else None

    def take(self, *expected: str) -> str:
        token = self.peek()
        if token is None or (expected and token not in expected):
            raise self.error(f"expects {' or '.join(expected) or 'more'}, not", token)
        self.at += 1
        return token

    def bar(self) -> Bar:
        clauses = [self.clause()]
        while self.peek() == "and":
            self.take("and")
            clauses.append(self.clause())
        seeds = 1
        if self.peek() == ",":
            self.take(",")
            count = self.take()
            if not count.isdigit() or int(count) < 1:
                raise self.error("expects a number of seeds, not", count)
            seeds = int(count)
            self.take("seeds", "seed")
        if self.peek() is not None:
            raise self.error("does not expect", self.peek())
        return Bar(self.text, tuple(clauses), seeds)

    def clause(self) -> Clause:
        start = self.at
        left = self.sum()
        sign = self.take(">=", "<=", ">", "<")
        right = self.sum()
        text = self.text[self.tokens[start][1] : self.tokens[self.at - 1][2]]
        try:
            threshold = right({})
        except KeyError as error:
            raise LaminaError(f"the bar {self.text!r} needs a constant right of {sign!r}") from error
        if not math.isfinite(threshold):
            raise LaminaError(f"the bar {self.text!r} needs a finite number right of {sign!r}, got {threshold}")
        return Clause(text, left, sign, right, _neutral(left), threshold)

    def sum(self) -> _Value:
        value = self.term()
        while self.peek() in ("+", "-"):
            sign = 1.0 if self.take() == "+" else -1.0
            value = _add(value, self.term(), sign)
        return value

    def term(self) -> _Value:
        value = self.factor()
        while self.peek() in ("*", "/"):
            combine = _divide if self.take() == "/" else _multiply
            value = combine(value, self.factor())
        return value

    def factor(self) -> _Value:
        token = self.take()
        if token == "-":
            return _multiply(self.factor(), lambda _: -1.0)
        if token == "(":
            inner = self.sum()
            self.take(")")
            return inner
        if token[0].isdigit() or token[0] == ".":
            number = float(token)
            return lambda _: number
        if token in _ARMS:
            return _figure(token, "value")
        if not token.isidentifier():
            raise self.error("expects a figure, not", token)
        self.take("(")
        arm = self.take(*_ARMS)
        self.take(")")
        return _figure(arm, token)


def _figure(arm: str, name: str) -> _Value:
    def value(arms: Mapping[str, Figures]) -> float:
        measured = arms[arm]
        if name not in measured:
            raise LaminaError(f"the bar asks for {name}({arm}), which was not measured{nearest(name, measured)}")
        return measured[name]

    return value


def _add(left: _Value, right: _Value, sign: float) -> _Value:
    return lambda arms: left(arms) + sign * right(arms)


def _multiply(left: _Value, right: _Value) -> _Value:
    return lambda arms: left(arms) * right(arms)


def _divide(left: _Value, right: _Value) -> _Value:
    def value(arms: Mapping[str, Figures]) -> float:
        below = right(arms)
        return left(arms) / below if below else float("nan")

    return value
