"""Numbers in float8 and back: one scale for a tensor, or one for every 16 numbers along its last dimension.

The scale is rounded to bfloat16 first, and numbers are divided by what is stored.
Source: Xi et al., COAT (2025), arXiv 2410.19313, section 5.
Deviation: the official code divides by the unrounded scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from lamina.errors import LaminaError, nearest
from lamina.float8 import DTYPES, Format, decode

TINY = 1e-10
"""Added to the largest magnitude: a tensor of zeros has a scale."""


@dataclass(frozen=True)
class Formats:
    """How a layer rounds what it keeps and what it multiplies."""

    forward: Format = "e4m3"
    """Of activations and weights."""
    backward: Format = "e5m2"
    """Of gradients that are multiplied."""
    group: int = 16
    """Numbers with one scale, along the last dimension, outside linear layers; 0: one scale for the tensor."""

    def __post_init__(self) -> None:
        for option in ("forward", "backward"):
            value = getattr(self, option)
            if value not in DTYPES:
                raise LaminaError(f"{option} must be 'e4m3' or 'e5m2', got {value!r}{nearest(str(value), DTYPES)}")
        if not isinstance(self.group, int) or self.group < 0:
            raise LaminaError(f"group is how many numbers share a scale (0: all of a tensor), got {self.group!r}")


def per_tensor(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return (codes like x, scale ()) of a tensor."""
    return _divide(x, _scale(x.abs().amax(), format), format)


def per_group(x: Tensor, format: Format, group: int) -> tuple[Tensor, Tensor]:
    """Return (codes like x, scales (..., groups)) of consecutive numbers; the last group of a row may be shorter."""
    if not group:
        return per_tensor(x, format)
    scale = _scale(group_max(x, group), format)
    codes, _ = _divide(x, spread(scale, x.shape[-1], group), format)
    return codes, scale


def group_max(x: Tensor, group: int) -> Tensor:
    """Return the largest magnitude of each group, (..., n) -> (..., groups); its maximum is exactly that of x."""
    padded = F.pad(x.abs(), (0, -x.shape[-1] % group))
    return padded.unflatten(-1, (-1, group)).amax(-1)


def spread(scale: Tensor, size: int, group: int) -> Tensor:
    """Repeat the scale of each group for its numbers; (..., groups) -> (..., size)."""
    return scale.repeat_interleave(group, -1)[..., :size]


def restore(codes: Tensor, scale: Tensor, group: int = 0) -> Tensor:
    """Return the float32 numbers of codes; products of two of them are exact in float32."""
    wide = scale.float()
    return decode(codes) * (wide if wide.dim() == 0 else spread(wide, codes.shape[-1], group))


def per_tensor_once(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return `per_tensor(x)`; layers that read the very same tensor keep the very same codes."""
    if torch.compiler.is_compiling():
        # There equal expressions are merged anyway.
        return per_tensor(x.detach(), format)
    known = _latest.get(x)
    if known is None or known[:2] != (x._version, format):
        known = (x._version, format, *per_tensor(x.detach(), format))
        _latest[x] = known
    return known[2], known[3]


_latest: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Codes of tensors that are still alive."""


def _scale(largest: Tensor, format: Format) -> Tensor:
    return ((largest.float() + TINY) / torch.finfo(DTYPES[format]).max).bfloat16()


def _divide(x: Tensor, scale: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    limit = torch.finfo(DTYPES[format]).max
    # Clamped, as what a cast makes of larger numbers differs between versions.
    return (x.float() / scale.float()).clamp(-limit, limit).to(DTYPES[format]), scale
