from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.errors import LaminaError, ShapeError
from lamina.nn import Float8Activation, Float8GatedMLP, Float8LayerNorm, Float8Linear, Float8RMSNorm, SwiGLU
from lamina.nn.float8 import Formats, group_max, per_group, per_tensor, restore, save_in_float8, saved_bytes


def floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


EXAMPLES = [
    Example("layer", "float8_linear", {"in_features": 8, "out_features": 4}, floats(2, 3, 8), bad={"forward": "e4m4"}),
    Example("norm", "float8_rms_norm", {"normalized_shape": 20}, floats(2, 3, 20), bad={"forward": "int8"}),
    Example("norm", "float8_layer_norm", {"normalized_shape": 20}, floats(2, 3, 20), bad={"group": -1}),
    Example("layer", "float8_activation", {"function": "gelu"}, floats(2, 20), bad={"function": "relu"}),
    Example("layer", "float8_gated_mlp", {"width": 8, "hidden": 20}, floats(2, 3, 8), bad={"hidden": 0}),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest_e4m3(value: float) -> float:
    """Round by the format's definition: the nearest of its numbers, of two as near the one with an even code."""
    table = [(m / 8) * 2.0**-6 for m in range(8)] + [
        (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)
    ]
    finite = table[:-1]  # The last code is NaN.
    best = min(range(len(finite)), key=lambda code: (abs(finite[code] - abs(value)), code % 2))
    return finite[best] if value >= 0 else -finite[best]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_is_read_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = torch.isfinite(codes.float())
    assert torch.equal(restore(codes, torch.tensor(1.0))[finite], codes.float()[finite])


def test_numbers_are_rounded_to_the_nearest_even_code_of_a_bf16_scale() -> None:
    x = torch.cat([draw(200), 1e-3 * draw(200, seed=1), torch.tensor([0.0, 3.0])])
    codes, scale = per_tensor(x, "e4m3")
    exact = (float(x.abs().max()) + 1e-10) / 448
    assert scale.dtype == torch.bfloat16
    assert float(scale) == float(torch.tensor(exact).bfloat16())
    # Divided by what is stored, not by the unrounded scale.
    expected = [nearest_e4m3(max(-448.0, min(448.0, float(v)))) for v in x / scale.float()]
    assert codes.float().tolist() == expected
    assert torch.equal(restore(codes, scale), torch.tensor(expected) * scale.float())


@pytest.mark.parametrize("size", [1, 7, 16, 63, 64])
def test_a_maximum_in_two_stages_is_the_maximum(size: int) -> None:
    x = draw(3, 5, size)
    assert group_max(x, 16).shape == (3, 5, -(-size // 16))
    assert torch.equal(group_max(x, 16).amax(), x.abs().max())
    codes, scale = per_group(x, "e4m3", 16)
    assert (codes.shape, scale.shape) == (x.shape, (3, 5, -(-size // 16)))
    for begin in range(0, size, 16):
        part, own = per_tensor(x[1, 2, begin : begin + 16], "e4m3")
        assert torch.equal(codes[1, 2, begin : begin + 16].float(), part.float())
        assert scale[1, 2, begin // 16] == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_input", [False, True])
def test_a_linear_layer_multiplies_rounded_numbers_forward_and_backward(dtype: torch.dtype, keep_input: bool) -> None:
    layer = Float8Linear.of(nn.Linear(7, 63), Formats(), keep_input=keep_input).to(dtype)
    x, g = draw(2, 5, 7).to(dtype).requires_grad_(), draw(2, 5, 63, seed=1).to(dtype)
    y = layer(x)
    y.backward(g)
    a, w = (restore(*per_tensor(t.detach(), "e4m3")) for t in (x, layer.weight))
    e = restore(*per_tensor(g, "e5m2"))
    expected = (a @ w.T + layer.bias, e @ w, torch.einsum("bto,bti->oi", e, a), g.float().sum((0, 1)))
    found = (y, x.grad, layer.weight.grad, layer.bias.grad)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert one.dtype == dtype
        torch.testing.assert_close(one, other.to(dtype), rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rms", "layer", "silu", "gelu", "gelu_tanh"])
def test_what_is_not_linear_is_that_of_the_input_rounded_by_groups(kind: str, dtype: torch.dtype) -> None:
    norms: dict[str, nn.Module] = {"rms": Float8RMSNorm(63, 1e-6), "layer": Float8LayerNorm(63)}
    plain: dict[str, nn.Module] = {
        "rms": nn.RMSNorm(63, 1e-6),
        "layer": nn.LayerNorm(63),
        "silu": nn.SiLU(),
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU("tanh"),
    }
    module, twin = norms.get(kind) or Float8Activation(kind), plain[kind]  # type: ignore[arg-type]
    for i, p in enumerate(module.parameters()):
        p.data = 1 + 0.3 * draw(63, seed=i)
    twin.load_state_dict(module.state_dict())
    x = draw(2, 7, 63).to(dtype).requires_grad_()
    rounded = restore(*per_group(x.detach(), "e4m3", 16), 16).requires_grad_()
    g = draw(2, 7, 63, seed=5)
    module(x).backward(g.to(dtype))
    y = twin(rounded)
    y.backward(g.to(dtype).float())
    close = {"rtol": 1.6e-2 if dtype == torch.bfloat16 else 1e-4, "atol": 1e-2 if dtype == torch.bfloat16 else 1e-5}
    torch.testing.assert_close(module(x).float(), y, **close)
    torch.testing.assert_close(x.grad.float(), rounded.grad, **close)  # type: ignore[union-attr]
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=1e-3)


def test_a_gated_network_computes_from_what_it_keeps() -> None:
    plain = SwiGLU(16, 40)
    layers: Any = {n: m for n, m in plain.named_children() if isinstance(m, nn.Linear)}
    model = Float8GatedMLP.around(layers, ("gate", "up", "down"), "silu", Formats())
    assert [id(p) for p in model.parameters()] == [id(p) for p in plain.parameters()]
    x = draw(2, 3, 16).requires_grad_()
    a, b = model.gate(x), model.up(x)
    r = lambda t: restore(*per_group(t.detach(), "e4m3", 16), 16)  # noqa: E731
    product = r(F.silu(r(a))) * r(b)
    expected = restore(*per_tensor(product, "e4m3")) @ restore(*per_tensor(plain.down.weight.detach(), "e4m3")).T
    torch.testing.assert_close(model(x), expected)
    g = draw(2, 3, 16, seed=1)
    model(x).backward(g)
    e = restore(*per_tensor(g, "e5m2")) @ restore(*per_tensor(plain.down.weight.detach(), "e4m3"))
    ga, s = r(a), r(a).sigmoid()
    for layer, inner in ((plain.gate, e * r(b) * s * (1 + ga * (1 - s))), (plain.up, e * r(F.silu(ga)))):
        into = restore(*per_tensor(x.detach(), "e4m3"))
        wanted = torch.einsum("bto,bti->oi", restore(*per_tensor(inner, "e5m2")), into)
        torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-4, atol=1e-5)


def test_in_evaluation_everything_is_the_plain_layer() -> None:
    x = draw(4, 16)
    torch.manual_seed(0)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (Float8Linear(16, 8), nn.Linear(16, 8)),
        (Float8RMSNorm(16), nn.RMSNorm(16)),
        (Float8LayerNorm(16), nn.LayerNorm(16)),
        (Float8Activation("gelu_tanh"), nn.GELU("tanh")),
        (Float8GatedMLP(16, 40), SwiGLU(16, 40)),
    ]
    for ours, plain in pairs:
        plain.load_state_dict(ours.state_dict())
        assert torch.equal(ours.eval()(x), plain.eval()(x))
        assert not torch.equal(ours.train()(x), plain(x))


def test_one_channel_a_hundred_times_the_others_is_coarse_in_its_group_alone() -> None:
    x = draw(8, 64)
    x[:, 5] *= 100
    exact = F.rms_norm(x, (64,))
    errors = {}
    for group in (16, 0):
        found = Float8RMSNorm(64, group=group)(x).detach()
        errors[group] = float((found - exact)[:, 16:].norm() / exact[:, 16:].norm())
    assert errors[16] < 0.04
    assert errors[0] > 1.3 * errors[16]


def test_what_a_block_keeps_is_what_the_table_says() -> None:
    """Bytes a token: layers that read the same tensor keep it once."""
    width, hidden, rows = 64, 96, 32
    q, k = Float8Linear(width, width, False), Float8Linear(width, width, False)
    x = draw(rows, width).bfloat16().requires_grad_()
    both = nn.ModuleList([q, k]).bfloat16()
    assert saved_bytes(both, lambda: q(x) + k(x)) - rows * width <= 8  # and a scale each at most
    mlp, norm = Float8GatedMLP(width, hidden).bfloat16(), Float8RMSNorm(width).bfloat16()
    table = width + 3 * (hidden + 2 * hidden // 16) + hidden
    assert saved_bytes(mlp, lambda: mlp(x)) == pytest.approx(rows * table, rel=0.03)
    assert saved_bytes(norm, lambda: norm(x)) == rows * (width + 2 * width // 16)
    kept = Float8Linear(width, width, keep_input=True).bfloat16()
    assert saved_bytes(kept, lambda: kept(x)) == pytest.approx(2 * rows * width, abs=8)


def test_codes_of_a_tensor_that_was_written_into_are_made_anew() -> None:
    layer, x = Float8Linear(8, 8), draw(2, 8)
    before = layer(x)
    x.mul_(3)
    assert not torch.allclose(layer(x), before)
    assert torch.equal(layer(x), layer(x.clone()))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(16, 24, 3, padding=1), nn.Conv1d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_an_unknown_module_keeps_what_it_saves_in_float8() -> None:
    torch.manual_seed(0)
    plain = Convolutions()
    saving = save_in_float8(plain, Formats())
    assert [id(p) for p in saving.parameters()] == [id(p) for p in plain.parameters()]
    assert type(plain) is Convolutions
    x = draw(2, 16, 64).requires_grad_()
    assert torch.equal(saving(x), plain(x))
    assert saved_bytes(saving, lambda: saving(x)) == 0  # autograd has packed tensors, which this tape cannot see into
    plain(x).square().sum().backward()
    exact = x.grad.clone()  # type: ignore[union-attr]
    x.grad = None
    for model in (saving, copy.deepcopy(saving)):
        model(x).square().sum().backward()
        found, x.grad = x.grad, None
        assert found is not None
        assert not torch.equal(found, exact)
        assert torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.998
    saving.eval()(x).square().sum().backward()
    assert torch.equal(x.grad, exact)  # type: ignore[arg-type]


def test_weights_that_are_saved_are_not_rounded() -> None:
    plain, x = nn.Conv1d(16, 24, 3), draw(2, 16, 32).requires_grad_()
    # The gradient of a sum depends on the weight alone.
    models = (plain, save_in_float8(plain, Formats()))
    grads = [torch.autograd.grad(model(x).sum(), x)[0] for model in models]
    assert torch.equal(*grads)


def test_under_autocast_outputs_are_bf16_and_gradients_float32() -> None:
    layer, x = Float8Linear(8, 4), draw(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(LaminaError, match="forward must be 'e4m3' or 'e5m2', got 'e4m4'; did you mean"):
        Float8Linear(4, 4, forward="e4m4")  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="group is how many numbers share a scale"):
        Float8LayerNorm(4, group=-1)
    with pytest.raises(LaminaError, match="function must be one of 'silu', 'gelu', 'gelu_tanh', got 'relu'"):
        Float8Activation("relu")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="normalises over the last dimension"):
        Float8RMSNorm((4, 4))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="sizes must be positive: width=4, hidden=0"):
        Float8GatedMLP(4, 0)
    with pytest.raises(
        ShapeError, match=r"Float8GatedMLP takes floating-point \(..., 16\), got torch.float32 \(2, 8\)"
    ):
        Float8GatedMLP(16)(torch.zeros(2, 8))
    with pytest.raises(ShapeError, match=r"takes floating-point numbers, got torch.int64"):
        Float8Activation()(torch.zeros(2, dtype=torch.long))
