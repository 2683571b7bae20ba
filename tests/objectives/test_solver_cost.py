from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.models import NeuralSDEClassifier
from lamina.nn import NeuralODE, NeuralSDE, TimeMLP, local_error, local_stiffness, recording, rk_step
from lamina.nn.ode.recording import Solve
from lamina.nn.ode.solve import Solution
from lamina.nn.ode.tableau import DOPRI5
from lamina.objectives import Classification, GlobalSolverCost, LocalSolverCost, WeightedSum


def model(adjoint: str = "discrete", tolerance: float = 1e-5, method: str = "dopri5") -> nn.Sequential:
    torch.manual_seed(0)
    block = NeuralODE(TimeMLP(4, 6), method=method, rtol=tolerance, atol=tolerance, adjoint=adjoint)  # type: ignore[arg-type]
    return nn.Sequential(block, nn.Linear(4, 3))


def batch() -> dict[str, Tensor]:
    """Rows in equal pairs: the cost is a norm over the batch, and so one of halves only where those are alike."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 0)
    return {"inputs": x, "labels": torch.tensor([0, 1, 2, 1]).repeat_interleave(2)}


def double(net: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    data = batch()
    return net.double(), {**data, "inputs": data["inputs"].double()}


def exact() -> nn.Module:
    """In float64: the error of a step is a small difference, whose rounding differs from batch to batch."""
    return double(model())[0]


def exact_batch() -> dict[str, Tensor]:
    return double(model())[1]


EXAMPLES = [
    Example("objective", name, {"decay": "constant"}, model=exact, batch=exact_batch, bad={"start": -1.0})
    for name in ("local_solver_cost", "global_solver_cost")
]


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("estimate", ["error", "stiffness"])
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_the_loss_is_the_task_plus_the_coefficient_times_one_step_s_cost(estimate: Any, sampling: Any) -> None:
    net, data = double(model())
    objective = LocalSolverCost(Classification(), estimate, sampling, 3.0, decay="constant", seed=4)
    losses = objective(net, data)
    block = net[0]
    generator = torch.Generator().manual_seed(4 * 1_000_003)
    if sampling == "unbiased":
        with recording(net, float(torch.rand((), generator=generator))):
            net(data["inputs"])
        time, state = block.solution.save_time, block.solution.state_at_save
    else:
        with recording(net, None, keep_steps=True):
            net(data["inputs"])
        at = int(float(torch.rand((), generator=generator)) * block.solution.steps)
        time, state = block.solution.times[at], block.solution.states[at]
    measure = local_error if estimate == "error" else local_stiffness
    expected = measure(block.derivative, state, time, 1.0, 1e-5, 1e-5, "dopri5")
    torch.testing.assert_close(losses["regulariser"], expected.detach().float())
    torch.testing.assert_close(losses["loss"], losses["task"] + 3.0 * expected.float())
    assert losses["coefficient"] == 3.0
    torch.testing.assert_close(losses["task"], Classification()(net, data)["loss"])
    assert losses["measure"] == losses["task"]


def test_nfe_adds_the_extra_step_to_what_the_solve_took() -> None:
    net, data = model(), batch()
    count = [0]
    net[0].func.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    for objective in (LocalSolverCost(), LocalSolverCost(sampling="biased"), GlobalSolverCost()):
        count[0] = 0
        losses = objective(net, data)
        assert losses["nfe"] == count[0]
        assert losses["nfe"] == net[0].solution.nfe + (8 if isinstance(objective, LocalSolverCost) else 0)


def test_the_unbiased_time_is_uniform_and_the_same_for_equal_calls() -> None:
    objective = LocalSolverCost()

    found = [float(torch.rand((), generator=objective.generator())) for _ in range(2000)]
    assert int(objective.calls) == 2000
    assert kstest(found, "uniform").pvalue > 0.05
    other, draws = LocalSolverCost(seed=5), []
    draws.extend(float(torch.rand((), generator=other.generator())) for _ in range(3))
    resumed = LocalSolverCost(seed=5)
    resumed.load_state_dict({**other.state_dict(), "calls": torch.tensor(2)})
    assert float(torch.rand((), generator=resumed.generator())) == draws[2]
    assert len(set(draws)) == 3


def test_the_biased_time_is_drawn_as_often_as_the_solver_stepped_there_and_never_the_last() -> None:
    class Burst(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return -z * (0.1 + 200.0 * torch.exp(-(((t - 0.5) / 0.15) ** 2)))

    block = NeuralODE(Burst(), method="dopri5", rtol=1e-5, atol=1e-5)
    with recording(block, None, keep_steps=True):
        block(torch.ones(2, 3))
    solution = block.solution
    objective = LocalSolverCost(sampling="biased")
    solve, drawn = Solve("", block, solution), []
    for place in torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist():
        time, state = objective.place(solve, place)
        assert state is solution.states[solution.times.index(time)]
        drawn.append(time)
    inside = [t for t in solution.times[:-1] if 0.2 < t < 0.8]
    share = sum(t in inside for t in drawn) / len(drawn)
    assert share == pytest.approx(len(inside) / solution.steps, abs=0.03)
    assert share > 0.75, "the burst is 60 % of the time and most of the steps"
    assert solution.times[-1] not in drawn
    assert set(drawn) == set(solution.times[:-1])


@pytest.mark.parametrize("adjoint", ["discrete", "backsolve"])
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_without_weight_the_gradients_are_the_task_s_own(adjoint: str, sampling: Any) -> None:
    net = model(adjoint)
    Classification()(net, batch())["loss"].backward()
    expected = gradients(net)
    net.zero_grad()
    LocalSolverCost(sampling=sampling, start=0.0, end=0.0)(net, batch())["loss"].backward()
    assert all(map(torch.equal, gradients(net), expected))


def test_the_cost_has_the_same_gradient_under_both_adjoints_and_none_for_what_comes_before() -> None:
    found = []
    for adjoint in ("discrete", "backsolve"):
        torch.manual_seed(2)
        net, data = double(nn.Sequential(nn.Linear(4, 4), model(adjoint, 1e-2)))
        losses = LocalSolverCost(start=1.0, decay="constant")(net, data)
        whole = torch.autograd.grad(losses["loss"], list(net.parameters()), retain_graph=True)
        task = torch.autograd.grad(Classification()(net, data)["loss"], list(net.parameters()))
        assert torch.equal(whole[0], task[0])
        found.append(torch.cat([(a - b).flatten() for a, b in zip(whole[2:], task[2:], strict=True)]))
    assert float(found[0].norm()) > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))


def test_in_evaluation_there_is_no_cost_and_the_solve_is_as_it_is() -> None:
    net, objective = model().eval(), LocalSolverCost()
    with torch.no_grad():
        plain = net(batch()["inputs"])
    nfe = net[0].solution.nfe
    losses = objective(net, batch())
    assert losses["loss"] == losses["task"]
    assert losses["coefficient"] == losses["regulariser"] == 0
    assert losses["nfe"] == nfe == net[0].solution.nfe
    assert int(objective.calls) == 0
    with torch.no_grad():
        assert torch.equal(net(batch()["inputs"]), plain)


def test_in_evaluation_every_solve_is_counted() -> None:
    torch.manual_seed(0)
    net = NeuralSDEClassifier(4, 3, width=4, hidden=5, trajectories=3).eval()
    count = [0]
    net.sde.drift.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with torch.no_grad():
        losses = LocalSolverCost()(net, batch())
    assert losses["nfe"] == count[0] > net.sde.solution.nfe
    # What ran before is not of this pass, and stays as it was.
    block = model().eval()[0]
    block(batch()["inputs"])
    solution = block.solution

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ode, self.head = block, nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(inputs)

    assert LocalSolverCost()(Skips().eval(), batch())["nfe"] == 0
    assert block.solution is solution


def test_the_coefficient_decays_over_training() -> None:
    objective = LocalSolverCost(start=100.0, end=10.0)
    found = []
    for fraction in (0.0, 0.5, 1.0):
        objective.set_progress(fraction)
        found.append(objective.coefficient)
    assert found == pytest.approx([100.0, 1000**0.5, 10.0])
    constant = LocalSolverCost(start=2.0, decay="constant")
    constant.set_progress(1.0)
    assert constant.coefficient == 2.0


def test_the_global_cost_sums_every_accepted_step_with_its_gradient() -> None:
    net, data = double(model(tolerance=1e-4))
    losses = GlobalSolverCost(start=2.0, decay="constant")(net, data)
    block = net[0]
    with recording(net, None, keep_steps=True):
        net(data["inputs"])
    solution, total, z = block.solution, torch.zeros(()).double(), data["inputs"]
    for start, end in zip(solution.times, solution.times[1:], strict=False):
        t, h = (torch.tensor(v, dtype=torch.float64) for v in (start, end - start))
        if end == solution.times[-1]:
            # The solver's last step goes beyond the end.
            continue
        step = rk_step(block.derivative, z, t, h, block.derivative(t, z), DOPRI5)
        scale = 1e-4 + 1e-4 * torch.maximum(z.abs(), step.end.abs())
        total, z = total + h * (step.error / scale).square().mean().sqrt(), step.end
    assert float(losses["regulariser"]) > float(total.detach()) > 0
    torch.testing.assert_close(losses["loss"], losses["task"] + 2.0 * losses["regulariser"])
    with recording(net, None, keep_errors=True) as seen:
        net(data["inputs"])
    assert len(seen.errors) == solution.steps
    torch.testing.assert_close(losses["regulariser"], torch.stack(seen.errors).sum().detach().float())
    grads = torch.autograd.grad(torch.stack(seen.errors[:-1]).sum(), list(block.parameters()), retain_graph=True)
    expected = torch.autograd.grad(total, list(block.parameters()))
    torch.testing.assert_close(torch.stack(seen.errors[:-1]).sum(), total, rtol=1e-6, atol=0.0)
    assert all(float((a - b).norm() / b.norm()) < 0.5 for a, b in zip(grads, expected, strict=True))
    with pytest.raises(LaminaError, match="adjoint='discrete'"):
        GlobalSolverCost()(model("backsolve"), batch())


def test_it_goes_with_sdes_sums_and_models_without_a_solver() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(NeuralSDE(nn.Linear(4, 4), nn.Linear(4, 4), rtol=0.1, atol=0.1), nn.Linear(4, 3))
    for sampling in ("unbiased", "biased"):
        losses = LocalSolverCost(sampling=sampling)(net, batch())  # type: ignore[arg-type]
        losses["loss"].backward()
        assert losses["regulariser"] > 0
        assert losses["nfe"] == net[0].solution.nfe + 6
    both = WeightedSum([(1.0, LocalSolverCost()), (0.5, Classification())])
    net2 = model()
    count = [0]
    net2[0].register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    both(net2, batch())["loss"].backward()
    assert count[0] == 1, "one forward pass serves both"
    plain = LocalSolverCost()(nn.Linear(4, 3), batch())
    assert plain["loss"] == plain["task"]

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ode, self.head = model()[0], nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(inputs)

    with pytest.raises(LaminaError, match=r"none of the continuous blocks ran .* ode"):
        LocalSolverCost()(Skips(), batch())


def test_two_blocks_and_two_calls_are_averaged() -> None:
    torch.manual_seed(0)
    shared = NeuralODE(TimeMLP(4), method="dopri5")
    net = nn.Sequential(shared, NeuralODE(nn.Linear(4, 4)), shared, nn.Linear(4, 3))
    losses = LocalSolverCost(start=1.0, decay="constant")(net, batch())
    with recording(net, 0.3) as seen:
        net(batch()["inputs"])
    assert [s.path for s in seen.solves] == ["0", "1", "0"]
    assert losses["nfe"] == sum(s.solution.nfe for s in seen.solves) + 3 * 8
    assert copy.deepcopy(net)[0].solution.nfe == shared.solution.nfe


@pytest.mark.parametrize(
    "options",
    [
        {"start": -1.0},
        {"start": float("nan")},
        {"start": 0.0},
        {"estimate": "curvature"},
        {"sampling": "all"},
        {"decay": "linear"},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LaminaError, match=r"\w+ \w+"):
        LocalSolverCost(**options)


def test_a_solution_without_steps_costs_nothing() -> None:
    net = model()
    objective = LocalSolverCost(sampling="biased")
    assert objective.place(Solve("", net[0], Solution(times=[0.0, 1.0])), 0.5)[1] is None
    with pytest.raises(LaminaError, match="not its loss"):
        objective.loss(net(batch()["inputs"]), batch())
