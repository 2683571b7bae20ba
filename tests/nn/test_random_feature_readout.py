"""Fitting the random-feature layer of a model in closed form, on what the rest of the model gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.foreign import vision
from torch import Tensor, nn

from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.nn import RandomFeatureAttention, RandomFeatureMLP, fit_readout
from lamina.probe import run_captured


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TokenReader(nn.Module):
    """A foreign vision transformer whose tokens go to random-feature attention: class token as query."""

    def __init__(self, trunk: nn.Module, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = RandomFeatureAttention(16, 40, classes, bias_scale=4.0, normalize=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.trunk(pixel_values).last_hidden_state
        return self.head(tokens[:, 0], tokens[:, 1:])


class Bags(nn.Module):
    """Home-made: a linear map of every item with dropout, then a function of the bag."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Linear(3, 8), nn.Dropout(0.5)
        self.head = RandomFeatureAttention(8, 30, 2)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(query)), keys=self.drop(self.embed(keys)), mask=mask)


def images(count: int) -> dict[str, Tensor]:
    labels = torch.arange(count) % 3
    pictures = 0.3 * normal(count, 3, 8, 8)
    pictures[torch.arange(count), labels] += 1.0
    return {"pixel_values": pictures, "labels": labels}


def test_attention_on_the_tokens_of_a_transformers_model_is_fitted_batch_by_batch() -> None:
    model = TokenReader(vision()[0].vit, 3).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    batch, test = images(60), images(31)
    pieces = [{k: v[start : start + 16] for k, v in batch.items()} for start in range(0, 60, 16)]
    chosen = fit_readout(model, pieces)
    assert chosen > 0
    assert model.training
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["head.value"]
    model.eval()
    assert (model(test["pixel_values"]).argmax(1) == test["labels"]).float().mean() == 1.0
    fitted = model.head.value.clone()
    tokens = run_captured(model, batch, ["trunk"]).tensor("trunk")
    assert model.head.fit(tokens[:, 0], tokens[:, 1:], batch["labels"]) == pytest.approx(chosen, rel=1e-3)
    torch.testing.assert_close(model.head.value, fitted, rtol=1e-3, atol=1e-4)


def test_a_mask_and_keywords_reach_the_features_and_dropout_does_not() -> None:
    torch.manual_seed(0)
    model = Bags()
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 2])[:, None]
    batch = {"query": normal(40, 3), "keys": normal(40, 5, 3, seed=1), "mask": mask.repeat(10, 1)}
    y = normal(40, 2, seed=2)
    fit_readout(model, [batch], 0.01, target=lambda b: y)
    found = model.head.value.clone()
    model.head.fit(model.embed(batch["query"]), model.embed(batch["keys"]), y, 0.01, mask=batch["mask"])
    torch.testing.assert_close(found, model.head.value)


def test_every_position_of_a_sequence_is_a_row_and_ignored_ones_are_not() -> None:
    model = nn.Sequential(nn.Linear(3, 6), RandomFeatureMLP(6, 4, 20))
    x, labels = normal(5, 7, 3), torch.randint(4, (5, 7), generator=torch.Generator().manual_seed(0))
    labels[2:] = -100
    fit_readout(model, [{"inputs": x, "labels": labels}], 0.1)
    found = model[1].value.clone()
    model[1].fit(model[0](x[:2]).flatten(0, 1), labels[:2].flatten(), 0.1)
    torch.testing.assert_close(found, model[1].value)


def test_the_layer_alone_is_a_model_too_and_of_several_one_is_named() -> None:
    alone, x = RandomFeatureMLP(3, 1, 20), normal(30, 3)
    assert fit_readout(alone, [{"inputs": x, "labels": x[:, 0].abs()}], 0.1) == pytest.approx(0.1)
    two = nn.Sequential(RandomFeatureMLP(3, 3, 20), RandomFeatureMLP(3, 1, 20))
    with pytest.raises(AnatomyError, match=r"has 2 random-feature layers, \['0', '1'\]: name one by path"):
        fit_readout(two, [{"inputs": x, "labels": x[:, 0]}])
    fit_readout(two, [{"inputs": x, "labels": x}], path="0")
    assert two[0].value.abs().max() > 0
    assert two[1].value.abs().max() == 0


def test_what_cannot_be_fitted_is_refused() -> None:
    x = normal(6, 3)
    model: Any = nn.Sequential(nn.Linear(3, 4), RandomFeatureMLP(4, 2, 5))
    with pytest.raises(AnatomyError, match="has no random-feature layer: put one in, such as by Replace"):
        fit_readout(nn.Linear(3, 4), [])
    with pytest.raises(AnatomyError, match=r"'0' is a Linear, no random-feature layer; these are: \['1'\]"):
        fit_readout(model, [], path="0")
    with pytest.raises(LaminaError, match=r"needs a tensor 'labels', or pass target=; it has \['inputs'\]"):
        fit_readout(model, [{"inputs": x}])
    with pytest.raises(ShapeError, match=r"targets \(5,\) do not belong to \(6,\) rows"):
        fit_readout(model, [{"inputs": x, "labels": torch.zeros(5, dtype=torch.long)}])
    with pytest.raises(LaminaError, match="at least 2 rows to choose a penalty"):
        fit_readout(model, [])
    assert model.training
    assert model[1].value.abs().max() == 0
