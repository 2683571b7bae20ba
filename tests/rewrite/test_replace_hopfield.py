"""Hopfield association put in the place of attention, in models that were not written for it, and taken out again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import home_made, llama
from tests.rewrite.test_carry_attention import (
    IMAGES,
    TOKENS,
    VECTORS,
    bert,
    distilbert,
    gpt2,
    opt,
    perturbed,
    torch_encoder,
    vit,
)
from torch import nn

import lamina
from lamina import io
from lamina.anatomy import attention_projections, dissect, get
from lamina.batches import Batch, call, logits
from lamina.errors import AnatomyError, RecipeError
from lamina.models import Transformer, VisionTransformer
from lamina.nn import Hopfield
from lamina.rewrite import DropAttention, Replace, history, replay, rewrite

transformers = pytest.importorskip("transformers")

EXAMPLES = [
    Example("pass", "replace", {"old": "attention", "new": "hopfield", "options": {"update_steps_max": 1}}),
]


def granite() -> nn.Module:
    """A decoder whose scale of the scores is its own, with grouped heads and rotary positions."""
    config = transformers.GraniteConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_multiplier=0.8, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return transformers.GraniteForCausalLM(config)


def rotary_of_ours() -> nn.Module:
    return Transformer(2, 16, 4, kv_heads=2, vocabulary=32, context=8)


def vit_of_ours() -> nn.Module:
    return VisionTransformer(8, 2, 2, 16, 2, classes=3)


def sunday() -> nn.Module:
    return home_made()[0]


ROTARY = {"rotary": True}
CASES = [
    (bert, TOKENS, {}),
    (gpt2, TOKENS, {}),
    (opt, TOKENS, {}),
    (distilbert, TOKENS, {}),
    (vit, IMAGES, {}),
    (torch_encoder, VECTORS, {}),
    (vit_of_ours, IMAGES, {}),
    (rotary_of_ours, TOKENS, ROTARY),
    (lambda: llama()[0], TOKENS, ROTARY),
    (granite, TOKENS, ROTARY),
    (sunday, home_made()[1], {}),
]


@pytest.mark.parametrize(("make", "batch", "options"), CASES)
def test_outputs_are_equal_at_the_moment_of_the_swap(make: Any, batch: Batch, options: dict[str, Any]) -> None:
    model = perturbed(make)
    with torch.no_grad():
        expected = logits(call(model, batch))
        model = rewrite(model, Replace("attention", "hopfield", options=options)).eval()
        assert any(isinstance(m, Hopfield) for m in model.modules())
        torch.testing.assert_close(logits(call(model, batch)), expected, rtol=1e-4, atol=1e-5)
        # And it is the update that makes another network of it.
        for module in model.modules():
            if isinstance(module, Hopfield):
                module.update_steps_max = 2
        assert not torch.allclose(logits(call(model, batch)), expected, rtol=1e-4, atol=1e-5)


def test_padding_is_left_out_as_it_was() -> None:
    model = perturbed(bert)
    batch = {**TOKENS, "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])}
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        found = rewrite(model, Replace("attention", "hopfield")).eval()(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "batch"), [(bert, TOKENS), (torch_encoder, VECTORS), (rotary_of_ours, TOKENS)])
def test_momentum_follows_and_the_way_back_restores_the_model(make: Any, batch: Batch) -> None:
    model = perturbed(make)
    options = ROTARY if make is rotary_of_ours else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    logits(call(model, batch)).square().mean().backward()
    optimizer.step()
    place = dissect(model).trunk().blocks[1].find("attention").path
    before = {
        name: (p.matrix(), optimizer.state[p.weight]["momentum_buffer"][list(p.rows)].clone())
        for name, p in attention_projections(get(model, place), heads=4).named().items()
    }
    with torch.no_grad():
        expected = logits(call(model.eval(), batch))
    model = rewrite(model, Replace("attention", "hopfield", options=options), optimizer=optimizer)
    model = rewrite(model, Replace("attention", "attention", options=options), optimizer=optimizer)
    assert not any(isinstance(m, Hopfield) for m in model.modules())
    for name, p in attention_projections(get(model, place)).named().items():
        assert torch.equal(p.matrix(), before[name][0]), name
        assert torch.equal(optimizer.state[p.weight]["momentum_buffer"], before[name][1]), name
    with torch.no_grad():
        torch.testing.assert_close(logits(call(model.eval(), batch)), expected, rtol=1e-4, atol=1e-5)


def test_a_home_made_model_gets_it_by_pattern_and_with_options_of_its_own() -> None:
    model, batch = home_made()
    rows = [p for p, _ in model.named_modules() if p.endswith("attend")]
    one = Replace(
        "attention", "hopfield", match="*.[12].*", options={"update_steps_max": 2, "heads": 4, "norm_state": True}
    )
    model = rewrite(model, one)
    changed = {p.removesuffix(".mixer"): m for p, m in model.named_modules() if isinstance(m, Hopfield)}
    assert sorted(changed) == rows[1:3]
    assert all(m.heads == 4 and m.update_steps_max == 2 for m in changed.values())
    assert all(
        isinstance(m.norm_state, nn.LayerNorm) and isinstance(m.norm_stored, nn.Identity) for m in changed.values()
    )
    assert logits(call(model, batch)).shape == (2, 3)


def test_the_decision_is_data_and_is_replayed_saved_and_loaded(tmp_path: Any) -> None:
    model = perturbed(bert)
    original = copy.deepcopy(model)
    model = rewrite(model, Replace("attention", "hopfield", options={"update_steps_max": 2})).eval()
    decision = history(model)[0].decision
    assert decision["new"] == "hopfield"
    assert decision["options"] == {"update_steps_max": 2}
    assert len(decision["paths"]) == 2
    again = replay(copy.deepcopy(original), history(model)).eval()
    with torch.no_grad():
        expected = logits(call(model, TOKENS))
        assert torch.equal(logits(call(again, TOKENS)), expected)
        io.save(model, tmp_path / "saved")
        assert torch.equal(logits(call(lamina.load(tmp_path / "saved"), TOKENS)), expected)
    skeleton = replay(original.to("meta"), history(model))
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_decoder_of_it_generates_with_its_cache_and_is_dropped_like_attention() -> None:
    torch.manual_seed(0)
    mixer = {"name": "hopfield", "update_steps_max": 2}
    model = Transformer(3, 16, 4, kv_heads=2, vocabulary=32, context=12, mixer=mixer).eval()
    assert model.caches
    assert all(isinstance(b.mixer, Hopfield) and b.mixer.kv_heads == 2 and b.mixer.rotary for b in model.blocks)
    tokens = TOKENS["input_ids"][:, :5]
    made = model.generate(tokens, 6, temperature=0)
    whole = tokens
    for _ in range(6):
        whole = torch.cat((whole, model(whole)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(made, whole)
    smaller = rewrite(model, DropAttention(count=1), data=[{"input_ids": tokens}])
    assert sum(isinstance(m, Hopfield) for m in smaller.modules()) == 2
    assert smaller.generate(tokens, 6, temperature=0).shape == made.shape


@pytest.mark.parametrize(
    ("make", "one", "error", "words"),
    [
        (bert, Replace("attention", "hopfield", options={"beta": -1.0}), RecipeError, "beta must be above 0"),
        (
            bert,
            Replace("attention", "hopfield", options={"update_steps": 1}),
            RecipeError,
            "did you mean 'update_steps",
        ),
        (bert, Replace("attention", "hopfield", options={"heads": 3}), RecipeError, "does not divide by 3 heads"),
        (bert, Replace("attention", "hopfield", match="nowhere"), AnatomyError, "no attention .* at a path like"),
    ],
)
def test_refusals_change_nothing(make: Any, one: Replace, error: type[Exception], words: str) -> None:
    model = make()
    before = [id(m) for m in model.modules()]
    with pytest.raises(error, match=words):
        rewrite(model, one)
    assert [id(m) for m in model.modules()] == before
