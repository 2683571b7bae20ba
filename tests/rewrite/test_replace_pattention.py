from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import Transformer
from lamina.nn import Pattention
from lamina.rewrite import Replace, rewrite

EXAMPLES = [
    Example(
        "pass",
        "replace",
        {"old": "linear", "new": "pattention", "options": {"pairs": 6}, "match": "*.q*"},
        bad={"options": {"pairs": 0}},
    )
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normed(out_features: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.LayerNorm(8, eps=0.0, elementwise_affine=False)
    return nn.Sequential(norm, nn.Linear(8, out_features, bias=bias))


def replaced(model: nn.Module, optimizer: Any = None, **options: Any) -> nn.Module:
    return rewrite(copy.deepcopy(model) if optimizer is None else model,
                   Replace("linear", "pattention", options=options), optimizer=optimizer)  # fmt: skip


@pytest.mark.parametrize("out_features", [1, 5, 63])
@pytest.mark.parametrize("pairs", [16, 21])
def test_behind_a_norm_with_twice_as_many_pairs_as_inputs_it_is_the_linear_layer(out_features: int, pairs: int) -> None:
    model, x = normed(out_features), drawn(7, 8)
    made = replaced(model, pairs=pairs)
    torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)
    # On other inputs it is the layer of their direction: W x / rms(x) + b.
    plain = model[1]
    length = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(made[1](x), (x / length) @ plain.weight.T + plain.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pairs", "scale"), [(16, 2.0), (16, 30.0), (21, 0.1)])
def test_the_linear_layer_is_kept_at_any_scale(pairs: int, scale: float) -> None:
    model, x = normed(5), drawn(7, 8)
    made: Any = replaced(model, pairs=pairs, scale=scale)
    assert float(made[1].scale) == pytest.approx(scale)
    torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)


def test_fewer_pairs_keep_the_directions_that_matter() -> None:
    model, x = normed(32, bias=False), drawn(50, 8)
    with torch.no_grad():
        model[1].weight.copy_(drawn(32, 2) @ drawn(2, 8, seed=1) + 0.01 * drawn(32, 8, seed=2))
    made: Any = replaced(model, pairs=4)[1]
    within = made.key.detach()[:2]
    y, kept = model(x), model[0](x) @ within.T
    found = made(model[0](x)) * kept.square().mean(-1, keepdim=True).sqrt()
    assert (found - y).norm() < 0.05 * y.norm()


def test_the_bias_keeps_its_momentum_and_the_model_trains_on() -> None:
    model, x = normed(5), drawn(6, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    bias, momentum = model[1].bias.detach().clone(), optimizer.state[model[1].bias]["exp_avg"].clone()
    made = replaced(model, optimizer, pairs=16)
    assert torch.equal(made[1].bias, bias)
    assert torch.equal(optimizer.state[made[1].bias]["exp_avg"], momentum)
    before = made(x).square().sum()
    optimizer.zero_grad()
    before.backward()
    assert all(p.grad.any() for p in made[1].parameters())
    optimizer.step()
    assert made(x).square().sum() < before


@pytest.mark.parametrize("options", [{"score": "softmax"}, {"score": "gelu_l2"}, {"pairs": 1}])
def test_where_there_is_no_map_the_layer_starts_fresh(options: Any) -> None:
    made: Any = replaced(normed(5), **options)[1]
    assert made.key.std().item() == pytest.approx(0.02, rel=0.6)
    assert made.bias is not None
    again: Any = replaced(normed(5), **options)[1]
    assert torch.equal(made.value, again.value)


def test_options_are_the_layers_own() -> None:
    made: Any = replaced(normed(5), pairs=16, scale=2.0, bias=False)[1]
    assert float(made.scale) == 2.0
    assert made.bias is None
    assert replaced(normed(5))[1].pairs == 8  # type: ignore[union-attr]
    frozen = normed(5).requires_grad_(False)
    assert not any(p.requires_grad for p in replaced(frozen, pairs=3).parameters())
    with pytest.raises(RecipeError, match=r"pattention has no option 'pair'; did you mean 'pairs'"):
        replaced(normed(5), pair=3)
    with pytest.raises(ShapeError, match="at least 1"):
        replaced(normed(5), pairs=0)
    with pytest.raises(LaminaError, match=r"only an nn.Linear becomes 'pattention'"):
        from lamina.lineage import Lineage
        from lamina.rewrite._replace_pattention import linear_to_pattention

        linear_to_pattention(nn.Bilinear(2, 2, 2), "pattention", {}, Lineage())


def test_a_trained_decoder_starts_near_where_it_was() -> None:
    """In place of the queries, keys and values, which read a norm; fresh layers in the same place are far off."""
    torch.manual_seed(0)
    model = Transformer(2, 32, 4, vocabulary=32, context=8).eval()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.mixer.query, block.mixer.key, block.mixer.value):
                layer.weight.mul_(5.0)
    ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(1))
    before = model(ids)

    def moved(**options: Any) -> float:
        chosen = Replace("linear", "pattention", match="*.mixer.[qkv]*", options=options)
        found = rewrite(copy.deepcopy(model), chosen)
        assert len([m for m in found.modules() if isinstance(m, Pattention)]) == 6
        return ((found(ids) - before).norm() / before.norm()).item()

    # Not exact, for embeddings are small at the start and the norm's eps shows.
    assert moved(pairs=64) < 0.01
    assert moved(pairs=64, score="gelu_l2") > 0.05
    assert moved(pairs=48) < moved(pairs=16)


def test_a_tied_head_is_untied_and_told() -> None:
    model = Transformer(1, 16, 2, vocabulary=32, context=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made: Any = rewrite(model, Replace("head", "pattention", options={"pairs": 32}))
    assert isinstance(made.head, Pattention)
    assert made.lamina_history[0].decision["untied"] == ["embedding.weight"]
