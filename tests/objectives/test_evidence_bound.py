from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lamina.errors import LaminaError, ShapeError
from lamina.models import LatentODE
from lamina.objectives import EvidenceBound


class Guess(nn.Module):
    """Any model with such outputs will do; nothing is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead, self.again, self.start = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.start(inputs).chunk(2, -1)
        found = {"logits": self.ahead(inputs), "reconstruction": self.again(inputs)}
        return {**found, "mean": mean, "log_variance": log_variance}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Guess()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(6, 4, generator=generator), "labels": torch.randn(6, 3, generator=generator)}


EXAMPLES = [
    Example("objective", "evidence_bound", {"growth": 0.0, "delay": 0}, model=model, batch=batch, bad={"noise": 0.0})
]


def test_it_is_the_negative_log_likelihood_and_the_divergence_of_two_normals() -> None:
    net, data = model(), batch()
    found = EvidenceBound(noise=0.5, weight=2.0, growth=0.0, delay=0, reconstruct=0.3)(net, data)
    out = net(data["inputs"])
    posterior = Normal(out["mean"], (0.5 * out["log_variance"]).exp())
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    ahead = -Normal(out["logits"], 0.5).log_prob(data["labels"]).mean()
    constant = -Normal(torch.tensor(0.0), 0.5).log_prob(torch.tensor(0.0))
    again = 0.3 * (out["reconstruction"] - data["inputs"]).square().mean() / (2 * 0.25)
    torch.testing.assert_close(found["loss"], ahead - constant + again + 2.0 * divergence / 3)
    torch.testing.assert_close(found["divergence"], divergence.detach())
    assert found["count"] == 18
    assert found["measure"] == found["error"]


def test_the_divergence_s_weight_grows_after_a_delay_and_only_in_training() -> None:
    net, data, objective = model(), batch(), EvidenceBound(growth=0.9, delay=2, reconstruct=0.0)
    weights = []
    for _ in range(4):
        found = objective(net, data)
        weights.append(float((found["loss"].detach() - found["error"] / 2) * 3 / found["divergence"]))
    assert weights == pytest.approx([0.0, 0.0, 0.1, 0.19], abs=1e-5)
    with torch.no_grad():
        objective(net, data)
    assert int(objective.calls) == 4


def test_what_was_not_observed_does_not_count_in_a_reconstruction() -> None:
    torch.manual_seed(0)
    net = LatentODE(2, width=3, latent=4, hidden=5).eval()
    x = torch.randn(3, 5, 2)
    mask = torch.rand(3, 5, 2) > 0.5
    data = {"inputs": torch.where(mask, x, torch.nan), "mask": mask}
    found = EvidenceBound()(net, data)
    expected = (net(x, mask)["reconstruction"] - x).square()[mask].mean()
    torch.testing.assert_close(found["error"], expected.detach())
    assert found["count"] == mask.sum()
    found["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"growth": 1.0}, {"delay": -1}, {"reconstruct": -0.1}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LaminaError, match="noise must be above 0"):
        EvidenceBound(**options)


def test_other_outputs_and_shapes_are_refused() -> None:
    with pytest.raises(LaminaError, match="mean, log_variance"):
        EvidenceBound()(nn.Linear(4, 3), batch())
    with pytest.raises(ShapeError, match="targets"):
        EvidenceBound()(model(), {**batch(), "labels": torch.zeros(6, 2)})
