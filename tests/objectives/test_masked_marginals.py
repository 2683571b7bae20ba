from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives import MaskedMarginals
from lamina.objectives.masked_marginals import balance


class Guess(nn.Module):
    """Any model with such outputs will do."""

    def __init__(self) -> None:
        super().__init__()
        self.pixel, self.label = nn.Linear(6, 18), nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x = inputs.float()
        mask = {"pixel": (torch.arange(6, device=x.device) % 3 == 0).expand(inputs.shape)}
        return {"pixel": self.pixel(x).unflatten(1, (6, 3)), "label": self.label(x)[:, None], "mask": mask}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Guess()


def batch(rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randint(3, (rows, 6), generator=generator),
        "targets": torch.randint(4, (rows,), generator=generator),
    }


# Balanced by class, the weights are those of the rows at hand: not what a whole batch would give each process.
EXAMPLES = [
    Example("objective", "masked_marginals", {"class_balance": None}, model=model, batch=batch, bad={"focal": -1.0})
]


def test_plain_it_is_the_cross_entropy_of_what_was_hidden() -> None:
    net, data = model(), batch(7)
    found = MaskedMarginals({"pixel": 0.3, "label": 0.7}, focal=0.0, class_balance=None)(net, data)
    out = net(data["inputs"])
    hidden = ~out["mask"]["pixel"][0]
    pixel = F.cross_entropy(out["pixel"][:, hidden].reshape(-1, 3), data["inputs"][:, hidden].reshape(-1))
    label = F.cross_entropy(out["label"][:, 0], data["targets"])
    torch.testing.assert_close(found["loss"], 0.3 * pixel + 0.7 * label)
    torch.testing.assert_close(
        found["label_accuracy"], (out["label"][:, 0].argmax(1) == data["targets"]).float().mean()
    )
    assert found["count"] == 7


def test_focal_weights_are_one_less_the_probability() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    out = {"pixel": logits, "mask": {"pixel": torch.zeros(1, 2, dtype=torch.bool)}}
    found = MaskedMarginals({"pixel": 1.0}, 2.0, None).loss(out, {"inputs": torch.tensor([[0, 0]])})
    p = logits.softmax(-1)[0, :, 0]
    torch.testing.assert_close(found["loss"], (-((1 - p) ** 2) * p.log()).mean())
    found["loss"].backward()
    assert torch.isfinite(logits.grad).all()


def test_rare_states_weigh_more_with_mean_one() -> None:
    states = torch.tensor([[0, 0, 0, 1], [0, 0, 2, 2]])
    hidden = torch.ones_like(states, dtype=torch.bool)
    hidden[1, 3] = False
    weights = balance(states, hidden, 4, 0.9)
    raw = {0: 0.1 / (1 - 0.9**5), 1: 1.0, 2: 1.0}
    mean = (5 * raw[0] + 2) / 7
    torch.testing.assert_close(weights[0], torch.tensor([raw[0], raw[0], raw[0], raw[1]]) / mean)
    assert float(weights[hidden].mean()) == pytest.approx(1.0)
    # A beta of 0 makes no difference between states.
    torch.testing.assert_close(balance(states, hidden, 4, 0.0), torch.ones(2, 4))


def test_only_masked_groups_are_weighted() -> None:
    net, data = model(), batch()
    plain, weighted = (MaskedMarginals({"label": 1.0}, f, c)(net, data)["loss"] for f, c in ((0.0, None), (2.0, 0.99)))
    assert torch.equal(plain, weighted)


def test_splitting_a_batch_gives_the_same_gradient() -> None:
    net, data = model(), batch(6)
    objective = MaskedMarginals(class_balance=None)
    objective(net, data)["loss"].backward()
    whole = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        found = objective(net, {k: v[part] for k, v in data.items()})
        (found["loss"] * found["count"] / 6).backward()
    for p, expected in zip(net.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_where_nothing_was_hidden_the_group_adds_nothing() -> None:
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    out = {"pixel": logits, "mask": {"pixel": torch.ones(2, 3, dtype=torch.bool)}}
    found = MaskedMarginals({"pixel": 1.0}).loss(out, {"inputs": torch.zeros(2, 3, dtype=torch.long)})
    found["loss"].backward()
    assert found["loss"] == 0
    assert not logits.grad.any()


def test_targets_by_name_and_from_labels() -> None:
    net, data = model(), batch()
    expected = MaskedMarginals()(net, data)["loss"]
    named = {"inputs": {"pixel": data["inputs"]}, "targets": {"label": data["targets"]}}
    assert torch.equal(MaskedMarginals().loss(net(data["inputs"]), named)["loss"], expected)
    renamed = {"inputs": data["inputs"], "labels": data["targets"]}
    assert torch.equal(MaskedMarginals()(net, renamed)["loss"], expected)
    out = {**net(data["inputs"]), "states": {"pixel": data["inputs"]}}
    assert torch.equal(MaskedMarginals().loss(out, {"labels": data["targets"]})["loss"], expected)


def test_bad_input_is_met_with_a_sentence() -> None:
    with pytest.raises(LaminaError, match="at least one group"):
        MaskedMarginals({})
    with pytest.raises(LaminaError, match=r"class_balance in 0\.\.1"):
        MaskedMarginals(class_balance=1.0)
    net, data = model(), batch()
    with pytest.raises(LaminaError, match="logits of 'pixels' among the outputs; did you mean 'pixel'"):
        MaskedMarginals({"pixels": 1.0})(net, data)
    with pytest.raises(LaminaError, match="states of 'label' as 'targets' or 'labels' in the batch"):
        MaskedMarginals()(net, {"inputs": data["inputs"]})
    with pytest.raises(ShapeError, match=r"targets of 'label' must be whole numbers \(5, 1\)"):
        MaskedMarginals()(net, {**data, "targets": data["targets"][:3]})
    with pytest.raises(ShapeError, match=r"\(batch, variables, states\), got \(5, 4\)"):
        MaskedMarginals({"label": 1.0}).loss({"label": torch.zeros(5, 4)}, data)
