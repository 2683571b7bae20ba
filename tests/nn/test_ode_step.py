from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import RK45
from scipy.integrate._ivp.rk import rk_step as scipy_step
from torch import Tensor

from lamina.nn import TimeMLP, initial_step, local_error, local_stiffness, rk_step
from lamina.nn.ode.step import inside
from lamina.nn.ode.tableau import DOPRI5, TABLEAUS, TSIT5, Tableau

METHODS = sorted(TABLEAUS)


def field(width: int = 5, dtype: torch.dtype = torch.float64) -> TimeMLP:
    torch.manual_seed(0)
    return TimeMLP(width, 7).to(dtype)


def state(rows: int = 3, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def full(tableau: Tableau) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A (7, 7), b, the error's weights, c."""
    a = np.zeros((7, 7))
    for i, row in enumerate(tableau.stages):
        a[i + 1, : len(row)] = row
    return a, a[6], np.array(tableau.error), np.array([0.0, *tableau.nodes])


@pytest.mark.parametrize("method", METHODS)
def test_the_coefficients_meet_the_order_conditions(method: str) -> None:
    a, b, error, c = full(TABLEAUS[method])
    np.testing.assert_allclose(a.sum(1), c, atol=1e-14)
    lower = b - error
    for weights, order in ((b, 5), (lower, 4)):
        for q in range(1, order + 1):
            assert weights @ c ** (q - 1) == pytest.approx(1 / q, abs=1e-12)
        assert weights @ a @ c == pytest.approx(1 / 6, abs=1e-12)
        assert weights @ (c * (a @ c)) == pytest.approx(1 / 8, abs=1e-12)
        assert weights @ a @ c**2 == pytest.approx(1 / 12, abs=1e-12)
        assert weights @ a @ a @ c == pytest.approx(1 / 24, abs=1e-12)
    for tree, value in (
        (c**2 * (a @ c), 1 / 10),
        ((a @ c) ** 2, 1 / 20),
        (c * (a @ c**2), 1 / 15),
        (a @ c**3, 1 / 20),
        (c * (a @ a @ c), 1 / 30),
        (a @ (c * (a @ c)), 1 / 40),
        (a @ a @ c**2, 1 / 60),
        (a @ a @ a @ c, 1 / 120),
    ):
        assert b @ tree == pytest.approx(value, abs=1e-12)
    assert lower @ c**4 != pytest.approx(1 / 5, abs=1e-6), "the embedded solution is of lower order"
    for q in range(4):
        assert np.array(TABLEAUS[method].middle) @ c**q == pytest.approx(0.5 ** (q + 1) / (q + 1), abs=1e-12)
    assert TSIT5.error[-1] == -1 / 66


def test_the_error_is_that_of_torchdiffeq_and_of_scipy() -> None:
    from torchdiffeq._impl.dopri5 import Dopri5Solver
    from torchdiffeq._impl.misc import Perturb, _rms_norm, _select_initial_step
    from torchdiffeq._impl.rk_common import _runge_kutta_step

    func, u = field(), state()
    t, end = torch.tensor(0.2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    k1 = func(t, u)
    theirs = _select_initial_step(func, t, u, 4, 1e-1, 1e-1, _rms_norm, f0=k1)
    h = initial_step(func, u, t, k1, end, 1e-1, 1e-1)
    torch.testing.assert_close(h, theirs, rtol=1e-12, atol=0.0)

    def call(t: Tensor, y: Tensor, perturb: object = Perturb.NONE) -> Tensor:
        return func(t, y)

    y1, _, error, _ = _runge_kutta_step(call, u, k1, t, h, t + h, Dopri5Solver.tableau)
    step = rk_step(func, u, t, h, k1, DOPRI5)
    torch.testing.assert_close(step.end, y1, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(step.error, error, rtol=1e-10, atol=1e-16)
    scale = 1e-1 + 1e-1 * torch.maximum(u.abs(), y1.abs())
    found = local_error(func, u, t, end, 1e-1, 1e-1, "dopri5")
    torch.testing.assert_close(found, h * _rms_norm(error / scale), rtol=1e-10, atol=0.0)

    def flat(t: float, y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return func(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y).view(3, 5)).flatten().numpy()

    start, stages = u.flatten().numpy(), np.zeros((7, 15))
    ours = k1.detach().flatten().numpy()
    end_y, _ = scipy_step(flat, 0.2, start, ours, float(h), RK45.A, RK45.B, RK45.C, stages)
    np.testing.assert_allclose(step.end.detach().flatten().numpy(), end_y, rtol=1e-12)
    # SciPy has Dormand and Prince's own weights of the error; Shampine's, as in torchdiffeq, are 2/3 of them.
    theirs = float(h) * stages.T @ RK45.E
    np.testing.assert_allclose(step.error.detach().flatten().numpy(), -2 / 3 * theirs, rtol=0, atol=1e-16)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_field_has_no_error_and_a_linear_one_that_of_the_two_polynomials(method: str) -> None:
    u, still = state(), torch.ones(3, 5, dtype=torch.float64)
    assert float(local_error(lambda t, z: still, u, 0.0, 1.0, method=method)) < 1e-10
    assert float(local_error(lambda t, z: 0.0 * z, u, 0.0, 1.0, method=method)) == 0.0
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    h = torch.tensor(0.3, dtype=torch.float64)
    step = rk_step(lambda t, z: z @ matrix.T, u, torch.zeros(()), h, u @ matrix.T, TABLEAUS[method])
    a, b, error, _ = full(TABLEAUS[method])
    for weights, found in ((error, step.error), (b, step.end - u)):
        expected, power, tree = torch.zeros_like(u), u, np.ones(7)
        for _ in range(7):
            power = power @ (h * matrix).T
            expected += float(weights @ tree) * power
            tree = a @ tree
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_halving_the_step_divides_the_error_by_32(method: str) -> None:
    func, u, t = field(), state(), torch.tensor(0.1, dtype=torch.float64)
    with torch.no_grad():
        sizes = [0.2 / 2**i for i in range(4)]
        errors = [rk_step(func, u, t, u.new_tensor(h), func(t, u), TABLEAUS[method]).error.norm() for h in sizes]
    slope = np.polyfit(np.log(sizes), np.log([float(e) for e in errors]), 1)[0]
    assert slope == pytest.approx(5.0, abs=0.2)


@pytest.mark.parametrize("estimate", [local_error, local_stiffness])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_gradient_is_that_of_one_step_with_its_start_held_fixed(estimate, direction: float) -> None:
    func, x = field(), state().requires_grad_()
    with torch.no_grad():
        # Far from linear, and a step so long, that the error is more than what a changed k_2 alone would make.
        func.up.weight.mul_(3.0)
    end, size = 0.4 + direction, 0.9 * direction
    estimate(func, x, 0.4, end, 1e-2, 1e-2, h=size).backward()
    assert x.grad is None
    found = torch.cat([p.grad.flatten() for p in func.parameters()])
    u, t = x.detach(), torch.tensor(0.4, dtype=torch.float64)
    with torch.no_grad():
        k1 = func(t, u)
        h = torch.tensor(size).double()
    assert float(initial_step(func, u, t, k1, torch.tensor(end).double(), 1e-5, 1e-5)) * direction > 0

    def value() -> float:
        with torch.no_grad():
            step = rk_step(func, u, t, h, k1, TSIT5)
            if estimate is local_error:
                scale = 1e-2 + 1e-2 * torch.maximum(u.abs(), step.end.abs())
                return float(h.abs() * (step.error / scale).square().mean().sqrt())
            # The card's formula, with norms in place of root mean squares: their ratio is the same.
            above, below = step.stages[6] - step.stages[5], step.end - step.sixth
            return float(above.norm() / (below.norm() + torch.finfo(torch.float64).eps * below.numel() ** 0.5) / 3.5068)

    given = estimate(func, x, 0.4, end, 1e-2, 1e-2, h=size)
    assert value() == pytest.approx(float(given.detach()), rel=1e-12)
    numeric = []
    for p in func.parameters():
        for i in range(0, p.numel(), 5):
            flat, eps = p.data.view(-1), 1e-6
            flat[i] += eps
            up = value()
            flat[i] -= 2 * eps
            numeric.append((up - value()) / (2 * eps))
            flat[i] += eps
    picked = torch.cat([p.grad.flatten()[::5] for p in func.parameters()])
    torch.testing.assert_close(picked, torch.tensor(numeric).double(), rtol=1e-5, atol=1e-6 * float(found.abs().max()))


def test_the_stiffness_is_the_largest_eigenvalue_over_the_stability_and_0_where_nothing_moves() -> None:
    u = state()
    found = local_stiffness(lambda t, z: -50.0 * z, u, 0.0, 1.0, 1e-8, 1e-8)
    assert float(found) == pytest.approx(50 / 3.5068, rel=1e-4)
    assert float(local_stiffness(lambda t, z: 0.0 * z, u, 0.0, 1.0)) == 0.0


def test_the_interpolant_meets_both_ends_the_middle_and_both_slopes() -> None:
    func, u, t, h = field(), state(), torch.tensor(0.1).double(), torch.tensor(0.4).double()
    with torch.no_grad():
        for tableau in TABLEAUS.values():
            step = rk_step(func, u, t, h, func(t, u), tableau)
            ends = [inside(step, u, h, x, tableau) for x in (0.0, 1.0)]
            torch.testing.assert_close(ends, [u, step.end])
            for x, slope in ((0.0, step.stages[0]), (1.0, step.stages[-1])):
                near = [inside(step, u, h, x + d, tableau) for d in (-1e-6, 1e-6)]
                torch.testing.assert_close((near[1] - near[0]) / 2e-6, h * slope, rtol=1e-5, atol=1e-8)
