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

DRAWN = 1 << 16
"""Numbers that rounding is drawn for; later ones are derived from these."""

INSIDE = 1 - 2.0**-20
"""Keeps what rounds up from the largest number of a bucket below the next level, whatever the last bit is."""

SMALLEST = 1e-35
"""Scale at least, so that it can be divided by."""


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
    Deviation: the numbers that round have 25 - bits bits, so a mean is off by at most 2^-16 of a level (and 2^-20 of
        the number itself). They are drawn for 2^16 numbers; those of later ones differ from these by an exclusive or
        with random bits, new for each 2^16, after which any two are independent still, so errors add up as those of
        independent numbers do. A bucket's scale is at least 1e-35.
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
    n, device = flat.numel(), flat.device
    scales = torch.empty(-(-n // bucket), device=device)
    codes = torch.empty(bits * -(-n // 8), dtype=torch.uint8, device=device)
    span = _span(bucket, n, device)
    # Floats of s .. s + 1 differ in their last bits only.
    dither = torch.full((min(DRAWN, span, bucket * len(scales)),), levels(bits), dtype=torch.float32, device=device)
    dither.view(torch.int32).bitwise_or_(_drawn(len(dither), 25 - bits, generator, device))
    full = n // span * span
    if full:
        chunks = flat[:full].view(-1, span // bucket, bucket)
        made = scales[: full // bucket].view(len(chunks), -1), codes[: bits * full // 8].view(len(chunks), bits, -1)
        _quantize_chunks(chunks, *made, dither, scale, generator)
    if full < n:
        rest = _rows(flat[full:], bucket)[None]
        made = scales[None, full // bucket :], codes[bits * full // 8 :].view(1, bits, -1)
        _quantize_chunks(rest, *made, dither, scale, generator)
    return scales, codes


def _quantize_chunks(
    chunks: Tensor, scales: Tensor, codes: Tensor, dither: Tensor, scale: Scale, generator: torch.Generator | None
) -> None:
    """Fill scales (chunks, rows) and codes (chunks, bits, bytes) with those of numbers (chunks, rows, bucket).

    A call of torch takes as long as thousands of numbers, so whatever can be is done once for all chunks.
    """
    bits, shape, device = codes.shape[1], chunks.shape[1:], chunks.device
    repeated = dither.repeat(-(-shape.numel() // len(dither)), 1)
    u, words = repeated.view(-1)[: shape.numel()].view(shape), repeated.view(torch.int32)
    # Exclusive or of the last bits makes other numbers of them.
    others = _drawn(len(chunks) * len(words), 25 - bits, generator, device).view(len(chunks), -1, 1)
    value, inverse = torch.empty(shape, device=device), torch.empty((shape[0], 1), device=device)
    whole = torch.zeros(max(8 * codes.shape[2], shape.numel()), dtype=torch.int16, device=device)
    floor, eight = whole[: shape.numel()].view(shape), whole[: 8 * codes.shape[2]].view(8, -1)
    for rows, scale_of, packed, other in zip(chunks, scales, codes, others, strict=True):
        rows = rows.float()
        _scales(rows, scale, value, scale_of).clamp_(min=SMALLEST)
        torch.reciprocal(scale_of, out=inverse.view(-1))
        words.bitwise_xor_(other)
        torch.addcmul(u, rows, inverse, value=levels(bits) * INSIDE, out=value)
        # Above zero this rounds down; by way of int16, which vector units have.
        floor.copy_(value)
        pack(eight, bits, packed)


def add_dequantized(total: Tensor, scales: Tensor, codes: Tensor, bits: int, bucket: int = 512) -> Tensor:
    """Add to a float32 vector, in place, what `quantize` made of another one; return it."""
    s, n = levels(bits), total.numel()
    for first, last in _chunks(n, _span(bucket, n, total.device)):
        eighth = -(-(last - first) // 8)
        packed = codes[bits * first // 8 :][: bits * eighth].view(bits, eighth)
        value = unpack(packed, bits).sub_(s).view(-1)[: last - first].to(torch.float32)
        steps = (scales[first // bucket : -(-last // bucket)] / s)[:, None]
        whole = (last - first) // bucket
        split = whole * bucket
        total[first : first + split].view(whole, bucket).addcmul_(value[:split].view(whole, bucket), steps[:whole])
        if split < last - first:
            total[first + split : last].addcmul_(value[split:], steps[whole])
    return total


def pack(codes: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Put codes below 2^bits side by side: 8 rows of int16 -> `bits` rows of bytes. Row i's bits begin at i * bits.

    The codes are written over.
    """
    width = bits
    while width < bits * _codes_a_word(bits):
        codes, width = codes[::2].add_(codes[1::2], alpha=2**width), 2 * width
    out = torch.empty((bits, codes.shape[1]), dtype=torch.uint8, device=codes.device) if out is None else out
    if width == 8:
        return out.copy_(codes)
    words = codes.unbind()
    for i, byte in enumerate(out.unbind()):
        # What overflows a byte is lost with the copy; a word has more bits than a byte, so two at most meet there.
        at, shift = divmod(8 * i, width)
        word = words[at] >> shift if shift else words[at]
        byte.copy_(word.add_(words[at + 1], alpha=2 ** (width - shift)) if width - shift < 8 else word)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`: `bits` rows of bytes -> 8 rows of int16."""
    together = _codes_a_word(bits)
    width, words = bits * together, packed.to(torch.int16)
    if width != 8:
        rows, words = words.unbind(), words.new_empty((8 // together, packed.shape[1]))
        for i, word in enumerate(words.unbind()):
            byte, shift = divmod(i * width, 8)
            torch.bitwise_right_shift(rows[byte], shift, out=word)
            for more in range(1, -(-(shift + width) // 8)):
                word.add_(rows[byte + more], alpha=2 ** (8 * more - shift))
    codes = words.new_empty((len(words), together, packed.shape[1]))
    for i, some in enumerate(codes.unbind(1)):
        torch.bitwise_right_shift(words, i * bits, out=some)
    return codes.bitwise_and_(2**bits - 1).view(8, -1)


def _codes_a_word(bits: int) -> int:
    """Return how many codes (1, 2, 4) make up a byte; where they do not, those that an int16 has room for."""
    return 8 // bits if 8 % bits == 0 else 4 if bits == 3 else 2


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


def _scales(rows: Tensor, scale: Scale, room: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return what each row is measured by: (rows, width) -> (rows,); `room` is memory that may be written over."""
    if scale == "l2":
        return torch.linalg.vector_norm(rows, 2, dim=1, out=out)
    return torch.amax(torch.abs(rows, out=room), 1, out=out)


def _drawn(count: int, bits: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw int32 numbers of 0 .. 2^bits - 1."""
    pairs = torch.empty(-(-count // 2), dtype=torch.int64, device=device)
    return pairs.random_(-(2**63), None, generator=generator).view(torch.int32)[:count].bitwise_and_(2**bits - 1)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step > 0, 1.0 / step, 0.0)
