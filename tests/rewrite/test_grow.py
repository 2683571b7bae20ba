from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina import io
from lamina.errors import AnatomyError, LaminaError
from lamina.models import TokenFormer, Transformer
from lamina.nn import Pattention
from lamina.optim import LAMB, parameter_groups
from lamina.recipe import build
from lamina.rewrite import GrowParameterTokens, GrowParameterTokensRandom, Replace, history, replay, rewrite


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(32, shape, generator=torch.Generator().manual_seed(seed))


def small(**options: Any) -> TokenFormer:
    sizes = {"depth": 2, "width": 16, "heads": 2, "vocabulary": 32, "context": 12, "attention_pairs": 5, "mlp_pairs": 9}
    return TokenFormer(**(sizes | options))


def batch() -> dict[str, Tensor]:
    return {"input_ids": tokens(2, 8)}


NOTHING_TO_GROW = "there is nothing to add to before linear layers are replaced; that is tried in its own test"
EXAMPLES = [
    Example(
        "pass",
        "grow_parameter_tokens",
        {"pairs": 1.5},
        model=lambda: small(depth=1),
        batch=batch,
        bad={"pairs": 3},
        only_ours=NOTHING_TO_GROW,
    ),
    Example(
        "pass",
        "grow_parameter_tokens_random",
        {"pairs": 12},
        model=lambda: small(depth=1),
        batch=batch,
        bad={"value_std": 0.0},
        only_ours=NOTHING_TO_GROW,
    ),
]


def make(seed: int = 0, **options: Any) -> TokenFormer:
    torch.manual_seed(seed)
    return small(**options).eval()


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    return F.cross_entropy(model(tokens(2, 12, seed=seed)).flatten(0, 1), tokens(2, 12, seed=seed + 50).flatten())


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def home_made() -> nn.Module:
    """A layer that stands at two places, one that shares its keys with another, and one behind a compiled module."""
    torch.manual_seed(0)
    shared, tied = Pattention(6, 6, 4), Pattention(6, 6, 4)
    model = nn.Sequential(shared, nn.LayerNorm(6), shared, tied, Pattention(6, 6, 4, bias=True))
    model[4].key = tied.key
    return model


@pytest.mark.parametrize("score", ["l2_gelu", "gelu_l2"])
def test_growing_twice_changes_nothing_and_trains_on(score: Any) -> None:
    model = make(score=score)
    trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    before = {"logits": model(tokens(2, 12)), "loss": loss(model)}
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens(2, 12))
    scales = [m.scale.clone() for m in model.modules() if isinstance(m, Pattention)]
    for factor in (2.0, 1.5):
        model = rewrite(model, GrowParameterTokens(factor, seed=1))
        torch.testing.assert_close(model(tokens(2, 12)), before["logits"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loss(model), before["loss"], rtol=1e-6, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(tokens(2, 12)) - low).abs().max() < 1e-2
    layers = [m for m in model.modules() if isinstance(m, Pattention)]
    assert [m.pairs for m in layers] == [15, 15, 15, 15, 27] * 2
    assert all(torch.equal(m.scale, s) for m, s in zip(layers, scales, strict=True))
    old = loss(model).item()
    trained(model, torch.optim.AdamW(model.parameters(), lr=1e-3), steps=1)
    assert loss(model).item() < old
    assert all(m.key[-1].any() for m in layers)


def test_new_pairs_learn_from_the_first_step_on_only_where_their_values_are_not_zero() -> None:
    for zeros in (False, True):
        model = rewrite(make(), GrowParameterTokens(2.0))
        layer: Any = model.blocks[0].mixer.query
        if zeros:
            with torch.no_grad():
                layer.value[5:] = 0.0
        loss(model).backward()
        assert layer.key.grad[5:].any() != zeros
        assert not layer.value.grad[5:].any()
        assert layer.value.grad[:5].any()


@pytest.mark.parametrize(
    ("options", "score"), [({}, "l2_gelu"), ({"key_std": 0.0}, "l2_gelu"), ({"key_std": 0.0}, "softmax"),
                           ({"key_std": 0.0, "rescale": False}, "softmax")],
)  # fmt: skip
def test_the_official_way_and_a_softmax_change_the_function(options: Any, score: Any) -> None:
    model = make(score=score)
    before = model(tokens(2, 12))
    grown = rewrite(model, GrowParameterTokensRandom(2.0, **options))
    assert (grown(tokens(2, 12)) - before).abs().max() > 1e-4
    layer: Any = grown.blocks[0].feed_forward
    assert layer.key[9:].any() == (options.get("key_std") != 0.0)
    fresh = Pattention(16, 16, 18, score=score)
    assert torch.equal(layer.scale, fresh.scale) == options.get("rescale", True)


def test_without_rescaling_and_with_keys_of_zero_the_official_way_is_exact() -> None:
    model = make()
    before = model(tokens(2, 12))
    grown = rewrite(model, GrowParameterTokensRandom(2.0, key_std=0.0, rescale=False))
    torch.testing.assert_close(grown(tokens(2, 12)), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "lamb", "sgd"])
def test_the_optimizer_keeps_what_it_knows_of_old_pairs(kind: str) -> None:
    model = make()
    optimizer: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(model.named_parameters(), lr=1e-2),
        "lamb": lambda: LAMB(parameter_groups(model, 0.01), lr=1e-2),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    }[kind]()
    trained(model, optimizer)
    layer: Any = model.blocks[1].mixer.value
    old = {n: copy.deepcopy(optimizer.state[getattr(layer, n)]) for n in ("key", "value")}
    model = rewrite(model, GrowParameterTokens(8, match="*.mixer.*"), optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for name, state in old.items():
        new = optimizer.state[getattr(layer, name)]
        assert new.keys() == state.keys()
        for entry, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                assert torch.equal(new[entry][:5], value)
                assert new[entry].shape == (8, 16)
                assert not new[entry][5:].any()
            else:
                assert new[entry] == value
    trained(model, optimizer, steps=2, first=3)
    assert loss(model).isfinite()


def test_counts_factors_patterns_and_the_decision() -> None:
    model = make()
    one = GrowParameterTokens({"blocks.0.*": 10, "*.feed_forward": 1.1})
    decision = one.decide(model)
    assert decision.layers["blocks.0.mixer.key"].after == 10
    # The first pattern that fits; 9 * 1.1 = 9.9, rounded up.
    assert decision.layers["blocks.0.feed_forward"].after == 10
    assert decision.layers["blocks.1.feed_forward"].after == 10
    assert "blocks.1.mixer.key" not in decision.layers
    grown = rewrite(model, one)
    assert "blocks.0.mixer.key: 5 -> 10 pairs" in decision.table()
    # 50 * 1.1 is 55, and 55.00000000000001 in floating point.
    fifty = rewrite(make(), GrowParameterTokens(50))
    assert GrowParameterTokens(1.1).decide(fifty).layers["blocks.0.mixer.key"].after == 55
    # A recipe tells a factor from a count by the decimal point.
    kinds = [type(build({"name": "grow_parameter_tokens", "pairs": p}, "pass").pairs) for p in (3.0, 30, {"*": 3.0})]
    assert kinds == [float, int, dict]
    stored = json.loads(json.dumps(history(grown)[0].decision))
    assert stored["layers"]["blocks.1.feed_forward"] == {"before": 9, "after": 10}
    assert stored["value_std"] is None
    again = replay(make(), history(grown))
    for name, parameter in grown.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


def test_new_values_are_drawn_by_seed_and_path_with_the_deviation_of_the_old() -> None:
    def values(**options: Any) -> list[Tensor]:
        model = make(width=64)
        state = torch.get_rng_state()
        model = rewrite(model, GrowParameterTokens(400, **options))
        assert torch.equal(torch.get_rng_state(), state)
        return [m.value[9:] for m in model.modules() if isinstance(m, Pattention)]

    one, same, other, wide = values(), values(), values(seed=1), values(value_std=3.0)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(wide[0], wide[1])
    first: Any = next(m for m in make(width=64).modules() if isinstance(m, Pattention))
    assert one[0].std().item() == pytest.approx(first.value.std(correction=0).item(), rel=0.05)
    assert wide[0].std().item() == pytest.approx(3.0, rel=0.05)


def test_a_home_made_model_with_shared_layers_and_keys() -> None:
    model, x = home_made(), torch.randn(3, 6)
    before = model(x)
    decision = GrowParameterTokens(2.0).decide(model)
    assert list(decision.layers) == ["0", "3", "4"]
    grown = rewrite(model, GrowParameterTokens(2.0))
    torch.testing.assert_close(grown(x), before)
    assert grown[0] is grown[2]
    assert grown[3].key is grown[4].key
    assert not grown[3].requires_grad_(False).key.requires_grad
    frozen = rewrite(grown, GrowParameterTokens(3.0, match="[34]"))
    assert [p.requires_grad for p in (frozen[3].key, frozen[3].value, frozen[4].value)] == [False, False, True]
    with pytest.raises(
        AnatomyError, match=r"3.key is shared with a Pattention layer that grows, and does not grow alik"
    ):
        rewrite(home_made(), GrowParameterTokens(2.0, match="4"))


def test_a_transformers_model_grows_after_its_layers_were_replaced() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model = rewrite(model, Replace("linear", "pattention", match="*.mlp.*", options={"pairs": 6}))
    before = model(tokens(2, 8)).logits
    model = rewrite(model, GrowParameterTokens(2.0))
    torch.testing.assert_close(model(tokens(2, 8)).logits, before)
    assert [m.pairs for m in model.modules() if isinstance(m, Pattention)] == [12, 12]


@pytest.mark.slow  # Contract tests compile a grown model.
def test_a_compiled_model_grows_and_is_traced_again() -> None:
    torch.compiler.reset()
    model = make(depth=1)
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled(tokens(2, 12)).detach()
    rewrite(compiled, GrowParameterTokens(2.0))
    torch.testing.assert_close(compiled(tokens(2, 12)), before)
    compiled(tokens(2, 12)).sum().backward()
    layer: Any = model.blocks[0].mixer.query
    assert layer.key.grad.shape == (10, 16)


def test_the_scale_is_saved_and_a_state_of_another_size_is_refused_by_name(tmp_path: Any) -> None:
    model = rewrite(make(), GrowParameterTokens(2.0), GrowParameterTokens(2.0, match="blocks.1.*"))
    io.save(model, tmp_path / "saved")
    loaded: Any = io.load(tmp_path / "saved")
    assert float(loaded.blocks[1].feed_forward.scale) == 3.0
    assert loaded.blocks[1].feed_forward.pairs == 36
    assert torch.equal(loaded(tokens(2, 12)), model(tokens(2, 12)))
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks\.0\.mixer\.query\.key"):
        make().load_state_dict(model.state_dict())


def test_a_model_of_fifty_million_parameters_has_its_plan_without_memory() -> None:
    with torch.device("meta"):
        model = TokenFormer(8, 512, 8, vocabulary=256, context=64)
    grown = rewrite(model, GrowParameterTokens(2.0))
    assert all(p.is_meta for p in grown.parameters())
    assert sum(p.numel() for p in grown.blocks.parameters()) == 8 * 2 * 512 * 2 * (4 * 512 + 2048)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pairs": 0}, r"pairs is a new count or a factor, at least 1, got 0"),
        ({"pairs": 0.5}, r"at least 1, got 0.5"),
        ({"pairs": True}, r"at least 1, got True"),
        ({"pairs": {}}, r"pairs names no layer: give a pattern"),
        ({"pairs": 3}, r"blocks.0.mixer.query has 5 pairs and cannot shrink to 3 \(for a factor write 3.0\)"),
        ({"pairs": 1.0}, r"has that many pairs already"),
        ({"pairs": 2.0, "match": "block.*"}, r"no Pattention layer stands at a path like 'block.\*'.*they are at 'bl"),
        ({"pairs": {"*.mlp": 2.0}}, r"no Pattention layer stands at a path like '\*.mlp'"),
        ({"pairs": 2.0, "value_std": -1.0}, r"value_std must not be negative, got -1.0"),
        ({"pairs": 2.0, "value_std": 0.0}, r"would never get a gradient"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        rewrite(make(), GrowParameterTokens(**options))


def test_models_that_cannot_grow_exactly_are_refused() -> None:
    one = GrowParameterTokens(2.0)
    with pytest.raises(AnatomyError, match=r"Transformer has no Pattention layer to add pairs to; replace its linear"):
        rewrite(Transformer(1, 16, 2, vocabulary=32, context=8), one)
    with pytest.raises(AnatomyError, match=r'blocks.0.mixer.query scores by "softmax", where a key of zeros'):
        rewrite(make(score="softmax"), one)
    edited: Any = make()
    edited.blocks[0].mixer.out.scale = torch.tensor([1.0, 2.0])
    with pytest.raises(AnatomyError, match=r"blocks.0.mixer.out: the scale must be one positive number"):
        rewrite(edited, one)
    dead: Any = make()
    nn.init.zeros_(dead.blocks[0].mixer.out.value)
    with pytest.raises(AnatomyError, match=r"blocks.0.mixer.out has no value but zeros"):
        rewrite(dead, one)
    smaller, larger = make(), make()
    decision = one.decide(smaller)
    rewrite(larger, one)
    with pytest.raises(LaminaError, match=r"adds to 5 pairs at 'blocks.0.mixer.query', and there are 10"):
        from lamina.lineage import Lineage

        one.apply(larger, decision, Lineage())
