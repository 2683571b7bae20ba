"""Prototypes put into models that were not written for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.contract.foreign import home_made
from torch import Tensor, nn

import lamina
from lamina.batches import Batch, call, logits
from lamina.errors import AnatomyError, RecipeError
from lamina.models import ResNet, explain_prototypes, nearest_training
from lamina.nn import PrototypeHead
from lamina.objectives import PrototypePenalties
from lamina.rewrite import Replace, history, replay, rewrite

OPTIONS = {"num_prototypes": 7}


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.rand(12, 1, 8, 8, generator=generator), "labels": torch.arange(12) % 3}


def ours() -> tuple[nn.Module, Batch]:
    return ResNet((1, 1), (8, 12), stem="small", channels=1, classes=3), images()


def of_transformers() -> tuple[nn.Module, Batch]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), images()


def of_a_user() -> tuple[nn.Module, Batch]:
    generator = torch.Generator().manual_seed(0)
    return home_made()[0], {"inputs": torch.randn(12, 7, 5, generator=generator), "labels": torch.arange(12) % 3}


@pytest.mark.parametrize("make", [ours, of_transformers, of_a_user])
def test_a_model_gets_prototypes_starts_at_its_latents_learns_and_explains_itself(make: Any) -> None:
    torch.manual_seed(0)
    model, batch = make()
    trunk = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = logits(call(model, batch))
    assert rewrite(model, Replace("head", "prototype_head", options=OPTIONS)) is model
    (head,) = (m for m in model.modules() if isinstance(m, PrototypeHead))
    assert len(head.layer.prototypes) == 7
    assert logits(call(model, batch)).shape == before.shape
    kept = [n for n, p in model.named_parameters() if n in trunk and torch.equal(p, trunk[n])]
    assert len(kept) >= len(trunk) - 2
    model.eval()
    near = nearest_training(model, [batch])
    told = explain_prototypes(model, batch, 7, nearest=near)
    torch.testing.assert_close(told.contributions.sum(1), logits(call(model, batch)), rtol=1e-4, atol=1e-4)
    assert told.pictures_from == "nearest training input"
    objective, optimizer = PrototypePenalties(), torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        found = objective(model, batch)
        found["loss"].backward()
        optimizer.step()
        losses.append(found["loss"].detach())
    assert losses[-1] < losses[0]


def test_the_decision_has_all_there_is_to_it_and_is_replayed() -> None:
    torch.manual_seed(0)
    model, batch = ours()
    bare = copy.deepcopy(model)
    model = rewrite(model, Replace("head", "prototype_head", options={**OPTIONS, "seed": 3}))
    decision = history(model)[0].decision
    assert decision["paths"] == ["head"]
    assert decision["options"] == {"num_prototypes": 7, "seed": 3}
    again = replay(bare, history(model))
    assert torch.equal(call(again.eval(), batch), call(model.eval(), batch))
    with torch.device("meta"):
        empty = ours()[0]
    assert replay(empty, history(model)).head.layer.prototypes.is_meta


def test_a_replaced_model_is_saved_and_loaded(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, batch = ours()
    model = rewrite(model, Replace("head", "prototype_head", options=OPTIONS)).eval()
    with torch.no_grad():
        model.head.layer.prototypes.mul_(2.0)
    lamina.save(model, tmp_path / "saved")
    assert torch.equal(call(lamina.load(tmp_path / "saved").eval(), batch), call(model, batch))


def test_what_cannot_be_replaced_is_refused() -> None:
    with pytest.raises(RecipeError, match="prototype_head has no option 'prototypes'; did you mean 'num_prototypes'"):
        rewrite(ours()[0], Replace("head", "prototype_head", options={"prototypes": 3}))
    with pytest.raises(AnatomyError):
        rewrite(nn.Sequential(nn.ReLU()), Replace("head", "prototype_head"))
