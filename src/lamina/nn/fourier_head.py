"""A classification head over ordered bins whose probabilities are a truncated Fourier density.

Source: Gillman et al., Fourier Head: Helping Large Language Models Learn Complex Probability Distributions (2024),
arXiv 2410.22269.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import _fourier_series as series
from lamina.nn._inputs import check_features
from lamina.registry import register

SOURCE = "Gillman et al., Fourier Head (2024), arXiv 2410.22269"

FFT_FROM = 128
"""Bins from which the FFT is faster than a product with the table of waves."""


@register("layer", source=f"{SOURCE}, algorithm 1")
class FourierHead(nn.Module):
    """Linear head whose logits are the logarithm of a Fourier density at ordered bins; for `nn.Linear(d, bins)`.

    For outputs that are numbers cut into bins (values, actions on a scale, counts, angles): neighbouring bins share
    strength, and the distribution is smooth. Not for an unordered vocabulary. x (..., in_features) -> logits
    (..., num_bins + extra_classes), at least float32, also under autocast. softmax(logits) is the density at the bin
    centres -1 + (2j+1)/num_bins, floored by `eps`. The density is periodic: mass at one end leaks to the other where
    frequencies are few.

    Args:
        num_bins: m >= 2, of equal width in the latent z.
        num_frequencies: N >= 1, highest harmonic. Few: smooth. Above num_bins / 2 (a warning): like a softmax.
        eps: added to each probability before the logarithm. 1e-5 as in the paper; 1e-8 for sharp targets, as bins far
            below eps get no gradient.
        init_scale: what the start of torch's linear layer is divided by: weight, bias. (1000, 10) in the Chronos runs.
        order: bin of each class, a permutation of 0..num_bins-1, where classes are not numbered in their order.
        extra_classes: unordered classes after the bins (end of text, padding) by a linear layer `extra`, whose first
            output is the score of the ordered part. One softmax over all: ordered logits = that score + log y.
        transform: how bins are computed, with equal results: `fft`, `matmul` (no complex numbers, as some exporters
            want, and any N) or `auto`: by size.
    Raises:
        LaminaError: a size out of range, an order that is no permutation, an input that is not finite (eager mode).
        ShapeError: the last dimension of x is not in_features.
    Source: algorithm 1 and equation 4. Deviation: p = |A|^2 / (2 sum |a|^2) in place of the autocorrelation, which is
        the same number, never negative in floating point, and cheaper.
    Example:
        >>> FourierHead(64, 32, num_frequencies=8)(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    order: Tensor | None
    waves: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_bins: int,
        num_frequencies: int,
        *,
        eps: float = 1e-5,
        init_scale: tuple[float, float] = (100.0, 100.0),
        order: Sequence[int] | None = None,
        extra_classes: int = 0,
        transform: Literal["auto", "matmul", "fft"] = "auto",
    ) -> None:
        super().__init__()
        _check(in_features, num_bins, num_frequencies, eps, init_scale, extra_classes)
        self.in_features, self.num_bins, self.num_frequencies = in_features, num_bins, num_frequencies
        self.eps, self.extra_classes, self.transform = eps, extra_classes, transform
        self.linear = series.coefficient_layer(in_features, num_frequencies, init_scale)
        self.extra = nn.Linear(in_features, 1 + extra_classes) if extra_classes else None
        self.register_buffer("order", None if order is None else torch.tensor(_checked_order(order, num_bins)))
        by_fft = _by_fft(transform, num_bins, num_frequencies)
        table = None if by_fft else series.waves(num_frequencies, num_bins, torch.float32)
        self.register_buffer("waves", table)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of (..., in_features)."""
        re, im = self._coefficients(x)
        series.refuse_non_finite(series.energy(re, im), "FourierHead")
        logits = (fourier_bins(re, im, self.num_bins, self.waves) + self.eps).log()
        if self.order is not None:
            logits = logits.index_select(-1, self.order)
        if self.extra is None:
            return logits
        scores = self.extra(x).to(logits.dtype)
        return torch.cat([logits + scores[..., :1], scores[..., 1:]], dim=-1)

    def pdf(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the density of the latent at z in [-1, 1]: x (..., in_features), z that broadcasts against (...)."""
        return series.density(*self._coefficients(x), z)

    def cdf(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the probability of a latent below z, as `pdf`."""
        return series.cumulative(*self._coefficients(x), z)

    @torch.no_grad()
    def sample(self, x: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents: x (..., in_features) -> (count, ...), by bisection of the cdf."""
        if count < 1:
            raise LaminaError(f"sample draws at least one latent, got count={count}")
        re, im = self._coefficients(x)
        u = torch.rand((count, *re.shape[:-1]), dtype=re.dtype, device=re.device, generator=generator)
        return series.invert(*series.autocorrelation(re, im), u)

    def penalty(self, x: Tensor) -> Tensor:
        """Return `fourier_penalty` of the densities of x (..., in_features), 0-dim; the paper weighs it by 1e-6."""
        return series.roughness(*self._coefficients(x))

    def extra_repr(self) -> str:
        """Show the options."""
        text = f"{self.in_features}, {self.num_bins}, num_frequencies={self.num_frequencies}, eps={self.eps}"
        return text + (f", extra_classes={self.extra_classes}" if self.extra_classes else "")

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_features("FourierHead", x, self.in_features)
        return series.parts(self.linear(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierHead:
        # A table of waves rounded to bfloat16, or widened from float32, would no longer be one: make it anew.
        before = self.waves
        super()._apply(fn, recurse)
        after = self.waves
        if before is not None and after is not None and after.dtype != before.dtype:
            dtype = after.dtype if after.dtype == torch.float64 else torch.float32
            made = torch.empty(after.shape, dtype=dtype, device=after.device)
            if not after.is_meta:
                made = series.waves(self.num_frequencies, self.num_bins, dtype).to(after.device)
            self.waves = made
        return self


def fourier_bins(re: Tensor, im: Tensor, bins: int, waves: Tensor | None = None) -> Tensor:
    """Return the probabilities y of `bins` equal bins of [-1, 1]: re, im (..., N+1) -> (..., bins), sum 1 (or all 0).

    Args:
        re, im: parts of a_0..a_N, of which the density is |sum_k a_k e^{i pi k z}|^2 up to a factor.
        waves: the table of `lamina.nn._fourier_series.waves`; None: by FFT where 2 N < bins, else a table is made.
    Raises:
        ShapeError: parts of different shapes, or fewer than 2 bins.
    Example:
        >>> fourier_bins(torch.tensor([1.0, 0.0]), torch.zeros(2), 4)
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if re.shape != im.shape or bins < 2:
        raise ShapeError(f"fourier_bins takes two parts of one shape and at least 2 bins, got {tuple(re.shape)}, {tuple(im.shape)} and {bins}")  # fmt: skip  # noqa: E501
    frequencies = re.shape[-1] - 1
    # Below m harmonics the bins of |A|^2 sum to exactly m * sum |a|^2. Dividing a, which is smaller, is cheaper.
    scale = (bins * series.energy(re, im)).rsqrt()
    re, im = re * scale, im * scale
    if waves is None and 2 * frequencies < bins:
        power = series.power_by_fft(re, im, bins)
    else:
        table = series.waves(frequencies, bins, re.dtype).to(re.device) if waves is None else waves
        power = series.power_by_matmul(re, im, table)
    if frequencies < bins:
        return power
    return power / series.floored(power.sum(-1, keepdim=True))


def fourier_penalty(coefficients: Tensor) -> Tensor:
    """Return the penalty on high frequencies of coefficients (..., 2(N+1)), real parts first; 0-dim, 0 of no rows.

    2 * mean over (...) of sum_k 2 pi^2 k^2 |c_k|^2 with c_k = sum_l a_{l+k} conj(a_l), unnormalised as in the official
    code: all coefficients times s cost s^4 as much.
    Source: arXiv 2410.22269, equation 5.
    """
    return series.roughness(*series.parts(coefficients))


def smoothness(pmf: Tensor) -> Tensor:
    """Measure how far probabilities (..., m) are from their own blurs, (...): lower is smoother; float64 inside.

    sum over s = 1..100 of (6 / pi^2) / s^2 * |y - blur(y, s)|_2, blurred periodically by a Gaussian of s bins cut at
    m - 1 bins (scipy's gaussian_filter1d with mode="wrap", radius=m-1).
    Source: arXiv 2410.22269, section 4, definition of smoothness.
    """
    bins = pmf.shape[-1]
    if bins < 2:
        raise ShapeError(f"smoothness needs at least 2 bins in the last dimension, got {tuple(pmf.shape)}")
    sigma = torch.arange(1, 101, dtype=torch.float64, device=pmf.device)
    offsets = torch.arange(1 - bins, bins, device=pmf.device)
    kernel = (-0.5 * (offsets / sigma[:, None]).square()).exp()
    kernel = kernel / kernel.sum(-1, keepdim=True)
    around = torch.zeros(len(sigma), bins, dtype=torch.float64, device=pmf.device).index_add_(1, offsets % bins, kernel)
    # By Parseval: the distance is that of the spectra, and a blur multiplies a spectrum.
    left = (1 - torch.fft.fft(around)).abs().square()  # (100, m)
    power = torch.fft.fft(pmf.double()).abs().square() / bins
    return ((6 / math.pi**2) / sigma.square() * (power @ left.T).sqrt()).sum(-1)


def _by_fft(transform: str, bins: int, frequencies: int) -> bool:
    possible = 2 * frequencies < bins
    if transform not in ("auto", "matmul", "fft"):
        raise LaminaError(f"transform must be 'auto', 'matmul' or 'fft', got {transform!r}")
    if transform == "fft" and not possible:
        raise LaminaError(
            f"transform='fft' needs fewer than num_bins / 2 frequencies, got {frequencies} of {bins} bins"
        )
    return possible and (transform == "fft" or (transform == "auto" and bins >= FFT_FROM))


def _check(
    in_features: int, bins: int, frequencies: int, eps: float, scale: tuple[float, float], extra_classes: int
) -> None:
    if bins < 2:
        raise LaminaError(f"FourierHead needs num_bins of at least 2, got {bins}")
    if in_features < 1 or frequencies < 1 or extra_classes < 0:
        raise LaminaError(
            "FourierHead needs in_features and num_frequencies of at least 1 and extra_classes of at least 0, got "
            f"{in_features}, {frequencies} and {extra_classes}"
        )
    if not (eps > 0 and all(s > 0 for s in scale) and len(scale) == 2):
        raise LaminaError(f"eps and both numbers of init_scale must be above 0, got eps={eps} and {tuple(scale)}")
    if frequencies >= bins:
        warnings.warn(f"{frequencies} frequencies alias on {bins} bins: take at most {bins // 2}", stacklevel=3)
    elif 2 * frequencies > bins:
        warnings.warn(
            f"{frequencies} frequencies on {bins} bins smooth no more than a softmax: take at most {bins // 2}",
            stacklevel=3,
        )


def _checked_order(order: Sequence[int], bins: int) -> list[int]:
    if sorted(order) != list(range(bins)):
        raise LaminaError(
            f"order must name each of the {bins} bins 0..{bins - 1} once, got {len(order)}: {list(order)[:8]}..."
        )
    return list(order)
