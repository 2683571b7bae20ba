from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamina.errors import LaminaError, ShapeError
from lamina.models import MetaFormer, Transformer, VisionTransformer
from lamina.nn import Attention, LocalGlobalAttention
from lamina.nn.attention import rotate

EXAMPLES = [
    Example(
        "mixer",
        "local_global_attention",
        {"width": 8, "heads": 2, "group": 3, "latents": 2, "causal": True, "rotary": True},
        inputs=lambda: (torch.randn(2, 7, 8),),
        bad={"latents": 0},
    )
]


def make(*, lively: bool = True, **options: Any) -> LocalGlobalAttention:
    torch.manual_seed(0)
    layer = LocalGlobalAttention(**({"width": 8, "heads": 2, "group": 3, "latents": 2} | options)).eval()
    with torch.no_grad():
        for parameter in layer.parameters() if lively else ():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """(T, C) of one sequence, written out."""
    outs = []
    for a, b, c in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
        scores = a @ b.T / a.shape[-1] ** 0.5
        scores = scores if seen is None else scores.masked_fill(~seen, -1e30)
        outs.append(scores.softmax(-1) @ c)
    return torch.cat(outs, -1)


def naive(layer: LocalGlobalAttention, x: Tensor) -> Tensor:
    """Group by group, the last one as short as it is."""
    rows = []
    for one in x:
        parts, m, latents, outs = one.split(layer.group), layer.latents, [], []
        for part in parts:
            z = layer.table
            q, k, v = layer.read.query(layer.read_norm(z)), layer.read.key(part), layer.read.value(part)
            latents.append(z + layer.read.out(attend(q, k, v, layer.read.heads)))
        z = torch.cat(latents)
        number = torch.arange(len(parts)).repeat_interleave(m)
        y = layer.among_norm(z)
        q, k, v = (p(y) for p in (layer.among.query, layer.among.key, layer.among.value))
        size = layer.among.head_width
        q, k = (torch.cat([rotate(h[None, None], number)[0, 0] for h in t.split(size, -1)], -1) for t in (q, k))
        seen = number[:, None] >= number if layer.causal else None
        z = z + layer.among.out(attend(q, k, v, layer.among.heads, seen))
        z = layer.write_norm(z)
        for i, part in enumerate(parts):
            source = z.split(m)[i] if not layer.causal else z.split(m)[i - 1] if i else torch.zeros(m, z.shape[1])
            q, k, v = layer.write.query(part), layer.write.key(source), layer.write.value(source)
            outs.append(layer.local(part[None])[0] + layer.write.out(attend(q, k, v, layer.write.heads)))
        rows.append(torch.cat(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 3, 7, 63])
@pytest.mark.parametrize("options", [{}, {"causal": True, "rotary": True}, {"group": 1, "latents": 1}, {"group": 7}])
def test_outputs_and_gradients_are_those_written_out(length: int, options: dict[str, Any]) -> None:
    layer, x = make(**options), torch.randn(2, length, 8, requires_grad=True)
    found, wanted = layer(x), naive(layer, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(found)
    wanting = [x, *layer.parameters()]
    grads = [torch.autograd.grad((y * weight).sum(), wanting, materialize_grads=True) for y in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    low = make(**options).bfloat16()(x.detach().bfloat16())
    assert (low.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_every_token_reaches_every_other_that_it_may(causal: bool) -> None:
    layer, x = make(causal=causal), torch.randn(1, 10, 8, requires_grad=True)
    found = layer(x)[0]
    reached = torch.stack([torch.autograd.grad(y.sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0 for y in found])
    whole = torch.ones(10, 10, dtype=torch.bool)
    assert torch.equal(reached, whole.tril() if causal else whole)


def test_it_starts_as_local_attention_and_with_one_group_as_attention() -> None:
    layer, x = make(lively=False, rotary=True), torch.randn(2, 7, 8)
    whole = Attention(8, 2, rotary=True)
    whole.load_state_dict(layer.local.state_dict())
    torch.testing.assert_close(layer(x), torch.cat([whole(part) for part in x.split(3, 1)], 1))
    torch.testing.assert_close(layer(x[:, :3]), whole(x[:, :3]))
    partly = make(lively=False, rotary=True, rotary_fraction=0.5)
    whole = Attention(8, 2, rotary=True, rotary_fraction=0.5)
    whole.load_state_dict(partly.local.state_dict())
    torch.testing.assert_close(partly(x[:, :3]), whole(x[:, :3]))
    assert not torch.allclose(partly(x[:, :3]), layer(x[:, :3]))


def test_padding_is_read_by_no_one() -> None:
    layer, x = make(), torch.randn(2, 8, 8)
    mask = torch.tensor([[1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]])
    other = x.clone()
    other[1, 4:] = 9.0
    torch.testing.assert_close(layer(x, mask)[1, :4], layer(other, mask)[1, :4])
    torch.testing.assert_close(layer(x, mask)[1:, :4], layer(x[1:, :4]))
    assert torch.isfinite(layer(x, mask)).all()


def test_its_cost_grows_with_the_groups_and_not_with_the_square() -> None:
    layer, counted = make(group=32, latents=2).requires_grad_(False), []
    for length in (256, 512, 1024):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            layer(torch.zeros(1, length, 8))
        counted.append(counter.get_total_flops())
    assert counted[2] / counted[1] < 2.4 < 4


def test_it_stands_in_the_slots_of_other_networks() -> None:
    mixer = {"name": "local_global_attention", "group": 3, "latents": 2}
    models: list[tuple[nn.Module, Tensor]] = [
        (Transformer(2, 8, 2, vocabulary=11, context=9, mixer=mixer), torch.zeros(2, 9, dtype=torch.long)),
        (VisionTransformer(12, 4, 2, 8, 2, classes=5, mixer=mixer), torch.randn(2, 3, 12, 12)),
        (MetaFormer((1, 1), (4, 8), mixers=mixer, classes=5), torch.randn(2, 3, 32, 32)),
    ]
    for model, x in models:
        assert sum(isinstance(m, LocalGlobalAttention) for m in model.modules()) == 2
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"group": 0}, "group and latents must be at least 1, got 0 and 2"), ({"heads": 3}, "does not divide")],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        make(**options)


def test_bad_inputs_are_refused() -> None:
    layer = make(context=7)
    for call, words in (
        (lambda: layer(torch.zeros(2, 8, 8)), "has 8 tokens, the context is 7"),
        (lambda: layer(torch.zeros(2, 7, 6)), r"tokens, 8\)"),
        (lambda: layer(torch.zeros(7, 8)), r"takes \(batch, tokens, 8\), got \(7, 8\)"),
        (lambda: layer(torch.zeros(2, 7, 8), torch.ones(2, 6)), r"attention_mask must be \(2, 7\), got \(2, 6\)"),
    ):
        with pytest.raises(LaminaError, match=words):
            call()
