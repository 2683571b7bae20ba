from __future__ import annotations

import copy
import itertools
import sys

import numpy as np
import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import HomeMade, llama, tokens
from torch import Tensor, nn

from lamina import anatomy
from lamina.errors import LaminaError, MissingExtra, ShapeError
from lamina.models import Transformer
from lamina.nn import NeuralODE, TimeConv, TimeMLP, local_error, recording
from lamina.nn.ode import solve
from lamina.nn.ode.tableau import TABLEAUS

STEPS = "an adaptive solve has as many steps as its numbers ask for: compile func"
FIELD = {"name": "time_mlp", "width": 6, "hidden": 8}

EXAMPLES = [
    Example(
        "layer", "neural_ode", {"func": FIELD}, lambda: (torch.randn(4, 6),), bad={"method": "rk4"}, no_compile=STEPS
    ),
    Example("layer", "time_mlp", {"width": 6}, lambda: (torch.tensor([0.3]), torch.randn(4, 6)), bad={"width": 0}),
    Example(
        "layer", "time_conv", {"width": 2}, lambda: (torch.tensor([0.3]), torch.randn(3, 2, 4, 5)), bad={"hidden": 0}
    ),
]

METHODS = sorted(TABLEAUS)


def field(width: int = 5, dtype: torch.dtype = torch.float64) -> TimeMLP:
    torch.manual_seed(0)
    return TimeMLP(width, 7).to(dtype)


def state(rows: int = 3, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def counted(func: nn.Module) -> list[int]:
    count = [0]
    func.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


@pytest.mark.parametrize("method", METHODS)
def test_the_solution_is_the_exact_one_in_both_directions(method: str) -> None:
    angle = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        angle.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    z0 = state(7, 2)
    for times in ((0.0, 0.7, 2.0), (2.0, 0.7, 0.0)):
        block = NeuralODE(angle, times, method, 1e-9, 1e-9, all_times=True)
        for z, t in zip(block(z0), times, strict=True):
            turned = torch.matrix_exp(angle.weight.detach() * (t - times[0]))
            torch.testing.assert_close(z, z0 @ turned.T, rtol=0.0, atol=1e-6)
        assert block.solution is not None
        assert block.solution.times[0] == times[0]
        assert block.solution.times[-1] == times[-1]
        ends = np.diff(block.solution.times)
        assert (ends * (times[-1] - times[0]) > 0).all()


def test_every_evaluation_is_counted_rejected_steps_too() -> None:
    class Burst(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return -z * (0.1 + 200.0 * torch.exp(-(((t - 0.5) / 0.15) ** 2)))

    func = Burst()
    count = counted(func)
    block = NeuralODE(func, rtol=1e-5, atol=1e-5)
    block(torch.ones(2, 3))
    solution = block.solution
    assert solution.nfe == count[0] == 2 + 6 * (solution.steps + solution.rejected)
    assert solution.rejected > 0
    assert len(solution.times) == solution.steps + 1
    assert solution.states == []
    assert solution.state_at_save is None


@pytest.mark.parametrize(("method", "adjoint"), [("tsit5", "discrete"), ("tsit5", "backsolve"), ("dopri5", "discrete")])
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.4, 0.0)])
def test_recording_is_invisible_and_sees_the_state_at_its_time(method: str, adjoint: str, times: tuple) -> None:
    func, z0 = field(), state()
    block = NeuralODE(func, times, method, 1e-6, 1e-6, adjoint, all_times=True)  # type: ignore[arg-type]

    def gradients(fraction: float | None) -> tuple[Tensor, list[Tensor]]:
        func.zero_grad()
        if fraction is None:
            out = block(z0)
        else:
            with recording(block, fraction, keep_steps=True) as seen:
                out = block(z0)
            assert [s.solution for s in seen.solves] == [block.solution]
        out.square().sum().backward()
        return out.detach(), [p.grad.clone() for p in func.parameters()]

    plain, expected = gradients(None)
    nfe = block.solution.nfe
    for fraction in (0.0, 0.37, 0.6):
        found, grads = gradients(fraction)
        assert torch.equal(found, plain)
        assert all(map(torch.equal, grads, expected))
        solution = block.solution
        assert solution.nfe == nfe
        assert solution.save_nfe == (7 if adjoint == "backsolve" else 0)
        assert (solution.backward_nfe > 0) == (adjoint == "backsolve")
        assert len(solution.states) == solution.steps
        torch.testing.assert_close(solution.states[0], z0)
        if solution.save_time == times[0]:
            exact = z0
        else:
            exact = NeuralODE(func, (times[0], solution.save_time), method, 1e-10, 1e-10)(z0)
        torch.testing.assert_close(solution.state_at_save, exact.detach(), rtol=0.0, atol=1e-5)
        assert not solution.state_at_save.requires_grad
    assert block.request is None


def test_both_adjoints_give_the_gradient_that_finite_differences_give() -> None:
    z0, grads = state(), []
    for adjoint in ("discrete", "backsolve"):
        func = field()
        x = z0.clone().requires_grad_()
        NeuralODE(func, (0.0, 1.0), "tsit5", 1e-9, 1e-9, adjoint)(x).square().sum().backward()  # type: ignore[arg-type]
        grads.append(torch.cat([t.grad.flatten() for t in (*func.parameters(), x)]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    func, eps = field(), 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            func.up.weight[0, 0] += sign * eps
            ends.append(float(NeuralODE(func, rtol=1e-10, atol=1e-10)(z0).square().sum()))
            func.up.weight[0, 0] -= sign * eps
    assert float(grads[0][0]) == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-4)


@pytest.mark.parametrize("size", [1, 7, 63])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_sizes_and_precisions(size: int, dtype: torch.dtype, tolerance: float) -> None:
    block = NeuralODE(field(size, dtype), rtol=1e-3, atol=1e-3)
    z = state(size, size, dtype).requires_grad_()
    out = block(z)
    assert out.shape == z.shape
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert torch.isfinite(z.grad).all()
    exact = NeuralODE(field(size), rtol=1e-8, atol=1e-8)(z.detach().double())
    torch.testing.assert_close(out.detach().double(), exact.detach(), rtol=0.0, atol=tolerance)


def test_a_time_column_is_the_same_as_time_joined_to_the_input() -> None:
    func, z, t = field(), state(), torch.tensor(0.7).double()
    joined = torch.cat([z, t.expand(3, 1)], 1)
    hidden = torch.cat([torch.tanh(func.up(joined)), t.expand(3, 1)], 1)
    torch.testing.assert_close(func(t, z), func.down(hidden))
    maps = TimeConv(2, 3)
    assert sum(p.numel() for p in maps.parameters()) == (3 * 3 + 3) + (4 * 9 * 3 + 3) + (4 * 2 + 2)
    assert not torch.equal(maps(torch.tensor(0.0), torch.ones(1, 2, 3, 3)), maps(t.float(), torch.ones(1, 2, 3, 3)))


def test_it_stands_in_the_feed_forward_slot_and_for_a_layer_of_any_model() -> None:
    node = {"name": "neural_ode", "func": {"name": "feed_forward", "hidden": 8}, "increment": True}
    model = Transformer(2, 16, 2, vocabulary=32, context=8, feed_forward=node)
    assert model(tokens()).shape == (2, 8, 32)
    assert model.blocks[0].feed_forward.solution.nfe > 0
    foreign, batch = llama()
    home = HomeMade()
    for net, path, given in (
        (foreign, "model.layers.1.mlp", batch),
        (home, "stack.2.net", {"x": torch.randn(2, 7, 5)}),
    ):
        inner = anatomy.get(net, path)
        block = NeuralODE(inner, increment=True)
        anatomy.swap(net, path, block)
        out = net(**given)
        getattr(out, "logits", out).square().mean().backward()
        assert block.solution.nfe >= 8
        assert all(p.grad is not None for p in inner.parameters())


def test_an_increment_is_what_a_residual_branch_adds() -> None:
    func, z0 = field(), state()
    torch.testing.assert_close(z0 + NeuralODE(func, increment=True)(z0), NeuralODE(func)(z0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "rk4"}, "estimate an error"),
        ({"method": "dopri"}, "did you mean 'dopri5'"),
        ({"times": (0.5, 0.5)}, "strictly rising or strictly falling"),
        ({"times": (0.0, 1.0, 0.5)}, "strictly rising"),
        ({"times": (0.0,)}, "at least two"),
        ({"rtol": 0.0}, "above 0"),
        ({"adjoint": "symplectic"}, "'discrete'"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_bad_options_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        NeuralODE(field(), **change)


def test_bad_states_and_fields_are_refused_with_the_time() -> None:
    block = NeuralODE(field(5, torch.float32))
    for bad in (torch.ones(2, 5, dtype=torch.long), torch.ones(5), torch.ones(2, 4)):
        with pytest.raises(ShapeError):
            block(bad)
    with pytest.raises(LaminaError, match=r"t=0 .*NaN"):
        block(torch.full((2, 5), torch.nan))
    with pytest.raises(ShapeError, match=r"must return the derivative.*float32 \(2, 5\).*\(2, 3\)"):
        NeuralODE(nn.Linear(5, 3))(torch.ones(2, 5))

    class Pole(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return z.square()

    with pytest.raises(LaminaError, match=r"t=0\.[5-9]"):
        NeuralODE(Pole(), (0.0, 2.0), max_steps=500)(torch.full((1, 2), 1.5))
    with pytest.raises(LaminaError, match=r"max_steps=3 .*stiff"):
        NeuralODE(nn.Linear(5, 5), (0.0, 100.0), max_steps=3)(torch.ones(2, 5))
    with pytest.raises(LaminaError, match="func\\(t, z\\) or func\\(z\\)"):
        NeuralODE(nn.MultiheadAttention(4, 2))
    with pytest.raises(LaminaError, match="interval needs two times"):
        local_error(field(), state(), 0.5, 0.5)
    with pytest.raises(LaminaError, match=r"within 0\.\.1"), recording(block, 1.5):
        pass
    with pytest.raises(LaminaError, match="one recording"), recording(block, 0.5), recording(block, 0.5):
        pass
    assert block.request is None


@pytest.mark.parametrize("adjoint", ["discrete", "backsolve"])
def test_an_assertion_of_the_user_s_own_is_left_alone(adjoint: str) -> None:
    class Picky(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            assert bool(t < 0.2), "mine"
            return -z

    block = NeuralODE(Picky(), adjoint=adjoint)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="mine"):
        block(torch.ones(3, 2, requires_grad=True))


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    solve.solvers.cache_clear()
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(MissingExtra, match=r"torchdiffeq .*lamina\[ode\]"):
        NeuralODE(nn.Linear(2, 2))(torch.ones(1, 2))
    solve.solvers.cache_clear()


def test_a_compiled_field_is_called_and_a_copy_is_its_own() -> None:
    func = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    block = NeuralODE(torch.compile(func, backend="eager"))  # type: ignore[arg-type]
    z = torch.ones(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(block(z), NeuralODE(func)(z))
    other = copy.deepcopy(NeuralODE(func))
    assert other.func is not func
    empty = block(z[:0])
    assert empty.shape == (0, 4)
    assert list(itertools.pairwise(block.times)) == [(0.0, 1.0)]
