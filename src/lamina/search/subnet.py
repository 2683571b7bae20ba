"""Pick the best part of an elastic model that a device can afford, by evolution.

Source: Cai et al., Once-for-All (ICLR 2020), arXiv 1908.09791, section 3.4; Real et al., Regularized Evolution (AAAI
2019), arXiv 1802.01548.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lamina.batches import Batch
from lamina.errors import LaminaError
from lamina.nn.elastic import Subnet, Supernet, supernet
from lamina.rewrite import cut_out
from lamina.search.measure import latency

Cost = Literal["multiply_adds", "latency"] | Callable[[Subnet], float]

TRIES = 200
"""Draws, one after the other, of which none is affordable, before the search gives up."""


@dataclass(frozen=True)
class Picked:
    """The best part that was found."""

    subnet: Subnet
    score: float
    cost: float
    """In the unit of the limit."""
    scored: int
    """How many different parts were cut out, calibrated and scored."""


def pick_subnet(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    batch: Batch,
    *,
    limit: float,
    cost: Cost = "multiply_adds",
    data: Iterable[Batch] | None = None,
    images: int = 2000,
    population: int = 100,
    parents: float = 0.25,
    mutation: float = 0.1,
    generations: int = 500,
    patience: int | None = 20,
    seed: int = 0,
) -> Picked:
    """Search the parts of an elastic model for the one of the highest score whose cost is within the limit.

    Every generation keeps the best quarter and fills up with mutants of them and crosses of two. A part is scored and
    its cost taken once, however often it comes up.

    Args:
        score: of a plain model, cut out and calibrated: higher is better (accuracy on held-out data).
        batch: inputs of the size that the cost is for.
        limit: in multiply-adds of the batch, or seconds of a forward pass.
        cost: what is limited: "multiply_adds", "latency" (measured here), or a function of the part.
        data: training batches for the statistics of batch norms; images: how many rows of them.
        population: parts in a generation; parents: ratio of them that stay, 0..1.
        mutation: chance of every place to be drawn anew, 0..1.
        generations: at most.
        patience: stop after so many generations without a better part; None = never.
        seed: of all draws.
    Raises:
        LaminaError: not even the smallest part is within the limit, or an option is out of range.
    Source: Once-for-All's search: population 100, a quarter parents, mutation 0.1, 500 generations.
    """
    if population < 2 or not 0 < parents <= 1 or not 0 <= mutation <= 1 or generations < 1:
        raise LaminaError(
            "pick_subnet: population is at least 2, parents in 0..1 (not 0), mutation in 0..1, generations at least 1; "
            f"got {population}, {parents}, {mutation}, {generations}"
        )
    net, rows = supernet(model), None if data is None else list(_first_rows(data, images))
    price = _remembered(_cost(net, cost, batch))
    value = _remembered(lambda part: score(cut_out(model, part, rows, images=images)))
    if price(net.smallest()) > limit:
        raise LaminaError(
            f"not even the smallest part is within the limit of {limit:g}: it takes {price(net.smallest()):g}"
        )
    evolution = _Evolution(net, lambda part: price(part) <= limit, mutation, torch.Generator().manual_seed(seed))
    standing = [net.smallest(), *(evolution.drawn() for _ in range(population - 1))]
    kept = max(1, round(parents * population))
    best, without = max(standing, key=value), 0
    for _ in range(generations):
        standing = sorted(standing, key=value, reverse=True)[:kept]
        half = (population - kept) // 2
        fresh = [evolution.mutant(standing) for _ in range(half)]
        standing += [*fresh, *(evolution.cross(standing) for _ in range(population - kept - half))]
        leading = max(standing, key=value)
        without = without + 1 if value(leading) <= value(best) else 0
        best = leading if value(leading) > value(best) else best
        if patience is not None and without >= patience:
            break
    return Picked(best, value(best), price(best), len(value.known))


class _Remembered:
    """A function of a part that is asked once for each."""

    def __init__(self, function: Callable[[Subnet], float]) -> None:
        self.function = function
        self.known: dict[Subnet, float] = {}

    def __call__(self, part: Subnet) -> float:
        if part not in self.known:
            self.known[part] = float(self.function(part))
        return self.known[part]


def _remembered(function: Callable[[Subnet], float]) -> _Remembered:
    return _Remembered(function)


class _Evolution:
    """Draws parts that are affordable: at random, near a parent, or out of two."""

    def __init__(
        self, net: Supernet, fits: Callable[[Subnet], bool], mutation: float, generator: torch.Generator
    ) -> None:
        self.net, self.fits, self.mutation, self.generator = net, fits, mutation, generator

    def drawn(self) -> Subnet:
        """Draw one at random; the smallest where none is affordable."""
        return self._first_fitting(lambda: self.net.sample(self.generator))

    def mutant(self, parents: Sequence[Subnet]) -> Subnet:
        """Draw a parent and some of its places anew."""
        parent = self._one(parents)

        def change() -> Subnet:
            other = self.net.sample(self.generator)
            return self._mixed(parent, other, self.mutation)

        return self._first_fitting(change)

    def cross(self, parents: Sequence[Subnet]) -> Subnet:
        """Take every place from one of two parents."""
        return self._first_fitting(lambda: self._mixed(self._one(parents), self._one(parents), 0.5))

    def _mixed(self, one: Subnet, other: Subnet, chance: float) -> Subnet:
        def mix(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
            drawn = torch.rand(len(a), generator=self.generator).tolist()
            return tuple(y if p < chance else x for x, y, p in zip(a, b, drawn, strict=True))

        return Subnet(mix(one.depth, other.depth), mix(one.expand, other.expand), mix(one.kernel, other.kernel))

    def _one(self, parts: Sequence[Subnet]) -> Subnet:
        return parts[int(torch.randint(len(parts), (1,), generator=self.generator))]

    def _first_fitting(self, draw: Callable[[], Subnet]) -> Subnet:
        return next((p for p in (draw() for _ in range(TRIES)) if self.fits(p)), self.net.smallest())


def _cost(net: Supernet, cost: Cost, batch: Batch) -> Callable[[Subnet], float]:
    if callable(cost):
        return cost
    if cost == "multiply_adds":
        return net.costs(batch)
    if cost != "latency":
        raise LaminaError(f"pick_subnet: cost is multiply_adds, latency or a function, got {cost!r}")
    return lambda part: latency(_uncalibrated(net.model, part), batch)


def _uncalibrated(model: nn.Module, part: Subnet) -> nn.Module:
    """Cut a part out to be timed alone."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return cut_out(model, part)


def _first_rows(data: Iterable[Batch], images: int) -> Iterable[Batch]:
    """Keep as many batches as one calibration needs: every part sees the same."""
    seen = 0
    for batch in data:
        if seen >= images:
            return
        seen += next(len(v) for v in batch.values() if hasattr(v, "dim"))
        yield batch
