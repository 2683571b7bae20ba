"""The slow neural loss: the kernels' distance, to the slow nets alone; the norms; any model with slow kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina.errors import LaminaError
from lamina.models import MetaFormer, Terminator
from lamina.nn import (
    CoordinateKernel,
    GroupInstanceBatchNorm,
    HyperZZWGlobal,
    slow_kernel_distance,
)
from lamina.objectives import Classification, SlowNeuralLoss
from lamina.objectives.slow_kernels import norms_of


def model(**options: Any) -> Terminator:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"bottlenecks": (2, 2), "local_kernels": (1, 3, 3, 1), "groups": 2}
    return Terminator(3, 4, 1, **sizes, **{"dropout": 0.0, "omega0": 1.0, **options})


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 4, 4, generator=generator)
    return {"pixel_values": x, "labels": torch.tensor([0, 2, 1, 2])}


def light() -> nn.Module:
    """Two slow kernels, and statistics over all processes, so that two of them do what one does."""
    torch.manual_seed(0)
    first, second = (HyperZZWGlobal(2, (4, 4), hidden=4, omega0=1.0) for _ in range(2))
    norm = GroupInstanceBatchNorm(2, 2, sync=True)
    return nn.Sequential(nn.Conv2d(1, 2, 1), first, norm, second, nn.Flatten(), nn.Linear(32, 3))


EXAMPLES = [Example("objective", "slow_neural_loss", model=light, batch=batch, bad={"weight": -1.0})]


def test_the_loss_is_the_task_plus_the_distance_plus_the_norms() -> None:
    made = model()
    losses = SlowNeuralLoss({"name": "classification", "label_smoothing": 0.09}, 2.0, 1e-3)(made, batch())
    task = Classification(0.09)(made, batch())
    kernels, factors = zip(*made.slow_kernels(), strict=True)
    slow = slow_kernel_distance(kernels, factors)
    assert slow > 0
    torch.testing.assert_close(losses["loss"], task["loss"] + 2.0 * slow + 1e-3 * norms_of(made))
    torch.testing.assert_close((losses["task"], losses["slow"]), (task["loss"].detach(), slow.detach()))
    assert losses["count"] == task["count"]
    alone = SlowNeuralLoss(norm_penalty=0.0)(made, batch())
    assert "norms" not in alone


def test_norms_are_not_squared_and_slow_nets_count_a_millionth() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fast = nn.Linear(2, 1)
            self.frozen = nn.Linear(2, 1).requires_grad_(False)
            self.plane, self.line = CoordinateKernel(2, 2, 1, hidden=2), CoordinateKernel(1, 2, 1, hidden=2)

    net = Net()
    with torch.no_grad():
        net.fast.weight.copy_(torch.tensor([[3.0, 4.0]]))
        net.fast.bias.fill_(-2.0)
        for p in net.plane.parameters():
            p.zero_()
        net.plane.out.weight.copy_(torch.tensor([[3e6, 4e6]]))
    assert norms_of(net).item() == pytest.approx(5 + 2 + 5)


def test_the_distance_teaches_slow_nets_only() -> None:
    made = model()
    objective = SlowNeuralLoss(weight=1.0, norm_penalty=0.0)
    losses = objective(made, batch())
    (losses["loss"] - Classification()(made, batch())["loss"]).backward()
    for name, p in made.named_parameters():
        reached = p.grad is not None and bool(p.grad.abs().max() > 1e-9)
        assert reached == (".slow." in name), name


def test_it_takes_any_model_with_global_mixers() -> None:
    torch.manual_seed(0)
    mixer = {"name": "hyper_zzw_global", "hidden": 8}
    made = MetaFormer((1, 1), (4, 8), mixers=mixer, image=16, channels=1, classes=3, patch=(3, 2, 1))
    data = {"pixel_values": torch.randn(2, 1, 16, 16), "labels": torch.tensor([0, 1])}
    losses = SlowNeuralLoss()(made, data)
    assert losses["slow"] > 0
    losses["loss"].backward()
    assert all(p.grad is not None for p in made.parameters())


def test_bad_use_is_refused_in_a_sentence() -> None:
    for name in ("weight", "norm_penalty"):
        with pytest.raises(LaminaError, match=rf"{name} must be at least 0, got -1"):
            SlowNeuralLoss(**{name: -1.0})
    with pytest.raises(LaminaError, match="needs a model with slow_kernels"):
        SlowNeuralLoss()(nn.Linear(2, 3), {"inputs": torch.randn(2, 2), "labels": torch.tensor([0, 1])})
    with pytest.raises(LaminaError, match="call the objective, not its loss"):
        SlowNeuralLoss().loss(torch.zeros(2, 3), {})
