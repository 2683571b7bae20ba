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

Blocks = Iterable[tuple[Tensor, Tensor]]
"""(features (n, D), targets (n,) or (n, k)), one pair a block."""

GRID = torch.logspace(-8, 2, 21, dtype=torch.float64)
"""Penalties that are tried, in units of the mean squared norm of a centred row over the number of rows."""

GROUP = 5
"""One row of so many is held out."""

NUMBERS_AT_ONCE = 2**24
"""How many features are held in float64 at a time."""

STRIPS = 8
"""In how many strips a symmetric product is made."""


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
        memory_limit: bytes for what is kept; above it the fit is refused.
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
    system = kept.system(least=2 if choose else 1)
    if isinstance(penalty, str):
        chosen, error = system.choose(separate)
    else:
        chosen, error = torch.tensor(penalty, dtype=torch.float64, device=kept.device), None
    weights, intercept = system.solve(chosen)
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
        self.sums: tuple[_Sums, _Sums] | None = None
        self.count = self.width = self.outputs = 0
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
        if self.sums is not None or self.count > self.width:
            self._sum_up()
        elif (needed := self.count * self.width * phi.element_size()) > self.limit:
            raise self._too_much(f"{self.count} rows of {self.width} features", needed)

    def system(self, least: int) -> _Primal | _Dual:
        if self.count < least:
            why = " to choose a penalty by holding some out" if least > 1 else ""
            raise LaminaError(f"a ridge regression needs at least {least} rows{why}, got {self.count}")
        if self.sums is not None:
            return _Primal(*self.sums)
        if (needed := 3 * 8 * self.count**2) > self.limit:
            raise self._too_much(f"the products of {self.count} rows", needed)
        phi, y, out = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        return _Dual(phi, y.to(self.device, torch.float64), out.to(self.device))

    def _sum_up(self) -> None:
        if self.sums is None:
            if (needed := 3 * 8 * self.width**2) > self.limit:
                raise self._too_much(f"the products of {self.width} features", needed)
            # About the mean of some rows, sums lose no digits where a mean is large and the spread small.
            origin = [_double(v, self.device).mean(0) for v in self.rows[0][:2]]
            self.sums = _Sums(*origin), _Sums(*origin)
        for phi, y, out in self.rows:
            for start in range(0, len(phi), step := max(1, NUMBERS_AT_ONCE // self.width)):
                part = slice(start, start + step)
                for sums, chosen in zip(self.sums, (~out[part], out[part]), strict=True):
                    sums.add(_double(phi[part][chosen], self.device), _double(y[part][chosen], self.device))
        self.rows.clear()

    def _too_much(self, what: str, needed: int) -> LaminaError:
        return LaminaError(
            f"{what} take {needed / 1e9:.3g} GB, above memory_limit={self.limit / 1e9:.3g} GB: take fewer features, "
            "or raise the limit"
        )


class _Sums:
    """Count, sums and products of rows about an origin, in float64."""

    def __init__(self, origin: Tensor, origin_y: Tensor) -> None:
        width, outputs = len(origin), len(origin_y)
        self.origin, self.origin_y = origin, origin_y
        self.count = 0
        self.phi, self.y = torch.zeros_like(origin), torch.zeros_like(origin_y)
        self.gram = origin.new_zeros(width, width)
        """Its lower half."""
        self.cross = origin.new_zeros(width, outputs)
        self.squares = torch.zeros_like(origin_y)

    def add(self, phi: Tensor, y: Tensor) -> None:
        phi, y = phi - self.origin, y - self.origin_y
        self.count += len(phi)
        self.phi += phi.sum(0)
        self.y += y.sum(0)
        _add_products(self.gram, phi.t())
        self.cross.addmm_(phi.t(), y)
        self.squares += y.square().sum(0)

    def about(self, mean: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Gram matrix, cross products and squares of the targets about other points than the origins."""
        a, b, n = mean - self.origin, mean_y - self.origin_y, self.count
        moved = torch.outer(self.phi - n * a / 2, a)
        gram = _whole(self.gram) - moved - moved.t()
        cross = self.cross - torch.outer(self.phi, b) - torch.outer(a, self.y) + n * torch.outer(a, b)
        return gram, cross, self.squares - 2 * b * self.y + n * b.square()

    def means(self) -> tuple[Tensor, Tensor]:
        return self.origin + self.phi / self.count, self.origin_y + self.y / self.count

    def joined(self, other: _Sums) -> _Sums:
        """Return the sums of both; this one's are changed."""
        for name in ("count", "phi", "y", "gram", "cross", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class _Primal:
    """The D x D system."""

    def __init__(self, train: _Sums, held: _Sums) -> None:
        self.train, self.held = train, held

    def choose(self, separate: bool) -> tuple[Tensor, Tensor]:
        means = self.train.means()
        gram, cross, _ = self.train.about(*means)
        held, cross_held, squares = self.held.about(*means)
        penalties = _grid(gram.diagonal().sum() + held.diagonal().sum(), self.train.count + self.held.count)
        values, basis = _spectrum(gram)
        fitted = (basis.t() @ cross)[:, None] / _shifted(values, penalties, self.train.count)  # (D, penalties, k)
        flat = fitted.flatten(1)
        quadratic = ((basis.t() @ held @ basis) @ flat * flat).sum(0).view(fitted.shape[1:])
        linear = (fitted * (basis.t() @ cross_held)[:, None]).sum(0)
        return _least((squares - 2 * linear + quadratic) / self.held.count, penalties, separate)

    def solve(self, penalty: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.train.joined(self.held)
        mean, mean_y = whole.means()
        gram, cross, _ = whole.about(mean, mean_y)
        weights = _solve(gram, cross, penalty * whole.count).t()
        return weights, mean_y - weights @ mean


class _Dual:
    """The n x n system."""

    def __init__(self, phi: Tensor, y: Tensor, held: Tensor) -> None:
        self.phi, self.y, self.held = phi, y, held
        # Columns at a time: what is widened to float64 stays small.
        self.columns = phi.split(max(1, NUMBERS_AT_ONCE // len(phi)), dim=1)
        self.mean = torch.cat([_double(c, y.device).mean(0) for c in self.columns])
        self.gram = y.new_zeros(len(y), len(y))
        for centred in self._centred():
            _add_products(self.gram, centred)
        self.gram = _whole(self.gram)

    def choose(self, separate: bool) -> tuple[Tensor, Tensor]:
        train, held = ~self.held, self.held
        to_train = self.gram[:, train].mean(1)
        gram = self.gram - to_train[:, None] - to_train + to_train[train].mean()
        y = self.y - self.y[train].mean(0)
        penalties = _grid(gram.diagonal().sum(), len(y))
        values, basis = _spectrum(gram[train][:, train])
        fitted = (basis.t() @ y[train])[:, None] / _shifted(values, penalties, len(values))  # (n, penalties, k)
        guessed = torch.tensordot(gram[held][:, train] @ basis, fitted, 1)
        return _least((guessed - y[held][:, None]).square().mean(0), penalties, separate)

    def solve(self, penalty: Tensor) -> tuple[Tensor, Tensor]:
        mean_y = self.y.mean(0)
        coefficients = _solve(self.gram, self.y - mean_y, penalty * len(self.y)).t()
        weights = torch.cat([coefficients @ centred for centred in self._centred()], 1)
        return weights, mean_y - weights @ self.mean

    def _centred(self) -> Iterator[Tensor]:
        start = 0
        for column in self.columns:
            yield _double(column, self.y.device) - self.mean[start : start + column.shape[1]]
            start += column.shape[1]


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
            if not bool(torch.isfinite(values).all()):
                raise LaminaError(f"the {what} {tuple(values.shape)} of a ridge regression have NaN or infinity")
        if len(phi):
            yield phi, y


def _home(phi: Tensor) -> torch.device:
    """Where the system is solved: Apple's GPUs have no float64."""
    return torch.device("cpu") if phi.device.type == "mps" else phi.device


def _double(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device).to(torch.float64)


def _add_products(gram: Tensor, x: Tensor) -> None:
    """Add x @ x.T to the lower half of gram, strip by strip: little more than half of the work."""
    step = -(-len(x) // STRIPS)
    for start in range(0, len(x), step):
        end = start + step
        gram[start:end, :end].addmm_(x[start:end], x[:end].t())


def _whole(lower: Tensor) -> Tensor:
    """Return the symmetric matrix of a lower half."""
    return lower.tril() + lower.tril(-1).t()


def _grid(squares: Tensor, count: int) -> Tensor:
    """Return the penalties to try, from the sum of squared norms of the centred rows."""
    return GRID.to(squares.device) * squares.clamp(min=torch.finfo(torch.float64).tiny * 1e10) / count**2


def _spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, basis = torch.linalg.eigh(gram)
    return values.clamp(min=0.0), basis


def _shifted(values: Tensor, penalties: Tensor, count: int) -> Tensor:
    return values[:, None, None] + count * penalties[:, None]


def _least(errors: Tensor, penalties: Tensor, separate: bool) -> tuple[Tensor, Tensor]:
    """Choose of errors (penalties, k) the least; of equal ones the largest penalty."""
    told = errors.clamp(min=0.0) if separate else errors.clamp(min=0.0).mean(1)
    best = len(penalties) - 1 - told.flip(0).argmin(0)
    return penalties[best], told.gather(0, best[None])[0]


def _solve(gram: Tensor, right: Tensor, shift: Tensor) -> Tensor:
    """Solve (gram + shift) x = right (n, k); shift () or (k,), one factorisation for each that is different."""
    if shift.dim():
        solved = torch.empty_like(right)
        for value in shift.unique():
            solved[:, shift == value] = _solve(gram, right[:, shift == value], value)
        return solved
    rounding = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().max()
    if shift > rounding:
        shifted = gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if not int(info):
            return torch.cholesky_solve(right, factor)
    values, basis = _spectrum(gram)
    # What is 0 up to rounding meets a right side that is 0 up to rounding, and must not divide it.
    inverse = torch.where(values > rounding, 1 / (values + shift), 0.0)
    return basis @ ((basis.t() @ right) * inverse[:, None])
