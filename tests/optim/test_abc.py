from __future__ import annotations

import itertools

import pytest
import torch

from lamina.errors import LaminaError
from lamina.optim import ABC


def named(hidden: int) -> dict[str, ABC]:
    found = {"standard": ABC.standard(hidden), "stable standard": ABC.standard(hidden, c=1.0)}
    found |= {"ntk": ABC.ntk(hidden), "mup": ABC.mup(hidden)}
    return found | ({"mean field": ABC.mean_field()} if hidden == 1 else {})


@pytest.mark.parametrize("theta", [0.0, -1.0, -0.5, 0.5])
@pytest.mark.parametrize("hidden", [1, 2, 3, 4])
def test_the_papers_classification_at_every_depth_and_under_the_symmetry(hidden: int, theta: float) -> None:
    for name, one in named(hidden).items():
        found = one.shift(theta).classify()
        assert found["stable"] == (name != "standard")
        expected = {"ntk": "kernel", "stable standard": "kernel", "standard": "none"}.get(name, "feature learning")
        assert found["regime"] == expected, name
        assert not found["trivial"]
    assert ABC.mup(hidden).shift(theta).classify()["r"] == pytest.approx(0.0)
    assert ABC.ntk(hidden).shift(theta).classify()["r"] == pytest.approx(0.5)
    if hidden > 1:
        assert ABC.standard(hidden, c=1.0).shift(theta).classify()["r"] == pytest.approx(0.5)


def test_no_parametrization_is_stable_and_learns_nothing_or_both() -> None:
    counts = {"feature learning": 0, "kernel": 0, "none": 0}
    halves = [-0.5, 0.0, 0.5, 1.0]
    for a1, last, b_last, c in itertools.product(halves, halves, halves, [-1.0, -0.5, 0.0, 0.5, 1.0]):
        found = ABC((a1, 0.0, last), (-a1, 0.5, b_last), c).classify()
        counts[found["regime"]] += 1
        assert (found["regime"] != "none") == (found["stable"] and not found["trivial"])
        # Of the stable, those whose hidden layers move are those with r = 0, by the dichotomy (corollary 3.10).
        if found["regime"] != "none":
            assert (found["regime"] == "feature learning") == (abs(found["r"]) < 1e-9)
    assert min(counts.values()) > 0


def test_hidden_layers_that_blow_up_are_not_stable_though_the_output_is() -> None:
    # n^-1.5 on the read-out hides that the first layer moves by n: r = -1.
    found = ABC((0.0, 1.5), (0.0, 0.5), -2.0).classify()
    assert found["r"] == -1.0
    assert not found["stable"]


def trajectory(abc: ABC, width: int, steps: int) -> list[torch.Tensor]:
    """Outputs of a literal perceptron, W = n^-a w, w ~ N(0, n^-2b), under SGD with lr n^-c."""
    generator = torch.Generator().manual_seed(0)
    sizes = [5, *[width] * abc.hidden, 2]
    weights = [
        (torch.randn(o, i, generator=generator, dtype=torch.float64) * width**-b).requires_grad_()
        for i, o, b in zip(sizes, sizes[1:], abc.b, strict=False)
    ]
    x, y = (torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (5, 2))
    outputs = []
    for _ in range(steps):
        h = x
        for layer, (weight, a) in enumerate(zip(weights, abc.a, strict=True)):
            h = h @ (weight * width**-a).T
            h = torch.tanh(h) if layer < abc.hidden else h
        outputs.append(h.detach())
        gradients = torch.autograd.grad((h - y).square().mean(), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.1 * width**-abc.c * gradient
    return outputs


@pytest.mark.parametrize("abc", [ABC.mup(2), ABC.ntk(3), ABC.mean_field()])
def test_shifted_parametrizations_are_the_very_same_training(abc: ABC) -> None:
    expected = trajectory(abc, 63, 20)
    assert (expected[-1] - expected[0]).abs().max() > 0.05
    for theta in (-1.0, 0.5):
        for a, b in zip(trajectory(abc.shift(theta), 63, 20), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_exponents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LaminaError, match="an exponent a layer, two at least"):
        ABC((0.0, 0.0), (0.0,), 0.0)
    with pytest.raises(LaminaError, match="at least one hidden layer, got 0"):
        ABC.mup(0)
