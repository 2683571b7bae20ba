from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.nn import FeedForward, Pattention, parameter_attention
from lamina.nn.attention import Attention

SCORES = ("l2_gelu", "gelu_l2", "softmax")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


EXAMPLES = [
    Example(
        "layer",
        "pattention",
        {"in_features": 6, "out_features": 4, "pairs": 7},
        inputs=lambda: (drawn(2, 5, 6, dtype=torch.float32),),
        bad={"pairs": 0},
    ),
    Example(
        "layer",
        "pattention",
        {"in_features": 6, "out_features": 4, "bias": True, "score": "gelu_l2"},
        inputs=lambda: (drawn(5, 6, dtype=torch.float32),),
        bad={"score": "l2gelu"},
    ),
    Example(
        "layer",
        "pattention",
        {"in_features": 6, "out_features": 4, "score": "softmax"},
        inputs=lambda: (drawn(5, 6, dtype=torch.float32),),
        bad={"scale": -1.0},
    ),
]


def make(in_features: int = 6, out_features: int = 4, pairs: int = 7, **options: Any) -> Pattention:
    torch.manual_seed(0)
    return Pattention(in_features, out_features, pairs, **options).double()


def gelu(a: float) -> float:
    return a * 0.5 * (1 + math.erf(a / math.sqrt(2)))


def written_out(layer: Pattention, x: Tensor, seen: Tensor | None = None) -> np.ndarray[Any, Any]:
    """The definition in loops over tokens and pairs; no token is zero."""
    key, value, tau = layer.key.detach().numpy(), layer.value.detach().numpy(), float(layer.scale)
    pairs = [j for j in range(len(key)) if seen is None or seen[j]]
    rows = []
    for token in x.reshape(-1, x.shape[-1]).numpy():
        a = [sum(token[i] * key[j][i] for i in range(len(token))) for j in pairs]
        if layer.score == "l2_gelu":
            s = [gelu(v * tau / math.sqrt(sum(w * w for w in a))) for v in a]
        elif layer.score == "gelu_l2":
            s = [gelu(v) * tau / math.sqrt(sum(gelu(w) ** 2 for w in a)) for v in a]
        else:
            s = [math.exp(v) / sum(math.exp(w) for w in a) * tau for v in a]
        rows.append(sum(w * value[j] for w, j in zip(s, pairs, strict=True)))
    return np.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("width", "pairs"), [(1, 1), (7, 63), (5, 2)])
def test_outputs_are_those_of_the_definition_written_out(score: str, width: int, pairs: int) -> None:
    layer, x = make(width, 3, pairs, score=score), drawn(2, 3, width, seed=1)
    np.testing.assert_allclose(layer(x).detach().numpy(), written_out(layer, x), rtol=1e-6)
    narrow = copy.deepcopy(layer).float()
    torch.testing.assert_close(narrow(x.float()), layer(x).float(), rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    rounded = half(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded - layer(x)).abs().max() < 0.05 * layer(x).abs().max()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(score: str, masked: bool) -> None:
    key, value, x = (drawn(*s, seed=i).requires_grad_() for i, s in enumerate([(5, 3), (5, 2), (4, 3)]))
    mask = torch.tensor([True, False, True, True, False]) if masked else None

    def run(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return parameter_attention(x, key, value, 1.7, score=score, pair_mask=mask)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, (x, key, value))


def test_only_the_direction_of_a_token_counts() -> None:
    layer, x = make(), drawn(3, 6)
    for factor in (0.1, 0.5, 1e3):
        torch.testing.assert_close(layer(factor * x), layer(x), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(layer(-x), layer(x), atol=1e-2)
    assert not torch.allclose(make(score="gelu_l2")(2e2 * x), make(score="gelu_l2")(x), atol=1e-4)


def test_normalised_scores_have_a_mean_square_of_one_and_the_order_of_pairs_does_not_matter() -> None:
    layer, x = make(pairs=13), drawn(5, 6)
    scores = x @ layer.key.T
    normal = scores * float(layer.scale) / scores.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(normal.square().mean(-1), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer(x), torch.nn.functional.gelu(normal) @ layer.value, rtol=1e-6, atol=1e-9)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parameter_attention(x, layer.key[order], layer.value[order], layer.scale), layer(x))


@pytest.mark.parametrize("score", SCORES)
def test_a_masked_pair_is_a_removed_pair(score: str) -> None:
    layer, x = make(score=score), drawn(2, 3, 6)
    mask = torch.tensor([True, True, False, True, False, True, True])
    np.testing.assert_allclose(layer(x, mask).detach().numpy(), written_out(layer, x, mask), rtol=1e-6)
    left = parameter_attention(x, layer.key[mask], layer.value[mask], layer.scale, score=layer.score)
    torch.testing.assert_close(layer(x, mask), left)
    each = torch.stack((mask, ~mask, torch.zeros_like(mask))).expand(2, 3, 7)
    torch.testing.assert_close(layer(x, each)[:, 1], layer(x, ~mask)[:, 1])
    assert not layer(x, each)[:, 2].any()
    with pytest.raises(ShapeError, match=r"pair_mask must be bool \(\.\.\., 7\), got torch.int64 \(7,\)"):
        layer(x, mask.long())


@pytest.mark.parametrize("score", ["l2_gelu", "gelu_l2"])
def test_a_token_of_zeros_gives_zeros_and_finite_gradients(score: str) -> None:
    layer = make(score=score).float()
    x = torch.zeros(2, 6, requires_grad=True)
    with torch.no_grad():
        x[1] = 1.0
    y = layer(x)
    assert not y[0].any()
    assert y[1].any()
    y.square().sum().add(y.sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, layer.key, layer.value))


def test_the_scale_stays_float32_and_is_loaded() -> None:
    layer = Pattention(6, 4, 7, scale=2.718281828)
    for changed in (copy.deepcopy(layer).bfloat16(), copy.deepcopy(layer).double(), copy.deepcopy(layer).half().cpu()):
        assert changed.scale.dtype == torch.float32
        assert float(changed.scale) == float(layer.scale)
    with torch.device("meta"):
        empty = Pattention(6, 4, 7)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty.scale, layer.scale)
    assert float(Pattention(6, 4, 9).scale) == 3.0
    assert float(Pattention(6, 4, 9, score="softmax").scale) == 9.0


def test_a_layer_built_on_meta_starts_as_any_other() -> None:
    for scale in (None, 2.5):
        with torch.device("meta"):
            layer = Pattention(6, 4, 9, bias=True, scale=scale)
        layer.to_empty(device="cpu")
        for tensor in layer.state_dict().values():
            tensor.fill_(torch.nan)
        torch.manual_seed(0)
        layer.reset_parameters()
        torch.manual_seed(0)
        whole = Pattention(6, 4, 9, bias=True, scale=scale).state_dict()
        assert all(torch.equal(t, whole[name]) for name, t in layer.state_dict().items())


def test_the_norm_is_float32_in_low_precision() -> None:
    """The squares of these scores sum up to more than the 65504 that float16 can hold."""
    layer = Pattention(64, 8, 32)
    x = drawn(4, 64, dtype=torch.float32) * 1e3
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.02)
    half = copy.deepcopy(layer).half()(x.half())
    torch.testing.assert_close(half.float(), layer(x), rtol=0.1, atol=0.05)


def test_it_starts_with_the_spread_of_the_layer_it_stands_for() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 64)
    slot = {"name": "pattention", "pairs": 256}
    mixer, feed = Attention(64, 4, bias=True, linear=slot), FeedForward(64, linear=slot)
    for layer in (mixer, feed):
        layer.initialise(0.02, 0.01)
    assert mixer.query.value.std().item() == pytest.approx(0.02 * 0.5, rel=0.05)
    assert mixer.out.value.std().item() == pytest.approx(0.01 * 0.5, rel=0.05)
    assert mixer.query(x).std().item() == pytest.approx(0.02 * 8 * 0.65, rel=0.1)
    assert mixer.query.key.std().item() == pytest.approx(0.02, rel=0.05)
    assert isinstance(feed.up.bias, nn.Parameter)
    assert feed(x).shape == (500, 64)
    # No option of a slot is taken and left: a bias that is asked for is there.
    assert mixer.query.bias is not None
    assert Pattention(64, 4).bias is None


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"at least 1, got in_features=6, out_features=4, pairs=0"):
        Pattention(6, 4, 0)
    with pytest.raises(RecipeError, match=r"score is one of l2_gelu, gelu_l2, softmax, got 'gelu'"):
        Pattention(6, 4, score="gelu")  # type: ignore[arg-type]
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ShapeError, match="scale and eps must be positive"):
            Pattention(6, 4, scale=wrong)
    with pytest.raises(ShapeError, match=r"Pattention takes floating-point \(\.\.\., 6\), got torch.float32 \(2, 5\)"):
        Pattention(6, 4)(torch.zeros(2, 5))
