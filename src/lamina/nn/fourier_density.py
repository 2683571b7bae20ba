"""A density head: features in, a Fourier density on [-1, 1] out, trained by exact likelihood.

Source: Gillman et al., Fourier Head (2024), arXiv 2410.22269, appendix on the continuous (MLE) head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from lamina.errors import LaminaError, ShapeError
from lamina.nn import _fourier_series as series
from lamina.nn._inputs import check_features
from lamina.registry import register

SOURCE = "Gillman et al., Fourier Head (2024), arXiv 2410.22269"


class FourierDistribution(Distribution):
    """Density |sum_k a_k e^{i pi k z}|^2 on [-1, 1], normalised in closed form; a mixture with the uniform by `eps`.

    Differentiable in its coefficients by `log_prob`, `cdf`, `mean`, `variance` and (implicitly) `rsample`.

    Args:
        real, imaginary: parts of a_0..a_N, (..., N+1), float32 or float64; a common factor changes nothing.
        eps: added to the density before it is normalised again, so that no point has probability 0.
    Raises:
        ShapeError: parts of different shapes, or no frequency. LaminaError: eps below 0.
    Example:
        >>> FourierDistribution(torch.tensor([1.0, 1.0]), torch.zeros(2), eps=0.0).log_prob(torch.tensor(0.0)).exp()
        tensor(1.)
    """

    arg_constraints = {"real": constraints.real_vector, "imaginary": constraints.real_vector}  # noqa: RUF012
    support = constraints.interval(-1, 1)
    has_rsample = True

    def __init__(self, real: Tensor, imaginary: Tensor, eps: float = 1e-8, validate_args: bool | None = None) -> None:
        if real.shape != imaginary.shape or real.dim() < 1 or real.shape[-1] < 2:
            raise ShapeError(
                "a Fourier density takes two parts of one shape (..., at least 2), got "
                f"{tuple(real.shape)} and {tuple(imaginary.shape)}"
            )
        if not eps >= 0:
            raise LaminaError(f"eps must be at least 0, got {eps}")
        self.real, self.imaginary, self.eps = real, imaginary, eps
        super().__init__(real.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FourierDistribution:
        """Return the distribution for a larger batch shape."""
        shape = (*torch.Size(batch_shape), self.real.shape[-1])
        return FourierDistribution(self.real.expand(shape), self.imaginary.expand(shape), self.eps, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, in nats, of values that broadcast against the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        p = series.density(self.real, self.imaginary, value)
        return ((p + self.eps) / (1 + 2 * self.eps)).log()

    def cdf(self, value: Tensor) -> Tensor:
        """Return the probability below each value."""
        if self._validate_args:
            self._validate_sample(value)
        return series.floored_cumulative(series.cumulative(self.real, self.imaginary, value), value, self.eps)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the point below which each probability lies, to the resolution of float32; no gradient."""
        c = series.autocorrelation(self.real, self.imaginary)
        u = torch.broadcast_to(value.to(self.real.dtype), torch.broadcast_shapes(value.shape, self.batch_shape))
        return series.invert(*c, u, self.eps)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw (*sample_shape, *batch_shape); the gradient is the implicit one, -(dF/da) / p."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=self.real.dtype, device=self.real.device)
        z = self.icdf(u)
        if not (self.real.requires_grad or self.imaginary.requires_grad) or not torch.is_grad_enabled():
            return z
        p = self.log_prob(z).exp().detach()
        moved = -self.cdf(z) / p
        return z + (moved - moved.detach())

    @property
    def mean(self) -> Tensor:
        """The expected value."""
        ratio, k = self._harmonics(imaginary=True)
        return (ratio * self._sign(k) * (2 / math.pi) / k).sum(-1) / (1 + 2 * self.eps)

    @property
    def variance(self) -> Tensor:
        """The variance."""
        ratio, k = self._harmonics(imaginary=False)
        square = 1 / 3 + (ratio * self._sign(k) * (4 / math.pi**2) / k.square()).sum(-1)
        return (square + self.eps * (2 / 3)) / (1 + 2 * self.eps) - self.mean.square()

    def _harmonics(self, *, imaginary: bool) -> tuple[Tensor, Tensor]:
        """Return the chosen part of c_k / c_0, k = 1..N, and k."""
        c = series.autocorrelation(self.real, self.imaginary)
        k = torch.arange(1, self.real.shape[-1], device=self.real.device, dtype=self.real.dtype)
        return c[imaginary][..., 1:] / series.energy(self.real, self.imaginary), k

    @staticmethod
    def _sign(k: Tensor) -> Tensor:
        return 1 - 2 * (k % 2)


@register("layer", source=f"{SOURCE}, continuous head")
class FourierDensity(nn.Module):
    """Linear head that gives a density on [-1, 1] in place of one number: regression with any shape of uncertainty.

    x (..., in_features) -> `FourierDistribution` of batch shape (...), at least float32, also under autocast. Train it
    with `-density(x).log_prob(target).mean()`; the density is periodic, so map targets inside [-1, 1] with some room.

    Args:
        num_frequencies: N >= 1, highest harmonic. Few: smooth.
        eps: floor of the density, see `FourierDistribution`.
    Raises:
        LaminaError: a size or eps out of range, an input that is not finite (eager mode).
        ShapeError: the last dimension of x is not in_features.
    Example:
        >>> FourierDensity(64, num_frequencies=8)(torch.randn(2, 64)).log_prob(torch.zeros(2)).shape
        torch.Size([2])
    """

    def __init__(self, in_features: int, num_frequencies: int, eps: float = 1e-8) -> None:
        super().__init__()
        if in_features < 1 or num_frequencies < 1:
            raise LaminaError(
                "FourierDensity needs in_features and num_frequencies of at least 1, got "
                f"{in_features} and {num_frequencies}"
            )
        if not eps >= 0:
            raise LaminaError(f"eps must be at least 0, got {eps}")
        self.in_features, self.num_frequencies, self.eps = in_features, num_frequencies, eps
        self.linear = series.coefficient_layer(in_features, num_frequencies, (100.0, 100.0))

    def forward(self, x: Tensor) -> FourierDistribution:
        """Return the density of (..., in_features)."""
        check_features("FourierDensity", x, self.in_features)
        re, im = series.parts(self.linear(x))
        series.refuse_non_finite(series.energy(re, im), "FourierDensity")
        # A graph cannot look at values, and torch's check of them cannot reshape none; else its own default decides.
        blind = torch.compiler.is_compiling() or not re.numel()
        return FourierDistribution(re, im, self.eps, validate_args=False if blind else None)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{self.in_features}, num_frequencies={self.num_frequencies}, eps={self.eps}"
