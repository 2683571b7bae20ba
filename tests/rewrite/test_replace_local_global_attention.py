"""Local and global attention put in the place of attention, in models that were not written for it, and taken out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import home_made, llama
from tests.rewrite.test_carry_attention import IMAGES, TOKENS, VECTORS, bert, gpt2, perturbed, torch_encoder, vit
from torch import nn

from lamina import io
from lamina.batches import Batch, call, logits
from lamina.models import Transformer, VisionTransformer
from lamina.nn import LocalGlobalAttention
from lamina.rewrite import DropAttention, Replace, history, replay, rewrite

transformers = pytest.importorskip("transformers")

NEW = "local_global_attention"
EXAMPLES = [
    Example(
        "pass", "replace", {"old": "attention", "new": NEW, "options": {"group": 3}}, bad={"options": {"group": 0}}
    ),
]


def decoder() -> nn.Module:
    return Transformer(2, 16, 4, kv_heads=2, vocabulary=32, context=8)


def partly_turning() -> nn.Module:
    return Transformer(2, 32, 4, mixer={"name": "attention", "rotary_fraction": 0.25}, vocabulary=32, context=8)


def partly_turning_phi() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return transformers.PhiForCausalLM(
        transformers.PhiConfig(vocab_size=32, max_position_embeddings=16, pad_token_id=0, bos_token_id=1,
                               eos_token_id=2, rope_parameters=rope, **sizes)
    )  # fmt: skip


def partly_turning_phi_of_transformers_4() -> nn.Module:
    model = partly_turning_phi()
    model.config.rope_parameters, model.config.partial_rotary_factor = None, 0.5
    return model


def vit_of_ours() -> nn.Module:
    return VisionTransformer(8, 2, 2, 16, 2, classes=3)


ROTARY = {"rotary": True}
CASES = [
    (bert, TOKENS, {}),
    (gpt2, TOKENS, {}),
    (vit, IMAGES, {}),
    (torch_encoder, VECTORS, {}),
    (vit_of_ours, IMAGES, {}),
    (decoder, TOKENS, ROTARY),
    (partly_turning, TOKENS, ROTARY),
    (partly_turning_phi, TOKENS, ROTARY),
    (partly_turning_phi_of_transformers_4, TOKENS, ROTARY),
    (lambda: llama()[0], TOKENS, ROTARY),
    (lambda: home_made()[0], home_made()[1], {}),
]


@pytest.mark.parametrize(("make", "batch", "options"), CASES)
def test_with_one_group_nothing_changes_at_the_moment_of_the_swap(make: Any, batch: Batch, options: Any) -> None:
    model = perturbed(make)
    with torch.no_grad():
        expected = logits(call(model, batch))
        short, long = copy.deepcopy(model), model
        short = rewrite(short, Replace("attention", NEW, options={"group": 64, **options})).eval()
        torch.testing.assert_close(logits(call(short, batch)), expected, rtol=1e-4, atol=1e-5)
        long = rewrite(long, Replace("attention", NEW, options={"group": 3, "latents": 2, **options})).eval()
        assert not torch.allclose(logits(call(long, batch)), expected, rtol=1e-4, atol=1e-5)
    logits(call(long, batch)).square().mean().backward()
    mixers = [m for m in long.modules() if isinstance(m, LocalGlobalAttention)]
    assert all(p.grad is not None for m in mixers for p in m.parameters())


def test_a_causal_model_stays_causal() -> None:
    model = rewrite(perturbed(decoder), Replace("attention", NEW, options={"group": 3, "latents": 2, **ROTARY})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        x = torch.arange(8)[None] % 32
        for j in range(8):
            changed = x.where(torch.arange(8) != j, x + 5)
            moved = (model(changed) - model(x)).abs().amax(-1)[0] > 0
            assert moved.tolist() == [i >= j for i in range(8)]
    assert model.generate(x[:, :3], 4).shape == (1, 7)


def test_momentum_follows_and_the_way_back_restores_the_model(tmp_path: Any) -> None:
    model = perturbed(decoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    logits(call(model, TOKENS)).square().mean().backward()
    optimizer.step()
    held = optimizer.state[model.blocks[1].mixer.query.weight]["momentum_buffer"].clone()
    original = copy.deepcopy(model)
    with torch.no_grad():
        expected = logits(call(model.eval(), TOKENS))
    model = rewrite(model, Replace("attention", NEW, options={"group": 4, **ROTARY}), optimizer=optimizer)
    local = model.blocks[1].mixer.mixer.local
    assert torch.equal(optimizer.state[local.query.weight]["momentum_buffer"], held)
    record = history(model)[0]
    again = replay(original, [record])
    with torch.no_grad():
        torch.testing.assert_close(logits(call(again.eval(), TOKENS)), logits(call(model.eval(), TOKENS)))
    io.save(model, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(logits(call(io.load(tmp_path / "saved"), TOKENS)), logits(call(model, TOKENS)))
    model = rewrite(model, Replace("attention", "attention", options=ROTARY), optimizer=optimizer)
    with torch.no_grad():
        torch.testing.assert_close(logits(call(model.eval(), TOKENS)), expected)


def test_a_drop_pass_finds_it() -> None:
    torch.manual_seed(0)
    sizes = {"mixer": {"name": NEW, "group": 3, "latents": 2}, "vocabulary": 32, "context": 8}
    model = rewrite(Transformer(3, 16, 2, **sizes), DropAttention(count=1), data=[TOKENS])
    assert sum(isinstance(m, LocalGlobalAttention) for m in model.modules()) == 2
