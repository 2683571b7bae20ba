"""The objective that keeps densities smooth: one forward pass, every head counted, the base as it was."""

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina.errors import LaminaError
from lamina.nn import FourierHead
from lamina.objectives import Classification, Distillation, FourierSmoothness, HyperNetworkDrift, WeightedSum
from lamina.rewrite import Replace, rewrite


def model(bins=9):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), FourierHead(8, bins, 4, init_scale=(1.0, 1.0)))


def batch():
    generator = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(4, 6, generator=generator), "labels": torch.tensor([0, 3, 8, 5])}


EXAMPLES = [Example("objective", "fourier_smoothness", {"gamma": 1e-4}, model=model, batch=batch, bad={"gamma": -1.0})]


class TwoHeads(nn.Module):
    """One head runs twice, another once, and a third not at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.first, self.second, self.idle = (FourierHead(8, m, 4) for m in (9, 130, 9))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.body(x)
        self.second(h)
        return self.first(h) + self.first(2 * h)


def test_the_penalty_is_the_sum_over_heads_and_its_gradient_is_that_of_the_formula():
    gamma, data = 30.0, batch()
    one, other = TwoHeads(), TwoHeads()
    losses = FourierSmoothness("classification", gamma)(one, data)
    assert one.calls == 1
    h = other.body(data["inputs"])
    penalty = (other.first.penalty(h) + other.first.penalty(2 * h)) / 2 + other.second.penalty(h)
    task = Classification()(other, data)
    torch.testing.assert_close(losses["penalty"], penalty.detach())
    torch.testing.assert_close(losses["task"], task["loss"].detach())
    assert losses["count"] == task["count"]
    (task["loss"] + gamma * penalty).backward()
    losses["loss"].backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if "idle" not in name:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_until_a_pass_puts_a_head_there_it_is_the_base_and_says_so():
    torch.manual_seed(0)
    plain, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9)), batch()
    losses = FourierSmoothness(gamma=30.0)(plain, data)
    assert torch.equal(losses["loss"], Classification()(plain, data)["loss"])
    assert (losses["heads"], losses["penalty"]) == (0, 0)
    losses = FourierSmoothness(gamma=30.0)(
        rewrite(plain, Replace("head", "fourier_head", options={"num_frequencies": 3})), data
    )
    assert losses["heads"] == 1
    assert losses["penalty"] > 0


def test_without_a_weight_it_is_the_base():
    made = model()
    losses = FourierSmoothness({"name": "classification", "label_smoothing": 0.1}, 0.0)(made, batch())
    assert torch.equal(losses["loss"], Classification(0.1)(made, batch())["loss"])


def test_in_a_sum_it_shares_the_forward_pass_and_else_says_what_it_needs():
    made, data = TwoHeads(), batch()
    alone = FourierSmoothness("classification", 30.0)(made, data)
    made.calls = 0
    summed = WeightedSum([(1.0, FourierSmoothness("classification", 30.0)), (0.5, Distillation())])(made, data)
    assert made.calls == 1
    torch.testing.assert_close(summed["loss"], alone["loss"])
    assert torch.equal(summed["fourier_smoothness.penalty"], alone["penalty"])
    with pytest.raises(LaminaError, match="call the objective, not its loss"):
        FourierSmoothness()(model(), data) and FourierSmoothness().loss(torch.zeros(4, 9), data)
    assert FourierSmoothness(HyperNetworkDrift()).observing is None, "this base calls the model itself"


def test_a_base_that_follows_hidden_states_is_told_of_rewrites():
    made, data = model(), batch()
    objective = FourierSmoothness(Distillation(hidden={"0": "0"}), 1.0)
    objective.before_rewrite(made)
    with torch.no_grad():
        made[0].weight.mul_(2)
    losses = objective(made, data)
    assert losses["task"] > 0
    torch.testing.assert_close(losses["loss"].detach(), losses["task"] + losses["penalty"])


def test_bad_use_is_refused_in_a_sentence():
    with pytest.raises(LaminaError, match=r"gamma must be at least 0, got -0\.5"):
        FourierSmoothness(gamma=-0.5)

    class Passed(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    with pytest.raises(LaminaError, match=r"none of the Fourier heads ran on this batch: 1\.linear"):
        FourierSmoothness()(Passed(nn.Linear(6, 9), FourierHead(9, 9, 2)), batch())
