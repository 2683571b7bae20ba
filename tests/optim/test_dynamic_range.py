from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.lineage import Lineage
from lamina.optim.dynamic_range import (
    Coding,
    DynamicRangeQuantizer,
    QuantizedTensor,
    decode,
    encode,
    exponents,
    quantize_groups,
    zeros,
)


def spread(ratio: float, count: int = 128, seed: int = 0) -> Tensor:
    """Log-uniform magnitudes whose largest is `ratio` times the smallest, with signs."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(count, generator=generator)
    powers[0], powers[1] = 0.0, 1.0
    return 1e-3 * ratio**powers * torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)


def by_hand(x: Tensor, expand_min: int = 16) -> tuple[Tensor, float, float, float]:
    """Return codes (before the cast, in float64), scale, exponent and center of one group by the paper's words."""
    magnitudes = [abs(float(v)) for v in x]
    largest, smallest = max(magnitudes) + 1e-30, min(v for v in magnitudes if v) + 1e-30
    k = math.floor(expand_min * math.log2(448**2 / 2) / math.log2(largest / smallest)) / expand_min
    center = math.sqrt(largest) * math.sqrt(smallest)
    scale = (largest / center) ** k / 448
    codes = [math.copysign((m / center) ** k / scale, float(v)) for m, v in zip(magnitudes, x, strict=True)]
    return torch.tensor(codes, dtype=torch.float64), scale, k, center


@pytest.mark.parametrize(("ratio", "k"), [(1e3, 1.625), (10.0, 5.0), (229376.0**2, 0.4375)])
def test_a_range_has_the_exponent_of_the_official_code(ratio: float, k: float) -> None:
    found = encode(spread(ratio), Coding())
    assert found.exponent is not None
    assert found.exponent.item() == k


@pytest.mark.parametrize("ratio", [1e3, 10.0, 1e8])
def test_codes_are_those_of_the_paper(ratio: float) -> None:
    x = spread(ratio)
    codes, scale, k, center = by_hand(x)
    found = encode(x, Coding())
    assert found.exponent is not None
    assert found.center is not None
    assert (found.scale.item(), found.center.item()) == (
        pytest.approx(scale, rel=1e-5),
        pytest.approx(center, rel=1e-5),
    )
    assert found.exponent.item() == k
    # A power differs by an ulp: a code may be the neighbour of the one worked out in float64, hardly ever.
    expected = codes.clamp(-448, 448).float().to(torch.float8_e4m3fn).float()
    assert (found.codes.float() != expected).sum() <= 1
    back = codes.float().to(torch.float8_e4m3fn).double().abs().mul(scale).pow(1 / k).mul(center) * x.sign()
    torch.testing.assert_close(found.dequantize().double(), back, rtol=0.2, atol=0.0)


def test_the_bound_of_the_paper_uses_all_of_float8() -> None:
    x = spread(1e3)
    found = DynamicRangeQuantizer(range_bound="paper").quantize(x)
    assert found.exponent is not None
    assert found.exponent.item() == pytest.approx(math.log(229376) / math.log(1e3), rel=1e-5)
    assert found.codes.float().abs().min().item() == 2.0**-9
    wide = DynamicRangeQuantizer("e5m2").quantize(x)
    assert wide.exponent is not None
    assert wide.exponent.item() == math.floor(16 * math.log2(57344**2 / 2) / math.log2(1e3)) / 16
    assert wide.codes.dtype == torch.float8_e5m2


@pytest.mark.parametrize("ratio", [2.0, 30.0, 1e3, 1e5])
def test_rounding_keeps_order_and_the_largest_and_is_k_times_finer(ratio: float) -> None:
    x = spread(ratio, 128, seed=3).abs().sort().values
    found = encode(x, Coding())
    y = found.dequantize()
    assert (y.diff() >= 0).all()
    assert y[-1].item() == pytest.approx(x[-1].item(), rel=1e-6)
    assert (y > 0).all()
    k = min(found.exponent.item(), 1e9)  # type: ignore[union-attr]
    normal = found.codes.float() >= 2.0**-6
    error = ((y - x).abs() / x)[normal].max().item()
    # Half a step of three bits of mantissa, to first order; the factor is the second order at k < 1.
    assert error <= 1.1 * 2.0**-4 / k


CASES = {
    "constant": [0.3] * 70,
    "zeros": [0.0] * 70,
    "one number": [-5.0],
    "one beside zeros": [0.0, 0.0, -2.0, 0.0],
    "tiny": [1e-38, -3e-38, 0.0],
    "huge": [1e30, -1e30, 3e38],
    "tiny beside huge": [1e-38, -1e30, 0.0],
    "a second group of one": [float(i + 1) for i in range(129)],
}


@pytest.mark.parametrize("formats", ["e4m3", "e5m2"])
@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_groups_of_every_sort_stay_finite_with_their_signs_and_zeros(name: str, expand: bool, formats: Any) -> None:
    x = torch.tensor(CASES[name])
    y = DynamicRangeQuantizer(formats, expand=expand).quantize(x).dequantize()
    assert torch.isfinite(y).all()
    assert ((y.sign() == x.sign()) | (x.abs() < 1e-30) | ((y == 0) & (not expand))).all()
    assert (y[x == 0] == 0).all()
    large = x.abs() == x.abs().max()
    if x.abs().max() > 1e-29:
        torch.testing.assert_close(y[large], x[large], rtol=1e-5, atol=0.0)


def test_without_exponents_small_numbers_become_zero_and_with_them_none_does() -> None:
    x = spread(1e7, 128).abs()
    plain, expanded = (DynamicRangeQuantizer(expand=e).quantize(x).dequantize() for e in (False, True))
    assert (plain == 0).sum() > 10
    assert (expanded > 0).all()


def test_padding_and_zeros_do_not_count_for_the_smallest() -> None:
    x = spread(10.0, 100)
    alone = encode(x, Coding())
    with_zeros = encode(torch.cat([x, torch.zeros(28)]), Coding())
    assert alone.exponent is not None
    assert alone.exponent.item() == by_hand(x)[2]
    assert alone.exponent == with_zeros.exponent
    assert torch.equal(alone.codes.view(torch.uint8), with_zeros.codes.view(torch.uint8)[:100])


def test_without_expansion_codes_are_those_of_other_8_bit_optimizers() -> None:
    """torchao 0.18's block quantiser, by its formula: scale = max(amax, 1e-12) / 448, codes = (x / scale)."""
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 5)[:, None]
    codes, scale = quantize_groups(x, Coding(expand=False))
    theirs = x.abs().amax(-1).clip(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    assert torch.equal(scale[:, 0], theirs)
    assert torch.equal(codes.view(torch.uint8), (x / theirs[:, None]).to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("shape", [(1,), (7, 63), (128,), (4, 96)])
def test_bytes_are_one_a_number_and_twelve_a_group(shape: tuple[int, ...]) -> None:
    found = encode(torch.randn(shape), Coding())
    count = math.prod(shape)
    assert found.nbytes_stored() == count + 12 * -(-count // 128)
    assert found.codes.shape == shape
    assert encode(torch.randn(shape), Coding(expand=False)).nbytes_stored() == count + 4 * -(-count // 128)
    assert zeros(shape, Coding()).nbytes_stored() == found.nbytes_stored()
    assert torch.equal(zeros(shape, Coding()).dequantize(), torch.zeros(shape))


def test_it_acts_as_the_tensor_it_stands_for() -> None:
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    q = encode(x, Coding())
    y = q.dequantize()
    assert (q.shape, q.dtype) == (x.shape, torch.float32)
    for kept in (q.clone(), q.detach(), q.to("cpu", copy=True), copy.deepcopy(q), q.view_as(q)):
        assert isinstance(kept, QuantizedTensor)
        assert torch.equal(kept.codes.view(torch.uint8), q.codes.view(torch.uint8))
    assert type(q + 1) is Tensor
    assert torch.equal(q + 1, y + 1)
    assert torch.equal(q[2:4], y[2:4])
    assert torch.equal(torch.cat(q.chunk(2)), y)
    q.mul_(2)
    torch.testing.assert_close(q.dequantize(), 2 * y, rtol=0.1, atol=0.0)
    q.copy_(x.flip(0))
    assert torch.equal(q.dequantize(), encode(x.flip(0), Coding()).dequantize())
    old, new, lineage = torch.nn.Parameter(x), torch.nn.Parameter(x[:3]), Lineage()
    lineage.derive(new, old, [5, -1, 0])
    carried = lineage.carry(new, {old: q})
    assert carried is not None
    assert torch.equal(carried[[0, 2]], q.dequantize()[[5, 0]])
    assert torch.equal(carried[1], torch.zeros(50))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_is_read_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = torch.isfinite(codes.float())
    assert finite.sum() >= 248
    found, expected = decode(codes)[finite], codes.float()[finite]
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


def test_exponents_are_clamped() -> None:
    one, all_of_float32 = torch.tensor([[1.0]]), torch.tensor([[3e38]])
    assert exponents(one, one, Coding()).item() == 64
    assert exponents(1.19 * one, one, Coding()).item() == 64
    assert exponents(all_of_float32, torch.tensor([[1e-45]]), Coding()).item() == 1 / 16


def test_what_has_no_code_is_refused() -> None:
    with pytest.raises(LaminaError, match=r"a tensor of shape \(2,\) has numbers that are not finite"):
        DynamicRangeQuantizer().quantize(torch.tensor([1.0, math.nan]))
    for options, words in (
        ({"format": "e4m4"}, "format must be one of 'e4m3', 'e5m2', got 'e4m4'; did you mean"),
        ({"group_size": 100}, "group_size must be a power of two, 32 or more, got 100"),
        ({"expand": (True, False)}, "expand is True or False, for both moments alike"),
        ({"expand_min": 0}, "expand_min must be an integer of 1 or more"),
        ({"range_bound": "papre"}, "range_bound must be one of 'code', 'paper'"),
    ):
        with pytest.raises(LaminaError, match=words):
            DynamicRangeQuantizer(**options)  # type: ignore[arg-type]
