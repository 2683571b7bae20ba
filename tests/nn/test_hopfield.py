from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn import Attention, Hopfield, KeyValueCache, hopfield_update

NO_NORMS: dict[str, Any] = {"norm_stored": False, "norm_state": False, "norm_projection": False}
STATIC: dict[str, Any] = {"stored_static": True, "state_static": True, "projection_static": True}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXAMPLES = [
    Example(
        "mixer",
        "hopfield",
        {"width": 16, "heads": 4, "kv_heads": 2, "causal": True, "rotary": True, "update_steps_max": 2},
        inputs=lambda: (torch.randn(2, 7, 16),),
        bad={"heads": 3, "kv_heads": 3},
    ),
    Example(
        "mixer",
        "hopfield",
        {
            "width": 16,
            "heads": 2,
            "pattern_size": 5,
            "beta": [0.3, 0.7],
            "update_steps_max": [0, 3],
            "bias_row": True,
            "zero_row": True,
            "norm_hopfield": True,
            "norm_stored": "plain",
            "dropout": 0.1,
        },
        inputs=lambda: (torch.randn(2, 7, 16),),
        bad={"beta": -1.0},
    ),
    Example(
        "mixer",
        "hopfield",
        {"width": 16, "heads": 2, "update_steps_max": None},
        inputs=lambda: (torch.randn(2, 7, 16),),
        bad={"update_steps_eps": 0.0},
        no_compile="how many updates it takes to come to rest is known at the run only",
    ),
]


def make(width: int = 16, heads: int = 4, *, std: float = 0.4, **options: Any) -> Hopfield:
    """A layer in float64 whose weights are large enough for sharp associations, biases too."""
    torch.manual_seed(0)
    layer = Hopfield(width, heads, **options).double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(std * torch.randn_like(p))
    return layer


def torchs(layer: Hopfield, **options: Any) -> nn.MultiheadAttention:
    """torch's attention with the layer's weights."""
    assert isinstance(layer.query, nn.Linear)
    assert isinstance(layer.key, nn.Linear)
    assert isinstance(layer.value, nn.Linear)
    peer = nn.MultiheadAttention(layer.width, layer.heads, batch_first=True, dtype=torch.float64, **options)
    weights = [layer.query.weight, layer.key.weight, layer.value.weight]
    with torch.no_grad():
        if peer.in_proj_weight is not None:
            peer.in_proj_weight.copy_(torch.cat(weights))
        else:
            for mine, w in zip((peer.q_proj_weight, peer.k_proj_weight, peer.v_proj_weight), weights, strict=True):
                mine.copy_(w)
        peer.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]))
        peer.out_proj.load_state_dict(layer.out.state_dict())
        if peer.bias_k is not None:
            peer.bias_k.copy_(layer.key_row.view(1, 1, -1))
            peer.bias_v.copy_(layer.value_row.view(1, 1, -1))
    return peer


@pytest.mark.parametrize("masks", ["none", "padding", "2-D bool", "2-D float", "3-D float", "all"])
@pytest.mark.parametrize("rows", [False, True])
def test_one_association_is_torchs_attention_with_every_gradient(masks: str, rows: bool) -> None:
    layer = make(stored_size=10, projection_size=6, bias_row=rows, zero_row=rows, **NO_NORMS)
    peer = torchs(layer, kdim=10, vdim=6, add_bias_kv=rows, add_zero_attn=rows)
    stored, state, projection = tokens(3, 9, 10), tokens(3, 5, 16, seed=1), tokens(3, 9, 6, seed=2)
    padding = torch.arange(9) >= torch.tensor([[9], [5], [1]]) if masks in ("padding", "all") else None
    mask = None
    if masks in ("2-D bool", "all"):
        mask = tokens(5, 9, seed=3) > 0.5
        mask[:, 0] = False
    elif masks != "none":
        mask = None if masks == "padding" else tokens(*((5, 9) if masks == "2-D float" else (12, 5, 9)), seed=3)
    inputs = [t.requires_grad_() for t in (stored, state, projection)]
    ours = layer((stored, state, projection), key_padding_mask=padding, association_mask=mask)
    theirs, weights = peer(state, stored, projection, padding, True, mask, average_attn_weights=False)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    again, found = layer(
        (stored, state, projection), key_padding_mask=padding, association_mask=mask, return_weights=True
    )
    torch.testing.assert_close(found, weights, atol=1e-10, rtol=0)
    torch.testing.assert_close(again, ours, atol=1e-10, rtol=0)
    direction = tokens(*ours.shape, seed=4)
    (ours * direction).sum().backward()
    got = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    (theirs * direction).sum().backward()
    want = {n: p.grad for n, p in torchs_gradients(peer).items()}
    for name, gradient in want.items():
        torch.testing.assert_close(
            dict(layer.named_parameters())[name].grad.view_as(gradient), gradient, atol=1e-10, rtol=0
        )
    for g, t in zip(got, inputs, strict=True):
        torch.testing.assert_close(g, t.grad, atol=1e-10, rtol=0)


def torchs_gradients(peer: nn.MultiheadAttention) -> dict[str, Any]:
    """torch's parameters under our names, with their gradients."""

    class Held:
        def __init__(self, grad: Tensor) -> None:
            self.grad = grad

    biases = peer.in_proj_bias.grad.chunk(3)
    found = {f"{n}.bias": Held(b) for n, b in zip(("query", "key", "value"), biases, strict=True)}
    for name in ("query", "key", "value"):
        found[f"{name}.weight"] = getattr(peer, f"{name[0]}_proj_weight")
    found |= {"out.weight": peer.out_proj.weight, "out.bias": peer.out_proj.bias}
    if peer.bias_k is not None:
        found |= {"key_row": peer.bias_k, "value_row": peer.bias_v}
    return found


@pytest.mark.parametrize("length", [1, 7, 63])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_odd_lengths_and_low_precision(length: int, dtype: torch.dtype, tolerance: float) -> None:
    layer, x = make(update_steps_max=1), tokens(2, length, 16)
    exact = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype is dtype
    assert (found.double() - exact).abs().max() <= tolerance * max(1.0, float(exact.detach().abs().max()))


def test_all_static_is_the_plain_update() -> None:
    layer = Hopfield(6, **STATIC, **NO_NORMS, output_projection=False, beta=1.7)
    assert not list(layer.parameters())
    stored, state = tokens(1, 9, 6).float(), tokens(4, 5, 6, seed=1).float()
    expected = hopfield_update(state.double(), stored[0].double(), 1.7)
    assert (layer((stored, state)).double() - expected).abs().max() <= 1e-6
    assert Hopfield(6, **STATIC).beta == 1.0
    assert Hopfield(6).beta == pytest.approx(1 / math.sqrt(6))
    many = Hopfield(6, 3, hidden_size=6, **STATIC, **NO_NORMS, output_projection=False, beta=[0.5, 1.0, 2.0])
    found = many((stored, state)).unflatten(-1, (3, 6))
    for head, beta in enumerate((0.5, 1.0, 2.0)):
        one = hopfield_update(state.double(), stored[0].double(), beta)
        assert (found[:, :, head].double() - one).abs().max() <= 1e-6


def explicit(layer: Hopfield, stored: Tensor, state: Tensor, counts: list[int], betas: list[float]) -> Tensor:
    """The layer's steps, head by head, from its weights."""
    outs = []
    for h in range(layer.heads):
        rows = slice(h * layer.hidden_size, (h + 1) * layer.hidden_size)
        values = slice(h * layer.pattern_size, (h + 1) * layer.pattern_size)
        q = layer.norm_hopfield(layer.query(layer.norm_state(state))[..., rows])
        k = layer.norm_hopfield(layer.key(layer.norm_stored(stored))[..., rows])
        v = layer.value(layer.norm_projection(stored))[..., values]
        for _ in range(counts[h]):
            q = (betas[h] * q @ k.mT).softmax(-1) @ k
        outs.append((betas[h] * q @ k.mT).softmax(-1) @ v)
    return layer.out(torch.cat(outs, dim=-1))


@pytest.mark.parametrize(
    ("steps", "beta"),
    [(3, None), (1, 2.0), ([0, 1, 5, 2], 1.0), (2, [0.125, 1.0, 2.0, 5.0]), ([3, 0, 0, 1], [1.0, 2.0, 3.0, 4.0])],
)
@pytest.mark.parametrize("more", [{}, {"norm_hopfield": True, "pattern_size": 7, "norm_state": "plain"}])
def test_updates_are_those_of_key_space(steps: Any, beta: Any, more: dict[str, Any]) -> None:
    layer = make(update_steps_max=steps, beta=beta, **more)
    stored, state = tokens(2, 9, 16), tokens(2, 5, 16, seed=1)
    counts = steps if isinstance(steps, list) else [steps] * 4
    betas = beta if isinstance(beta, list) else [beta or 0.5] * 4
    expected = explicit(layer, stored, state, counts, betas)
    torch.testing.assert_close(layer((stored, state)), expected, atol=1e-10, rtol=0)
    found, weights = layer((stored, state), return_weights=True)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))


def test_until_rest_stops_at_a_fixed_point_head_by_head(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {**NO_NORMS, **STATIC, "output_projection": False, "hidden_size": 8}
    stored, state = tokens(1, 12, 8), tokens(3, 5, 8, seed=1)
    layer = Hopfield(8, 2, beta=[0.25, 1.5], update_steps_max=None, **options).double()
    found = layer((stored, state)).unflatten(-1, (2, 8))
    counts = []
    for head, beta in enumerate((0.25, 1.5)):
        again = hopfield_update(found[:, :, head], stored[0], beta)
        assert (again - found[:, :, head]).abs().max() < 1e-3
        # The same by hand: update until nothing moves farther than 1e-4, then associate once more.
        xi = state
        for count in range(1, 1000):  # noqa: B007
            moved, xi = xi, hopfield_update(xi, stored[0], beta)
            if (xi - moved).norm(dim=-1).max() <= 1e-4:
                break
        counts.append(count)
        torch.testing.assert_close(found[:, :, head], hopfield_update(xi, stored[0], beta), atol=1e-12, rtol=0)
    assert counts[0] != counts[1]
    loose = Hopfield(8, 2, beta=[0.25, 1.5], update_steps_max=50, update_steps_eps=[1e-4, 100.0], **options).double()
    first, second = loose((stored, state)).unflatten(-1, (2, 8)).unbind(2)
    torch.testing.assert_close(second, hopfield_update(state, stored[0], 1.5, steps=2))
    torch.testing.assert_close(first, found[:, :, 0])
    assert not caplog.records


def test_states_that_never_come_to_rest_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lamina.nn.hopfield_association.MOST_STEPS", 3)
    layer = make(update_steps_max=None, update_steps_eps=1e-30)
    layer(tokens(1, 5, 16))
    assert "after 3 updates" in caplog.text
    caplog.clear()
    make(update_steps_max=2, update_steps_eps=1e-30)(tokens(1, 5, 16))
    assert not caplog.records


def test_gradients_flow_through_all_updates() -> None:
    layer = make(8, 2, update_steps_max=2)
    stored, state = tokens(1, 5, 8).requires_grad_(), tokens(1, 3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: layer((a, b)), (stored, state))
    until = make(8, 2, update_steps_max=3, update_steps_eps=1e-12)
    until.load_state_dict(layer.state_dict())
    layer.update_steps_max = 3
    for one in (layer, until):
        one((stored, state)).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), until.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_order_of_what_is_stored_does_not_matter_and_that_of_the_states_is_kept() -> None:
    layer = make(update_steps_max=2, zero_row=True)
    stored, state = tokens(2, 9, 16), tokens(2, 5, 16, seed=1)
    expected = layer((stored, state))
    there, here = torch.randperm(9), torch.randperm(5)
    torch.testing.assert_close(layer((stored[:, there], state)), expected)
    torch.testing.assert_close(layer((stored, state[:, here])), expected[:, here])


@pytest.mark.parametrize("options", [{}, {"update_steps_max": 3}, {"bias_row": True, "zero_row": True, "causal": True}])
def test_padding_of_any_length_changes_nothing(options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens(2, 5, 16)
    expected = layer(x)
    for length in (1, 4):
        padded = torch.cat((x, 100 * tokens(2, length, 16, seed=2)), dim=1)
        real = (torch.arange(5 + length) < 5).expand(2, -1)
        for given in ({"attention_mask": real.long()}, {"key_padding_mask": ~real},
                      {"key_padding_mask": torch.zeros(2, 5 + length).masked_fill(~real, -math.inf)}):  # fmt: skip
            torch.testing.assert_close(layer(padded, **given)[:, :5], expected)


def test_a_state_that_sees_nothing_gives_the_bias_and_finite_gradients() -> None:
    for steps in (0, 2):
        layer, x = make(update_steps_max=steps), tokens(2, 5, 16).requires_grad_()
        padding = torch.tensor([[True] * 5, [False] * 5])
        found = layer(x, key_padding_mask=padding)
        torch.testing.assert_close(found[0], layer.out.bias.expand(5, -1))
        both, weights = layer(x, key_padding_mask=padding, return_weights=True)
        torch.testing.assert_close(both, found)
        assert not weights[0].any()
        found.square().sum().backward()
        assert torch.isfinite(x.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    rows = make(zero_row=True)
    _, weights = rows(x, key_padding_mask=padding, return_weights=True)
    torch.testing.assert_close(weights[0, ..., -1], torch.ones(4, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 2}, {"rotary": True}, {"rotary": True, "kv_heads": 1, "rotary_base": 50.0}]
)
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_our_attention_where_that_is_asked_for(options: dict[str, Any], causal: bool) -> None:
    layer = make(causal=causal, **options, **NO_NORMS)
    peer = Attention(16, 4, bias=True, causal=causal, **options).double()
    peer.load_state_dict(layer.state_dict())
    x, seen = tokens(3, 7, 16), torch.arange(7) >= torch.tensor([[0], [2], [6]])
    torch.testing.assert_close(layer(x), peer(x))
    torch.testing.assert_close(layer(x, seen), peer(x, seen))
    if "rotary" in options:
        positions = torch.arange(7) + 3
        torch.testing.assert_close(layer(x, positions=positions), peer(x, positions=positions))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("options", [{}, {"rotary": True, "kv_heads": 2}, {"bias_row": True, "zero_row": True}])
def test_causal_updates_see_the_past_alone_and_a_cache_continues_them(steps: int, options: dict[str, Any]) -> None:
    layer, x = make(causal=True, update_steps_max=steps, **options), tokens(2, 7, 16)
    whole = layer(x)
    changed = x.clone()
    changed[:, 4:] += 1.0
    torch.testing.assert_close(layer(changed)[:, :4], whole[:, :4])
    cache, parts = KeyValueCache(), []
    for part in x.split([3, 1, 2, 1], dim=1):
        parts.append(layer(part, cache=cache))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    dense, weights = layer(x, return_weights=True)
    torch.testing.assert_close(dense, whole)
    assert not weights[..., :7].triu(1).any()


def test_connected_values_come_out_of_the_key_projection() -> None:
    layer = make(projection_connected=True)
    x = tokens(2, 5, 16)
    expected = layer.value(layer.key(layer.norm_projection(x)))
    with torch.no_grad():
        layer.query.weight.zero_()
        layer.query.bias.zero_()
        found = layer(x)
    torch.testing.assert_close(found, layer.out(expected.mean(1, keepdim=True).expand(-1, 5, -1)))
    # Without norms the keys serve as they are; without a value projection what is retrieved lies in key space.
    bare, apart = (
        make(projection_connected=True, projection_static=True, **NO_NORMS, **o) for o in ({}, {"rotary": True})
    )
    with torch.no_grad():
        bare.query.weight.zero_()
        bare.query.bias.zero_()
    torch.testing.assert_close(bare(x), bare.out(bare.key(x).mean(1, keepdim=True).expand(-1, 5, -1)))
    # The positions are turned into the keys, never into the values.
    with torch.no_grad():
        apart.query.weight.zero_()
        apart.query.bias.zero_()
    torch.testing.assert_close(apart(x), apart.out(apart.key(x).mean(1, keepdim=True).expand(-1, 5, -1)))


def test_the_norms_are_layer_norms_of_each_input_and_can_go() -> None:
    layer = make(stored_size=10, norm_state="plain", norm_projection=False)
    assert [type(m).__name__ for m in (layer.norm_stored, layer.norm_state, layer.norm_projection)] == [
        "LayerNorm", "LayerNorm", "Identity",
    ]  # fmt: skip
    assert layer.norm_state.weight is None
    stored, state, values = tokens(2, 9, 10), tokens(2, 5, 16, seed=1), tokens(2, 9, 16, seed=2)
    found = layer((stored * 10 + 3, state * 7 - 2, values))
    torch.testing.assert_close(found, layer((stored, state, values)), atol=1e-3, rtol=1e-3)


def test_dropout_is_of_the_last_association_in_training() -> None:
    layer, x = make(dropout=0.5, update_steps_max=1), tokens(2, 5, 16)
    whole = layer(x)
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([layer(x) for _ in range(2000)])
    assert not torch.equal(drawn[0], drawn[1])
    assert ((drawn.mean(0) - whole).abs() <= 5 * drawn.std(0) / math.sqrt(2000)).all()
    torch.manual_seed(0)
    found, weights = layer(x, return_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    assert not torch.allclose(found, whole)


@torch.no_grad()
def test_it_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    layer = Hopfield(256, 4, bias_row=True)
    for name, p in layer.named_parameters():
        if name.startswith("norm"):
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert float(p.std()) == pytest.approx(0.02, rel=0.2), name
            assert abs(float(p.mean())) < 0.005, name


def test_other_linear_layers_stand_in_its_slot() -> None:
    layer = Hopfield(16, 2, linear={"name": "phm_linear", "n": 2})
    assert {type(m).__name__ for m in (layer.query, layer.key, layer.value, layer.out)} == {"PHMLinear"}
    assert layer(tokens(2, 5, 16).float()).shape == (2, 5, 16)


def test_it_is_exported_with_any_number_of_patterns_and_saved() -> None:
    layer = Hopfield(16, 2, update_steps_max=[1, 2], beta=[0.3, 0.9]).eval()
    x = tokens(2, 7, 16).float()
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},))
    longer = tokens(3, 9, 16).float()
    torch.testing.assert_close(program.module()(longer), layer(longer))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = Hopfield(16, 2, update_steps_max=[1, 2], beta=[1.0, 2.0]).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"heads": 3}, ShapeError, "width 16 does not divide by 3 heads"),
        ({"heads": 0}, ShapeError, "sizes must be positive, got heads=0"),
        ({"hidden_size": 0}, ShapeError, "hidden_size=0"),
        ({"output_size": 0}, ShapeError, "output_size must be positive"),
        ({"heads": 4, "kv_heads": 3}, ShapeError, "4 heads do not divide by 3 kv_heads"),
        ({"beta": 0.0}, ValueError, "beta must be above 0 and finite, got 0"),
        ({"beta": math.nan}, ValueError, "beta must be above 0"),
        ({"heads": 2, "beta": [1.0, 2.0, 3.0]}, ShapeError, "beta has 3 entries for 2 heads"),
        ({"heads": 2, "beta": torch.ones(1)}, ShapeError, "beta has 1 entries"),
        ({"heads": 2, "beta": [1.0, -2.0]}, ValueError, "beta"),
        ({"update_steps_eps": 0.0}, ValueError, "update_steps_eps must be above 0"),
        ({"update_steps_max": -1}, ValueError, "update_steps_max must be whole numbers of at least 0"),
        ({"heads": 2, "update_steps_max": [1]}, ShapeError, "update_steps_max has 1 entries"),
        (
            {"projection_connected": True, "pattern_size": 3},
            ShapeError,
            "pattern_size must be hidden_size, got 3 and 16",
        ),
        ({"projection_connected": True, "stored_static": True}, ShapeError, "which there must be"),
        ({"projection_connected": True, "projection_size": 3}, ShapeError, "which reads 16, not 3"),
        (
            {"heads": 2, "state_static": True},
            ShapeError,
            "state_static: patterns of width 16 .* hidden_size must be 16, got 8",
        ),
        ({"stored_static": True, "stored_size": 5}, ShapeError, "stored_static: patterns of width 5"),
        ({"projection_static": True, "pattern_size": 5}, ShapeError, "pattern_size must be 16, got 5"),
        ({"rotary": True, "hidden_size": 5}, ShapeError, "must be even, got 5"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"norm_state": "none"}, ValueError, "True, 'plain'.*'none'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Hopfield(16, **options)


@pytest.mark.parametrize(
    ("options", "call", "error", "words"),
    [
        ({}, lambda m: m(torch.ones(2, 5, 8)), ShapeError, r"\(batch, at least 1, 16\) of floats, got \(2, 5, 8\)"),
        ({}, lambda m: m(torch.ones(2, 5, 16, dtype=torch.long)), ShapeError, "int64"),
        ({}, lambda m: m(torch.ones(2, 0, 16)), ShapeError, r"at least 1.*\(2, 0, 16\)"),
        ({}, lambda m: m(torch.ones(5, 16)), ShapeError, r"got \(5, 16\)"),
        ({}, lambda m: m((torch.ones(2, 5, 16),)), ShapeError, r"\(stored, state\) or"),
        (
            {},
            lambda m: m((torch.ones(2, 5, 16), torch.ones(2, 3, 16), torch.ones(2, 4, 16))),
            ShapeError,
            "5 patterns.*4",
        ),
        ({}, lambda m: m((torch.ones(2, 5, 16), torch.ones(3, 3, 16))), ShapeError, r"batch: \[2, 3, 2\]"),
        (
            {},
            lambda m: m(torch.ones(2, 5, 16), torch.ones(2, 4)),
            ShapeError,
            r"padding must be \(2, 5\), got \(2, 4\)",
        ),
        (
            {},
            lambda m: m(torch.ones(2, 5, 16), torch.ones(2, 5), key_padding_mask=torch.zeros(2, 5)),
            ValueError,
            "not both",
        ),
        (
            {},
            lambda m: m(torch.ones(2, 5, 16), association_mask=torch.ones(4, 5)),
            ShapeError,
            r"must be \(5, 5\) or \(4,",
        ),
        ({}, lambda m: m(torch.ones(2, 5, 16), cache=KeyValueCache()), ValueError, "needs causal=True"),
        ({"context": 4}, lambda m: m(torch.ones(2, 5, 16)), ShapeError, "5 tokens, the context is 4"),
        ({"rotary": True}, lambda m: m((torch.ones(2, 5, 16), torch.ones(2, 3, 16))), ValueError, "one sequence"),
        (
            {"causal": True},
            lambda m: m((torch.ones(2, 3, 16), torch.ones(2, 5, 16))),
            ShapeError,
            "5 states are the last of 3",
        ),
    ],
)
def test_inputs_that_cannot_be(options: dict[str, Any], call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(Hopfield(16, 2, **options))
