from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from tests.processes import in_processes
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.models import ResNet
from lamina.nn import EvoNorm, EvoNorm1d, EvoNorm2d, EvoNorm3d, normalize_and_activate
from lamina.nn.evonorm import VARIANTS
from lamina.optim import parameter_groups


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example("norm", "evonorm", {"num_features": 8}, inputs=lambda: (drawn(2, 8, 3, 4),), bad={"variant": "b3"}),
    Example(
        "norm",
        "evonorm",
        {"num_features": 6, "variant": "b0", "momentum": 0.3},
        inputs=lambda: (drawn(3, 6, 3, 4),),
        bad={"eps": 0.0},
    ),
    Example("norm", "evonorm", {"num_features": 6, "variant": "b1"}, inputs=lambda: (drawn(3, 6, 5),)),
    Example("norm", "evonorm", {"num_features": 6, "variant": "b2"}, inputs=lambda: (drawn(2, 6, 2, 3, 2),)),
    Example(
        "norm",
        "evonorm",
        {"num_features": 6, "variant": "s2", "groups": 4},
        inputs=lambda: (drawn(2, 6, 7),),
        bad={"groups": 0},
    ),
    Example(
        "norm",
        "evonorm",
        {"num_features": 6, "nonlinearity": False},
        inputs=lambda: (drawn(2, 6, 3, 3),),
        bad={"num_features": 0},
    ),
]


def trained(num_features: int, variant: Any, **options: Any) -> EvoNorm:
    """A layer whose parameters and statistic are not those of the start."""
    layer, generator = EvoNorm(num_features, variant, **options), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.v1, layer.running_var):
            if tensor is not None:
                tensor.uniform_(0.3, 1.7, generator=generator)
    return layer


def by_the_letter(layer: EvoNorm, given: Tensor) -> np.ndarray:
    """The paper's table in NumPy, one loop a set of indices."""
    x = given.detach().numpy().reshape(*given.shape[:2], -1)
    count, channels, _ = x.shape
    eps, variant = layer.eps, layer.variant
    groups = max(g for g in range(1, layer.groups + 1) if channels % g == 0)
    size = channels // groups
    y = np.empty_like(x)
    for n in range(count):
        for c in range(channels):
            own = x[n, c]
            first = c // size * size
            group = x[n, first : first + size]
            v1 = 1.0 if layer.v1 is None else layer.v1[c].item()
            if variant[0] == "b":
                batch = x[:, c].var() if layer.training else layer.running_var[c].item()
                instance = np.sqrt(own.var() + eps)
                root = np.sqrt((own**2).mean() + eps)
                second = {"b0": v1 * own + instance, "b1": (own + 1) * root, "b2": root - own}[variant]
                unit = own / np.maximum(np.sqrt(batch + eps), second)
            else:
                spread = (group**2).mean() if variant == "s2" else group.var()
                unit = own / (1 + np.exp(-v1 * own)) / np.sqrt(spread + eps)
            y[n, c] = unit * layer.weight[c].item() + layer.bias[c].item()
    return y.reshape(given.shape)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 1, 4), (2, 7, 3, 5), (4, 12, 2, 1, 3), (2, 63, 7, 1), (3, 64, 2, 2), (5, 6)])
def test_each_variant_is_the_papers_formula_in_training_and_evaluation(variant: str, shape: tuple[int, ...]) -> None:
    if len(shape) == 2 and variant == "b0":
        pytest.skip("one position has no variance; see the test of the warning")
    layer, x = trained(shape[1], variant, groups=32 if shape[1] != 12 else 3).double(), 1 + drawn(*shape).double()
    for mode in (False, True):
        layer.train(mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if shape in ((5, 6),) else "error")
            expected = by_the_letter(layer, x)
            np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_and_second_derivatives_are_those_of_finite_differences(variant: Any) -> None:
    layer, x = trained(5, variant, groups=4).double(), drawn(2, 5, 1, 3).double().requires_grad_()
    assert layer.groups == 1, "4, 3 and 2 do not divide 5"
    tensors = [x, layer.weight, layer.bias] + ([] if layer.v1 is None else [layer.v1])

    def function(*given: Tensor) -> Tensor:
        return normalize_and_activate(*given, variant=variant, groups=4)[0]

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def naive(layer: EvoNorm, x: Tensor) -> Tensor:
    """The formulas op by op in float32, as one would write them down; autograd keeps every step."""
    wide, shape = x.float(), (1, -1, 1, 1)
    v1 = torch.ones(1) if layer.v1 is None else layer.v1.view(shape)
    if layer.variant[0] == "b":
        batch = wide.var((0, 2, 3), correction=0, keepdim=True)
        square = (wide**2).mean((2, 3), keepdim=True)
        second = {
            "b0": v1 * wide + (wide.var((2, 3), correction=0, keepdim=True) + layer.eps).sqrt(),
            "b1": (wide + 1) * (square + layer.eps).sqrt(),
            "b2": (square + layer.eps).sqrt() - wide,
        }[layer.variant]
        unit = wide / torch.maximum((batch + layer.eps).sqrt(), second)
    else:
        grouped = wide.reshape(len(x), layer.groups, -1)
        spread = (grouped**2).mean(2) if layer.variant == "s2" else grouped.var(2, correction=0)
        spread = spread.repeat_interleave(x.shape[1] // layer.groups, 1)[:, :, None, None]
        unit = wide * torch.sigmoid(v1 * wide) / (spread + layer.eps).sqrt()
    return (unit * layer.weight.view(shape) + layer.bias.view(shape)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_every_gradient_are_the_naive_ones(variant: str, dtype: torch.dtype) -> None:
    for channels, side in ((1, 7), (7, 3), (63, 2)):
        layer, x = trained(channels, variant), drawn(3, channels, side, side + 1).to(dtype)
        direction = drawn(*x.shape, seed=1).to(dtype)
        found = {}
        for name, function in (("ours", layer), ("naive", lambda x, layer=layer: naive(layer, x))):
            layer.zero_grad()
            given = x.clone().requires_grad_()
            y = function(given)
            y.backward(direction)
            found[name] = [y.detach(), given.grad, *(p.grad.clone() for p in layer.parameters())]
        for ours, theirs in zip(*found.values(), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 0.02, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 80), st.integers(1, 40))
def test_groups_are_the_largest_number_that_divides(channels: int, groups: int) -> None:
    found = EvoNorm(channels, groups=groups).groups
    assert channels % found == 0
    assert found <= groups
    assert all(channels % g for g in range(found + 1, min(groups, channels) + 1))


@pytest.mark.parametrize("variant", ["s0", "s1", "s2"])
def test_an_example_of_the_s_series_does_not_see_the_others_nor_the_mode(variant: str) -> None:
    layer, x = trained(8, variant, groups=4), drawn(4, 8, 3, 3)
    assert not list(layer.buffers())
    whole = layer(x)
    torch.testing.assert_close(torch.cat([layer(one) for one in x.split(1)]), whole)
    assert torch.equal(layer.eval()(x), whole)


@pytest.mark.parametrize("variant", ["b0", "b1", "b2"])
def test_the_b_series_sees_the_batch_in_training_only_and_keeps_its_variance(variant: str) -> None:
    layer, batches = EvoNorm(5, variant, momentum=0.2), [drawn(4, 5, 3, 3, seed=s) * (s + 1) for s in range(3)]
    unbiased = EvoNorm(5, variant, momentum=0.2, unbiased_running_var=True)
    running, peer = torch.ones(5), nn.BatchNorm2d(5, momentum=0.2)
    for x in batches:
        layer(x)
        unbiased(x)
        peer(x)
        running = 0.8 * running + 0.2 * x.transpose(0, 1).reshape(5, -1).var(1, correction=0)
    torch.testing.assert_close(layer.running_var, running)
    torch.testing.assert_close(unbiased.running_var, peer.running_var)
    x = batches[0]
    assert not torch.allclose(layer(x)[:2], layer(x[:2]), atol=1e-3)
    kept = layer.running_var.clone()
    torch.testing.assert_close(layer.eval()(x)[:2], layer(x[:2]))
    assert torch.equal(layer.running_var, kept)


def test_b0_without_slope_is_a_batch_norm_that_does_not_centre() -> None:
    layer, scale = EvoNorm(3, "b0"), torch.tensor([1.0, 10.0])[:, None, None, None]
    nn.init.zeros_(layer.v1)
    x = drawn(2, 3, 8, 8) * scale
    expected = x / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    # The first image spreads less than the batch, so the batch's deviation wins.
    torch.testing.assert_close(layer(x)[0], expected[0])


@pytest.mark.parametrize("variant", ["s1", "s2"])
def test_large_positive_inputs_can_be_scaled_without_effect(variant: str) -> None:
    layer, x = EvoNorm(8, variant, groups=2).double(), 50 + 5 * drawn(2, 8, 4, 4).double()
    torch.testing.assert_close(layer(100 * x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_are_taken_in_float32_and_by_centring(variant: str) -> None:
    layer, x = EvoNorm(4, variant, groups=2), 100 + drawn(8, 4, 16, 16)
    exact = copy.deepcopy(layer).double()(x.half().double())
    assert torch.isfinite(layer(x.half())).all()
    torch.testing.assert_close(layer(x.half()).double(), exact, rtol=2e-3, atol=1e-3)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x))
    # A mean of squares less a squared mean would have no digit left.
    far = 1e4 + drawn(8, 4, 16, 16)
    torch.testing.assert_close(layer(far).double(), copy.deepcopy(layer).double()(far.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_the_input_is_kept_for_the_backward_pass(variant: str) -> None:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x = drawn(4, 8, 32, 32).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        EvoNorm(8, variant)(x)
    assert x.data_ptr() in kept
    assert sum(kept.values()) < 1.02 * x.nbytes


def test_memory_layout_and_gradients_per_example() -> None:
    layer, x = trained(8, "s0"), drawn(3, 8, 4, 4)
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, layer(x))
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(given: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(layer, given, (one[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, one in enumerate(x):
        layer.zero_grad()
        layer(one[None]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-4, atol=1e-5)


def test_without_nonlinearity_gain_and_shift_are_left() -> None:
    layer, x = trained(5, "b0", nonlinearity=False), drawn(2, 5, 3, 3)
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not list(layer.buffers())
    expected = x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x[:1, :, :1, :1]).shape == (1, 5, 1, 1)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_gain_shift_and_slope_are_not_decayed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), EvoNorm2d(4))
    assert [len(g["params"]) for g in parameter_groups(model, 0.1)] == [1, 3]


def test_it_starts_again_from_meta() -> None:
    with torch.device("meta"):
        layer = EvoNorm(4, "b0")
    layer.to_empty(device="cpu").reset_parameters()
    for name, value in EvoNorm(4, "b0").state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("variant", ["b0", "s0"])
def test_it_stands_in_the_norm_slot_of_a_resnet(variant: str) -> None:
    norm = {"name": "evonorm", "variant": variant}
    model = ResNet((1, 1), (8, 12), stem="small", classes=3, norm=norm, activation="identity")
    assert sum(isinstance(m, EvoNorm) for m in model.modules()) == 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = drawn(12, 3, 8, 8), torch.arange(12) % 3
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_ranks_and_bad_input_are_named() -> None:
    assert EvoNorm1d(3)(drawn(2, 3, 5)).shape == (2, 3, 5)
    assert EvoNorm3d(3)(drawn(2, 3, 5, 2, 2)).shape == (2, 3, 5, 2, 2)
    refused: list[tuple[EvoNorm, Tensor, type[Exception], str]] = [
        (EvoNorm1d(3), drawn(2, 3, 5, 5), ShapeError, r"\(N, C\) or \(N, C, L\), C = 3, got \(2, 3, 5, 5\)"),
        (EvoNorm2d(3), drawn(2, 3, 5), ShapeError, r"EvoNorm2d\(3\) expects \(N, C, H, W\), C = 3, got \(2, 3, 5\)"),
        (EvoNorm3d(3), drawn(2, 3, 5, 5), ShapeError, r"\(N, C, D, H, W\)"),
        (EvoNorm(3), drawn(2, 4, 5, 5), ShapeError, r"C = 3, got \(2, 4, 5, 5\)"),
        (EvoNorm(3), drawn(2, 3, 0, 5), ShapeError, r"at least one position.*got \(2, 3, 0, 5\)"),
        (EvoNorm(3), torch.ones(2, 3, 5, 5, dtype=torch.long), TypeError, "floating-point x, got torch.int64"),
        (EvoNorm(3, "b0"), drawn(1, 3, 1, 1), ShapeError, r"more than one value a channel in training, got \(1, 3, 1"),
        (EvoNorm(3, "b2"), drawn(0, 3, 4, 4), ShapeError, "more than one value a channel in training"),
    ]
    for layer, x, error, words in refused:
        with pytest.raises(error, match=words):
            layer(x)
    assert EvoNorm(3, "b1").eval()(drawn(1, 3, 1, 1)).shape == (1, 3, 1, 1)
    assert EvoNorm(3).eval()(drawn(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"variant": "s3"}, LaminaError, "one of b0, b1, b2, s0, s1, s2, got 's3'"),
        ({"num_features": 0}, ShapeError, "at least 1, got 0 and 32"),
        ({"groups": -1}, ShapeError, "at least 1, got 4 and -1"),
        ({"eps": 0.0}, LaminaError, "eps must be above 0"),
        ({"eps": float("nan")}, LaminaError, "eps must be above 0"),
        ({"momentum": 1.5}, LaminaError, r"within 0..1, got 1.5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        EvoNorm(**{"num_features": 4, **options})


def test_a_variance_of_one_number_is_warned_of_in_training() -> None:
    for layer in (EvoNorm(4, "b0"), EvoNorm(4, "s0"), EvoNorm(4, "s1")):
        with pytest.warns(UserWarning, match=r"variance of one number in x of shape \(2, 4, 1, 1\)"):
            layer(drawn(2, 4, 1, 1))
        layer.eval()(drawn(2, 4, 1, 1))
    for layer in (EvoNorm(4, "s0", groups=2), EvoNorm(4, "s2"), EvoNorm(4, "b1"), EvoNorm(4, nonlinearity=False)):
        layer(drawn(2, 4, 1, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_timms_layer_where_timm_is_installed(variant: Any) -> None:
    timm = pytest.importorskip("timm.layers.evo_norm")
    theirs = getattr(timm, f"EvoNorm2d{variant.upper()}")(64, eps=1e-5)
    ours, generator = EvoNorm2d(64, variant, unbiased_running_var=True), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
            getattr(ours, name if name != "v" else "v1").copy_(parameter)
    x = drawn(4, 64, 7, 5)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-5, atol=1e-5)


def _part_of_the_batch(rank: int) -> list[bool]:
    whole = trained(5, "b0").double()
    layer = trained(5, "b0", sync=True, unbiased_running_var=True).double()
    x, direction = 3 + drawn(5, 5, 3, 3).double(), drawn(5, 5, 3, 3, seed=1).double()
    own = slice(0, 2) if rank == 0 else slice(2, 5)
    expected = x.clone().requires_grad_()
    whole(expected).backward(direction)
    found = x[own].clone().requires_grad_()
    y = layer(found)
    y.backward(direction[own])
    dist.all_reduce(layer.v1.grad)
    unbiased = trained(5, "b0").running_var * 0.9 + 0.1 * x.transpose(0, 1).reshape(5, -1).var(1)
    return [
        torch.allclose(y, whole(x)[own]),
        torch.allclose(found.grad, expected.grad[own]),
        torch.allclose(layer.v1.grad, whole.v1.grad),
        torch.allclose(layer.running_var.float(), unbiased.float(), rtol=1e-5),
    ]


@pytest.mark.distributed
def test_synchronised_batches_of_unequal_size_are_one_batch(tmp_path: Any) -> None:
    assert in_processes(_part_of_the_batch, 2, tmp_path) == [[True] * 4] * 2
