"""Convolution with kernels computed from coordinates, and its two ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models import MetaFormer, ResNet
from lamina.nn import CoordinateConv2d, depthwise_convolution, prefers_fft
from lamina.nn.hyper_convolution.convolution import fast_length


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "layer",
        "coordinate_conv2d",
        {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": 1, "hidden": 4},
        inputs=lambda: (numbers(2, 2, 4, 5),),
        bad={"groups": 3},
    )
]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 5, 7]), min_size=1, max_size=3),
    st.lists(st.sampled_from([1, 3, 7, 11]), min_size=3, max_size=3),
    st.booleans(),
)
def test_both_ways_are_the_sum_over_the_neighbours_with_all_gradients(
    size: list[int], sides: list[int], own: bool
) -> None:
    x = numbers(2, 3, *size).double().requires_grad_()
    sides = sides[: len(size)]
    kernel = numbers(*([2] if own else []), 3, *sides, seed=1).double().requires_grad_()
    each = kernel if own else kernel.expand(2, *kernel.shape)
    expected = torch.zeros_like(x)
    padded = F.pad(x, [p for k in reversed(sides) for p in (k // 2, k // 2)])
    for place in torch.cartesian_prod(*(torch.arange(k) for k in sides)).view(-1, len(sides)).tolist():
        window = padded[(..., *(slice(i, i + n) for i, n in zip(place, size, strict=True)))]
        expected = expected + window * each[(..., *place)].view(2, 3, *[1] * len(size))
    weight = numbers(*x.shape, seed=2).double()
    wanted = torch.autograd.grad((expected * weight).sum(), (x, kernel))
    for path in ("direct", "fft"):
        found = depthwise_convolution(x, kernel, path)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad((found * weight).sum(), (x, kernel)), wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_the_way_is_chosen_by_size_and_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not prefers_fft((63, 63), (9, 9))
    assert prefers_fft((63, 63), (9, 9), learns=True)
    assert not prefers_fft((8, 8), (9, 9), learns=True)
    assert prefers_fft((8, 8), (11, 11))
    assert prefers_fft((64, 64), (63, 63), "cuda")
    assert not prefers_fft((64, 64), (5, 5), "cuda")
    calls = []
    whole = torch.fft.rfftn
    monkeypatch.setattr(torch.fft, "rfftn", lambda *a: (calls.append(1), whole(*a))[1])
    x = numbers(1, 2, 12, 12)
    for side, path, used in ((3, "auto", 0), (11, "auto", 2), (3, "fft", 2), (11, "direct", 0)):
        calls.clear()
        depthwise_convolution(x, numbers(2, side, side), path)
        assert len(calls) == used, (side, path)


def test_lengths_for_the_fft_have_small_primes() -> None:
    assert [fast_length(n) for n in (1, 7, 11, 13, 17, 31, 63, 97)] == [1, 8, 12, 15, 18, 32, 64, 100]


def test_narrow_maps_go_through_the_fft_in_float32() -> None:
    x, kernel = numbers(1, 2, 7, 7).bfloat16(), numbers(2, 11, 11) / 11
    found = depthwise_convolution(x, kernel, "fft")
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), depthwise_convolution(x.float(), kernel), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_convolution(x, kernel, "fft").dtype is torch.bfloat16


def test_what_cannot_be_convolved_is_refused() -> None:
    x = numbers(2, 3, 5, 5)
    with pytest.raises(ShapeError, match="odd, so that a kernel has a middle"):
        depthwise_convolution(x, numbers(3, 4, 3))
    with pytest.raises(ShapeError, match="do not fit depthwise kernels"):
        depthwise_convolution(x, numbers(2, 3, 3))
    with pytest.raises(RecipeError, match="path must be one of"):
        depthwise_convolution(x, numbers(3, 3, 3), "winograd")  # type: ignore[arg-type]


GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 5), "stride": 2, "dilation": (1, 2), "bias": False},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "groups": 2},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "same", "groups": 4},
    {"kernel_size": 13, "padding": 6, "groups": 4},
    {"kernel_size": 4, "padding": "valid", "groups": 4},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_torchs_convolution_by_the_kernel_and_back(geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = CoordinateConv2d(4, 4, **geometry), numbers(2, 4, 9, 10)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    plain = layer.as_conv2d()
    assert torch.equal(plain.weight, layer.weight)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    other = CoordinateConv2d(4, 4, **geometry)
    error = other.load_weight(plain.weight)
    # 64 features make 64 points exactly; 169 only nearly.
    assert error < 1e-5 or geometry["kernel_size"] == 13
    if geometry["kernel_size"] != 13:
        torch.testing.assert_close(other.weight, plain.weight, rtol=1e-3, atol=1e-4)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype is torch.bfloat16
    assert (half.float() - plain(x)).abs().max() < 0.05 * plain(x).abs().max()


def test_nine_points_are_met_by_eight_features_and_a_bias() -> None:
    torch.manual_seed(0)
    layer, wanted = CoordinateConv2d(2, 3, 3, hidden=8), numbers(3, 2, 3, 3)
    assert layer.load_weight(wanted) < 1e-4
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-2, atol=1e-2)
    assert CoordinateConv2d(2, 3, 3, hidden=2).load_weight(wanted) > 0.1


def test_a_larger_kernel_is_the_same_function_and_maps_stay_aligned() -> None:
    torch.manual_seed(0)
    layer = CoordinateConv2d(2, 2, 5, padding=2, omega0=0.05)
    x = numbers(1, 2, 6, 6)
    smooth = F.interpolate(x, (12, 12), mode="bilinear")
    assert layer(smooth, kernel_size=9).shape == (1, 2, 12, 12)
    torch.testing.assert_close(layer.weight_of(9)[..., ::2, ::2], layer.weight * (25 / 81), rtol=1e-4, atol=1e-5)
    again = F.avg_pool2d(layer(smooth, kernel_size=9), 2)[..., 2:-2, 2:-2]
    coarse = layer(F.avg_pool2d(smooth, 2))[..., 2:-2, 2:-2]
    assert (again - coarse).norm() < 0.5 * coarse.norm()
    with pytest.raises(ShapeError, match="has not the middle"):
        layer(x, kernel_size=4)


def test_it_stands_in_the_slots_of_our_models() -> None:
    torch.manual_seed(0)
    slot = {"name": "coordinate_conv2d", "hidden": 4}
    for model, x in (
        (ResNet((1,), (8,), stem="small", classes=3, conv=slot), numbers(2, 3, 8, 8)),
        (MetaFormer((1,), (8,), classes=3, conv=slot), numbers(2, 3, 16, 16)),
    ):
        assert sum(isinstance(m, CoordinateConv2d) for m in model.modules()) == 2
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_bad_geometry_is_refused() -> None:
    with pytest.raises(ShapeError, match="in_channels must be divisible by groups"):
        CoordinateConv2d(4, 4, 3, groups=3)
    with pytest.raises(RecipeError, match="path='fft' is for depthwise"):
        CoordinateConv2d(4, 4, 3, padding=1, path="fft")
    with pytest.raises(RecipeError, match="path must be one of"):
        CoordinateConv2d(4, 4, 3, path="fast")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"has a kernel \(4, 4, 3, 3\), got \(4, 4, 5, 5\)"):
        CoordinateConv2d(4, 4, 3).load_weight(torch.zeros(4, 4, 5, 5))
    with pytest.raises(ShapeError, match=r"takes floating-point maps \(B, 4, H, W\)"):
        CoordinateConv2d(4, 4, 3)(torch.zeros(1, 3, 5, 5))
