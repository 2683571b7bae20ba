from __future__ import annotations

import gc
import math
import sys

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, MissingExtra, ShapeError
from lamina.nn import NeuralSDE, TimeMLP, local_sde_error, recording
from lamina.nn.ode import sde
from lamina.nn.ode.sde_step import draw, euler_heun_step, sri2w1_step

STEPS = "an adaptive solve has as many steps as its numbers ask for: compile drift and diffusion"
NODES = {"drift": {"name": "time_mlp", "width": 5, "hidden": 6}, "diffusion": {"name": "time_mlp", "width": 5}}

EXAMPLES = [
    Example(
        "layer",
        "neural_sde",
        {**NODES, "rtol": 0.3, "atol": 0.3},
        lambda: (torch.randn(4, 5),),
        bad={"method": "milstein"},
        no_compile=STEPS,
    )
]


class Equation(nn.Module):
    """What torchsde takes, and what we do."""

    noise_type = "diagonal"

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sde_type, self.a, self.b = kind, TimeMLP(4, 6).double(), TimeMLP(4, 6).double()

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.a(t.double(), y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b(t.double(), y)


def state(rows: int = 3, width: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def block(method: str = "sri2w1", tolerance: float = 0.05, **options) -> NeuralSDE:
    torch.manual_seed(0)
    return NeuralSDE(TimeMLP(4, 6), TimeMLP(4, 6), method=method, rtol=tolerance, atol=tolerance, **options)


@pytest.mark.parametrize("method", ["sri2w1", "euler_heun"])
def test_a_step_is_that_of_torchsde_on_the_same_path(method: str) -> None:
    import torchsde

    kind, name = ("ito", "srk") if method == "sri2w1" else ("stratonovich", "euler_heun")
    equation, u, h = Equation(kind), state(), torch.tensor(0.1, dtype=torch.float64)
    path = torchsde.BrownianInterval(
        0.2, 0.3, (3, 4), dtype=torch.float64, entropy=5, levy_area_approximation="space-time"
    )
    times = torch.tensor([0.2, 0.3], dtype=torch.float64)
    theirs = torchsde.sdeint(equation, u, times, bm=path, method=name, dt=0.1)[-1]
    dw, over = path(0.2, 0.3, return_U=True)
    # torchsde hands out the integral of W over the step; dZ is what in it does not follow from dW.
    dz = math.sqrt(3.0) * (2 * over / h - dw)
    t = torch.tensor(0.2, dtype=torch.float64)
    if method == "sri2w1":
        end, of_drift, of_noise = sri2w1_step(equation.f, equation.g, u, t, h, dw, dz)
    else:
        end, of_drift, of_noise = euler_heun_step(equation.f, equation.g, u, t, h, dw)
    torch.testing.assert_close(end, theirs, rtol=1e-6, atol=1e-7)
    found = local_sde_error(equation.f, equation.g, u, 0.2, 1.0, 0.01, 0.02, method, h, noise=(dw, dz), delta=0.5)
    scaled = (0.5 * of_drift + of_noise) / (0.02 + 0.01 * torch.maximum(u.abs(), end.abs()))
    torch.testing.assert_close(found, h * scaled.square().mean().sqrt())


def test_on_geometric_brownian_motion_the_strong_order_is_three_halves() -> None:
    drift, diffusion = (lambda t, z: 0.5 * z), (lambda t, z: 0.8 * z)
    generator = torch.Generator().manual_seed(0)
    fine, paths = 64, 400
    tiny = 1.0 / fine
    dw = torch.randn(fine, paths, dtype=torch.float64, generator=generator) * math.sqrt(tiny)
    over = tiny * (dw + torch.randn(fine, paths, dtype=torch.float64, generator=generator) * math.sqrt(tiny / 3)) / 2
    exact = torch.exp((0.5 - 0.32) + 0.8 * dw.sum(0))
    errors, counts = [], (4, 8, 16)
    for count in counts:
        u, h, per = torch.ones(paths, dtype=torch.float64), torch.tensor(1.0 / count).double(), fine // count
        for i in range(count):
            part, inner = dw[i * per : (i + 1) * per], over[i * per : (i + 1) * per]
            before = torch.cat([torch.zeros(1, paths, dtype=torch.float64), part.cumsum(0)[:-1]])
            whole = part.sum(0)
            integral = (inner + tiny * before).sum(0)
            dz = math.sqrt(3.0) * (2 * integral / h - whole)
            u, _, _ = sri2w1_step(drift, diffusion, u, h * i, h, whole, dz)
        errors.append(float((u - exact).abs().mean()))
    slope = (math.log(errors[0]) - math.log(errors[-1])) / math.log(counts[-1] / counts[0])
    assert slope == pytest.approx(1.5, abs=0.3)


def test_the_parts_of_the_error_are_as_written() -> None:
    u, h, t = state(1, 2), torch.tensor(0.25).double(), torch.zeros(()).double()
    dw, dz = torch.tensor([[0.3, -0.2]]).double(), torch.tensor([[0.1, 0.4]]).double()
    one = torch.ones_like(u)
    _, of_drift, of_noise = sri2w1_step(lambda t, z: 2 * one, lambda t, z: 3 * one, u, t, h, dw, dz)
    torch.testing.assert_close(of_drift, 4 * h * 2 * one)
    torch.testing.assert_close(of_noise, 0 * one)  # b3 and b4 sum to 0
    end, of_drift, of_noise = euler_heun_step(lambda t, z: -z, lambda t, z: 0.5 * z, u, t, h, dw)
    torch.testing.assert_close(end, u - h * u + (0.5 * u + 0.5 * (u + 0.5 * u * dw)) * dw / 2)
    torch.testing.assert_close(of_drift, h * (-(u - h * u) + u) / 2)
    torch.testing.assert_close(of_noise, (0.5 * (u + 0.5 * u * h.sqrt()) - 0.5 * u) / h.sqrt() * dw**2 / 2)


@pytest.mark.parametrize("method", ["sri2w1", "euler_heun"])
def test_the_gradient_of_the_local_error_stops_at_the_state(method: str) -> None:
    equation, x = Equation("ito"), state().requires_grad_()
    found = [
        local_sde_error(equation.f, equation.g, x, 0.1, 0.9, method=method, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    found[0].backward()
    assert x.grad is None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in equation.parameters())
    drawn = draw(torch.zeros(20_000), torch.tensor(0.25), torch.Generator().manual_seed(0))
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("method", ["sri2w1", "euler_heun"])
def test_evaluations_and_steps_are_counted_and_none_is_made_twice(method: str) -> None:
    layer = block(method).eval()
    counts = [0, 0]
    layer.drift.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    layer.diffusion.register_forward_hook(lambda *_: counts.__setitem__(1, counts[1] + 1))
    z0 = state(dtype=torch.float32)
    out = layer(z0)
    solution = layer.solution
    assert [solution.nfe, solution.diffusion_nfe] == counts
    trials = solution.steps + solution.rejected
    assert solution.steps > 1
    # Three steps a trial; the whole one and the first half begin alike, and so do a step and the next trial's.
    assert solution.nfe <= 2 + (1 + 3 * (3 if method == "sri2w1" else 0) + 2) * trials + 2
    assert solution.times == sorted(solution.times)
    assert (solution.times[0], solution.times[-1]) == (0.0, 1.0)
    assert len(solution.times) == solution.steps + 1
    for fraction in (0.0, 0.4, 1.0):
        with recording(layer, fraction, keep_steps=True) as seen:
            assert torch.equal(layer(z0), out)
        assert layer.solution.nfe == solution.nfe
        assert len(seen.solves) == 1
        states, times = [*layer.solution.states, out], layer.solution.times
        assert len(states) == len(times)
        i = max(k for k, t in enumerate(times[:-1]) if t <= fraction)
        share = (fraction - times[i]) / (times[i + 1] - times[i])
        torch.testing.assert_close(layer.solution.state_at_save, torch.lerp(states[i], states[i + 1], share))
    with pytest.raises(LaminaError, match="only in a NeuralODE"), recording(layer, None, keep_errors=True):
        pass


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_a_solve_holds_on_to_no_more_states_the_more_steps_it_takes(fraction: float | None) -> None:
    layer, z0 = block(tolerance=5e-4).eval(), torch.zeros(13, 4)
    calls, held = [0], []

    def look(*_: object) -> None:
        calls[0] += 1
        if calls[0] % 300 == 0:
            held.append(sum(type(o) is Tensor and o.shape == z0.shape for o in gc.get_objects()))

    layer.drift.register_forward_hook(look)
    with torch.no_grad(), recording(layer, fraction):
        layer(z0)
    # Beside the states there are those of the path's that torchsde keeps, some hundred.
    assert layer.solution.steps > 80
    assert held[-1] - held[0] < 20
    assert (layer.solution.state_at_save is None) == (fraction is None)


def test_an_assertion_of_the_user_s_own_is_left_alone() -> None:
    class Picky(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            assert bool(t < 0.2), "mine"
            return 1.0 * z

    for method, adjoint in (("sri2w1", "discrete"), ("euler_heun", "backsolve")):
        for drift, diffusion in ((Picky(), nn.Linear(2, 2)), (nn.Linear(2, 2), Picky())):
            layer = NeuralSDE(drift, diffusion, method=method, adjoint=adjoint)  # type: ignore[arg-type]
            with pytest.raises(AssertionError, match="mine"):
                layer(torch.ones(3, 2, requires_grad=True))


@pytest.mark.parametrize(("method", "drifts", "diffusions"), [("sri2w1", 6, 4), ("euler_heun", 4, 3)])
def test_the_local_error_takes_no_evaluation_too_many(method: str, drifts: int, diffusions: int) -> None:
    layer = block(method)
    counts = [0, 0]
    layer.drift.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    layer.diffusion.register_forward_hook(lambda *_: counts.__setitem__(1, counts[1] + 1))
    cost = layer.local_cost(state(dtype=torch.float32), 0.1, 0.9)
    assert counts == [drifts, diffusions]
    assert cost.nfe == drifts


def test_training_follows_new_paths_and_evaluation_always_the_same() -> None:
    layer, z0 = block(), state(dtype=torch.float32)
    torch.manual_seed(3)
    first, second = layer(z0), layer(z0)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(layer(z0), first)
    layer.eval()
    assert torch.equal(layer(z0), layer(z0))
    assert torch.equal(layer(z0, seed=7), layer(z0, seed=7))
    assert not torch.equal(layer(z0, seed=7), layer(z0))
    every = block(all_times=True, times=(0.0, 0.5, 1.0)).eval()(z0)
    assert every.shape == (3, 3, 4)
    assert torch.equal(every[0], z0)


def test_the_solution_is_the_exact_one_on_the_same_path() -> None:
    class Scale(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, z: Tensor) -> Tensor:
            return self.by * z

    import torchsde

    z0 = torch.ones(3, 2, dtype=torch.float64)
    for method, correction in (("sri2w1", 0.08), ("euler_heun", 0.0)):
        layer = NeuralSDE(Scale(0.5), Scale(0.4), method=method, rtol=1e-3, atol=1e-3).eval()  # type: ignore[arg-type]
        area = "space-time" if method == "sri2w1" else "none"
        path = torchsde.BrownianInterval(0.0, 1.0, (3, 2), dtype=torch.float64, entropy=0, levy_area_approximation=area)
        exact = torch.exp(torch.tensor(0.5 - correction).double() + 0.4 * path(0.0, 1.0))
        torch.testing.assert_close(layer(z0), exact, rtol=0.02, atol=0.0)


def test_both_adjoints_agree_where_torchsde_has_both() -> None:
    grads = []
    for adjoint in ("discrete", "backsolve"):
        layer = block("euler_heun", 2e-3, adjoint=adjoint).double().eval()
        with torch.no_grad():
            for p in layer.diffusion.parameters():
                p.mul_(0.3)
        z0 = state().requires_grad_()
        layer(z0).square().mean().backward()
        grads.append(torch.cat([t.grad.flatten() for t in (*layer.parameters(), z0)]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.03
    with pytest.raises(LaminaError, match="does not converge to the gradient"):
        block("sri2w1", adjoint="backsolve")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 63])
def test_sizes_precisions_and_other_shapes(size: int, dtype: torch.dtype) -> None:
    layer = NeuralSDE(nn.Linear(size, size), nn.Linear(size, size), rtol=0.3, atol=0.3).to(dtype)
    out = layer(torch.ones(size, 2, size, dtype=dtype))
    assert out.shape == (size, 2, size)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert layer(torch.ones(0, size, dtype=dtype)).shape == (0, size)


def test_bad_input_is_refused() -> None:
    for change, sentence in (
        ({"times": (1.0, 0.0)}, "strictly rising"),
        ({"method": "milstein"}, "'sri2w1', 'euler_heun'"),
        ({"atol": -1.0}, "above 0"),
        ({"adjoint": "continuous"}, "'backsolve'"),
    ):
        with pytest.raises(LaminaError, match=sentence):
            NeuralSDE(nn.Linear(2, 2), nn.Linear(2, 2), **change)  # type: ignore[arg-type]
    layer = block(max_steps=2, tolerance=1e-4)
    with pytest.raises(LaminaError, match="max_steps=2"):
        layer(state(dtype=torch.float32))
    with pytest.raises(LaminaError, match="NaN"):
        block()(torch.full((2, 4), torch.nan))
    with pytest.raises(ShapeError, match="must return the derivative"):
        NeuralSDE(nn.Linear(4, 4), nn.Linear(4, 2))(torch.ones(2, 4))
    with pytest.raises(LaminaError, match="'error' only"):
        block().local_cost(state(dtype=torch.float32), 0.0, 1.0, "stiffness")
    with pytest.raises(LaminaError, match="forward in time"):
        local_sde_error(lambda t, z: z, lambda t, z: z, state(), 1.0, 0.0)
    for h in (0.0, -0.1, math.nan):
        with pytest.raises(LaminaError, match="must be above 0, got h="):
            local_sde_error(lambda t, z: z, lambda t, z: z, state(), 0.0, 1.0, h=h)
    for method in ("sri2w1", "euler_heun"):
        with pytest.raises(ShapeError, match="must return the derivative"):
            local_sde_error(lambda t, z: z, lambda t, z: z[:1], state(), 0.0, 1.0, method=method)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sde._path_class.cache_clear()
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(MissingExtra, match=r"torchsde .*lamina\[ode\]"):
        block()(torch.ones(1, 4))
