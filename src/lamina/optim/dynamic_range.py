"""Tensors of any range in one byte a number: groups, each with an exponent that spreads it over all of float8.

The functions work on whole groups, one a row, and compile; `QuantizedTensor` is a tensor that is stored this way.
Source: Xi et al., COAT (2025), arXiv 2410.19313, section 4 (dynamic range expansion).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lamina.errors import LaminaError, nearest
from lamina.float8 import DTYPES, Format, decode

RangeBound = Literal["code", "paper"]

EXPONENTS = (1 / 16, 64.0)
"""Bounds of a group's exponent; the upper one is met where the largest number is less than 1.2 times the smallest."""

TINY = 1e-30
"""Added to the largest and to the smallest magnitude of a group."""

HUGE = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Coding:
    """How a tensor is stored: format, group size, and how a group's exponent is found."""

    format: Format = "e4m3"
    group_size: int = 128
    """Consecutive numbers with one scale: 32, 64, 128, ..."""
    expand: bool = True
    """False: a scale alone, as other 8-bit optimizers do."""
    expand_min: int = 16
    """Exponents are multiples of 1 / expand_min."""
    range_bound: RangeBound = "code"
    """`code`: half the square of the largest float8, rounded down to a multiple; `paper`: all of float8's range."""

    def __post_init__(self) -> None:
        for option, choices in (("format", tuple(DTYPES)), ("range_bound", ("code", "paper"))):
            value = getattr(self, option)
            if value not in choices:
                raise LaminaError(
                    f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}"
                    f"{nearest(str(value), choices)}"
                )
        size = self.group_size
        if not isinstance(size, int) or size < 32 or size & (size - 1):
            raise LaminaError(f"group_size must be a power of two, 32 or more, got {size!r}")
        if not isinstance(self.expand, bool):
            raise LaminaError(f"expand is True or False, for both moments alike, got {self.expand!r}")
        if not isinstance(self.expand_min, int) or self.expand_min < 1:
            raise LaminaError(f"expand_min must be an integer of 1 or more, got {self.expand_min!r}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return DTYPES[self.format]

    @property
    def largest(self) -> float:
        """Largest finite number of the format."""
        return torch.finfo(self.dtype).max


def exponents(largest: Tensor, smallest: Tensor, coding: Coding) -> Tensor:
    """Return the exponent k of each group, from its largest and its smallest magnitude (both above 0).

    Source: arXiv 2410.19313, equation 3 (`paper`), and the official code (`code`), whose bound for E4M3 is 448^2 / 2.
        Deviation: k is clamped to 1/16..64; there a constant group gives an infinite k.
    """
    ratio = largest.log2() - smallest.log2()
    if coding.range_bound == "paper":
        subnormal = torch.finfo(coding.dtype).smallest_normal * torch.finfo(coding.dtype).eps
        k = math.log2(coding.largest / subnormal) / ratio
    else:
        k = (coding.expand_min * math.log2(coding.largest**2 / 2) / ratio).floor() / coding.expand_min
    return k.clamp(*EXPONENTS)


def quantize_groups(x: Tensor, coding: Coding) -> tuple[Tensor, ...]:
    """Return (codes, scale, exponent, center) of groups, or (codes, scale) without expansion.

    x (groups, n) float32 -> codes (groups, n) float8, the others (groups, 1) float32. Zeros stay zeros and do not
    count for the smallest magnitude; numbers beyond float32 are taken as its largest.

    Source: arXiv 2410.19313, equations 2 to 4; sign(x) (|x| / c)^k / s with c the geometric middle of the range.
    """
    magnitude = x.abs().clamp(max=HUGE)
    largest = magnitude.amax(-1, keepdim=True)
    if not coding.expand:
        scale = (largest + TINY) / coding.largest
        return _cast(x / scale, coding), scale
    least = magnitude.masked_fill(magnitude == 0, math.inf).amin(-1, keepdim=True)
    # Of a group of zeros both are 0.
    smallest = torch.minimum(least, largest) + TINY
    largest = largest + TINY
    # The root of a product would underflow.
    center = largest.sqrt() * smallest.sqrt()
    k = exponents(largest, smallest, coding)
    scale = (k * (largest / center).log2()).exp2() / coding.largest
    # (|x| / c)^k / s with c cancelled; a power would cost three times as much.
    spread = coding.largest * (k * (magnitude / largest).log2()).exp2()
    return _cast(torch.copysign(spread, x), coding), scale, k, center


def dequantize_groups(
    codes: Tensor, scale: Tensor, exponent: Tensor | None = None, center: Tensor | None = None
) -> Tensor:
    """Undo `quantize_groups`; float32, always finite. Source: arXiv 2410.19313, equation 4, inverted."""
    y = decode(codes) * scale
    if exponent is None or center is None:
        return y
    power = (y.abs().log2() / exponent).exp2()
    return torch.copysign((power * center).clamp(max=HUGE), y)


def to_groups(x: Tensor, group_size: int) -> Tensor:
    """Cut a tensor, row by row, into (groups, group_size); the last group is filled with zeros, which count nowhere."""
    flat = x.reshape(-1)
    short = -flat.numel() % group_size
    if short and flat.dtype.itemsize == 1:
        flat = F.pad(flat.view(torch.uint8), (0, short)).view(flat.dtype)
    elif short:
        flat = F.pad(flat, (0, short))
    return flat.view(-1, group_size)


class QuantizedTensor(Tensor):
    """A float32 tensor kept as float8 codes with a scale (and exponent and center) for each group of its numbers.

    To every operation it is the float32 tensor that it stands for: it is dequantised on the way in, and results are
    plain tensors, so that whatever follows a rewrite, shards or averages optimizer state works on it. What is written
    into it in place is quantised.

    codes (like the tensor), scale, exponent and center (groups,) each; the latter two are None without expansion.
    """

    codes: Tensor
    scale: Tensor
    exponent: Tensor | None
    center: Tensor | None
    coding: Coding

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, exponent: Tensor | None, center: Tensor | None, coding: Coding
    ) -> QuantizedTensor:
        """Make the tensor that the codes stand for; nothing is copied."""
        made: QuantizedTensor = Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=torch.float32, device=codes.device
        )
        return made

    def __init__(
        self, codes: Tensor, scale: Tensor, exponent: Tensor | None, center: Tensor | None, coding: Coding
    ) -> None:
        self.codes, self.scale, self.exponent, self.center, self.coding = codes, scale, exponent, center, coding

    def parts(self) -> dict[str, Tensor]:
        """Return what is stored, by name."""
        named = {"codes": self.codes, "scale": self.scale, "k": self.exponent, "center": self.center}
        return {name: part for name, part in named.items() if part is not None}

    def groups(self) -> list[Tensor]:
        """Return what the functions take: codes (groups, group_size), then the others (groups, 1); views if can be."""
        codes, *others = self.parts().values()
        return [to_groups(codes, self.coding.group_size), *(o[:, None] for o in others)]

    def store(self, groups: Sequence[Tensor]) -> None:
        """Take over what `quantize_groups` returned, in place."""
        codes, *others = self.parts().values()
        codes.view(torch.uint8).view(-1).copy_(groups[0].view(torch.uint8).view(-1)[: codes.numel()])
        for own, new in zip(others, groups[1:], strict=True):
            own.copy_(new.view(-1))

    def dequantize(self) -> Tensor:
        """Return the float32 numbers."""
        return dequantize_groups(*self.groups()).view(-1)[: self.numel()].view(self.shape)

    def nbytes_stored(self) -> int:
        """Return how many bytes it takes."""
        return sum(part.nbytes for part in self.parts().values())

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Say what it is; the numbers are `dequantize()`."""
        return f"QuantizedTensor(shape={tuple(self.shape)}, {self.coding})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Coding]]:
        """For torch: names of the tensors inside, and what else it takes to make it again."""
        names = [n for n in ("codes", "scale", "exponent", "center") if getattr(self, n) is not None]
        return names, (self.coding,)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], rest: tuple[Coding], size: Any, stride: Any
    ) -> QuantizedTensor:
        """For torch: make it again."""
        others = (inner.get(n) for n in ("exponent", "center"))
        return QuantizedTensor(inner["codes"], inner["scale"], *others, *rest)  # type: ignore[call-arg, arg-type]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Copies and moves keep the codes; every other operation sees float32 numbers."""
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, QuantizedTensor):
            moved = func is aten._to_copy.default and kwargs.get("dtype") in (None, torch.float32)
            same = func in (aten.view.default, aten._unsafe_view.default) and list(args[1]) == list(first.shape)
            if moved or same or func in (aten.detach.default, aten.alias.default, aten.clone.default):
                return first._each(func, {"device": kwargs.get("device")} if moved else {})
            if func._schema.is_mutable:
                wide = first.dequantize()
                func(wide, *_wide(args[1:]), **_wide(kwargs))
                first.store(quantize_groups(to_groups(wide, first.coding.group_size), first.coding))
                return first
        return func(*_wide(args), **_wide(kwargs))

    def _each(self, func: Any, kwargs: Mapping[str, Any]) -> QuantizedTensor:
        """Apply a copy or move to every part."""
        if func in (aten.view.default, aten._unsafe_view.default):
            func = aten.alias.default
        done = [None if p is None else func(p, **kwargs) for p in (self.codes, self.scale, self.exponent, self.center)]
        return QuantizedTensor(done[0], done[1], done[2], done[3], self.coding)  # type: ignore[arg-type]


aten = torch.ops.aten


def zeros(shape: Sequence[int], coding: Coding, device: torch.device | None = None) -> QuantizedTensor:
    """Return zeros: codes and scales 0, exponent and center 1."""
    count = -(-math.prod(shape) // coding.group_size)
    codes = torch.zeros(tuple(shape), dtype=torch.uint8, device=device).view(coding.dtype)
    scale = torch.zeros(count, device=device)
    if not coding.expand:
        return QuantizedTensor(codes, scale, None, None, coding)
    return QuantizedTensor(codes, scale, torch.ones(count, device=device), torch.ones(count, device=device), coding)


def encode(x: Tensor, coding: Coding) -> QuantizedTensor:
    """Quantise a tensor of finite numbers of any shape."""
    made = zeros(x.shape, coding, x.device)
    made.store(quantize_groups(to_groups(x.detach().float(), coding.group_size), coding))
    return made


class DynamicRangeQuantizer:
    """Quantise tensors to float8 with an exponent a group, so that none of its numbers is lost below the smallest code.

    For numbers of which small ones matter as much as large ones: an optimizer's second moment, of which the root is
    divided by. 1 byte a number, and 12 bytes a group. The relative error is about 2^-4 / exponent at most (E4M3): a
    group that spans little gets a large exponent.

    Args:
        format: `e4m3` or `e5m2`.
        group_size: numbers with one scale, taken row by row: 32, 64, 128, ...
        expand: False: a scale alone, 4 bytes a group; then what is 2^-18 of a group's largest number becomes 0.
        expand_min: exponents are multiples of 1 / expand_min.
        range_bound: see `Coding`.
    Raises:
        LaminaError: an option out of range; numbers that are not finite.
    Source: Xi et al., COAT (2025), arXiv 2410.19313, section 4.
    Example:
        >>> found = DynamicRangeQuantizer().quantize(torch.tensor([1e-6, -2e-3, 0.0, 1.0]))
        >>> found.dequantize()
        tensor([ 9.7640e-07, -1.8950e-03,  0.0000e+00,  1.0000e+00])
    """

    def __init__(
        self,
        format: Format = "e4m3",
        group_size: int = 128,
        expand: bool = True,
        *,
        expand_min: int = 16,
        range_bound: RangeBound = "code",
    ) -> None:
        self.coding = Coding(format, group_size, expand, expand_min, range_bound)

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Return the tensor in float8: codes like x, and scale, exponent and center of each group."""
        if not torch.isfinite(x).all():
            raise LaminaError(f"a tensor of shape {tuple(x.shape)} has numbers that are not finite: they have no code")
        return encode(x, self.coding)

    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 numbers."""
        return quantized.dequantize()


def _cast(x: Tensor, coding: Coding) -> Tensor:
    # Clamped, as what a cast makes of larger numbers differs between versions.
    return x.clamp(-coding.largest, coding.largest).to(coding.dtype)


def _wide(tree: Any) -> Any:
    return tree_map(lambda x: x.dequantize() if isinstance(x, QuantizedTensor) else x, tree)
