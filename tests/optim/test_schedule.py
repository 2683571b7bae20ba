from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.example import Example

from lamina.errors import LaminaError
from lamina.optim.schedule import (
    constant,
    sqrt_batch_rule,
    stages,
    warmup_cosine,
    warmup_linear,
    warmup_polynomial,
)

TWO = [(0.9, 1.0, 0.3, 1.0), (0.1, 0.5, 0.5, 1.0)]

EXAMPLES = [
    Example("schedule", "constant"),
    Example("schedule", "warmup_cosine", options={"warmup": 0.1}, bad={"warmup": 1.5}),
    Example("schedule", "warmup_linear", options={"warmup": 0.1}, bad={"floor": -0.1}),
    Example("schedule", "warmup_polynomial", options={"warmup": 0.1}, bad={"power": 0.0}),
    Example("schedule", "stages", options={"stages": TWO}, bad={"stages": [(0.5, 1.0, 0.1, 1.0)]}),
]

units = st.floats(0, 1)


def test_hand_values() -> None:
    assert constant(0.3) == 1
    assert warmup_polynomial(0.05, 0.1) == pytest.approx(0.5 * 0.95)
    assert warmup_polynomial(0.64, 0.1, 0.5) == pytest.approx(0.6)
    assert warmup_polynomial(0.0, 0.0) == 1
    assert warmup_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.55, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.55, 0.1, floor=0.2) == pytest.approx(0.6)
    assert warmup_cosine(1.0, 0.1, floor=0.2) == pytest.approx(0.2)
    assert warmup_linear(0.1, 0.1) == 1
    assert warmup_linear(0.325, 0.1, 0.2) == pytest.approx(0.8)


def test_the_second_stage_warms_up_again() -> None:
    assert stages(0.135, TWO) == pytest.approx(0.5 * 0.85)
    assert stages(0.45, TWO) == pytest.approx(0.5)
    assert stages(0.9, TWO) == 0
    assert stages(0.925, TWO) == pytest.approx(0.5 * 0.5 * 0.75)
    assert stages(0.95, TWO) == pytest.approx(0.5 * 0.5)
    assert stages(1.0, TWO) == 0


def test_one_stage_is_the_plain_schedule() -> None:
    for f in torch.linspace(0, 1, 21).tolist():
        assert stages(f, [(1.0, 2.0, 0.1, 0.5)]) == pytest.approx(2 * warmup_polynomial(f, 0.1, 0.5))


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_linear, warmup_polynomial])
@given(fraction=units, warmup=units)
def test_between_zero_and_one_continuous_at_the_peak(
    schedule: Callable[..., float], fraction: float, warmup: float
) -> None:
    assert 0 <= schedule(fraction, warmup=warmup) <= 1
    if 0.01 < warmup < 0.99:
        near = schedule(warmup * (1 - 1e-9), warmup=warmup)
        assert schedule(warmup, warmup=warmup) == pytest.approx(near, abs=1e-6)
        assert schedule(1.0, warmup=warmup) == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 50), st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_stages_take_any_shares(steps: int, parts: list[float]) -> None:
    shares = [(p / math.fsum(parts), 1.0, 0.1, 1.0) for p in parts]
    for i in range(steps + 1):
        assert 0 <= stages(i / steps, shares) <= 1


def test_sqrt_rule_gives_the_papers_table() -> None:
    lr, warmup = sqrt_batch_rule(5e-3, 32768, 512, warmup=1 / 5)
    assert lr == pytest.approx(6.25e-4)
    assert warmup == pytest.approx(1 / 320)
    assert sqrt_batch_rule(0.01, 32, 128) == (pytest.approx(0.02), None)
    assert pytest.approx(sqrt_batch_rule(1.0, 32768, 512, warmup=20 / 90)[1] * 90) == 20 * 512 / 32768  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: constant(1.01), "fraction must be within 0..1, got 1.01"),
        (lambda: warmup_cosine(0.5, -0.1), "warmup must be within"),
        (lambda: warmup_cosine(0.5, 0.1, 2.0), "floor"),
        (lambda: warmup_linear(float("nan")), "fraction"),
        (lambda: warmup_polynomial(0.5, 0.1, 0.0), "power must be > 0, got 0"),
        (lambda: stages(0.5, []), "sum to 1"),
        (lambda: stages(0.5, [(0.5, 1, 0.1, 1), (0.4, 1, 0.1, 1)]), "sum to 1, got 0.9"),
        (lambda: stages(0.5, [(1.5, 1, 0.1, 1), (-0.5, 1, 0.1, 1)]), "each share"),
        (lambda: sqrt_batch_rule(0.1, 0, 5), "positive"),
        (lambda: sqrt_batch_rule(0.1, 512, 32768, warmup=0.1), "more than all of it"),
    ],
)
def test_values_out_of_range_are_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        call()


def test_drives_a_torch_scheduler() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warmup_linear((i + 1) / 10, 0.2))
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 10:
            scheduler.step()
    assert rates == pytest.approx([1, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0])
