"""A mean field as the head of models that were written without one."""

from __future__ import annotations

import pytest
import torch
from tests.contract import foreign
from torch import nn

from lamina import io
from lamina.batches import call, logits
from lamina.models import Transformer, VisionTransformer
from lamina.nn import EquilibriumHead
from lamina.rewrite import Replace, history, rewrite

OPTIONS = {"variables": 3, "states": 3, "rank": 6}
PASS = ("head", "equilibrium_head")


def ours() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Transformer(2, 16, 2, vocabulary=32, context=8, classes=3)
    return model, {"input_ids": foreign.tokens()}


@pytest.mark.parametrize("make", [foreign.home_made, foreign.vision, foreign.llama, ours])
def test_a_head_is_replaced_without_a_change_of_outputs_and_trains(make) -> None:
    model, batch = make()
    model.eval()
    with torch.no_grad():
        before = logits(call(model, batch)).clone()
    model = rewrite(model, Replace(*PASS, options=OPTIONS))
    assert [type(m) for m in model.modules()].count(EquilibriumHead) == 1
    found = logits(call(model, batch))
    torch.testing.assert_close(found, before, rtol=0, atol=1e-5)
    # A target of its own: the sum of a softmax's logits tells the coupling nothing.
    nn.functional.cross_entropy(found.flatten(0, -2), torch.zeros(found[..., 0].numel(), dtype=torch.long)).backward()
    head = next(m for m in model.modules() if isinstance(m, EquilibriumHead))
    assert head.equilibrium.coupling.weight.grad.abs().max() > 0
    assert head.weight.grad.abs().max() > 0


def test_momentum_follows_the_weights_of_the_head() -> None:
    model, batch = foreign.home_made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    logits(call(model, batch)).square().sum().backward()
    optimizer.step()
    held = optimizer.state[model.answer.weight]["exp_avg"].clone()
    rewrite(model, Replace(*PASS, options=OPTIONS), optimizer=optimizer)
    assert torch.equal(optimizer.state[model.answer.weight]["exp_avg"], held)
    logits(call(model, batch)).square().sum().backward()
    optimizer.step()


def test_the_decision_is_replayed_from_disk(tmp_path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(image=8, patch=2, depth=2, width=16, heads=2, classes=3, channels=1).eval()
    model = rewrite(model, Replace(*PASS, options=OPTIONS))
    with torch.no_grad():
        model.head.equilibrium.coupling.weight.normal_()
    io.save(model, tmp_path / "model")
    loaded = io.load(tmp_path / "model")
    assert history(loaded) == history(model)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
