from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example

from lamina import registry
from lamina.optim.groups import parameter_groups
from lamina.optim.torch_parts import ALIASES

BAD = {"adafactor": {"eps": (-1.0, 1e-3)}}
EXAMPLES = [Example("optimizer", name, options={"lr": 1e-2}, bad=BAD.get(name, {"lr": -1.0})) for name in ALIASES]


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_alias_builds_the_torch_optimizer_and_takes_our_groups(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
    optimizer = registry.find("optimizer", name)(parameter_groups(model, 0.01), lr=1e-2)
    assert type(optimizer) is ALIASES[name]
    x = torch.randn(8, 3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[1]["adapt"] is False
