"""Non-negative Fourier series on [-1, 1]: p(z) = |A(z)|^2 / (2 sum_k |a_k|^2) with A(z) = sum_k a_k e^{i pi k z}.

Shapes: the real and imaginary parts of a_0..a_N are two real tensors (..., N+1); points z broadcast against `...`.
Source: Gillman et al., Fourier Head (2024), arXiv 2410.22269, algorithm 1 and equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.nn._precision import without_autocast

POINTS_AT_ONCE = 2**22
"""Points times frequencies that are held in memory at once while a series is summed."""

STEPS = 25
"""Bisections of [-1, 1]: to 2^-24, the resolution of float32."""


def coefficient_layer(in_features: int, num_frequencies: int, scale: tuple[float, float]) -> nn.Linear:
    """Build the layer that makes the coefficients, real parts first: torch's own start, divided by `scale`."""
    linear = nn.Linear(in_features, 2 * (num_frequencies + 1))
    with torch.no_grad():
        linear.weight.div_(scale[0])
        linear.bias.div_(scale[1])
    return linear


def parts(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Split what the layer made, (..., 2(N+1)), into real and imaginary parts, at least float32."""
    wide = coefficients if coefficients.dtype == torch.float64 else coefficients.float()
    re, im = wide.chunk(2, dim=-1)
    return re, im


def energy(re: Tensor, im: Tensor) -> Tensor:
    """Return c_0 = sum_k |a_k|^2 with its dimension kept, (..., 1); never 0, so that all-zero coefficients divide."""
    return floored(re.square().sum(-1, keepdim=True) + im.square().sum(-1, keepdim=True))


def floored(total: Tensor) -> Tensor:
    """Keep a sum of squares away from 0, but so little that its power -3/2, in a gradient, is still a number."""
    return total + torch.finfo(total.dtype).tiny ** 0.6


def refuse_non_finite(total: Tensor, what: str) -> None:
    """Refuse coefficients that are not finite, where a value can be looked at (not in a graph, nor under vmap).

    Raises:
        LaminaError: NaN or infinity.
    """
    if torch.compiler.is_compiling() or total.is_meta:
        return
    try:
        finite = bool(torch.isfinite(total).all())
    except RuntimeError:
        return
    if not finite:
        raise LaminaError(
            f"{what} got coefficients that are not finite (inputs of shape {tuple(total.shape[:-1])} plus features): "
            "its input has NaN or infinity, or has outgrown the square root of the largest number of its dtype"
        )


def waves(num_frequencies: int, bins: int, dtype: torch.dtype) -> Tensor:
    """Tabulate e^{i pi k b_j} at the bin centres as a real matrix (2(N+1), 2 bins): (re, im) @ it = (Re A, Im A)."""
    k, j = torch.arange(num_frequencies + 1), torch.arange(bins)
    # Whole turns are taken off while the numbers are integers: high frequencies are as exact as low ones.
    angle = (k[:, None] * (2 * j + 1 - bins) % (2 * bins)).double() * (math.pi / bins)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)]).to(dtype)


def power_by_matmul(re: Tensor, im: Tensor, table: Tensor) -> Tensor:
    """Return |A(b_j)|^2 at the bin centres, (..., bins), by one product with `waves`."""
    with without_autocast(re.device):
        real, imaginary = (torch.cat([re, im], -1) @ table.to(re.dtype)).chunk(2, dim=-1)
    return real.square() + imaginary.square()


def power_by_fft(re: Tensor, im: Tensor, bins: int) -> Tensor:
    """Return |A(b_j)|^2 at the bin centres, (..., bins), in O(bins log bins); needs 2 N < bins.

    Re A and Im A are two real signals, each of which is a real inverse FFT: half the memory of a complex one.
    """
    if not re.numel():
        return (re + im)[..., :1].expand(*re.shape[:-1], bins)
    k = torch.arange(re.shape[-1], device=re.device, dtype=re.dtype)
    # b_j = -1 + (2j+1)/m: what is left of pi k b_j beside 2 pi k j / m turns a_k once. Of k > 0 half goes to -k.
    angle = (math.pi / bins) * k
    half = (1 - 2 * (k % 2)) * torch.where(k > 0, 0.5, 1.0)
    cosine, sine = half * angle.cos(), half * angle.sin()
    u, v = re * cosine - im * sine, re * sine + im * cosine
    real = torch.fft.irfft(torch.complex(u, v), n=bins, norm="forward")
    imaginary = torch.fft.irfft(torch.complex(v, -u), n=bins, norm="forward")
    return real.square() + imaginary.square()


def autocorrelation(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """Return real and imaginary parts of c_k = sum_l a_{l+k} conj(a_l), k = 0..N, each (..., N+1), by FFT."""
    if not re.numel():
        return re + im, re - im
    count = re.shape[-1]
    spectrum = torch.fft.fft(torch.complex(re, im), n=2 * count)
    c = torch.fft.ifft(torch.view_as_real(spectrum).square().sum(-1))[..., :count]
    return c.real, c.imag


def density(re: Tensor, im: Tensor, z: Tensor) -> Tensor:
    """Return p(z), never below 0: re, im (..., N+1), z broadcast against (...) -> the common shape."""
    z = z.to(re.dtype)
    real = imaginary = re.new_zeros(())
    for part, angle in _angles(z, 0, re):
        cosine, sine, a, b = angle.cos(), angle.sin(), re[..., part], im[..., part]
        real = real + (a * cosine - b * sine).sum(-1)
        imaginary = imaginary + (a * sine + b * cosine).sum(-1)
    return (real.square() + imaginary.square()) / (2 * energy(re, im).squeeze(-1))


def cumulative(re: Tensor, im: Tensor, z: Tensor) -> Tensor:
    """Return F(z), the integral of the density from -1, as `density` takes and gives it."""
    return integral(*autocorrelation(re, im), z)


def integral(c_re: Tensor, c_im: Tensor, z: Tensor) -> Tensor:
    """Return F(z) of a density whose autocorrelation is known."""
    z = z.to(c_re.dtype)
    total = (z + 1) / 2
    scale = floored(c_re[..., :1])
    for part, angle in _angles(z, 1, c_re):
        k = torch.arange(part.start, part.stop, device=z.device, dtype=z.dtype)
        term = c_re[..., part] * angle.sin() + c_im[..., part] * (angle.cos() - 1 + 2 * (k % 2))
        total = total + (term / (scale * (math.pi * k))).sum(-1)
    return total


def invert(c_re: Tensor, c_im: Tensor, u: Tensor, eps: float = 0.0) -> Tensor:
    """Return z with F(z) = u by bisection, F mixed with the uniform density as `eps` says; no gradient."""
    low, high = torch.full_like(u, -1.0), torch.ones_like(u)
    with torch.no_grad():
        for _ in range(STEPS):
            middle = (low + high) / 2
            below = floored_cumulative(integral(c_re, c_im, middle), middle, eps) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def floored_cumulative(f: Tensor, z: Tensor, eps: float) -> Tensor:
    """Mix F with the uniform distribution, so that its density is (p + eps) / (1 + 2 eps)."""
    return (f + eps * (z + 1)) / (1 + 2 * eps)


def roughness(re: Tensor, im: Tensor) -> Tensor:
    """Return 2 * mean over `...` of sum_k 2 pi^2 k^2 |c_k|^2, c unnormalised; 0-dim, 0 of no rows."""
    c_re, c_im = autocorrelation(re, im)
    k = torch.arange(c_re.shape[-1], device=re.device, dtype=re.dtype)
    rows = ((2 * math.pi**2) * k.square() * (c_re.square() + c_im.square())).sum(-1)
    return 2 * rows.sum() / max(rows.numel(), 1)


def _angles(z: Tensor, first: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut frequencies first..N into parts small enough for memory; give each with pi k z, (..., part)."""
    stop = like.shape[-1]
    points = torch.broadcast_shapes(z.shape, like.shape[:-1]).numel()
    step = max(1, POINTS_AT_ONCE // max(1, points))
    for start in range(first, stop, step):
        end = min(start + step, stop)
        yield slice(start, end), math.pi * z.unsqueeze(-1) * torch.arange(start, end, device=z.device, dtype=z.dtype)
