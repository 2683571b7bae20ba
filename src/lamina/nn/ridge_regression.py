"""Ridge regression in closed form on features of any kind: a tensor, or blocks that need not fit into memory together.

Of n rows of D features, the smaller of two systems is solved: D x D (primal) or n x n (dual), in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn import _ridge_system as system
from lamina.nn._ridge_system import Dual, Primal, Sums, double

Blocks = Iterable[tuple[Tensor, Tensor]]
"""(features (n, D), targets (n,) or (n, k)), one pair a block."""

GROUP = 5
"""One row of so many is held out."""

SUMMED_FROM = 1024
"""Rows that are collected before their products are added to the sums: small blocks would move more than compute."""

MATRICES = 8
"""How many of the size of the system there are at most."""


@dataclass(frozen=True)
class RidgeFit:
    """What was fitted: targets = features @ weights.T + intercept; float64, on the device of the features."""

    weights: Tensor
    """(D,), or (k, D) for targets (n, k)."""
    intercept: Tensor
    """() or (k,)."""
    penalty: Tensor
    """The penalty of the fit: (), or (k,) where each target has its own."""
    error: Tensor | None
    """Mean squared error on the held-out rows at that penalty, of the same shape; None where none was chosen."""


def ridge(
    features: Tensor | Blocks, targets: Tensor | None = None, penalty: float | Literal["validate"] = "validate"
) -> tuple[Tensor, Tensor]:
    """Return (weights, intercept) of `fit_ridge`, for features whose weights are all that is wanted.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> weights, intercept = ridge(x, 2 * x[:, 0] + 1, penalty=1e-12)
        >>> weights.round(decimals=6), intercept.round(decimals=6)
        (tensor([2.], dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    found = fit_ridge(features, targets, penalty)
    return found.weights, found.intercept


@torch.no_grad()
def fit_ridge(
    features: Tensor | Blocks,
    targets: Tensor | None = None,
    penalty: float | Literal["validate"] = "validate",
    *,
    separate: bool = False,
    seed: int = 0,
    memory_limit: float = 4e9,
) -> RidgeFit:
    """Minimise mean |features @ w + b - targets|^2 + penalty |w|^2; b is not penalised.

    Blocks are read once. Rows are kept as they are while there are at most D of them, and become sums after that, so
    memory is bounded by D^2 numbers whatever comes. The same rows give the same fit whatever the blocks.

    Args:
        features: (n, D), float32 or float64, or an iterable of (features, targets) blocks.
        targets: (n,) or (n, k), of a tensor of features.
        penalty: above 0; "validate": the one with the least error on a fifth of the rows, which is held out and then
            fitted too, of 21 between 1e-8 and 1e2 times the mean squared norm of a centred row over n.
        separate: choose a penalty for each target by itself.
        seed: of which rows are held out (one of every five in a row).
        memory_limit: bytes; above it the fit is refused. It takes about eight matrices of the size of the system.
    Raises:
        LaminaError: a penalty that is not above 0, values that are not finite, too few rows, too much memory.
        ShapeError: blocks that do not fit each other.
    Source: Hoerl, Kennard, Ridge Regression (1970); arXiv 2307.11353 for the rule of the penalty. Where Cholesky fails,
        or the penalty is below rounding, by eigenvalues: what is 0 up to rounding counts as 0.
    """
    choose = penalty == "validate"
    if isinstance(penalty, str) and not choose:
        raise LaminaError(f"penalty must be a number above 0 or 'validate', got {penalty!r}")
    if not isinstance(penalty, str) and not 0 < penalty < float("inf"):
        raise LaminaError(f"the penalty of a ridge regression must be above 0 and finite, got {penalty}")
    held = _HeldOut(seed) if choose else None
    kept = _Kept(held, memory_limit)
    for block in _blocks(features, targets):
        kept.add(*block)
    solver = kept.system(least=2 if choose else 1)
    if isinstance(penalty, str):
        chosen, error = solver.choose(separate)
    else:
        chosen, error = torch.tensor(penalty, dtype=torch.float64, device=kept.device), None
    weights, intercept = solver.solve(chosen)
    if kept.flat:
        weights, intercept = weights[0], intercept[0]
        chosen, error = chosen.reshape(()), None if error is None else error.reshape(())
    return RidgeFit(weights, intercept, chosen, error)


class _HeldOut:
    """Says which of the rows to come are held out: one of every five, one of the first two among them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.randint(2, (1,), generator=self.generator)
        self.seen = 0

    def next(self, count: int) -> Tensor:
        rows = torch.arange(self.seen, self.seen + count)
        self.seen += count
        missing = -(-self.seen // GROUP) - len(self.drawn)
        more = [torch.randint(GROUP, (1,), generator=self.generator) for _ in range(missing)]
        self.drawn = torch.cat([self.drawn, *more])
        return rows % GROUP == self.drawn[rows // GROUP]


class _Kept:
    """What is remembered of the blocks: the rows themselves, or sums of them once they outnumber the features."""

    def __init__(self, held: _HeldOut | None, memory_limit: float) -> None:
        self.held, self.limit = held, memory_limit
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.sums: tuple[Sums, Sums] | None = None
        self.count = self.pending = self.width = self.outputs = 0
        self.flat = False
        self.device = torch.device("cpu")

    def add(self, phi: Tensor, y: Tensor) -> None:
        if not self.count:
            self.width, self.flat, self.device = phi.shape[1], y.dim() == 1, _home(phi)
            self.outputs = 1 if self.flat else y.shape[1]
        flat = y.dim() == 1
        if phi.shape[1] != self.width or flat != self.flat or (not flat and y.shape[1] != self.outputs):
            raise ShapeError(
                f"blocks of one ridge regression have features (n, {self.width}) and targets "
                f"{'(n,)' if self.flat else f'(n, {self.outputs})'}, got {tuple(phi.shape)} and {tuple(y.shape)}"
            )
        self.count += len(phi)
        out = torch.zeros(len(phi), dtype=torch.bool) if self.held is None else self.held.next(len(phi))
        self.rows.append((phi, y.reshape(len(phi), -1), out.to(phi.device)))
        self.pending += len(phi)
        if self.pending > (self.width if self.sums is None else min(self.width, SUMMED_FROM)):
            self._sum_up()
        elif self.sums is None and (needed := self.count * self.width * phi.element_size()) > self.limit:
            raise self._too_much(f"{self.count} rows of {self.width} features", needed)

    def system(self, least: int) -> Primal | Dual:
        if self.count < least:
            why = " to choose a penalty by holding some out" if least > 1 else ""
            raise LaminaError(f"a ridge regression needs at least {least} rows{why}, got {self.count}")
        if self.sums is not None:
            self._sum_up()
            return Primal(*self.sums)
        if (needed := MATRICES * 8 * self.count**2) > self.limit:
            raise self._too_much(f"the products of {self.count} rows", needed)
        phi, y, out = self._joined()
        return Dual(phi, y.to(self.device, torch.float64), out.to(self.device))

    def _sum_up(self) -> None:
        if self.sums is None:
            if (needed := MATRICES * 8 * self.width**2) > self.limit:
                raise self._too_much(f"the products of {self.width} features", needed)
            # About the mean of some rows, sums lose no digits where a mean is large and the spread small.
            origin = [double(v, self.device).mean(0) for v in self.rows[0][:2]]
            self.sums = Sums(*origin), Sums(*origin)
        if not self.rows:
            return
        phi, y, out = self._joined()
        step = max(1, system.NUMBERS_AT_ONCE // self.width)
        for rows in (slice(start, start + step) for start in range(0, len(phi), step)):
            if self.held is None:
                self.sums[0].add(phi[rows], y[rows])
                continue
            for sums, chosen in zip(self.sums, (~out[rows], out[rows]), strict=True):
                sums.add(phi[rows][chosen], y[rows][chosen])
        self.rows.clear()
        self.pending = 0

    def _joined(self) -> list[Tensor]:
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self.rows, strict=True)]

    def _too_much(self, what: str, needed: int) -> LaminaError:
        return LaminaError(
            f"{what} take {needed / 1e9:.3g} GB, above memory_limit={self.limit / 1e9:.3g} GB: take fewer features, "
            "or raise the limit"
        )


def _blocks(features: Tensor | Blocks, targets: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(features, Tensor) != (targets is not None):
        raise LaminaError(
            "a ridge regression takes a tensor and its targets, or blocks that hold both and nothing else"
        )
    pairs = [(features, targets)] if isinstance(features, Tensor) else features
    for phi, y in pairs:
        if not isinstance(phi, Tensor) or not isinstance(y, Tensor):
            raise LaminaError(f"a block is (features, targets), got {type(phi).__name__} and {type(y).__name__}")
        if phi.dim() != 2 or not phi.shape[1] or y.dim() not in (1, 2) or len(phi) != len(y):
            raise ShapeError(
                f"a ridge regression takes features (n, D) and targets (n,) or (n, k) of as many rows, got "
                f"{tuple(phi.shape)} and {tuple(y.shape)}"
            )
        if not phi.is_floating_point() or y.is_complex():
            raise ShapeError(f"features must be floating-point and targets real, got {phi.dtype} and {y.dtype}")
        for what, values in (("features", phi), ("targets", y)):
            # The sum is quicker; it may overflow where no value is at fault.
            if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
                raise LaminaError(f"the {what} {tuple(values.shape)} of a ridge regression have NaN or infinity")
        if len(phi):
            yield phi, y


def _home(phi: Tensor) -> torch.device:
    """Say where the system is solved: Apple's GPUs have no float64."""
    return torch.device("cpu") if phi.device.type == "mps" else phi.device
