from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.contract.example import Example
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn import ProxSoftmax, prox_softmax
from lamina.nn.proximal_softmax import softmax_jacobian


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXAMPLES = [
    Example("layer", "prox_softmax", {"alpha": 0.3}, inputs=lambda: (2 * scores(3, 5).float(),), bad={"alpha": 0.0})
]


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.125, 0.5, 0.999999])
@pytest.mark.parametrize("states", [2, 7, 63])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_the_conditions_of_the_minimum_hold(alpha: float, states: int, scale: float) -> None:
    x = scale * scores(50, states)
    z = prox_softmax(x, alpha)
    assert torch.isfinite(z).all()
    torch.testing.assert_close(z.sum(-1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-12)
    inside = z > 1e-200
    gradient = alpha * z.clamp(min=1e-200).log() + (1 - alpha) * z - x
    level = (gradient * z).sum(-1, keepdim=True)
    # Where a state has weight, the gradient is the same as everywhere; scaled by that weight it is met to rounding.
    assert ((gradient - level) * z)[inside].abs().max() < 1e-8 * max(scale, 1.0)


def test_step_one_is_the_softmax_and_nearby_steps_are_near() -> None:
    x = 3 * scores(20, 6)
    assert torch.equal(prox_softmax(x, 1.0), x.softmax(-1))
    torch.testing.assert_close(prox_softmax(x, 0.999999), x.softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.4, 0.9])
def test_a_general_minimiser_finds_the_same(alpha: float) -> None:
    minimize = pytest.importorskip("scipy.optimize").minimize
    for x in scores(3, 3).numpy():

        def loss(z: np.ndarray, x: np.ndarray = x) -> float:
            z = np.clip(z, 1e-12, None)
            return float(alpha * (z * np.log(z)).sum() + (1 - alpha) / 2 * (z @ z) - x @ z)

        simplex = {"type": "eq", "fun": lambda z: z.sum() - 1}
        found = minimize(loss, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints=simplex, tol=1e-14)
        np.testing.assert_allclose(prox_softmax(torch.tensor(x), alpha).numpy(), found.x, atol=2e-5)


def test_a_small_step_is_the_projection_on_the_simplex() -> None:
    z = prox_softmax(torch.tensor([0.9, 0.5, -3.0], dtype=torch.float64), 1e-4)
    torch.testing.assert_close(z, torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64), rtol=0, atol=2e-3)


def test_it_is_monotone_and_shift_invariant() -> None:
    x = scores(40, 5)
    higher = x.clone()
    higher[:, 2] += 0.3
    assert (prox_softmax(higher, 0.2)[:, 2] > prox_softmax(x, 0.2)[:, 2]).all()
    torch.testing.assert_close(prox_softmax(x + 100, 0.2), prox_softmax(x, 0.2), rtol=0, atol=1e-10)
    # As the proximal operator of a convex function it never moves two points apart.
    y = scores(40, 5, seed=1)
    apart = (prox_softmax(0.2 * x, 0.2) - prox_softmax(0.2 * y, 0.2)).norm(dim=1)
    assert (apart <= (0.2 * x - 0.2 * y).norm(dim=1) / 0.2).all()


def test_gradients_are_those_of_finite_differences_twice() -> None:
    x = scores(2, 4, 3).requires_grad_()
    for dim in (-1, 1, 0):
        assert torch.autograd.gradcheck(lambda v, d=dim: prox_softmax(v, 0.3, d), x)
    assert torch.autograd.gradgradcheck(lambda v: prox_softmax(v, 0.3, 1), x)


def test_the_start_does_not_matter_and_a_near_one_saves_nothing_of_the_answer() -> None:
    x = 3 * scores(30, 8)
    for start in (torch.full_like(x, 1 / 8), (10 * scores(30, 8, seed=2)).softmax(-1), prox_softmax(x, 0.1), 0 * x):
        torch.testing.assert_close(prox_softmax(x, 0.1, start=start), prox_softmax(x, 0.1), rtol=0, atol=1e-9)


def test_an_excluded_state_gets_nothing() -> None:
    x = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64)
    z = prox_softmax(x, 0.3)
    assert z[0, 1] == 0
    torch.testing.assert_close(z[:, [0, 2]], prox_softmax(x[:, [0, 2]], 0.3))


def test_half_precision_is_computed_in_float32() -> None:
    x = (2 * scores(4, 7)).to(torch.bfloat16)
    z = prox_softmax(x, 0.2)
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z, prox_softmax(x.float(), 0.2).to(torch.bfloat16), rtol=0, atol=0)


def test_the_jacobian_is_that_of_the_softmax() -> None:
    x, v = scores(3, 4), scores(3, 4, seed=1)
    expected = torch.stack([torch.func.jvp(lambda a: a.softmax(-1), (a,), (b,))[1] for a, b in zip(x, v, strict=True)])
    torch.testing.assert_close(softmax_jacobian(x.softmax(-1), v, -1), expected)


def test_bad_input_is_met_with_a_sentence() -> None:
    for alpha in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(LaminaError, match="alpha must be above 0 and at most 1"):
            prox_softmax(scores(2, 3), alpha)
    with pytest.raises(LaminaError, match="NaN"):
        prox_softmax(torch.tensor([0.0, torch.nan]), 0.5)
    with pytest.raises(LaminaError, match=r"floating-point scores, got torch\.int64"):
        prox_softmax(torch.tensor([0, 1]), 0.5)
    with pytest.raises(ShapeError, match=r"start must have the shape of x, \(2, 3\)"):
        prox_softmax(scores(2, 3), 0.5, start=scores(2, 2))
    with pytest.warns(UserWarning, match="stopped after 1 steps"):
        prox_softmax(5 * scores(2, 30), 0.01, max_iter=1)
    assert ProxSoftmax(0.5)(torch.zeros(0, 3)).shape == (0, 3)
