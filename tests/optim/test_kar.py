from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.example import Example
from torch.nn import Parameter

from lamina.errors import LaminaError
from lamina.lineage import Lineage
from lamina.optim import Kar2, Kar3, carry

EXAMPLES = [
    Example("optimizer", "kar2", bad={"beta": 1.0}),
    Example("optimizer", "kar3", bad={"betas": (0.5, 1.0)}),
]
SHAPES = [(4, 3), (7,), (1,), (63,), ()]


def gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def test_three_steps_of_kar3_by_hand() -> None:
    x = Parameter(torch.tensor([1.0]))
    optimizer = Kar3([x], lr=0.1)
    # sign(0) is 0: the first step moves by lr alone. Then m1 = 1, m2 = 0.1; then 0.5 * 1 - 0.5 * 4 = -1.5, ...
    for gradient, moved in ((2.0, -0.1), (-4.0, -0.1), (0.0, +0.2)):
        before = x.item()
        x.grad = torch.tensor([gradient])
        optimizer.step()
        assert x.item() - before == pytest.approx(moved, abs=1e-6)
    state = optimizer.state[x]
    assert state["mean_1"].item() == pytest.approx(0.5 * (0.5 * 1.0 - 2.0))
    assert state["mean_2"].item() == pytest.approx(0.95 * (0.95 * 0.1 - 0.2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decays", [(0.95,), (0.5, 0.95)])
def test_every_step_is_the_formula(decays: tuple[float, ...], dtype: torch.dtype) -> None:
    values = [p.double().numpy().copy() for p in gradients(99, dtype)]
    parameters = [Parameter(p) for p in gradients(99, dtype)]
    make: Any = {1: lambda p: Kar2(p, 0.01, *decays), 2: lambda p: Kar3(p, 0.01, decays)}[len(decays)]
    optimizer = make(parameters)
    means = [[np.zeros(s) for s in SHAPES] for _ in decays]
    for step in range(6):
        for i, (p, g) in enumerate(zip(parameters, gradients(step, dtype), strict=True)):
            p.grad = g
            exact = g.double().numpy()
            values[i] = values[i] - 0.01 * (np.sign(exact) + sum(np.sign(m[i]) for m in means))
            for m, decay in zip(means, decays, strict=True):
                m[i] = decay * m[i] + (1 - decay) * exact
        optimizer.step()
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
    for p, x in zip(parameters, values, strict=True):
        np.testing.assert_allclose(p.detach().double().numpy(), x, atol=tolerance)
    narrow = torch.float32 if dtype is torch.bfloat16 else dtype
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {narrow}


def test_a_parameter_without_gradient_stays_and_so_do_its_means() -> None:
    x, y = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = Kar3([x, y], lr=0.1)
    x.grad, y.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    kept = optimizer.state[y]["mean_1"].clone()
    y.grad = None
    before = y.detach().clone()
    optimizer.step()
    assert torch.equal(y.detach(), before)
    assert torch.equal(optimizer.state[y]["mean_1"], kept)
    # A gradient of zero after a momentum still moves.
    x.grad.zero_()
    at = x.detach().clone()
    optimizer.step()
    torch.testing.assert_close(x.detach(), at - 0.2)


def test_the_rate_may_be_a_tensor_and_differ_by_group() -> None:
    x, y = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    optimizer = Kar2([{"params": [x], "lr": torch.tensor(0.5)}, {"params": [y]}], lr=0.25)
    x.grad, y.grad = torch.ones(2), -torch.ones(2)
    optimizer.step()
    assert x.tolist() == [-0.5, -0.5]
    assert y.tolist() == [0.25, 0.25]


def test_the_means_follow_a_rewrite_row_by_row() -> None:
    layer = torch.nn.Linear(2, 3, bias=False)
    optimizer = Kar3(layer.parameters())
    layer.weight.grad = torch.arange(6.0).view(3, 2)
    optimizer.step()
    mean, old, lineage = optimizer.state[layer.weight]["mean_2"].clone(), layer.weight, Lineage()
    layer.weight = Parameter(old.detach()[[2, 0]])
    lineage.derive(layer.weight, old, torch.tensor([2, 0]))
    carry(optimizer, layer, lineage)
    assert torch.equal(optimizer.state[layer.weight]["mean_2"], mean[[2, 0]])


def test_what_it_cannot_take_is_refused() -> None:
    x = Parameter(torch.zeros(2))
    for options in ({"lr": -1.0}, {"betas": (0.5, 1.0)}, {"betas": (0.5,)}, {"betas": 0.5}):
        with pytest.raises(LaminaError, match=r"Kar3: (lr must be >= 0|betas must be two numbers)"):
            Kar3([x], **options)
    with pytest.raises(LaminaError, match=r"Kar2: beta must be a number in \[0, 1\), got 1"):
        Kar2([x], beta=1)
    with pytest.raises(LaminaError, match="complex"):
        Kar3([Parameter(torch.zeros(2, dtype=torch.complex64))])
    x.grad = torch.zeros(2).to_sparse()
    with pytest.raises(LaminaError, match="Kar3 does not take sparse gradients"):
        Kar3([x]).step()
