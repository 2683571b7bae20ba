"""What robust rules share: faulty workers left out, the exchange by slices, the same answer on every worker."""

from __future__ import annotations

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError, PlanError, ShapeError
from lamina.gradients.lost_worker import named
from lamina.gradients.reducer import Group, Stateless, size
from lamina.gradients.robust.exchange import Exchange
from lamina.gradients.robust.gram import gram
from lamina.gradients.robust.packing import Packed, all_finite

log = logging.getLogger(__name__)

Nonfinite = Literal["raise", "pass_on"]


class RobustRule(Stateless, ABC):
    """A reducer that a minority of faulty workers cannot carry away.

    A worker whose gradient has NaN or infinity is left out, named in the log and in `failed`; it counts as one of the
    faulty ones that the rule is meant for. Workers take part in the exchange honestly (see `exchange`): a rule guards
    against wrong gradients, not against a worker that corrupts the combined slice it is asked for.

    Subclasses say how many workers they need (`check`) and how to combine the rows that are left: `weigh` gives weights
    from the workers' inner products, `combine` applies them, or works on the columns.

    Args:
        nonfinite: what is done where no worker's gradient is finite: `raise`, or `pass_on` NaN, so that an fp16 loss
            scaler sees it and skips the step.
    """

    granularity: ClassVar[Literal["bucket", "model"]] = "model"
    uses_products: ClassVar[bool] = True
    """Whether `weigh` looks at inner products; else at nothing."""
    leaves_out_zeros: ClassVar[bool] = False
    """Whether a gradient of zeros counts as none: it says no direction, and would only make the step shorter."""

    def __init__(self, nonfinite: Nonfinite = "raise") -> None:
        super().__init__()
        if nonfinite not in ("raise", "pass_on"):
            raise LaminaError(f"nonfinite must be 'raise' or 'pass_on', got {nonfinite!r}")
        self.nonfinite = nonfinite
        self.failed: tuple[int, ...] = ()
        """Workers left out of the last call."""
        self.weights: Tensor | None = None
        """Of the last call, by worker, 0 where it was left out; None where the rule has no weight a worker."""
        self._turn = 0
        self._told: set[int] = set()

    @abstractmethod
    def check(self, workers: int, failed: int = 0) -> None:
        """Refuse too few workers.

        Args:
            workers: all of them.
            failed: of these, known to be faulty.
        Raises:
            LaminaError: says how many it takes.
        """

    def weigh(self, products: Tensor, failed: int) -> Tensor | None:
        """Return what `combine` needs, from the inner products of the workers that are left: (p, p) in float64."""
        return None

    @abstractmethod
    def combine(self, rows: Tensor, weights: Tensor | None, kept: Sequence[int], failed: int) -> Tensor:
        """Combine columns: (workers, n) -> (n,); only the kept rows may be looked at."""

    def note(self, plans: Sequence[Plan], workers: int) -> None:
        """Keep what the last call decided, to show: `weights`."""
        self.weights = by_worker(plans, workers, lambda weights: weights)

    def aggregate(self, gradients: Tensor) -> Tensor:
        """Combine gradients that are at hand: (workers, n) -> (n,).

        Raises:
            ShapeError: not a matrix of floating-point numbers.
            LaminaError: too few workers, or none with a finite gradient (that is not zero).
        """
        if not isinstance(gradients, Tensor) or gradients.ndim != 2 or not gradients.is_floating_point():
            raise ShapeError(
                "gradients must be one floating-point tensor of shape (workers, n), got "
                + (
                    f"{gradients.dtype} of shape {tuple(gradients.shape)}"
                    if isinstance(gradients, Tensor)
                    else "no tensor"
                )
            )
        rows = gradients.detach()
        self.check(len(rows))
        if self.uses_products:
            products = gram(rows)[None]
            bad = _not_finite(products)
        else:
            products = None
            bad = {i for i, row in enumerate(rows) if not all_finite(row)}
        (plan,) = self._plans(products, len(rows), bad)
        return self._combined(rows, plan)

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Combine the named gradients over the group; bitwise the same on every worker.

        Raises:
            LaminaError: too few workers are left, a worker sent no gradient, or is gone (it is named).
            ShapeError: workers disagree about names, shapes or types.
            PlanError: a sparse gradient.
        """
        if size(group) == 1:
            return dict(gradients)
        ordered = {name: gradients[name].detach() for name in sorted(gradients)}
        sparse = next((n for n, g in ordered.items() if g.layout != torch.strided), None)
        if sparse is not None:
            raise PlanError(f"{type(self).__name__} takes dense gradients, but that of {sparse!r} is sparse")
        self._turn += 1
        exchange = Exchange(group, self._turn)
        try:
            reduced = self._reduce(ordered, exchange)
        finally:
            self.sent += exchange.sent
        return {name: reduced[name] for name in gradients}

    def layers(self, names: Sequence[str]) -> list[int]:
        """Say which of the parameters, by number, are combined with the same weights: all, unless a rule says so."""
        return [0] * len(names)

    def _reduce(self, gradients: Mapping[str, Tensor], exchange: Exchange) -> dict[str, Tensor]:
        device = next(iter(gradients.values())).device if gradients else torch.device("cpu")
        checksum = zlib.crc32(repr([(n, tuple(g.shape), str(g.dtype)) for n, g in gradients.items()]).encode())
        finite = all(all_finite(g) for g in gradients.values())
        self.check(exchange.workers)
        count = sum(g.numel() for g in gradients.values())
        bad = set(exchange.roll_call(checksum, finite, count, device))
        packed = [Packed(part, exchange.workers) for part in self._by_dtype(gradients)]
        pieces = [pack.pieces(exchange.rank) for pack in packed]
        # Each vector goes as soon as it is sent.
        rows = [exchange.slices(pack.take()) for pack in packed]
        products = None
        if self.uses_products:
            known = 1 + max(layer for pack in packed for layer, _ in pack.ends)
            mine = torch.zeros(known, exchange.workers, exchange.workers, dtype=torch.float64)
            for slices, found in zip(rows, pieces, strict=True):
                for layer, columns in found:
                    mine[layer] += gram(slices[:, columns])
            products = exchange.total(mine, device)
            bad |= _not_finite(products)
        plans = self._plans(products, exchange.workers, bad)
        result: dict[str, Tensor] = {}
        for pack, slices, found in zip(packed, rows, pieces, strict=True):
            part = torch.zeros_like(slices[0])
            for layer, columns in found:
                part[columns] = self._combined(slices[:, columns], plans[layer])
            result |= pack.unpack(exchange.gather(part))
        return result

    def _by_dtype(self, gradients: Mapping[str, Tensor]) -> list[dict[str, tuple[int, Tensor]]]:
        layers = dict(zip(gradients, self.layers(list(gradients)), strict=True))
        dtypes = dict.fromkeys(g.dtype for g in gradients.values())
        return [{n: (layers[n], g) for n, g in gradients.items() if g.dtype == dtype} for dtype in dtypes]

    def _plans(self, products: Tensor | None, workers: int, bad: set[int]) -> list[Plan]:
        """Decide for each layer who is kept, and with which weights; take note of it."""
        left = [i for i in range(workers) if i not in bad]
        plans, absent = [], set(left)
        for layer in [None] if products is None else products:
            kept = left
            if layer is not None and self.leaves_out_zeros:
                kept = [i for i in left if layer[i, i] > 0]
            absent -= set(kept)
            plans.append(self._plan(layer, kept, workers, bad))
        if self.leaves_out_zeros and len(absent) == len(left) and left:
            raise LaminaError("every worker's gradient is zero: there is nothing to combine")
        self.failed = tuple(sorted(bad | (absent if self.leaves_out_zeros else set())))
        self._tell(workers)
        self.note(plans, workers)
        return plans

    def _plan(self, products: Tensor | None, kept: list[int], workers: int, bad: set[int]) -> Plan:
        if len(bad) == workers:
            if self.nonfinite == "raise":
                raise LaminaError(f"no worker's gradient is finite ({named(sorted(bad))}): there is nothing to combine")
            return Plan([], None, workers)
        failed = workers - len(kept)
        if not kept:
            return Plan(kept, None, len(bad))
        self.check(workers, failed)
        chosen = torch.tensor(kept)
        weights = None if products is None else self.weigh(products[chosen][:, chosen], failed)
        return Plan(kept, weights, failed)

    def _combined(self, rows: Tensor, plan: Plan) -> Tensor:
        if not plan.kept:
            # Nobody is left: NaN where the numbers were bad, zeros where everyone had zeros.
            fill = float("nan") if plan.failed == len(rows) else 0.0
            return torch.full_like(rows[0], fill)
        return self.combine(rows, plan.weights, plan.kept, plan.failed)

    def _tell(self, workers: int) -> None:
        new = set(self.failed) - self._told
        if new:
            log.warning(
                "%s of %d left out: its gradient has NaN or infinity, or is nothing but zeros (told once a worker)",
                named(sorted(new)),
                workers,
            )
            self._told |= new


@dataclass(frozen=True)
class Plan:
    """What is done with one layer."""

    kept: list[int]
    """Workers that enter."""
    weights: Tensor | None
    """What `weigh` gave for them; the last dimension is the workers'."""
    failed: int
    """How many do not enter."""


def by_worker(plans: Sequence[Plan], workers: int, choose: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return one number a worker, 0 where it was left out: (workers,), or (layers, workers) of several layers.

    Args:
        choose: from what `weigh` gave to one number a worker that is kept.
    """
    if all(plan.weights is None for plan in plans):
        return None
    result = torch.zeros(len(plans), workers, dtype=torch.float64)
    for row, plan in zip(result, plans, strict=True):
        if plan.weights is not None:
            row[torch.tensor(plan.kept)] = choose(plan.weights)
    return result[0] if len(plans) == 1 else result


def _not_finite(products: Tensor) -> set[int]:
    """Return the workers with NaN or infinity in any layer, from inner products (layers, p, p)."""
    return {i for i, fine in enumerate(torch.isfinite(products.diagonal(dim1=1, dim2=2)).all(0).tolist()) if not fine}
