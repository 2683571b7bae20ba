from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor

from lamina.errors import ShapeError
from lamina.nn.attention import Attention, KeyValueCache, rotate, visible

EXAMPLES = [
    Example(
        "mixer",
        "attention",
        options={"width": 16, "heads": 4, "kv_heads": 2, "causal": True, "rotary": True},
        inputs=lambda: (torch.randn(2, 7, 16),),
        bad={"heads": 3},
    )
]


def make(width: int = 16, heads: int | None = 4, **options: object) -> Attention:
    torch.manual_seed(0)
    return Attention(width, heads, **options).double().eval()  # type: ignore[arg-type]


def naive(layer: Attention, x: Tensor, seen: Tensor | None = None) -> Tensor:
    """Written out for one sequence, one head and one query at a time; no positions."""
    size, group = layer.head_width, layer.heads // layer.kv_heads
    rows = []
    for b in range(x.shape[0]):
        q, k, v = (p(x[b]) for p in (layer.query, layer.key, layer.value))
        outs = []
        for t in range(x.shape[1]):
            allowed = [
                s
                for s in range(x.shape[1])
                if (s <= t or not layer.causal) and ((s == t and layer.causal) or seen is None or bool(seen[b, s]))
            ]
            heads = []
            for h in range(layer.heads):
                mine, theirs = h * size, (h // group) * size
                score = torch.stack(
                    [q[t, mine : mine + size] @ k[s, theirs : theirs + size] / math.sqrt(size) for s in allowed]
                )
                weight = torch.exp(score) / torch.exp(score).sum()
                heads.append(sum(w * v[s, theirs : theirs + size] for w, s in zip(weight, allowed, strict=True)))
            outs.append(layer.out(torch.cat(heads)))
        rows.append(torch.stack(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "bias": True}, {"head_width": 3}])
def test_outputs_and_gradients_are_those_of_the_sum_written_out(
    length: int, causal: bool, masked: bool, options: dict[str, object]
) -> None:
    layer = make(causal=causal, **options)
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    seen = None
    if masked:
        seen = torch.rand(2, length) > 0.4
        seen[:, -1] = True
    ours, theirs = layer(x, seen), naive(layer, x, seen)
    assert torch.allclose(ours, theirs, atol=1e-12)
    weight = torch.randn_like(ours)
    wanted = [x, *layer.parameters()]
    got = torch.autograd.grad((ours * weight).sum(), wanted)
    want = torch.autograd.grad((theirs * weight).sum(), wanted)
    assert all(torch.allclose(g, w, atol=1e-11) for g, w in zip(got, want, strict=True))


def test_it_is_torchs_multihead_attention() -> None:
    layer = make(bias=True)
    peer = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        peer.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]))
        peer.out_proj.load_state_dict(layer.out.state_dict())
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    pad = torch.arange(9) >= torch.tensor([[9], [5], [1]])
    assert torch.allclose(layer(x, ~pad), peer(x, x, x, key_padding_mask=pad)[0], atol=1e-12)


def test_rotation_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    turned = rotate(x, torch.tensor([3]), base=100.0).flatten()
    fast, slow = 3.0, 3.0 / 10.0
    expected = [
        math.cos(fast) - 3 * math.sin(fast),
        2 * math.cos(slow) - 4 * math.sin(slow),
        3 * math.cos(fast) + math.sin(fast),
        4 * math.cos(slow) + 2 * math.sin(slow),
    ]
    assert turned.tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(rotate(x, torch.tensor([0])), x)


def test_a_fraction_of_each_head_turns_as_a_narrower_head_would() -> None:
    x, at = torch.randn(2, 3, 5, 8), torch.arange(5)
    turned = rotate(x, at, width=2)
    assert torch.equal(turned[..., :2], rotate(x[..., :2], at))
    assert torch.equal(turned[..., 2:], x[..., 2:])
    assert torch.equal(rotate(x, at, width=8), rotate(x, at))
    layer, whole, plain = make(rotary=True, rotary_fraction=0.5), make(rotary=True), make()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    assert layer.rotary_width == 2
    assert torch.equal(make(rotary=True, rotary_fraction=1.0)(x), whole(x))
    outs = [layer(x), whole(x), plain(x)]
    assert not any(torch.allclose(outs[i], outs[i - 1], atol=1e-4) for i in range(3))
    q, k, v = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    q, k = (torch.cat((rotate(t[..., :2], torch.arange(6)), t[..., 2:]), -1) for t in (q, k))
    heads = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    assert torch.allclose(layer.out(heads.transpose(1, 2).flatten(2)), outs[0], atol=1e-12)
    for wrong in (0.0, 1.5, 0.25):
        with pytest.raises(ShapeError, match=r"rotary"):
            make(rotary=True, rotary_fraction=wrong)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 300))
def test_scores_depend_on_the_distance_alone(query: int, key: int, shift: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(query))

    def score(at: int, to: int) -> float:
        return (rotate(q, torch.tensor([at])) * rotate(k, torch.tensor([to]))).sum().item()

    assert score(query, key) == pytest.approx(score(query + shift, key + shift), abs=2e-3)
    assert rotate(q, torch.tensor([query])).norm() == pytest.approx(q.norm().item(), rel=1e-5)


def test_rotary_layer_sees_shifts_no_more_than_plain_one() -> None:
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    layer = make(rotary=True)
    assert torch.allclose(layer(x, positions=torch.arange(6) + 40), layer(x), atol=1e-5)
    assert torch.allclose(layer(x, positions=torch.arange(6).expand(1, 6)), layer(x))
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert not torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-3)
    plain = make()
    assert torch.allclose(plain(x[:, order]), plain(x)[:, order])


def test_rotation_in_bfloat16_is_right_far_out() -> None:
    x = torch.randn(1, 1, 1, 8)
    far = torch.tensor([1001])
    assert torch.allclose(rotate(x.bfloat16(), far).float(), rotate(x, far), atol=0.05)


def test_grouped_heads_are_repeated_heads() -> None:
    grouped, full = make(kv_heads=2, rotary=True, causal=True), make(rotary=True, causal=True)
    with torch.no_grad():
        full.query.load_state_dict(grouped.query.state_dict())
        full.out.load_state_dict(grouped.out.state_dict())
        for theirs, mine in ((full.key, grouped.key), (full.value, grouped.value)):
            theirs.weight.copy_(mine.weight.view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert torch.allclose(grouped(x), full(x))


@pytest.mark.parametrize("pieces", [[1] * 7, [7], [3, 1, 3], [2, 5]])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_cache_equals_the_whole(pieces: list[int], kv_heads: int) -> None:
    layer = make(causal=True, rotary=True, kv_heads=kv_heads)
    x, cache, outs = torch.randn(2, 7, 16, dtype=torch.float64), KeyValueCache(), []
    for piece in x.split(pieces, dim=1):
        outs.append(layer(piece, cache=cache))
        cache.advance(piece.shape[1])
    assert torch.allclose(torch.cat(outs, 1), layer(x))
    assert cache.bytes == 2 * 2 * kv_heads * 7 * 4 * 8


def test_cache_refuses_what_cannot_be_right() -> None:
    layer, cache = make(causal=True), KeyValueCache()
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    layer(x, cache=cache)
    layer(x, cache=cache)
    with pytest.raises(ShapeError, match="counts 3 tokens, but a Attention layer holds 6"):
        cache.advance(3)
    with pytest.raises(ShapeError, match="counts 9 tokens, but a layer holds only 3"):
        make(causal=True)(x, cache=KeyValueCache(length=9))
    with pytest.raises(ValueError, match="needs causal attention"):
        make()(x, cache=KeyValueCache())


def test_mask_by_hand() -> None:
    assert visible(3, 3, False) is None
    assert visible(1, 5, True) is None
    mask = visible(2, 4, True, torch.tensor([[0, 1, 1, 0]]))
    assert mask is not None
    assert mask.int().tolist() == [[[[0, 1, 1, 0], [0, 1, 1, 1]]]]


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_causal_blocks_see_their_own_block_whole_and_earlier_ones(block: int) -> None:
    layer, x = make(causal_block=block), torch.randn(2, 7, 16, dtype=torch.float64)
    seen = torch.zeros(7, 7, dtype=torch.bool)
    for row in range(7):
        seen[row, : (row // block + 1) * block] = True
    mask = visible(7, 7, block)
    assert mask is not None
    assert torch.equal(mask[0, 0], seen)
    wide = make()
    for row in range(7):
        last = min((row // block + 1) * block, 7)
        assert torch.allclose(layer(x)[:, row], wide(x[:, :last])[:, row])
    if block == 1:
        assert torch.allclose(layer(x), make(causal=True)(x))


def test_causal_blocks_are_generated_block_by_block_from_a_cache() -> None:
    layer, x, cache = make(causal_block=3, rotary=True), torch.randn(2, 9, 16, dtype=torch.float64), KeyValueCache()
    parts = []
    for length in (6, 3):
        parts.append(layer(x[:, cache.length : cache.length + length], cache=cache))
        cache.advance(length)
    assert torch.allclose(torch.cat(parts, 1), layer(x))
    cache = KeyValueCache()
    layer(x[:, :4], cache=cache)
    cache.advance(4)
    with pytest.raises(ValueError, match="in whole blocks"):
        layer(x[:, 4:6], cache=cache)
    with pytest.raises(ValueError, match="give causal or causal_block=3, not both"):
        make(causal=True, causal_block=3)
    with pytest.raises(ShapeError, match="causal_block must be at least 1, got 0"):
        make(causal_block=0)


def test_own_kernel_gets_full_heads_and_the_mask() -> None:
    def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert q.shape == k.shape == v.shape
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v

    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for options in ({"causal": True, "kv_heads": 2}, {}, {"causal": True, "rotary": True}):
        assert torch.allclose(make(kernel=softmax, **options)(x), make(**options)(x))


def test_dropout_only_in_training() -> None:
    layer = make(dropout=0.5)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    assert torch.equal(layer(x), make()(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (64, 1), (200, 3), (256, 4)])
def test_default_heads(width: int, heads: int) -> None:
    if width % heads:
        with pytest.raises(ShapeError, match=f"width {width} does not divide by {heads} heads"):
            Attention(width)
    else:
        assert Attention(width).heads == heads


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"heads": 3}, ShapeError, "width 16 does not divide by 3 heads"),
        ({"heads": 0}, ShapeError, "must be positive"),
        ({"kv_heads": 3}, ShapeError, "4 heads do not divide by 3 kv_heads"),
        ({"head_width": 3, "rotary": True}, ShapeError, "must be even, got 3"),
        ({"dropout": 1.5}, ValueError, r"\[0, 1\), got 1.5"),
        ({"dropout": 0.1, "kernel": lambda q, k, v, mask: v}, ValueError, "kernel of your own"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_bad_input() -> None:
    layer = make(context=4)
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"takes floating-point \(batch, tokens, 16\), got torch.float64 \(2, 4, 8\)"):
        layer(x[..., :8])
    with pytest.raises(ShapeError, match="has 5 tokens, the context is 4"):
        layer(torch.cat((x, x[:, :1]), 1))
    with pytest.raises(ShapeError, match=r"attention_mask must be \(2, 4\), got \(2, 3\)"):
        layer(x, torch.ones(2, 3))
