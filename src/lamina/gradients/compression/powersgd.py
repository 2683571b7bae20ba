"""Gradients as two thin factors, found by one power iteration a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.compression.compressor import Compressor, Option, seeded
from lamina.gradients.reducer import Group, flatten, unflatten
from lamina.registry import register

POWER_ITERATIONS = 5
"""Of the estimate of singular values."""

CACHED = 160_000
"""Numbers that are written at a time."""


@register("reducer", "powersgd", source="Vogels et al., PowerSGD (NeurIPS 2019), arXiv 1905.13727, algorithms 1 and 2")
class PowerSGD(Compressor):
    """Mean of the workers' gradients as matrices of low rank: two all-reduces of thin factors.

    P = M Q is averaged and orthonormalised, Q = M^T P is averaged, and every worker takes P Q^T; Q is where the next
    step begins, and what P Q^T misses of a worker's own gradient is added to its next one. Factors add up over workers,
    so traffic does not grow with their number.

    torch's `powerSGD_hook` is what this is tested against (the same numbers, errors included). It cannot be the engine:
    it has one rank for all layers, keeps its buffers by the number of a bucket, so that neither a rewrite nor a resume
    finds them again, and works under DistributedDataParallel alone.

    Args:
        rank: columns of the factors; a layer takes at most its smaller dimension.
        error_feedback: add what was missed to the next step's gradient.
        warm_start: begin with the last step's Q; without it with a random one, the same on every worker.
        min_compression_rate: layers that would become less than so many times smaller go raw.
        start_step: steps before it are plain all-reduce. Buffers go by parameter name, so any step is safe.
        seed: of the first Q.
        nonfinite: `raise`, or `pass_on` under fp16; see `Compressor`.
        error: how L-GreCo's table is made: `svd`, exact, or `power`, by five power iterations, for large layers.
    Raises:
        LaminaError: an option out of its range; from `reduce`, a worker that is faulty or gone.
    Deviation: Q is orthonormalised before use, as torch does (the same subspace, better conditioned). A layer whose
        rank changes keeps the leading columns of Q, and only new ones are drawn. Orthonormal by QR at every rank, which
        needs no epsilon for columns of zeros. Factors are computed in float32 and sent in the gradient's type.
    Example:
        >>> PowerSGD(rank=4).size((128, 64), 4)
        3072
    """

    knob = "rank"

    def __init__(
        self,
        rank: int = 4,
        *,
        error_feedback: bool = True,
        warm_start: bool = True,
        min_compression_rate: float = 2.0,
        start_step: int = 2,
        seed: int = 0,
        nonfinite: Literal["raise", "pass_on"] = "raise",
        error: Literal["svd", "power"] = "svd",
    ) -> None:
        if not 0 < min_compression_rate < math.inf:
            raise LaminaError(f"min_compression_rate must be above 0, got {min_compression_rate!r}")
        if error not in ("svd", "power"):
            raise LaminaError(f"error must be 'svd' or 'power', got {error!r}")
        super().__init__(
            rank,
            error_feedback=error_feedback,
            start_step=start_step,
            nonfinite=nonfinite,
            min_compression_rate=min_compression_rate,
        )
        self.warm_start, self.seed, self.error = warm_start, seed, error
        self.memory.kinds["factor"] = {}

    def check_option(self, option: Option) -> Option:
        """Refuse ranks that are not whole numbers of at least 1."""
        if isinstance(option, bool) or option != int(option) or option < 1:
            raise LaminaError(f"rank must be a whole number of at least 1, got {option!r}")
        return int(option)

    def capped(self, shape: Sequence[int], option: Option) -> Option:
        """Return the rank, at most the matrix's own."""
        return min(int(option), *_matrix(shape))

    def options(self, shape: Sequence[int]) -> list[Option]:
        """List the ranks from half the default to twice it, as far as the matrix has them."""
        rank = int(self.option)
        return sorted({self.capped(shape, r) for r in range(max(1, rank // 2), 2 * rank + 1)})

    def compressed_size(self, shape: Sequence[int], option: Option, itemsize: int) -> int:
        """Return the bytes of both factors."""
        n, m = _matrix(shape)
        return min(int(option), n, m) * (n + m) * itemsize

    def compression_errors(self, gradient: Tensor, options: Sequence[Option]) -> Tensor:
        """Return sqrt(sum_{i > r} sigma_i^2) for each rank r: the least error a matrix of rank r can have."""
        matrix = gradient.reshape(len(gradient), -1)
        if self.error == "power":
            values = leading_singular_values(matrix, int(max(options)), POWER_ITERATIONS, self.seed)
            rest = matrix.double().square().sum() - values.square().sum()
            tails = torch.cat([values.square(), rest.clamp(min=0)[None]])
        else:
            tails = torch.cat([torch.linalg.svdvals(matrix).double().square(), matrix.new_zeros(1).double()])
        left = tails.flip(0).cumsum(0).flip(0)
        return torch.stack([left[min(int(rank), len(left) - 1)] for rank in options]).sqrt()

    def exchange(self, layers: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Average both factors and multiply them."""
        matrices = {n: self.corrected(n, g).reshape(len(g), -1) for n, g in layers.items()}
        dtype = next(iter(layers.values())).dtype
        first = {n: times(m, orthonormal(self.first_factor(n, m))) for n, m in matrices.items()}
        p = {n: orthonormal(f) for n, f in self._mean_factors(first, dtype, group).items()}
        q = self._mean_factors({n: times(m.T, p[n]) for n, m in matrices.items()}, dtype, group)
        result = {}
        for name, gradient in layers.items():
            product = outer(p[name], q[name]).to(dtype)
            result[name] = product.view(gradient.shape)
            self.keep(name, matrices[name].sub_(product).view(gradient.shape))
            if self.warm_start:
                self.memory["factor"][name] = q[name]
        return result

    def first_factor(self, name: str, matrix: Tensor) -> Tensor:
        """Return the (m, rank) factor that a step begins with: the last step's, filled up with random columns."""
        n, m = matrix.shape
        rank = min(int(self.option_of(name)), n, m)
        kept: Tensor | None = self.memory["factor"].get(name) if self.warm_start else None
        if kept is None or len(kept) != m:
            kept = matrix.new_empty((m, 0))
        missing = rank - kept.shape[1]
        if missing <= 0:
            return kept[:, :rank].to(matrix)
        when = 0 if self.warm_start else self.memory.steps
        drawn = torch.randn(m, missing, generator=seeded(torch.device("cpu"), self.seed, name, rank, when))
        return torch.cat([kept.to(matrix), drawn.to(matrix)], dim=1)

    def _mean_factors(self, factors: Mapping[str, Tensor], dtype: torch.dtype, group: Group) -> dict[str, Tensor]:
        sent = {n: f.to(dtype) for n, f in factors.items()}
        mean = unflatten({k: self.traffic.mean(v, group) for k, v in flatten(sent).items()}, sent)
        return {n: mean[n].to(f.dtype) for n, f in factors.items()}


def orthonormal(matrix: Tensor) -> Tensor:
    """Return orthonormal columns that span those of a matrix, (n, r) with r <= n."""
    return torch.linalg.qr(matrix).Q


def times(matrix: Tensor, thin: Tensor) -> Tensor:
    """Return matrix @ thin; the other way round, because BLAS is ten times slower with a thin factor on the right."""
    return (thin.T @ matrix.T).T


def outer(p: Tensor, q: Tensor) -> Tensor:
    """Return p @ q^T of two thin factors: on a CPU by rows that stay in its cache."""
    if p.device.type != "cpu":
        return p @ q.T
    product, across = p.new_empty((len(p), len(q))), q.T.contiguous()
    rows = max(1, CACHED // len(q))
    for some, out in zip(p.split(rows), product.split(rows), strict=True):
        torch.mm(some, across, out=out)
    return product


def leading_singular_values(matrix: Tensor, count: int, iterations: int, seed: int = 0) -> Tensor:
    """Estimate the largest singular values by power iterations on a block of vectors: float64, never above the true."""
    n, m = matrix.shape
    start = torch.randn(m, min(count, n, m), generator=seeded(torch.device("cpu"), seed, n, m)).to(matrix)
    for _ in range(iterations):
        start = matrix.T @ orthonormal(matrix @ start)
    return torch.linalg.svdvals(matrix.double().T @ orthonormal(matrix.double() @ orthonormal(start).double()))


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
