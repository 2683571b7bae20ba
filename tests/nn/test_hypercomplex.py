from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.nn import functional

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.nn import PHConv1d, PHConv2d, PHConv3d, PHConvTranspose2d, PHMLinear, kron_sum, nearest_kron_sum
from lamina.nn._hypercomplex_kron import multiply_blocks_first, multiply_low_rank
from lamina.nn._hypercomplex_weight import ALGEBRAS
from lamina.optim import parameter_groups


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


CHANNELS = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "n": 2}
EXAMPLES = [
    Example(
        "layer",
        "phm_linear",
        {"in_features": 12, "out_features": 8, "n": 2},
        inputs=lambda: (drawn(5, 12),),
        bad={"n": 3},
    ),
    Example(
        "layer",
        "phm_linear",
        {"in_features": 32, "out_features": 8, "n": 4, "rank": 2, "algebra": "quaternion"},
        inputs=lambda: (drawn(3, 32),),
        bad={"algebra": "quaternoin"},
    ),
    Example("layer", "ph_conv1d", CHANNELS, inputs=lambda: (drawn(2, 4, 7),), bad={"n": 4}),
    Example("layer", "ph_conv2d", CHANNELS, inputs=lambda: (drawn(2, 4, 7, 5),), bad={"groups": 2}),
    Example("layer", "ph_conv3d", CHANNELS, inputs=lambda: (drawn(2, 4, 3, 5, 4),), bad={"init": "xavier"}),
    Example("layer", "ph_conv_transpose2d", CHANNELS, inputs=lambda: (drawn(2, 4, 5, 3),), bad={"n": 0}),
]
CONVOLUTIONS: list[tuple[Any, Any, int]] = [
    (PHConv1d, nn.Conv1d, 1),
    (PHConv2d, nn.Conv2d, 2),
    (PHConv3d, nn.Conv3d, 3),
    (PHConvTranspose2d, nn.ConvTranspose2d, 2),
]


def quiet(make: Any, *values: Any, **options: Any) -> Any:
    """Build a layer that is too small to save anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make(*values, **options)


def summed(A: Tensor, F: Tensor) -> Tensor:
    """The definition, entry by entry of A: block (a, b) is sum_i A[i, a, b] F[i]."""
    n, p, q = F.shape[:3]
    H = torch.zeros(n * p, n * q, *F.shape[3:], dtype=F.dtype)
    for i in range(n):
        for a in range(n):
            for b in range(n):
                H[a * p : (a + 1) * p, b * q : (b + 1) * q] += A[i, a, b] * F[i]
    return H


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("kernel", [(), (3,), (1, 2), (2, 1, 3)])
def test_the_weight_is_the_sum_of_kronecker_products(n: int, kernel: tuple[int, ...]) -> None:
    A, F = drawn(n, n, n), drawn(n, 2, 3, *kernel, seed=1)
    torch.testing.assert_close(kron_sum(A, F), summed(A, F))
    if not kernel:
        torch.testing.assert_close(kron_sum(A, F), sum(torch.kron(a, f) for a, f in zip(A, F, strict=True)))


@pytest.mark.parametrize("rows", [0, 1, 7, 63])
@pytest.mark.parametrize(("inputs", "outputs", "n"), [(7, 63, 7), (1, 63, 1), (63, 21, 3), (16, 8, 4), (8, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_multiply_gives_the_dense_product(
    rows: int, inputs: int, outputs: int, n: int, dtype: torch.dtype
) -> None:
    x = drawn(2, rows, inputs).to(dtype)
    A, F = drawn(n, n, n, seed=1).to(dtype), drawn(n, outputs // n, inputs // n, seed=2).to(dtype)
    H = summed(A.double(), F.double())
    expected = functional.linear(x.double(), H)
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05 * n * inputs**0.5}
    )
    torch.testing.assert_close(multiply_blocks_first(x, A, F).double(), expected, **tolerance)
    torch.testing.assert_close(functional.linear(x, kron_sum(A, F)).double(), expected, **tolerance)
    left, right = drawn(n, outputs // n, 2, seed=3).to(dtype), drawn(n, 2, inputs // n, seed=4).to(dtype)
    thin = functional.linear(x.double(), summed(A.double(), left.double() @ right.double()))
    torch.testing.assert_close(multiply_low_rank(x, A, left, right).double(), thin, **tolerance)


def test_few_rows_and_many_rows_agree_in_outputs_and_gradients() -> None:
    layer, x = PHMLinear(64, 32, n=4), drawn(40, 64)
    assert layer._few_rows(x[:8])
    assert not layer._few_rows(x[:9])
    found = []
    for parts in (x.split(8), (x,)):
        layer.zero_grad()
        y = torch.cat([layer(part) for part in parts])
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(found[0]) == 4
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def hamilton(w: list[Tensor], x: list[Tensor]) -> list[Tensor]:
    r, i, j, k = w
    a, b, c, d = x
    return [
        r @ a - i @ b - j @ c - k @ d,
        i @ a + r @ b - k @ c + j @ d,
        j @ a + k @ b + r @ c - i @ d,
        k @ a - j @ b + i @ c + r @ d,
    ]


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 2), (7, 1)])
def test_the_quaternion_layer_is_hamiltons_product(k: int, m: int) -> None:
    layer, x = PHMLinear(4 * k, 4 * m, n=4, bias=False, algebra="quaternion"), drawn(5, 4 * k)
    expected = hamilton(list(layer.F.detach()), list(x.view(5, 4, k).permute(1, 2, 0)))
    torch.testing.assert_close(layer(x).detach(), torch.cat(expected).T)
    assert not isinstance(layer.A, nn.Parameter)
    assert "A" in layer.state_dict()


def test_quaternions_commute_with_multiplication_from_the_right_and_a_learned_algebra_does_not() -> None:
    torch.manual_seed(0)
    fixed = PHMLinear(12, 8, n=4, bias=False, algebra="quaternion").double()
    learned = quiet(PHMLinear, 12, 8, n=4, bias=False).double()
    x, r = drawn(1, 12, dtype=torch.float64), drawn(4, 1, 1, seed=1, dtype=torch.float64)

    def from_the_right(v: Tensor) -> Tensor:
        parts = [p.view(-1, 1) for p in v.view(4, -1)]
        return torch.cat(hamilton([p[:, :, None] for p in parts], [q[None] for q in r.view(4, 1, 1)]), 0).view(1, -1)

    torch.testing.assert_close(fixed(from_the_right(x)), from_the_right(fixed(x)))
    assert (learned(from_the_right(x)) - from_the_right(learned(x))).abs().max() > 0.1


def test_the_complex_layer_is_torchs_complex_product_and_n_1_is_nn_linear() -> None:
    layer, x = PHMLinear(6, 10, n=2, bias=False, algebra="complex"), drawn(3, 6)
    w = torch.complex(*layer.F.detach())
    expected = torch.complex(*x.view(3, 2, 3).unbind(1)) @ w.T
    torch.testing.assert_close(layer(x).detach(), torch.cat((expected.real, expected.imag), 1))
    real = PHMLinear(5, 3, n=1, algebra="real")
    torch.testing.assert_close(real(x[:, :5]), functional.linear(x[:, :5], real.F[0], real.bias))


@pytest.mark.parametrize(("ours", "twin", "dims"), CONVOLUTIONS)
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2, "padding": 1, "dilation": 2},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "padding_mode": "circular", "stride": 2},
        {"padding": "same", "padding_mode": "replicate", "kernel_size": 4},
        {"padding": "valid", "padding_mode": "replicate", "bias": False, "kernel_size": 1},
        {"output_padding": 1, "stride": 3, "padding": 1},
    ],
)
def test_a_convolution_is_torchs_with_the_summed_weight(
    ours: Any, twin: Any, dims: int, geometry: dict[str, Any]
) -> None:
    transposed = ours is PHConvTranspose2d
    if ("output_padding" in geometry) != transposed and ("output_padding" in geometry or "same" in str(geometry)):
        pytest.skip("not torch's geometry")
    if transposed and "padding_mode" in geometry:
        pytest.skip("torch's transposed convolutions pad with zeros only")
    options = {"kernel_size": 3} | geometry
    layer, x = ours(4, 6, n=2, **options), drawn(2, 4, *[9, 8, 7][:dims])
    plain = twin(4, 6, **options)
    with torch.no_grad():
        plain.weight.copy_(summed(layer.A, layer.F))
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), plain(x[0]), rtol=1e-4, atol=1e-5)
    fine = layer.double()
    torch.testing.assert_close(fine.fold()(x.double()), fine(x.double()), rtol=1e-12, atol=1e-12)
    assert repr(fine.fold()) == repr(plain)


def test_the_output_size_of_a_transposed_convolution_is_torchs() -> None:
    layer, x = PHConvTranspose2d(4, 6, 3, n=2, stride=2, padding=1), drawn(1, 4, 5, 4)
    plain = layer.fold()
    assert isinstance(plain, nn.ConvTranspose2d)
    for size in ((10, 8), (9, 7)):
        torch.testing.assert_close(layer(x, output_size=size), plain(x, output_size=list(size)))
    with pytest.raises(ShapeError, match=r"\[9, 7\]\.\.\[10, 8\], got \[11, 8\]"):
        layer(x, output_size=(11, 8))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_number_of_parameters(n: int) -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    linear, plain = PHMLinear(48, 24, n), nn.Linear(48, 24)
    assert count(linear) == n**3 + 48 * 24 // n + 24
    conv = PHConv2d(48, 24, (3, 5), n, bias=False)
    full = 48 * 24 * 15
    assert count(conv) == n**3 + full // n
    assert count(conv) / full <= 1 / n + n**3 / full
    assert count(linear) / count(plain) <= 1 / n + (n**3 + 24) / (48 * 24)
    thin = PHMLinear(48, 24, n, rank=2, bias=False)
    assert count(thin) == n**3 + 2 * (48 + 24)
    assert count(PHMLinear(48, 24, 4, algebra="quaternion", bias=False)) == 48 * 24 // 4


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("rows", [1, 9])
def test_gradients_by_finite_differences(rank: int | None, rows: int) -> None:
    layer = quiet(PHMLinear, 8, 4, n=2, rank=rank).double()
    parameters = dict(layer.named_parameters())
    x = drawn(rows, 8, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


def test_gradients_of_a_convolution_by_finite_differences_and_the_bias_has_one() -> None:
    layer = quiet(PHConv2d, 4, 2, 2, n=2).double()
    parameters = dict(layer.named_parameters())
    x = drawn(1, 4, 3, 3, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), x)

    assert set(parameters) == {"A", "F", "bias"}
    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.0, dtype=torch.float64))


def test_a_learned_algebra_learns_the_quaternion_product_and_a_diagonal_one_cannot() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 4) * torch.tensor([0.0, 1.0, 1.0, 1.0])
    w = torch.tensor([0.0, 1.0, -2.0, 0.5])
    target = torch.stack(hamilton(list(w.view(4, 1, 1)), list(x.T[:, None])))[:, 0].T
    diagonal = torch.diag_embed(torch.randn(4, 4))

    def fit(layer: nn.Module) -> float:
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        for _ in range(400):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    learned = quiet(PHMLinear, 4, 4, n=4, bias=False)
    assert fit(learned) < 1e-4
    truth = kron_sum(torch.tensor(ALGEBRAS["quaternion"], dtype=torch.float32), w.view(4, 1, 1))
    # The first column multiplies the real part, which is always zero.
    torch.testing.assert_close(learned.weight[:, 1:], truth[:, 1:], atol=0.03, rtol=0)
    assert fit(nn.Linear(4, 4, bias=False)) < 1e-4
    assert fit(PHMLinear(4, 4, n=4, bias=False, algebra=diagonal)) > 0.1


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("init", ["variance", "algebra"])
def test_a_deep_stack_starts_at_the_scale_of_hes_initialisation(n: int, init: str) -> None:
    if init == "algebra" and n not in (2, 4):
        pytest.skip("no known algebra")
    scales = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(4, 48, 6, 6)
        for _ in range(10):
            x = torch.relu(
                quiet(PHConv2d, 48, 48, 3, n=n, padding=1, padding_mode="circular", bias=False, init=init)(x)
            )
        scales.append(float(x.detach().square().mean()))
    # He keeps the second moment of the rectified signal at half the input's, whatever the depth: 1/2 * 2 after each.
    assert 0.25 < sum(scales) / len(scales) < 4.0


def test_the_official_initialisation_is_xaviers_rule_on_the_tensors_as_stored() -> None:
    torch.manual_seed(0)
    layer = PHConv2d(32, 64, 3, n=4, init="official")
    assert layer.A.abs().max() <= math.sqrt(6 / (2 * 16))
    bound = math.sqrt(6 / ((16 + 4) * 8 * 9))
    assert 0.95 * bound < layer.F.abs().max() <= bound
    assert 0.9 / math.sqrt(32) < layer.bias.abs().max() <= 1 / math.sqrt(32)


def test_initialise_gives_the_weight_the_spread_asked_for() -> None:
    for options in ({}, {"rank": 8}, {"algebra": "quaternion"}, {"algebra": 5 * drawn(4, 4, 4)}):
        layer = PHMLinear(64, 96, n=4, **options)
        assert 0.7 < layer.weight.std() / math.sqrt(2 / (64 + 96)) < 1.4
        layer.initialise(0.02)
        assert 0.7 * 0.02 < layer.weight.std() < 1.4 * 0.02
        assert not layer.bias.any()
    for layer, dims in ((PHMLinear(64, 96, n=4), (0, 2)), (PHConvTranspose2d(64, 96, 1, n=4), (0, 1))):
        # Every output block has the same power: entries of variance 1/n, n * n of them.
        torch.testing.assert_close(layer.A.detach().square().sum(dims), torch.full((4,), 4.0))


def test_the_weight_kept_in_evaluation_follows_every_change_of_a_parameter() -> None:
    torch.manual_seed(0)
    layer = PHMLinear(8, 8, n=2)
    optimizer, rows = torch.optim.SGD(layer.parameters(), lr=0.5), drawn(9, 8)

    def check(x: Tensor) -> None:
        with torch.no_grad():
            expected = functional.linear(x, summed(layer.A, layer.F), layer.bias)
            torch.testing.assert_close(layer(x), expected)
            kept = layer.formed()
            assert layer.formed() is kept, "formed twice"
            torch.testing.assert_close(layer(x), expected)

    layer.eval()
    check(rows)
    layer(rows).square().sum().backward()
    optimizer.step()
    check(rows)
    layer.load_state_dict(PHMLinear(8, 8, n=2).state_dict())
    check(rows)
    layer.A = nn.Parameter(torch.randn(2, 2, 2))
    check(rows)
    with torch.inference_mode():
        layer(rows)
    check(rows)
    layer.F.data.mul_(2)
    layer.eval()
    check(rows)
    layer.to(torch.float64)
    check(rows.double())
    layer.train()
    assert layer.formed().requires_grad


def test_a_kept_weight_is_never_used_where_a_gradient_is_wanted_or_parameters_are_stand_ins() -> None:
    layer, x = PHMLinear(8, 8, n=2).eval(), drawn(5, 8)
    with torch.no_grad():
        layer(x)
        kept = layer.formed()
        zeros = {n: torch.zeros_like(p) for n, p in layer.named_parameters()}
        assert not torch.func.functional_call(layer, zeros, x).any()
        stacked = {n: torch.stack((p, 2 * p)) for n, p in layer.named_parameters()}
        both = torch.vmap(lambda p: torch.func.functional_call(layer, p, x))(stacked)
        torch.testing.assert_close(both[0], layer(x))
        assert layer.formed() is kept, "a stand-in took the place of the kept weight"
    layer(x).sum().backward()
    assert layer.F.grad is not None
    with torch.inference_mode():
        unversioned = PHMLinear(8, 8, n=2).eval()
        assert torch.equal(unversioned(x), unversioned(x))
    with torch.no_grad():
        layer(x)
        other = copy.deepcopy(layer)
        assert other._held is None, "a copy need not carry the dense weight"
        other.F.zero_()
        torch.testing.assert_close(other(x), other.bias.expand(5, -1))


@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3), (8, 12, 3, 1)])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_nearest_sum_is_exact_where_there_is_one_and_the_tail_of_the_svd_elsewhere(
    shape: tuple[int, ...], n: int
) -> None:
    A, F = drawn(n, n, n), drawn(n, shape[0] // n, shape[1] // n, *shape[2:], seed=1)
    exact = summed(A.double(), F.double())
    algebra, blocks, error = nearest_kron_sum(exact, n)
    torch.testing.assert_close(summed(algebra, blocks), exact, rtol=1e-6, atol=1e-6)
    assert error < 1e-6
    noise = drawn(*shape, seed=2, dtype=torch.float64)
    algebra, blocks, error = nearest_kron_sum(noise, n)
    rows = [
        noise[a * len(noise) // n : (a + 1) * len(noise) // n, b * shape[1] // n : (b + 1) * shape[1] // n].flatten()
        for a in range(n)
        for b in range(n)
    ]
    tail = torch.linalg.svdvals(torch.stack(rows))[n:].square().sum().sqrt()
    torch.testing.assert_close((summed(algebra, blocks) - noise).norm(), tail, rtol=1e-6, atol=1e-9)
    assert error == pytest.approx(float(tail / noise.norm()), abs=1e-9)


def test_taking_a_weight_with_a_fixed_algebra_and_with_thin_blocks() -> None:
    quaternion = PHMLinear(8, 12, n=4, algebra="quaternion").double()
    exact = PHMLinear(8, 12, n=4, algebra="quaternion").double().weight.detach()
    assert quaternion.load_nearest(exact) < 1e-6
    torch.testing.assert_close(quaternion.weight, exact)
    thin, source = PHMLinear(32, 32, n=2, rank=3).double(), PHMLinear(32, 32, n=2, rank=3).double()
    weight = torch.randn(32, 32, dtype=torch.float64)
    error = thin.load_nearest(weight)
    assert error == pytest.approx(float((thin.weight.detach() - weight).norm() / weight.norm()))
    assert thin.load_nearest(source.weight.detach()) < 0.9
    one = quiet(PHMLinear, 4, 4, n=4)
    one.load_nearest(torch.zeros(4, 4))
    one(torch.ones(1, 4)).sum().backward()
    assert not one.weight.any()
    assert one.F.grad.any(), "a weight of zeros must be able to move"


def test_layers_that_share_an_algebra_hold_it_once_wherever_they_go(tmp_path: Any) -> None:
    first = PHMLinear(8, 8, n=2)
    before = first.A.detach().clone()
    model = nn.Sequential(first, PHMLinear(8, 4, n=2, algebra_from=first), PHMLinear(4, 8, n=2, algebra_from=first))
    assert torch.equal(first.A, before), "another layer's algebra was drawn anew"
    assert model[1].A is first.A
    assert sum(p.numel() for n, p in model.named_parameters() if n.endswith("A")) == 8
    copied = copy.deepcopy(model)
    assert copied[0].A is copied[1].A is not first.A
    with torch.device("meta"):
        other = copy.deepcopy(model).to("meta")
    other = other.to_empty(device="cpu")
    assert other[0].A is other[1].A is other[2].A
    assert not other[0].A.is_meta
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(drawn(2, 8)), model(drawn(2, 8)))


def test_the_algebra_is_not_decayed() -> None:
    layer = PHMLinear(8, 8, n=2)
    decayed, plain = parameter_groups(layer, 0.1)
    assert [p is layer.F for p in decayed["params"]] == [True]
    assert {id(p) for p in plain["params"]} == {id(layer.A), id(layer.bias)}


def test_autocast_forms_the_weight_in_float32_and_bf16_layers_stay_near() -> None:
    torch.manual_seed(0)
    layer, x = PHMLinear(64, 64, n=4), drawn(40, 64)
    seen: list[torch.dtype] = []
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
        seen = [weight.dtype, layer(x).dtype, layer(x[:2]).dtype]
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(weight, layer.weight, rtol=0, atol=0)
    low = copy.deepcopy(layer).bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16
    expected = summed(low.A.float(), low.F.float()).bfloat16()
    torch.testing.assert_close(low.weight, expected, rtol=0.01, atol=1e-3)


def test_an_exported_layer_takes_any_number_of_rows() -> None:
    layer = PHMLinear(32, 8, n=2).eval()
    rows = torch.export.Dim("rows", min=1, max=1000)
    exported = torch.export.export(layer, (drawn(4, 32),), dynamic_shapes=({0: rows},)).module()
    for count in (1, 900):
        x = drawn(count, 32)
        torch.testing.assert_close(exported(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PHMLinear(6, 8, n=4), "n=4 must divide the 6 inputs and the 8 outputs; the next n that does is 2"),
        (lambda: PHConv2d(3, 64, 3, n=4), "the next n that does is 1"),
        (lambda: PHConvTranspose2d(4, 9, 3, n=2), "the 4 inputs and the 9 outputs"),
        (lambda: PHMLinear(8, 8, n=0), "sizes must be positive"),
        (lambda: PHConv2d(8, 8, 3, n=2, groups=2), "groups must be 1, got 2"),
        (lambda: PHConv2d(8, 8, 3, n=2, padding="some"), "Invalid padding string"),
        (
            lambda: PHMLinear(8, 8, n=2, algebra="quaternion"),
            r"quaternion algebra has the shape \(4, 4, 4\), n=2 needs",
        ),
        (lambda: PHMLinear(8, 8, n=2, algebra="komplex"), "did you mean 'complex'"),
        (lambda: PHMLinear(8, 8, n=2, algebra=torch.zeros(2, 2, 2)), "all zero or not finite"),
        (lambda: PHMLinear(8, 8, n=2, algebra=[[[1.0]], [[2.0, 3.0]]]), "n x n x n numbers"),
        (lambda: PHMLinear(8, 8, n=2, init="kaiming"), "init must be"),
        (lambda: PHMLinear(16, 16, n=8, init="algebra"), "n = 1, 2, 4, not 8"),
        (lambda: PHMLinear(16, 16, n=2, init="algebra", algebra="complex"), "this one is fixed"),
        (lambda: PHMLinear(8, 8, n=2, init="kaiming", algebra_from=PHMLinear(8, 8, n=2)), "init must be"),
        (lambda: PHMLinear(8, 8, n=2, rank=5), r"rank must lie in 1..4"),
        (lambda: PHMLinear(8, 8, n=2, algebra_from=nn.Linear(2, 2)), "must be a hypercomplex layer, got a Linear"),
        (lambda: PHMLinear(8, 8, n=4, algebra_from=PHMLinear(8, 8, n=2)), "n=4, but the algebra"),
        (lambda: PHMLinear(8, 8, n=2, algebra="complex", algebra_from=PHMLinear(8, 8, n=2)), "both given"),
        (lambda: PHMLinear(8, 8, n=2)(torch.ones(2, 7)), r"takes \(\.\.\., 8\), got \(2, 7\)"),
        (lambda: PHMLinear(8, 8, n=2)(torch.ones(2, 8, dtype=torch.long)), "got torch.int64 of shape"),
        (lambda: PHMLinear(8, 8, n=2)(torch.ones(2, 8, dtype=torch.float64)), "holds torch.float32"),
        (lambda: PHConv2d(8, 8, 3, n=2)(torch.ones(2, 4, 9, 9)), r"\(batch, 8, height, width\), got \(2, 4, 9, 9\)"),
        (lambda: PHConv1d(8, 8, 3, n=2)(torch.ones(8)), r"takes \(batch, 8, length\), got \(8,\)"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make: Any, words: str) -> None:
    with pytest.raises((RecipeError, ShapeError), match=words) as caught:
        quiet(make)
    assert isinstance(caught.value, LaminaError)


def test_a_layer_that_saves_nothing_warns() -> None:
    with pytest.warns(UserWarning, match=r"n\^3 = 64 numbers, more than the blocks \(16\)"):
        PHMLinear(8, 8, n=4)
    PHMLinear(8, 8, n=4, algebra="quaternion")
