"""Gradients in a few bits a number, rounded at random so that the mean is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.compression.compressor import Compressor, Option, seeded
from lamina.gradients.reducer import Group
from lamina.registry import register

Scale = Literal["max", "l2"]
CHUNK = 1 << 18
"""Elements worked on at a time on a CPU, so that they stay in its cache; part of the format of what is sent."""

INSIDE = 1 - 2.0**-20
"""Keeps what rounds up from the largest number of a bucket below the next level, whatever the last bit is."""


@register("reducer", "qsgd", source="Alistarh et al., QSGD (NeurIPS 2017), arXiv 1610.02132, section 3.1")
class QSGD(Compressor):
    """Mean of the workers' gradients, each sent with `bits` bits a number and one scale a bucket of numbers.

    A number becomes one of 2 (2^(bits-1) - 1) + 1 levels between -scale and scale, the upper or the lower neighbour at
    random: unbiased, off by less than one level. Workers gather each other's codes (sums of codes would not fit).

    Args:
        bits: 2..8, of a number with its sign.
        bucket: numbers that share a scale.
        scale: `max`, the largest magnitude of a bucket, or `l2`, its norm (the paper's; far fewer non-zero levels).
        seed: of the rounding; every worker, step and tensor draws numbers of its own from it.
        start_step: steps before it are plain all-reduce.
        nonfinite: `raise`, or `pass_on` under fp16; see `Compressor`.
    Raises:
        LaminaError: an option out of its range; from `reduce`, a worker that is faulty or gone.
    Deviation: the numbers that round have 16 bits, so a mean is off by at most 2^-17 of a level. They are drawn for one
        chunk; each later chunk of a tensor adds a random offset (modulo 1) of its own to them, after which any two are
        independent still, so errors add up as those of independent numbers do.
    Example:
        >>> QSGD(bits=4).size((128, 64), 4)
        4160
    """

    knob = "bits"

    def __init__(
        self,
        bits: int = 4,
        *,
        bucket: int = 512,
        scale: Scale = "max",
        seed: int = 0,
        start_step: int = 0,
        nonfinite: Literal["raise", "pass_on"] = "raise",
    ) -> None:
        if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
            raise LaminaError(f"bucket must be a whole number of at least 1, got {bucket!r}")
        if scale not in ("max", "l2"):
            raise LaminaError(f"scale must be 'max' or 'l2', got {scale!r}")
        super().__init__(bits, error_feedback=False, start_step=start_step, nonfinite=nonfinite)
        self.bucket, self.scale, self.seed = bucket, scale, seed

    def check_option(self, option: Option) -> Option:
        """Refuse bits that are not 2..8."""
        if isinstance(option, bool) or option not in range(2, 9):
            raise LaminaError(f"bits must be a whole number from 2 to 8, got {option!r}")
        return int(option)

    def options(self, shape: Sequence[int]) -> list[Option]:
        """List 2..8 bits."""
        return list(range(2, 9))

    def compressed_size(self, shape: Sequence[int], option: Option, itemsize: int) -> int:
        """Return bits for every number (in eights) and a float32 for every bucket, in bytes."""
        numbers = int(torch.Size(shape).numel())
        return int(option) * -(-numbers // 8) + 4 * -(-numbers // self.bucket)

    def compression_errors(self, gradient: Tensor, options: Sequence[Option]) -> Tensor:
        """Return the root of the expected squared error, which rounding's own variance gives in closed form."""
        rows = _rows(gradient.reshape(-1), self.bucket)
        scales = _scales(rows, self.scale)
        found = []
        for bits in options:
            step = scales / levels(int(bits))
            above = (rows * _inverse(step)[:, None]).frac_().abs_()
            found.append(((above - above.square()).sum(1).double() * step.double().square()).sum().sqrt())
        return torch.stack(found)

    def exchange(self, layers: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Gather everyone's codes and average what they stand for."""
        rank, device = dist.get_rank(group), next(iter(layers.values())).device
        parts: list[Tensor] = []
        for name, gradient in layers.items():
            generator = seeded(device, self.seed, self.memory.steps, rank, name)
            bits = int(self.option_of(name))
            scales, codes = quantize(gradient.reshape(-1), bits, self.bucket, self.scale, generator)
            parts += [scales.view(torch.uint8), codes]
        everyone = self.traffic.gather(torch.cat(parts), group)
        result, at = {}, 0
        for name, gradient in layers.items():
            bits = int(self.option_of(name))
            middle = at + 4 * -(-gradient.numel() // self.bucket)
            end = at + self.compressed_size(gradient.shape, bits, gradient.element_size())
            mean = torch.zeros(gradient.numel(), device=device)
            for message in everyone:
                scales = message[at:middle].clone().view(torch.float32)
                add_dequantized(mean, scales, message[middle:end], bits, self.bucket)
            result[name] = mean.div_(len(everyone)).to(gradient.dtype).view(gradient.shape)
            at = end
        return result


def levels(bits: int) -> int:
    """Return the number of levels above zero."""
    return int(2 ** (bits - 1)) - 1


def quantize(
    flat: Tensor, bits: int, bucket: int = 512, scale: Scale = "max", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Round a vector at random: (n,) -> scales (n / bucket,) in float32 and codes, bits * n / 8 bytes, both rounded up.

    A number x stands for floor(x / scale * s + u) with s levels and u uniform on 0..1; see `add_dequantized`.
    """
    s, n, device = levels(bits), flat.numel(), flat.device
    span = _span(bucket, n, device)
    width = min(span, -(-n // (8 * bucket)) * 8 * bucket)
    value = torch.empty(width, device=device)
    scales = torch.cat([_scales(_rows(part.float(), bucket), scale, value) for part in flat.split(span)])
    factors = _inverse(scales / s)[:, None] * (INSIDE * 2.0**16)
    drawn = torch.empty(-(-width // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    dither = drawn.view(torch.int16)[:width]
    offsets = torch.randint(-(2**15), 2**15, (-(-n // span),), generator=generator, device=device).to(torch.int16)
    whole, small = torch.empty_like(dither), torch.zeros_like(dither, dtype=torch.uint8)
    # Codes are floor(v + s + u), u = (dither + 1/2) / 2^16 + 1/2.
    shift = torch.tensor(s + 0.5 + 2.0**-17, device=device)
    codes = torch.empty(bits * -(-n // 8), dtype=torch.uint8, device=device)
    for i, (first, last) in enumerate(_chunks(n, span)):
        rows, eighth = _rows(flat[first:last].float(), bucket), -(-(last - first) // 8)
        t, shifted = value[: rows.numel()], whole[: rows.numel()]
        t.copy_(torch.add(dither[: rows.numel()], offsets[i], out=shifted))
        t.view(-1, bucket).addcmul_(rows, factors[first // bucket :][: len(rows)])
        # By way of int16, which vector units have.
        small[: rows.numel()] = shifted.copy_(torch.add(shift, t, alpha=2.0**-16, out=t))
        packed = pack(small[: 8 * eighth].view(8, eighth), bits)
        codes[bits * first // 8 :][: packed.numel()] = packed.view(-1)
    return scales, codes


def add_dequantized(total: Tensor, scales: Tensor, codes: Tensor, bits: int, bucket: int = 512) -> Tensor:
    """Add to a float32 vector, in place, what `quantize` made of another one; return it."""
    s, n = levels(bits), total.numel()
    for first, last in _chunks(n, _span(bucket, n, total.device)):
        eighth = -(-(last - first) // 8)
        packed = codes[bits * first // 8 :][: bits * eighth].view(bits, eighth)
        value = unpack(packed, bits).view(-1)[: last - first].to(torch.float32).sub_(s)
        steps = (scales[first // bucket : -(-last // bucket)] / s)[:, None]
        whole = (last - first) // bucket
        split = whole * bucket
        total[first : first + split].view(whole, bucket).addcmul_(value[:split].view(whole, bucket), steps[:whole])
        if split < last - first:
            total[first + split : last].addcmul_(value[split:], steps[whole])
    return total


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put codes below 2^bits side by side: 8 rows of bytes -> `bits` rows. Row i's bits begin at bit i * bits."""
    if 8 % bits == 0:
        together = codes.view(bits, 8 // bits, -1)
        packed = together[:, 0]
        for i in range(1, 8 // bits):
            packed = packed | (together[:, i] << (bits * i))
        return packed
    packed = torch.zeros((bits, codes.shape[1]), dtype=torch.uint8, device=codes.device)
    for i, row, shift in _places(bits):
        packed[row] |= codes[i] << shift if shift >= 0 else codes[i] >> -shift
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`: `bits` rows -> 8 rows."""
    if 8 % bits == 0:
        return torch.stack([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], 1).view(8, -1)
    codes = torch.zeros((8, packed.shape[1]), dtype=torch.uint8, device=packed.device)
    for i, row, shift in _places(bits):
        codes[i] |= packed[row] >> shift if shift >= 0 else packed[row] << -shift
    return codes.bitwise_and_(2**bits - 1)


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield (code row, byte row, left shift of the code in that byte); a code may lie across two bytes."""
    for i in range(8):
        first = i * bits
        for row in range(first // 8, (first + bits - 1) // 8 + 1):
            yield i, row, first - 8 * row


def _span(bucket: int, n: int, device: torch.device) -> int:
    """Elements of a chunk: whole buckets, whole bytes. A GPU takes all at once, so workers must be of one kind."""
    unit = 8 * bucket
    return unit * max(1, (CHUNK if device.type == "cpu" else n) // unit)


def _chunks(n: int, span: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n, span):
        yield first, min(first + span, n)


def _rows(flat: Tensor, width: int) -> Tensor:
    """Cut a vector into rows, the last one filled with zeros."""
    missing = -flat.numel() % width
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, width)


def _scales(rows: Tensor, scale: Scale, room: Tensor | None = None) -> Tensor:
    """Return what each row is measured by: (rows, width) -> (rows,); `room` is memory that may be written over."""
    if scale == "l2":
        return torch.linalg.vector_norm(rows, 2, dim=1)
    magnitude = torch.abs(rows) if room is None else torch.abs(rows, out=room[: rows.numel()].view_as(rows))
    return magnitude.amax(1)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step > 0, 1.0 / step, 0.0)
