"""Flag Aggregator: the workers' gradients, projected onto the subspace that explains most of them best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.flag_subspace import flag_subspace
from lamina.gradients.robust.gram import weighted_sum
from lamina.gradients.robust.rule import Nonfinite, Plan, RobustRule, by_worker
from lamina.registry import register

Scale = Literal["median", "unit", "raw"]


@register("reducer", source="Almasi et al., Flag Aggregator (2024), arXiv 2302.05865, algorithm 1")
class FlagAggregator(RobustRule):
    """Projects the workers' directions onto the subspace that explains most of them best, and averages there.

    For workers that may send garbage (bit flips, bugs, attackers) or train on very noisy data. Nothing need be known of
    how many are faulty. Every gradient is first made a unit vector u_i, so none has influence by its length; a worker
    counts the less, the less of its direction the subspace holds. See `flag_subspace` for how it is found.

    Workers whose gradient has NaN or infinity, or is nothing but zeros, are left out: in `failed`, and p below counts
    those that are left. A float64 gradient whose square overflows (about 1e150) counts as infinite. After a call
    `explained` has v_i, the share of each worker's direction inside the subspace, and `weights` has the w_i
    that follow from it (both 0 where left out; with `per_layer` a row a parameter).

    Args:
        rank: dimension m of the subspace, 1 .. workers (where fewer are left, p); None = ceil((p + 1) / 2).
        iters: steps at most, >= 1; the official trainer takes 1 (plain PCA), the paper's text iterates.
        lam: weight of the differences between workers, >= 0.
        a: exponent of the objective, >= 1.
        scale: length of the result. `median`: median ||g_i|| * Y Y^T (sum of u_i) / p, so that learning rates of the
            mean stay right. `unit`: Y Y^T (sum of u_i) / m, as the official code has it. `raw`: Y Y^T (sum of g_i) / p
            as in the paper's algorithm: not robust, for a huge gradient inside the subspace passes.
        compat: `reference` = the official code's treatment of differences.
        per_layer: a subspace for every parameter by itself.
        nonfinite: see `RobustRule`.
    Raises:
        LaminaError: an option out of its range, fewer than 2 workers, a rank above their number, all gradients zero or
            none of them finite.
    Deviation: the paper's code takes the SVD of parameters x workers; here it is the eigenvectors of workers x workers,
        which is equal. A gradient of zeros is left out (there: it shortens the mean).
    Example:
        >>> honest = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [1.0, -0.1, 0.0], [1.0, 0.0, -0.1]])
        >>> faulty = torch.tensor([[0.0, 90.0, 90.0]])
        >>> FlagAggregator(rank=1).aggregate(torch.cat([honest, faulty])).round(decimals=1)
        tensor([0.8000, 0.0000, 0.0000])
    """

    leaves_out_zeros = True

    def __init__(
        self,
        rank: int | None = None,
        iters: int = 5,
        lam: float = 0.0,
        a: float = 2,
        scale: Scale = "median",
        compat: Literal["reference"] | None = None,
        per_layer: bool = False,
        *,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        super().__init__(nonfinite)
        for name, value in (("rank", 1 if rank is None else rank), ("iters", iters)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LaminaError(f"{name} must be a whole number >= 1, got {value!r}")
        if not 0 <= lam < float("inf"):
            raise LaminaError(f"lam must be a number >= 0, got {lam!r}")
        if not 1 <= a < float("inf"):
            raise LaminaError(f"a must be a number >= 1 (below, outliers would count more), got {a!r}")
        if scale not in ("median", "unit", "raw"):
            raise LaminaError(f"scale must be 'median', 'unit' or 'raw', got {scale!r}")
        if compat not in (None, "reference"):
            raise LaminaError(f"compat must be None or 'reference', got {compat!r}")
        self.rank, self.iters, self.lam, self.a = rank, iters, lam, a
        self.scale, self.compat, self.per_layer = scale, compat, per_layer
        self.explained: Tensor | None = None
        """v of the last call, by worker."""

    def check(self, workers: int, failed: int = 0) -> None:
        """Refuse a single worker, and a subspace larger than the workers can span."""
        if workers < 2:
            raise LaminaError(f"FlagAggregator needs at least 2 workers, got {workers}")
        if self.rank is not None and self.rank > workers:
            raise LaminaError(f"rank must be within 1..{workers}, the number of workers, got {self.rank}")

    def weigh(self, products: Tensor, failed: int) -> Tensor:
        """Return (3, p): weights of the gradients, w and v."""
        p = len(products)
        rank = min(self.rank or p // 2 + 1, p)
        lengths = products.diagonal().sqrt()
        found = flag_subspace(
            products / (lengths[:, None] * lengths),
            rank,
            self.iters,
            lam=self.lam,
            a=self.a,
            compat=self.compat,
        )
        if self.scale == "raw":
            whole = found.projected @ lengths / p
        elif self.scale == "unit":
            whole = found.projected.sum(1) / rank
        else:
            whole = found.projected.sum(1) * (lengths.quantile(0.5) / p)
        return torch.stack([whole / lengths, found.weights, found.explained])

    def combine(self, rows: Tensor, weights: Tensor | None, kept: Sequence[int], failed: int) -> Tensor:
        """Return the weighted sum."""
        assert weights is not None
        return weighted_sum(rows, weights[0], kept)

    def layers(self, names: Sequence[str]) -> list[int]:
        """Give each parameter weights of its own, with `per_layer`."""
        return list(range(len(names))) if self.per_layer else super().layers(names)

    def note(self, plans: Sequence[Plan], workers: int) -> None:
        """Keep w and v of the last call."""
        self.weights = by_worker(plans, workers, lambda table: table[1])
        self.explained = by_worker(plans, workers, lambda table: table[2])
