from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.models import MetaFormer, ResNet, Transformer, VisionTransformer
from lamina.nn import FourierHead, fourier_bins, smoothness
from lamina.nn import _fourier_series as series


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def features() -> tuple[Tensor, ...]:
    return (normal(3, 2, 6),)


EXAMPLES = [
    Example(
        "layer", "fourier_head", {"in_features": 6, "num_bins": 9, "num_frequencies": 4}, features, bad={"num_bins": 1}
    ),
    Example(
        "layer",
        "fourier_head",
        {"in_features": 6, "num_bins": 12, "num_frequencies": 4, "transform": "fft", "extra_classes": 2},
        features,
        bad={"num_frequencies": 0},
        no_onnx="a complex FFT (torch pads it by constant_pad_nd); transform='matmul' exports",
    ),
]


def centres(bins: int) -> Tensor:
    return -1 + (2 * torch.arange(bins, dtype=torch.float64) + 1) / bins


def by_autocorrelation(re: Tensor, im: Tensor, z: Tensor) -> Tensor:
    """The paper's own way, term by term: c_k by a double loop, then the series. re, im (N+1,), z (n,) -> (n,)."""
    a = torch.complex(re, im)
    count = len(a)
    c = [sum(a[n + k] * a[n].conj() for n in range(count - k)) for k in range(count)]
    p = 0.5 + torch.zeros_like(z)
    for k in range(1, count):
        p = p + ((c[k] / c[0].real) * torch.exp(1j * math.pi * k * z)).real
    return p


def by_amplitude(re: Tensor, im: Tensor, z: Tensor) -> Tensor:
    a, k = torch.complex(re, im), torch.arange(len(re), dtype=z.dtype)
    total = (a * torch.exp(1j * math.pi * k * z[:, None])).sum(-1)
    return total.abs().square() / (2 * a.abs().square().sum())


@pytest.mark.parametrize("frequencies", [1, 8, 64])
def test_the_density_is_never_negative_and_integrates_to_one(frequencies: int) -> None:
    re, im = normal(frequencies + 1, dtype=torch.float64), normal(frequencies + 1, seed=1, dtype=torch.float64)
    z = torch.linspace(-1, 1, 10_001, dtype=torch.float64)
    p = series.density(re, im, z)
    assert p.min() >= 0
    assert torch.trapezoid(p, z).item() == pytest.approx(1, abs=1e-6)
    assert series.density(re.float(), im.float(), z.float()).min() >= 0


@pytest.mark.parametrize(("frequencies", "bins"), [(1, 7), (3, 7), (5, 63), (31, 63), (12, 50), (63, 128), (1, 2)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_every_way_to_compute_the_bins_agrees_with_values_and_gradients(
    frequencies: int, bins: int, dtype: torch.dtype, close: float
) -> None:
    z, weight = centres(bins), normal(bins, seed=3, dtype=torch.float64)
    start = [normal(frequencies + 1, seed=s, dtype=dtype) for s in (0, 1)]

    def pulled(function: Callable[[Tensor, Tensor], Tensor], kind: torch.dtype) -> list[Tensor]:
        re, im = (s.clone().to(kind).detach().requires_grad_() for s in start)
        y = function(re, im)
        (y.double() * weight).sum().backward()
        return [y.detach().double(), re.grad.double(), im.grad.double()]

    expected = pulled(lambda re, im: by_autocorrelation(re, im, z) * 2 / bins, torch.float64)
    direct = pulled(lambda re, im: by_amplitude(re, im, z) * 2 / bins, torch.float64)
    table = series.waves(frequencies, bins, dtype)
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [lambda re, im: fourier_bins(re, im, bins, table)]
    if 2 * frequencies < bins:
        ways.append(lambda re, im: fourier_bins(re, im, bins))
    for found in (direct, *(pulled(way, dtype) for way in ways)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=close)


@pytest.mark.parametrize("count", [1, 7, 63])
def test_the_autocorrelation_by_fft_is_the_naive_double_loop(count: int) -> None:
    re, im = normal(count + 1, dtype=torch.float64), normal(count + 1, seed=1, dtype=torch.float64)
    a = torch.complex(re, im).tolist()
    found = torch.complex(*series.autocorrelation(re, im))
    for k in range(count + 1):
        c = sum(a[n + k] * a[n].conjugate() for n in range(count + 1 - k))
        assert abs(complex(found[k]) - c) < 1e-11


@pytest.mark.parametrize(("frequencies", "exact"), [(7, True), (8, False), (11, False)])
def test_the_bins_of_the_density_sum_to_half_their_number_below_aliasing(frequencies: int, exact: bool) -> None:
    bins = 8
    re, im = normal(frequencies + 1, dtype=torch.float64), normal(frequencies + 1, seed=1, dtype=torch.float64)
    summed = by_amplitude(re, im, centres(bins)).sum().item()
    assert (summed == pytest.approx(bins / 2, rel=1e-6)) is exact
    assert fourier_bins(re.float(), im.float(), bins).sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(fourier_bins(re, im, bins), by_amplitude(re, im, centres(bins)) / summed)


def test_closed_forms_of_no_and_of_one_frequency() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    only = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(fourier_bins(only, zero, 9), torch.full((9,), 1 / 9, dtype=torch.float64))
    z = torch.linspace(-1, 1, 21, dtype=torch.float64)
    one, phase = torch.ones(2, dtype=torch.float64), 0.7
    torch.testing.assert_close(series.density(one, zero[:2], z), (1 + torch.cos(math.pi * z)) / 2)
    turned = torch.tensor([[1.0, math.cos(phase)], [0.0, math.sin(phase)]], dtype=torch.float64)
    torch.testing.assert_close(series.density(*turned, z), (1 + torch.cos(math.pi * z + phase)) / 2)


def head(bins: int = 9, frequencies: int = 4, seed: int = 0, **options: Any) -> FourierHead:
    torch.manual_seed(seed)
    return FourierHead(6, bins, frequencies, **options)


@pytest.mark.parametrize(("bins", "frequencies"), [(9, 4), (63, 20), (300, 33)])
def test_logits_are_the_logarithm_of_the_floored_bins(bins: int, frequencies: int) -> None:
    made, x = head(bins, frequencies).double(), normal(5, 6, dtype=torch.float64)
    re, im = made.linear(x).chunk(2, -1)
    assert re.shape == (5, frequencies + 1)
    y = torch.stack([by_amplitude(a, b, centres(bins)) for a, b in zip(re, im, strict=True)]) * 2 / bins
    expected = y / (1 + bins * 1e-5) + 1e-5 / (1 + bins * 1e-5)
    torch.testing.assert_close(made(x).softmax(-1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(made(x), (y + 1e-5).log(), rtol=0, atol=1e-9)


def test_the_layer_starts_as_torchs_divided() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 10)
    made = head(init_scale=(1000.0, 10.0))
    torch.testing.assert_close(made.linear.weight, plain.weight / 1000)
    torch.testing.assert_close(made.linear.bias, plain.bias / 10)
    torch.testing.assert_close(head().linear.weight, plain.weight / 100)


@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_both_transforms_are_one_function_with_one_set_of_weights(transform: str) -> None:
    made, plain, x = head(200, 30, transform=transform), head(200, 30), normal(4, 6)
    made.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(made(x), plain(x), rtol=0, atol=2e-5)
    assert set(made.state_dict()) == {"linear.weight", "linear.bias"} | ({"waves"} if transform == "matmul" else set())


@pytest.mark.parametrize("bins", [12, 256])
def test_a_common_factor_changes_no_logit_and_the_penalty_by_its_fourth_power(bins: int) -> None:
    made, x = head(bins, 5, eps=1e-8), normal(4, 6)
    with torch.no_grad():
        made.linear.weight.mul_(30)
    before, cost = made(x), made.penalty(x)
    factor = complex(1.5, -2.0)
    with torch.no_grad():
        for p in (made.linear.weight, made.linear.bias):
            re, im = p.chunk(2)
            turned = factor * torch.complex(re, im)
            p.copy_(torch.cat([turned.real, turned.imag]))
    torch.testing.assert_close(made(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.penalty(x), cost * abs(factor) ** 4, rtol=1e-4, atol=0)


def test_the_penalty_is_the_mean_of_its_formula() -> None:
    made, x = head(9, 3).double(), normal(2, 3, 6, dtype=torch.float64)
    total = 0.0
    for row in made.linear(x).flatten(0, 1).tolist():
        a = [complex(r, i) for r, i in zip(row[:4], row[4:], strict=True)]
        for k in range(4):
            c = sum(a[n + k] * a[n].conjugate() for n in range(4 - k))
            total += 2 * math.pi**2 * k**2 * abs(c) ** 2
    assert made.penalty(x).item() == pytest.approx(2 * total / 6, rel=1e-9)


def test_cdf_and_samples_belong_to_the_density() -> None:
    made, x = head(12, 5).double(), normal(2, 3, 6, dtype=torch.float64)
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(made.cdf(x, ends), torch.stack([torch.zeros(2, 3), torch.ones(2, 3)]).double())
    z = torch.linspace(-0.9, 0.8, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    (slope,) = torch.autograd.grad(made.cdf(x, z).sum(), z)
    torch.testing.assert_close(slope, made.pdf(x, z))
    drawn = made.sample(x, 7, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (7, 2, 3)
    assert torch.equal(drawn, made.sample(x, 7, generator=torch.Generator().manual_seed(0)))
    assert drawn.abs().max() <= 1


def test_a_series_summed_in_small_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    re, im, z = normal(3, 12), normal(3, 12, seed=1), torch.linspace(-1, 1, 5)[:, None]
    whole = series.density(re, im, z), series.cumulative(re, im, z)
    monkeypatch.setattr(series, "POINTS_AT_ONCE", 40)
    torch.testing.assert_close(series.density(re, im, z), whole[0])
    torch.testing.assert_close(series.cumulative(re, im, z), whole[1])


def test_classes_are_numbered_as_the_user_numbers_them() -> None:
    order = [3, 0, 4, 1, 2]
    plain, made, x = head(5, 2), head(5, 2, order=order), normal(4, 6)
    logits, found = plain(x), made(x)
    for c, bin in enumerate(order):
        assert torch.equal(found[:, c], logits[:, bin])
    assert "order" in made.state_dict()


def test_extra_classes_share_one_softmax_with_the_ordered_mass() -> None:
    made, x = head(9, 4, extra_classes=2), normal(4, 6)
    assert made(x).shape == (4, 11)
    y = fourier_bins(*made.linear(x).chunk(2, -1), 9)
    scores = made.extra(x)
    torch.testing.assert_close(made(x)[:, 9:], scores[:, 1:])
    expected = (y + 1e-5) * scores[:, :1].exp()
    torch.testing.assert_close(
        made(x).softmax(-1)[:, :9], expected / (expected.sum(-1) + scores[:, 1:].exp().sum(-1))[:, None]
    )


@pytest.mark.parametrize("bins", [16, 256])
def test_coefficients_of_nothing_are_uniform_with_finite_gradients(bins: int) -> None:
    made = head(bins, 5)
    with torch.no_grad():
        made.linear.weight.zero_()
        made.linear.bias.zero_()
    logits = made(normal(3, 6))
    torch.testing.assert_close(logits.softmax(-1), torch.full((3, bins), 1 / bins))
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert torch.isfinite(made.linear.weight.grad).all()


@pytest.mark.parametrize("bins", [16, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_coefficients_and_nothing_after_them(bins: int, dtype: torch.dtype) -> None:
    made, x = head(bins, 5), normal(4, 6)
    with torch.no_grad():
        made.linear.weight.mul_(30)
    half = copy.deepcopy(made).to(dtype)
    assert half.waves is None or half.waves.dtype == torch.float32
    coefficients = half.linear(x.to(dtype)).float()
    exact = (fourier_bins(*coefficients.double().chunk(2, -1), bins) + 1e-5).log()
    found = half(x.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.float32
        mixed = made.linear(x).double()
        expected = (fourier_bins(*mixed.chunk(2, -1), bins) + 1e-5).log()
        torch.testing.assert_close(made(x).double(), expected, rtol=0, atol=2e-4)


def test_the_table_of_waves_survives_casts_and_the_meta_device() -> None:
    made = head(16, 5)
    assert torch.equal(copy.deepcopy(made).bfloat16().float().waves, made.waves)
    assert torch.equal(copy.deepcopy(made).double().waves, series.waves(5, 16, torch.float64))
    with torch.device("meta"):
        bare = FourierHead(6, 16, 5)
        assert bare(torch.empty(2, 6)).shape == (2, 16)
        assert bare.bfloat16().waves.is_meta
    bare.float().to_empty(device="cpu").load_state_dict(made.state_dict())
    x = normal(3, 6)
    assert torch.equal(bare(x), made(x))


@pytest.mark.parametrize("bins", [6, 130])
def test_gradients_of_first_and_second_order(bins: int) -> None:
    made = head(bins, 2).double()
    x = normal(1, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: made(x)[..., :4], x)
    assert torch.autograd.gradgradcheck(lambda x: made(x)[..., :2], x)


def test_many_sets_of_weights_run_at_once_under_vmap() -> None:
    heads, x = [head(12, 3, seed=s) for s in range(3)], normal(3, 6)
    params, buffers = torch.func.stack_module_state(heads)
    template = copy.deepcopy(heads[0])

    def run(p: dict[str, Tensor], b: dict[str, Tensor], row: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(template, {**p, **b}, (row,))
        return made

    found = torch.func.vmap(run)(params, buffers, x)
    torch.testing.assert_close(found, torch.stack([h(row) for h, row in zip(heads, x, strict=True)]))


def test_a_bimodal_target_is_fitted_and_a_heavy_penalty_makes_it_uniform() -> None:
    z = centres(32)
    target = (-((z - 0.5) / 0.12).square()).exp() + (-((z + 0.3) / 0.12).square()).exp()
    target, x = (target / target.sum()).float(), torch.ones(1, 6)

    def fit(gamma: float, steps: int) -> tuple[list[float], Tensor]:
        made, losses = head(32, 10), []
        optimizer = torch.optim.Adam(made.parameters(), 0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(made(x), target[None])
            (loss + gamma * made.penalty(x)).backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, made(x).softmax(-1)[0].detach()

    losses, fitted = fit(0.0, 200)
    assert losses[-1] < losses[0] - 0.5
    assert (fitted - target).abs().sum() < 0.2 < 0.2 * (target - 1 / 32).abs().sum()
    flat = fit(1e4, 300)[1]
    assert (flat - 1 / 32).abs().max() < 0.25 * (fitted - 1 / 32).abs().max()


@pytest.mark.parametrize("bins", [2, 7, 50])
def test_smoothness_is_that_of_scipys_filter(bins: int) -> None:
    pmf = normal(3, bins, dtype=torch.float64).softmax(-1)
    expected = [
        sum(
            (6 / np.pi**2) / s**2 * np.linalg.norm(y - gaussian_filter1d(y, s, mode="wrap", radius=bins - 1))
            for s in range(1, 101)
        )
        for y in pmf.numpy()
    ]
    torch.testing.assert_close(smoothness(pmf), torch.tensor(np.array(expected)), rtol=1e-9, atol=1e-12)
    assert smoothness(torch.full((bins,), 1 / bins)) < 1e-7
    with pytest.raises(ShapeError, match="at least 2 bins"):
        smoothness(torch.ones(3, 1))


IMAGES = torch.zeros(2, 3, 8, 8)
MODELS = [
    (lambda **o: Transformer(1, 8, 2, vocabulary=7, context=4, **o), torch.zeros(2, 4, dtype=torch.long)),
    (lambda **o: VisionTransformer(8, 4, 1, 8, 2, classes=7, **o), IMAGES),
    (lambda **o: ResNet((1,), (8,), stem="small", classes=7, **o), IMAGES),
    (lambda **o: MetaFormer((1,), (8,), patch=(3, 1, 1), classes=7, **o), IMAGES),
]


@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_it_stands_in_the_head_slot_of_every_model(make: Callable[..., nn.Module], inputs: Tensor) -> None:
    model = make(head={"name": "fourier_head", "num_frequencies": 3})
    assert type(model.head) is FourierHead
    assert model(inputs).shape[-1] == 7
    assert model.head.linear.weight.abs().max() < 0.01 / math.sqrt(8) * 1.01, "the head keeps its own small start"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_bins": 1}, "num_bins of at least 2, got 1"),
        ({"num_frequencies": 0}, "at least 1 .* got 6, 0 and 0"),
        ({"extra_classes": -1}, "at least 0, got 6, 4 and -1"),
        ({"eps": 0.0}, "above 0, got eps=0.0"),
        ({"init_scale": (0.0, 1.0)}, "init_scale must be above 0"),
        ({"order": [0, 1, 1, 2, 3, 4, 5, 6, 7]}, "each of the 9 bins 0..8 once"),
        ({"order": [0, 1]}, "each of the 9 bins 0..8 once, got 2: "),
        ({"transform": "dct"}, "'auto', 'matmul' or 'fft', got 'dct'"),
        ({"num_frequencies": 5, "transform": "fft"}, "fewer than num_bins / 2 frequencies, got 5 of 9"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*frequencies on")
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        FourierHead(**{"in_features": 6, "num_bins": 9, "num_frequencies": 4, **options})


@pytest.mark.parametrize("bins", [9, 300])
def test_bad_input_is_refused_with_its_shape(bins: int) -> None:
    made = head(bins, 4)
    with pytest.raises(ShapeError, match=r"takes floating-point \(\.\.\., 6\), got torch.float32 \(2, 5\)"):
        made(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=r"takes floating-point .*, got torch\.int64"):
        made(torch.zeros(2, 6, dtype=torch.long))
    for value in (math.nan, math.inf):
        x = normal(2, 6)
        x[1, 3] = value
        with pytest.raises(LaminaError, match="not finite"):
            made(x)
    assert made(torch.zeros(0, 6)).shape == (0, bins)
    assert made.penalty(torch.zeros(0, 6)) == 0
    with pytest.raises(LaminaError, match="count=0"):
        made.sample(normal(2, 6), 0)
    with pytest.raises(ShapeError, match="two parts of one shape"):
        fourier_bins(torch.zeros(3), torch.zeros(4), 8)


def test_too_many_frequencies_are_warned_of_and_still_a_distribution() -> None:
    for frequencies, words in ((6, "no more than a softmax: take at most 5"), (11, "alias on 10 bins")):
        with pytest.warns(UserWarning, match=words):
            made = FourierHead(6, 10, frequencies, eps=1e-9)
        torch.testing.assert_close(made(normal(3, 6)).exp().sum(-1), torch.ones(3), rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FourierHead(6, 10, 5)
