"""The two systems of ridge regression, features by features or rows by rows: the penalty's choice, the solution."""

from __future__ import annotations

import torch
from torch import Tensor

GRID = tuple(10.0 ** (step / 2) for step in range(-16, 5))
"""Penalties that are tried, in units of the mean squared norm of a centred row over the number of rows."""

NUMBERS_AT_ONCE = 2**20
"""How many features are widened to float64 at a time, while they are in the cache."""

STRIPS = 8
"""In how many strips a symmetric product is made."""


class Sums:
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
        phi, y = _centred(phi, self.origin), _centred(y, self.origin_y)
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

    def joined(self, other: Sums) -> Sums:
        """Return the sums of both; this one's are changed."""
        for name in ("count", "phi", "y", "gram", "cross", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class Primal:
    """The D x D system."""

    def __init__(self, train: Sums, held: Sums) -> None:
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


class Dual:
    """The n x n system."""

    def __init__(self, phi: Tensor, y: Tensor, held: Tensor) -> None:
        self.phi, self.y, self.held = phi, y, held
        # Columns at a time: what is widened to float64 stays small.
        self.columns = phi.split(max(1, NUMBERS_AT_ONCE // len(phi)), dim=1)
        means, lower = [], y.new_zeros(len(y), len(y))
        for column in self.columns:
            means.append(double(column, y.device).mean(0))
            _add_products(lower, _centred(column, means[-1]))
        self.mean, self.gram = torch.cat(means), _whole(lower)

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
        # Their sum is 0, and so the mean of the features drops out; made exact, for a mean may be large.
        coefficients = coefficients - coefficients.mean(1, keepdim=True)
        weights = torch.cat([coefficients @ double(column, self.y.device) for column in self.columns], 1)
        return weights, mean_y - weights @ self.mean


def double(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device).to(torch.float64)


def _centred(values: Tensor, mean: Tensor) -> Tensor:
    """Subtract the mean in float64, in place where widening made a copy."""
    wide = double(values, mean.device)
    return wide - mean if wide is values else wide.sub_(mean)


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
    grid = torch.tensor(GRID, dtype=torch.float64, device=squares.device)
    return grid * squares.clamp(min=torch.finfo(torch.float64).tiny * 1e10) / count**2


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
