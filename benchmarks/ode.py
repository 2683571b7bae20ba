"""What the local cost adds to a training step; neural ODEs beside plain torchdiffeq; neural SDEs beside plain torchsde.

The model with and without the cost is one and the same, with a coefficient too small to change it, so that both solves
take equally many evaluations. Peer: torchdiffeq 0.2.5 and torchsde 0.2.6, called directly.

Run: OMP_NUM_THREADS=1 python -m benchmarks ode
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchdiffeq
import torchsde
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.models import NeuralODEClassifier
from lamina.nn import NeuralODE, NeuralSDE, TimeMLP
from lamina.objectives import Classification, GlobalSolverCost, LocalSolverCost
from lamina.objectives.objective import Objective

TINY = 1e-12
"""A coefficient that costs what any does and changes nothing."""


def step(model: nn.Module, objective: Objective, batch: dict[str, Tensor]) -> Callable[[], object]:
    def run() -> object:
        model.zero_grad()
        objective(model, batch)["loss"].backward()
        return None

    return run


def training(name: str, model: NeuralODEClassifier, rows: int, goal: str, rounds: int) -> list[Row]:
    width = model.features
    generator = torch.Generator().manual_seed(1)
    batch = {"pixel_values": torch.rand(rows, width, generator=generator), "labels": torch.arange(rows) % 10}
    rows_found = []
    plain = step(model, Classification(), batch)
    with torch.no_grad():
        # As after some training: dynamics that take the solver several steps.
        for p in model.ode.parameters():
            p.mul_(3.0)
    plain()
    solution = model.ode.solution
    assert solution is not None
    local, biased, total = (
        LocalSolverCost(start=TINY, decay="constant"),
        LocalSolverCost(sampling="biased", start=TINY, decay="constant"),
        GlobalSolverCost(start=TINY, decay="constant"),
    )
    for label, objective in (("local_solver_cost", local), ("the same, biased", biased), ("global_solver_cost", total)):
        what = f"{name}: training step at {solution.nfe} evaluations, batch {rows}, {model.ode.adjoint}"
        own = "" if objective is total else goal
        names = (label, "no cost")
        rows_found.append(pair(what, step(model, objective, batch), plain, names=names, goal=own, rounds=rounds))
        if model.ode.adjoint != "discrete" and objective is biased:
            break
    return rows_found


def beside_torchdiffeq() -> list[Row]:
    torch.manual_seed(0)
    func = TimeMLP(64)
    block, z = NeuralODE(func, method="dopri5"), torch.randn(128, 64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def ours() -> object:
        func.zero_grad()
        block(z).square().mean().backward()
        return None

    def peer() -> object:
        func.zero_grad()
        torchdiffeq.odeint(func, z, t, rtol=1e-4, atol=1e-4, method="dopri5")[-1].square().mean().backward()
        return None

    names = "neural_ode", "torchdiffeq.odeint"
    return [pair("dopri5, forward and backward, width 64", ours, peer, names=names, goal="<= 1.1", rounds=21)]


class Equation(nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, drift: nn.Module, diffusion: nn.Module) -> None:
        super().__init__()
        self.f, self.g = drift, diffusion


def beside_torchsde() -> list[Row]:
    torch.manual_seed(0)
    drift, diffusion = TimeMLP(32, 64), TimeMLP(32)
    block, z = NeuralSDE(drift, diffusion, rtol=0.14, atol=0.14).eval(), torch.randn(128, 32)
    equation, t = Equation(drift, diffusion), torch.tensor([0.0, 1.0])
    block(z)
    assert block.solution is not None
    first = block.solution.times[1]

    def ours() -> object:
        block.zero_grad()
        block(z).square().mean().backward()
        return None

    def peer() -> object:
        block.zero_grad()
        path = torchsde.BrownianInterval(0.0, 1.0, (128, 32), entropy=0, levy_area_approximation="space-time")
        options = {"bm": path, "method": "srk", "adaptive": True, "rtol": 0.14, "atol": 0.14, "dt": first}
        torchsde.sdeint(equation, z, t, **options)[-1].square().mean().backward()
        return None

    names = "neural_sde", "torchsde.sdeint"
    return [pair("srk, adaptive, forward and backward, width 32", ours, peer, names=names, goal="<= 1.0", rounds=9)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    small = {"hidden": 64, "method": "dopri5"}
    rows += training("digits", NeuralODEClassifier(64, **small), 128, "<= 1.25", 15)  # type: ignore[arg-type]
    rows += training("digits", NeuralODEClassifier(64, adjoint="backsolve", **small), 128, "<= 1.25", 15)  # type: ignore[arg-type]
    rows += training("MNIST", NeuralODEClassifier(method="tsit5"), 512, "<= 1.25", 7)
    rows += beside_torchdiffeq()
    rows += beside_torchsde()
    write("ode", rows, ("torchdiffeq", "torchsde"))


if __name__ == "__main__":
    main()
