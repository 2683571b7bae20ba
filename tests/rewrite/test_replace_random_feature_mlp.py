"""A random-feature MLP in place of the head of models that were not made for it, fitted in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import FOREIGN, HomeMade, home_made, vision
from torch import Tensor, nn

import lamina
from lamina.batches import call, logits
from lamina.errors import LaminaError
from lamina.models import ResNet
from lamina.nn import RandomFeatureMLP, fit_readout
from lamina.rewrite import Replace, history, replay, rewrite
from lamina.rewrite.conversion import targets

EXAMPLES = [
    Example(
        "pass",
        "replace",
        {"old": "head", "new": "random_feature_mlp", "options": {"num_features": 12}},
        bad={"options": {"num_feature": 1}},
    )
]


def replace(**options: Any) -> Replace:
    return Replace("head", "random_feature_mlp", options={"num_features": 200, **options})


def ours() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return ResNet((1, 1), (8, 12), stem="small", classes=3), {"pixel_values": torch.zeros(2, 3, 8, 8)}


def rows(example: dict[str, Tensor], count: int, seed: int) -> dict[str, Tensor]:
    """Inputs like those of the example, whose first entries tell the class."""
    name, value = next(iter(example.items()))
    labels = torch.arange(count) % 3
    x = 0.3 * torch.randn(count, *value.shape[1:], generator=torch.Generator().manual_seed(seed))
    x.flatten(2)[:, :, 0] += 2.0 * (labels[:, None] - 1)
    x += 0.7 * (labels.view(-1, *[1] * (x.dim() - 1)) - 1)
    return {name: x, "labels": labels}


@pytest.mark.parametrize("make", [ours, vision, home_made])
def test_a_model_gets_a_nonlinear_head_that_is_fitted_without_a_learning_rate(make: Any) -> None:
    model, example = make()
    trunk = {n: p.detach().clone() for n, p in model.named_parameters()}
    rewrite(model, replace(weight_scale=2.0))
    batch, test = rows(example, 90, 0), rows(example, 30, 1)
    (head,) = (m for m in model.modules() if isinstance(m, RandomFeatureMLP))
    assert head.num_features == 200
    model.eval()
    assert logits(call(model, test)).abs().max() == 0, "zero until it is fitted"
    fit_readout(model, [{k: v[part : part + 45] for k, v in batch.items()} for part in (0, 45)])
    assert (logits(call(model, test)).argmax(1) == test["labels"]).float().mean() >= 0.8
    assert all(torch.equal(p, trunk[n]) for n, p in model.named_parameters() if n in trunk)


def test_the_decision_is_replayed_and_a_fitted_model_is_saved_and_loaded(tmp_path: Any) -> None:
    model, example = ours()
    rewrite(model, replace(seed=5))
    assert history(model)[0].decision["options"] == {"num_features": 200, "seed": 5}
    batch = rows(example, 60, 0)
    fit_readout(model, [batch])
    skeleton = replay(ours()[0].to("meta"), history(model))
    assert list(skeleton.state_dict()) == list(model.state_dict())
    assert skeleton.head.features.weight.is_meta
    lamina.save(model.eval(), tmp_path / "saved")
    assert torch.equal(call(lamina.load(tmp_path / "saved").eval(), batch), call(model, batch))


def test_the_head_takes_the_dtype_of_the_old_one_and_a_language_model_is_untied() -> None:
    model = HomeMade().double()
    rewrite(model, replace())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.answer.features.weight.dtype == torch.float64
    llama, batch = FOREIGN["llama"]()
    rewrite(llama, replace())
    assert logits(call(llama, batch)).shape == (2, 8, 32)
    fit_readout(llama, [{**batch, "labels": batch["input_ids"].roll(-1, 1)}], 1e-6)
    guessed = logits(call(llama.eval(), batch)).argmax(-1)
    assert (guessed == batch["input_ids"].roll(-1, 1)).float().mean() > 0.5


def test_attention_over_a_set_is_no_successor_of_a_layer_that_gets_one_vector() -> None:
    assert "random_feature_mlp" in targets("head")
    assert "random_feature_attention" not in targets("head") | targets("linear")
    with pytest.raises(LaminaError, match="cannot become 'random_feature_attention'"):
        rewrite(ours()[0], Replace("head", "random_feature_attention"))
    with pytest.raises(LaminaError, match="did you mean 'num_features'"):
        rewrite(ours()[0], Replace("head", "random_feature_mlp", options={"num_feature": 3}))
