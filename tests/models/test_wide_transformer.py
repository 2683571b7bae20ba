from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import Transformer, aspect_ratios, wide_transformer
from lamina.models.transformer import INITIAL_STD, sinusoids
from lamina.nn.attention import Attention
from lamina.nn.attention_kernels import written_out
from lamina.recipe import build
from lamina.rewrite import Replace, rewrite

TINY: dict[str, Any] = {"total_heads": 4, "width": 8, "head_width": 3, "hidden": 10, "vocabulary": 32, "context": 12}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(32, shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "model",
        "wide_transformer",
        TINY | {"depth": 2, "classes": 3, "pool": "class", "position": "sinusoidal"},
        batch=lambda: {"input_ids": tokens(2, 8), "labels": torch.tensor([0, 2])},
        bad={"depth": 3},
    )
]


def make(seed: int = 0, **options: Any) -> Transformer:
    torch.manual_seed(seed)
    return wide_transformer(**(TINY | {"classes": 3} | options)).eval()


def attention_parameters(model: Transformer) -> int:
    return sum(p.numel() for b in model.blocks for n, p in b.mixer.named_parameters() if "bias" not in n)


def test_ratios_are_the_divisors_deepest_first() -> None:
    assert aspect_ratios(6) == [(6, 1), (3, 2), (2, 3), (1, 6)]
    assert aspect_ratios(1) == [(1, 1)]


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_parameters_are_the_formula_at_every_ratio(H: int, d: int, D: int, F_: int, bias: bool) -> None:
    mixer = {"name": "attention", "bias": bias}
    with torch.device("meta"):
        for depth, heads in aspect_ratios(H):
            sizes = {"total_heads": H, "width": D, "head_width": d, "hidden": F_}
            model = make(depth=depth, **sizes, mixer=mixer)
            assert [(b.mixer.heads, b.mixer.head_width) for b in model.blocks] == [(heads, d)] * depth
            assert attention_parameters(model) == 4 * D * H * d
            biases = bias * (3 * H * d + depth * D)
            ends = (32 + 12) * D + 2 * D + 3 * D + 3
            block = 2 * D * F_ + F_ + D + 4 * D
            assert sum(p.numel() for p in model.parameters()) == ends + 4 * D * H * d + biases + depth * block


@pytest.mark.parametrize(
    ("width", "hidden", "millions"),
    [(256, 1024, {6: 6.64, 3: 5.06, 2: 4.53, 1: 4.00}), (512, 2048, {6: 19.56, 3: 13.25, 2: 11.15, 1: 9.05})],
)
def test_sizes_are_the_papers(width: int, hidden: int, millions: dict[int, float]) -> None:
    with torch.device("meta"):
        for depth, expected in millions.items():
            model = wide_transformer(48, depth, width, hidden=hidden, vocabulary=256, context=1000, classes=2)
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, abs=0.006)


def test_multiply_adds_are_the_formula_and_only_the_feed_forward_grows_with_depth() -> None:
    B, T, D, d, hidden, H = 2, 100, 32, 8, 64, 6
    for depth, heads in aspect_ratios(H):
        # Attention written out, so that the counter sees both of its products.
        mixer = {"name": "attention", "kernel": written_out}
        with torch.device("meta"):
            model = make(total_heads=H, depth=depth, width=D, head_width=d, hidden=hidden, context=T, mixer=mixer)
            ids = torch.zeros(B, T, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids)
        layer = 4 * T * D * heads * d + 2 * T**2 * heads * d + 2 * T * D * hidden
        assert counter.get_total_flops() / 2 == pytest.approx(B * depth * layer, rel=0.01)


def torch_twin(layer: nn.Module) -> nn.TransformerEncoderLayer:
    a, f = layer.mixer, layer.feed_forward
    options: dict[str, Any] = {"activation": F.gelu, "batch_first": True, "norm_first": True, "dtype": torch.float64}
    twin = nn.TransformerEncoderLayer(a.width, a.heads, f.up.out_features, 0.0, **options)
    state = {
        "self_attn.in_proj_weight": torch.cat([a.query.weight, a.key.weight, a.value.weight]),
        "self_attn.in_proj_bias": torch.cat([a.query.bias, a.key.bias, a.value.bias]),
    }
    for ours, theirs in ((a.out, "self_attn.out_proj"), (f.up, "linear1"), (f.down, "linear2"), (layer.norm1, "norm1"), (layer.norm2, "norm2")):  # fmt: skip  # noqa: E501
        state |= {f"{theirs}.weight": ours.weight, f"{theirs}.bias": ours.bias}
    twin.load_state_dict(state)
    return twin


def lively(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("length", [1, 7, 12])
def test_where_heads_fill_the_width_a_block_is_torchs_encoder_layer(length: int) -> None:
    block = lively(make(total_heads=4, depth=2, width=8, head_width=4)).double().blocks[1]
    twin = torch_twin(block)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    ours, theirs = block(x), twin(x)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), x) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    ours_grad = torch.autograd.grad((block(x) * weight).sum(), [block.mixer.key.weight, block.norm1.weight])
    theirs_grad = torch.autograd.grad((twin(x) * weight).sum(), [twin.self_attn.in_proj_weight, twin.norm1.weight])
    torch.testing.assert_close(ours_grad[0], theirs_grad[0][8:16], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ours_grad[1], theirs_grad[1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 4}, {"kernel": {"name": "local", "window": 2}}])
def test_a_wide_layer_is_the_sum_of_independent_heads(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads, size, width = 48, 4, 8
    layer = Attention(width, heads, head_width=size, bias=True, **options)
    x, seen = torch.randn(2, 7, width), torch.arange(7) < torch.tensor([[7], [4]])
    parts = layer.head_outputs(x, seen)
    assert parts.shape == (2, heads, 7, width)
    torch.testing.assert_close(parts.sum(1) + layer.out.bias, layer(x, seen), atol=1e-5, rtol=1e-5)
    group = heads // layer.kv_heads
    for h in (0, 5, 47):
        one = Attention(width, 1, head_width=size, bias=True, **{k: v for k, v in options.items() if k == "kernel"})
        rows = {
            n: slice(g * size, (g + 1) * size) for n, g in (("query", h), ("key", h // group), ("value", h // group))
        }
        with torch.no_grad():
            for name, chosen in rows.items():
                getattr(one, name).weight.copy_(getattr(layer, name).weight[chosen])
                getattr(one, name).bias.copy_(getattr(layer, name).bias[chosen])
            one.out.weight.copy_(layer.out.weight[:, h * size : (h + 1) * size])
            one.out.bias.zero_()
        torch.testing.assert_close(one(x, seen), parts[:, h], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
def test_a_padded_batch_equals_the_unpadded_one(pool: str, position: str) -> None:
    model = lively(make(depth=2, pool=pool, position=position, head_width=4))
    ids = tokens(2, 7)
    padded = torch.cat((ids, tokens(2, 5, seed=1)), dim=1)
    torch.testing.assert_close(model(padded, torch.arange(12).expand(2, -1) < 7), model(ids), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(padded), model(ids), atol=1e-2)


def test_a_class_token_stands_in_front_and_the_context_stays_the_users() -> None:
    model = lively(make(pool="class"))
    assert model.class_token is not None
    seen: list[Tensor] = []
    model.final_norm.register_forward_hook(lambda _, __, out: seen.append(out))
    out = model(tokens(2, 12))
    assert seen[0].shape == (2, 13, 8)
    torch.testing.assert_close(out, model.head(seen[0][:, 0]))
    with pytest.raises(ShapeError, match="13 tokens, the model's context is 12"):
        model(tokens(2, 13))


def test_sinusoids_by_hand() -> None:
    found = sinusoids(torch.tensor([0, 3]), 4)
    fast, slow = torch.tensor(3.0), torch.tensor(3.0 / 100)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0, 1, 1]))
    torch.testing.assert_close(found[1], torch.stack([fast.sin(), slow.sin(), fast.cos(), slow.cos()]))
    assert sinusoids(torch.arange(2), 5).shape == (2, 5)


def test_what_a_layer_adds_at_first_does_not_grow_with_its_heads() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, 64)
    sizes = []
    for heads in (4, 64):
        layer = Attention(64, heads, head_width=16)
        layer.initialise(INITIAL_STD, INITIAL_STD)
        sizes.append(layer(x).square().mean().sqrt().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.25)


HIGH_WATER = Path("/proc/self/clear_refs")


@pytest.mark.skipif(sys.platform != "linux" or not HIGH_WATER.exists(), reason="reads Linux's high-water mark")
@pytest.mark.parametrize("length", [500, pytest.param(4000, marks=pytest.mark.slow)])
def test_memory_of_many_heads_has_no_table_of_all_pairs(length: int) -> None:
    """At 4000 tokens the weights of 48 heads alone would be 3 GB."""

    def growth(**options: Any) -> int:
        layer, x = Attention(16, 48, head_width=4, **options).eval(), torch.randn(1, length, 16)
        HIGH_WATER.write_text("5")
        status = Path("/proc/self/status")
        before = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        with torch.no_grad():
            layer(x, torch.ones(1, length, dtype=torch.bool))
        after = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return (after - before) * 1024

    table = 48 * length**2 * 4
    assert growth() < 0.25 * table
    if length == 500:
        assert growth(kernel=written_out) > 0.8 * table


@pytest.mark.parametrize("kernel", ["local", "linear"])
def test_replace_puts_a_kernel_into_a_transformers_model_and_carries_its_projections(kernel: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3)  # fmt: skip  # noqa: E501
    bert = lively(BertForSequenceClassification(config).eval())
    batch = {"input_ids": tokens(2, 9), "attention_mask": torch.arange(9) < torch.tensor([[9], [5]])}
    before = bert(**batch).logits
    options = {"kernel": {"name": "local", "window": 9} if kernel == "local" else kernel}
    after = rewrite(bert, Replace("attention", "attention", options=options))(**batch).logits
    if kernel == "local":
        # A window that reaches everywhere is what was there before.
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    else:
        assert not torch.allclose(after, before, atol=1e-4)


class HomeMade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_replace_works_in_a_home_made_model_and_in_one_of_ours() -> None:
    torch.manual_seed(0)
    home_made, x = HomeMade().eval(), torch.randn(2, 9, 16)
    expected = home_made(x)
    found = rewrite(home_made, Replace("attention", "attention", options={"kernel": {"name": "local", "window": 9}}))(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    ours, ids = lively(make(depth=2, head_width=4, width=8, total_heads=4)), tokens(2, 9)
    expected = ours(ids)
    ours = rewrite(ours, Replace("attention", "attention", options={"kernel": {"name": "local", "window": 12}}))
    torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-4)
    in_front, ids = lively(make(depth=2, head_width=4, pool="class")), tokens(2, 12)
    expected = in_front(ids)
    in_front = rewrite(in_front, Replace("attention", "attention"))
    torch.testing.assert_close(in_front(ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"depth": 3},
            RecipeError,
            r"depth 3 does not divide total_heads 4; \(depth, heads\) can be \(4, 1\), \(2, 2\)",
        ),
        ({"depth": 0}, RecipeError, "depth 0 does not divide"),
        ({"total_heads": 0}, RecipeError, "does not divide total_heads 0"),
        ({"head_width": 0}, LaminaError, "head_width=0"),
        ({"mixer": "pooling_mixer"}, RecipeError, "head_width=3 would change nothing"),
        ({"pool": "class", "causal": True}, RecipeError, "pool='class' is for classifiers that see the whole"),
        ({"pool": "max"}, RecipeError, "pool.*'max'"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build({"name": "wide_transformer", **TINY, "classes": 3, **options}, "model")


def test_token_ids_and_lengths_out_of_range_are_refused() -> None:
    with pytest.raises(ShapeError, match="13 tokens, the model's context is 12"):
        make()(tokens(1, 13))
    with pytest.raises(IndexError, match="out of range"):
        make()(torch.tensor([[40]]))
