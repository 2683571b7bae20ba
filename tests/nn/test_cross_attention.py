from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import CrossAttention

EXAMPLES = [
    Example(
        "layer",
        "cross_attention",
        {"query_width": 8, "key_width": 12, "heads": 2},
        inputs=lambda: (torch.randn(2, 3, 8), torch.randn(2, 7, 12)),
        bad={"heads": 3},
    )
]


def make(query_width: int = 12, key_width: int | None = 8, heads: int | None = 2, **options: Any) -> CrossAttention:
    torch.manual_seed(0)
    layer = CrossAttention(query_width, key_width, heads, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def naive(layer: CrossAttention, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Written out, one head at a time."""
    q, k, v = layer.query(x), layer.key(context), layer.value(context)
    heads = []
    for h in range(layer.heads):
        part = slice(h * layer.head_width, (h + 1) * layer.head_width)
        scores = q[..., part] @ k[..., part].mT / layer.head_width**0.5
        heads.append(scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v[..., part])
    return layer.out(torch.cat(heads, -1))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 63), (63, 7)])
@pytest.mark.parametrize("options", [{}, {"head_width": 3}, {"bias": False}, {"key_width": 20}])
def test_outputs_and_gradients_are_those_written_out(queries: int, keys: int, options: dict[str, Any]) -> None:
    layer = make(**options)
    x, context = torch.randn(3, queries, 12, requires_grad=True), torch.randn(3, keys, layer.key_width)
    mask = torch.rand(3, keys) > 0.4
    mask[:, 0] = True
    weight = torch.randn(3, queries, 12)
    wanted = [x, *layer.parameters()]
    ours, theirs = layer(x, context, mask), naive(layer, x, context, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    low = make(**options).bfloat16()(x.detach().bfloat16(), context.bfloat16(), mask)
    assert (low.float() - theirs).abs().max() < 0.06 * theirs.abs().max()


def test_it_is_torchs_multihead_attention() -> None:
    layer = make(12, 8, 4, head_width=3)
    peer = nn.MultiheadAttention(12, 4, kdim=8, vdim=8, batch_first=True).eval()
    with torch.no_grad():
        for name, part in (("q", layer.query), ("k", layer.key), ("v", layer.value)):
            getattr(peer, f"{name}_proj_weight").copy_(part.weight)
        peer.in_proj_bias.copy_(torch.cat([p.bias for p in (layer.query, layer.key, layer.value)]))
        peer.out_proj.load_state_dict(layer.out.state_dict())
    x, context, mask = torch.randn(2, 5, 12), torch.randn(2, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    expected = peer(x, context, context, key_padding_mask=~mask)[0]
    torch.testing.assert_close(layer(x, context, mask), expected, rtol=1e-4, atol=1e-5)


def test_heads_are_of_the_narrower_width() -> None:
    layer = CrossAttention(48, 32, 4)
    assert (layer.head_width, layer.query.out_features, layer.out.out_features) == (8, 32, 48)
    assert CrossAttention(192).heads == 3


def test_what_is_masked_is_not_read_and_a_row_of_nothing_reads_nothing() -> None:
    layer, x, context = make(), torch.randn(2, 3, 12), torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    found = layer(x, context, mask)
    found.square().sum().backward()
    assert not context.grad[mask == 0].any()
    assert torch.isfinite(context.grad).all()
    torch.testing.assert_close(found[1], layer.out.bias.expand(3, -1))


def test_a_kernel_of_ones_own_and_another_kind_of_linear_layer() -> None:
    x, context = torch.randn(2, 3, 12), torch.randn(2, 5, 8)

    def uniform(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return v.mean(2, keepdim=True).expand(-1, -1, q.shape[2], -1)

    layer = make(kernel=uniform)
    torch.testing.assert_close(layer(x, context)[:, 0], layer.out(layer.value(context).mean(1)))
    assert not torch.allclose(layer(x, context), make()(x, context))
    torch.testing.assert_close(make(kernel=F.scaled_dot_product_attention)(x, context), make()(x, context))
    assert type(make(linear={"name": "phm_linear", "n": 2}).key).__name__ == "PHMLinear"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 5}, "width 8 does not divide by 5 heads"),
        ({"query_width": 0}, "sizes must be positive"),
        ({"heads": 0}, "sizes must be positive"),
        ({"head_width": 0}, "sizes must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("x", "context", "mask", "words"),
    [
        ((2, 3, 8), (2, 5, 8), None, r"\(\.\.\., 12\), got"),
        ((2, 3, 12), (2, 5, 12), None, r"its context\) takes floating-point \(\.\.\., 8\)"),
        ((2, 3, 12), (3, 5, 8), None, "of one batch"),
        ((3, 12), (5, 8), None, "of one batch"),
        ((2, 3, 12), (2, 5, 8), (2, 3), r"context_mask must be \(2, 5\), got \(2, 3\)"),
    ],
)
def test_bad_inputs_are_refused(x: Any, context: Any, mask: Any, words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        make()(torch.zeros(x), torch.zeros(context), None if mask is None else torch.ones(mask))
