from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.example import Example
from torch.nn import Parameter

from lamina.errors import LaminaError
from lamina.optim.lars import LARS

EXAMPLES = [
    Example("optimizer", "lars", options={"lr": 0.1, "weight_decay": 1e-4}, bad={"momentum": 1.0}),
]
SHAPES = [(4, 3), (7,), (2, 3, 5), (1, 1)]


def make(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def run(optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [p.detach() for p in parameters]


def naive(
    steps: int,
    lr: float,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    c: float = 1e-3,
    nesterov: bool = False,
    trust_clip: bool = False,
    always_adapt: bool = False,
) -> list[np.ndarray[Any, Any]]:
    """The card's formula of 2017 in numpy, one tensor after the other."""
    values, buffers = [p.detach().numpy().copy() for p in make()], [None] * len(SHAPES)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for i, x in enumerate(values):
            g = torch.randn(x.shape, generator=generator, dtype=torch.float64).numpy()
            decay = weight_decay if x.ndim > 1 else 0.0
            ratio = 1.0
            if x.ndim > 1 and (weight_decay != 0 or always_adapt):
                xn, gn = np.linalg.norm(x.ravel()), np.linalg.norm(g.ravel())
                ratio = c * xn / (gn + decay * xn + 1e-8)
                ratio = min(ratio / lr, 1.0) if trust_clip else ratio
            d = ratio * (g + decay * x)
            b: Any = buffers[i]
            if momentum:
                buffers[i] = b = d.copy() if b is None else momentum * b + (1 - dampening) * d
                d = d + momentum * b if nesterov else b
            values[i] = x - lr * d
    return values


@pytest.mark.parametrize("foreach", [False, None])
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum": 0.0},
        {"weight_decay": 0.1, "dampening": 0.5},
        {"weight_decay": 0.1, "nesterov": True, "trust_clip": True},
        {"always_adapt": True, "trust_coefficient": 0.1, "trust_clip": True},
        {},
    ],
)
def test_2017_is_the_cards_formula(options: dict[str, Any], foreach: bool | None) -> None:
    ours = run(LARS(make(), lr=0.5, foreach=foreach, **options), 10)
    named = {"c" if k == "trust_coefficient" else k: v for k, v in options.items()}
    for a, b in zip(ours, naive(10, 0.5, **named), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-12)


def test_hand_case() -> None:
    x = Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    x.grad = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    LARS([x], lr=0.1, weight_decay=0.2, eps=0.0, trust_coefficient=0.3).step()
    ratio = 0.3 * 5 / (2 + 0.2 * 5)
    expected = [[3 - 0.1 * ratio * 0.6, 4 - 0.1 * ratio * 2.8]]
    torch.testing.assert_close(x.data, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("foreach", [False, None])
def test_lamb_paper_steps_are_as_long_as_the_weights(foreach: bool | None) -> None:
    parameters = make()
    optimizer = LARS(parameters, lr=0.05, weight_decay=0.1, variant="lamb-paper", foreach=foreach)
    means = [np.zeros(s) for s in SHAPES]
    for step in range(5):
        before = [p.detach().numpy().copy() for p in parameters]
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        for i, (x, p) in enumerate(zip(before, parameters, strict=True)):
            means[i] = 0.9 * means[i] + 0.1 * (p.grad.numpy() + 0.1 * x)  # type: ignore[union-attr]
            expected = x - 0.05 * np.linalg.norm(x.ravel()) / np.linalg.norm(means[i].ravel()) * means[i]
            np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-10)


def test_without_ratio_it_is_sgd() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}
    torch.testing.assert_close(run(LARS(make(), **options), 8), run(torch.optim.SGD(make(), **options), 8))


def test_a_group_decides_over_the_dimension() -> None:
    groups = [{"params": make()[:2], "adapt": True}, {"params": make()[2:], "adapt": False}]
    optimizer = LARS(groups, lr=0.1, weight_decay=0.1)
    optimizer.record = True
    run(optimizer, 1)
    assert optimizer.trust_ratios().keys() == {0, 1}


def test_the_scale_of_the_loss_does_not_matter() -> None:
    def train(scale: float) -> torch.Tensor:
        x = make()[0]
        optimizer = LARS([x], lr=0.5, always_adapt=True, eps=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            (scale * (x - 1).square().sum()).backward()
            optimizer.step()
        return x.detach()

    torch.testing.assert_close(train(1e4), train(1.0))


@pytest.mark.parametrize("variant", ["2017", "lamb-paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_tensors_stay_finite(variant: Any, dtype: torch.dtype) -> None:
    still, moved, idle = (Parameter(torch.zeros(3, 2, dtype=dtype)) for _ in range(3))
    optimizer = LARS([still, moved, idle], lr=0.5, weight_decay=0.1, eps=0.0, variant=variant)
    still.grad, moved.grad = torch.zeros_like(still), torch.ones_like(moved)
    optimizer.step()
    assert torch.equal(still.data, torch.zeros_like(still))
    step = 0.5 if variant == "2017" else 0.05
    torch.testing.assert_close(moved.data, torch.full_like(moved, -step), rtol=1e-2, atol=0)
    assert optimizer.state[moved]["momentum_buffer"].dtype is torch.float32


@pytest.mark.parametrize("variant", ["2017", "lamb-paper"])
def test_state_dict_continues_bit_for_bit(variant: Any) -> None:
    parameters = make()
    optimizer = LARS(parameters, lr=0.5, weight_decay=0.1, variant=variant)
    run(optimizer, 3)
    again = LARS(copy.deepcopy(parameters), lr=0.1, variant=variant)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(run(optimizer, 3), run(again, 3), strict=True))
    other = LARS(make(), lr=0.1, variant="2017" if variant == "lamb-paper" else "lamb-paper")
    with pytest.raises(LaminaError, match="variant of the state"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"dampening": 1.5}, "dampening"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"eps": -1.0}, "eps"),
        ({"trust_coefficient": -1.0}, "trust_coefficient"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs"),
        ({"variant": "lamb-paper", "nesterov": True}, "neither nesterov"),
        ({"variant": "lamb-paper", "phi": (2.0, 1.0)}, "low <= high"),
        ({"phi": (0.0, 1.0)}, "phi belongs"),
        ({"lr": None}, "lr must be >= 0, got None"),
        ({"variant": "2018"}, "did you mean '2017'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        LARS(make(), **{"lr": 0.1, **options})
