from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import EquilibriumHead, MeanFieldEquilibrium, MonotoneHollow, MonotoneHollowConv
from lamina.nn._state_blocks import StateBlocks
from lamina.recipe import build

LOOP = "the solver stops when it has converged: a loop whose length is known only as it runs"
SMALL = {"name": "monotone_hollow", "sizes": [2, 2, 3], "rank": 4}


def scores(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXAMPLES = [
    Example(
        "layer",
        "mean_field_equilibrium",
        {"coupling": SMALL},
        inputs=lambda: (scores(3, 7).float(),),
        bad={"alpha": 0.0},
        no_compile=LOOP,
    ),
    Example(
        "layer",
        "equilibrium_head",
        {"in_features": 5, "out_features": 3, "variables": 2, "states": 3, "rank": 4},
        inputs=lambda: (scores(4, 5).float(),),
        bad={"out_features": 1},
        no_compile=LOOP,
    ),
]


def dense(sizes: list[int], rank: int, m: float = 0.1, by: float = 1.0, seed: int = 0) -> MonotoneHollow:
    torch.manual_seed(seed)
    coupling = MonotoneHollow(sizes, rank, m).double()
    with torch.no_grad():
        coupling.weight.mul_(by)
    return coupling


def start_of(coupling: Any, rows: int, seed: int) -> Tensor:
    return coupling.blocks.softmax(5 * scores(rows, coupling.blocks.dim, seed))


def observe(coupling: Any, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One-hot states of all variables, and a mask of about half of them."""
    blocks, generator = coupling.blocks, torch.Generator().manual_seed(seed)
    pieces = []
    for run in blocks.runs:
        drawn = torch.randint(run.states, (rows, run.outer, run.inner), generator=generator)
        pieces.append(F.one_hot(drawn, run.states).movedim(-1, 2).double())
    return blocks.join(pieces), torch.rand(rows, blocks.count, generator=generator) < 0.5


class Attractive(nn.Module):
    """A coupling that is none of ours: every pair of binary variables likes to agree, as strongly as one says."""

    def __init__(self, count: int, strength: float) -> None:
        super().__init__()
        self.blocks = StateBlocks.of_sizes([2] * count)
        self.strength = nn.Parameter(torch.tensor(strength, dtype=torch.float64))

    def prepare(self) -> tuple[Tensor, ...]:
        count = self.blocks.count
        pairs = 1.0 - torch.eye(count, dtype=torch.float64)
        return (self.strength * torch.kron(pairs, torch.eye(2, dtype=torch.float64)),)

    def product(self, q: Tensor, *prepared: Tensor) -> Tensor:
        return q @ prepared[0]


COUPLINGS = {
    "dense": lambda: dense([4] * 12 + [3] * 3, 5, by=2.0),
    "of large rank": lambda: dense([4] * 6 + [3] * 3, 40, by=3.0),
    "of small margin": lambda: dense([4] * 12, 5, m=0.01, by=3.0),
    "convolutional": lambda: MonotoneHollowConv([(4, 5, 4, 2), (6, 3, 2, 2), (3, 1, 1, 1)]).double(),
}


@pytest.mark.parametrize("name", COUPLINGS)
def test_every_start_step_and_solver_ends_at_the_one_fixed_point_of_the_softmax(name: str) -> None:
    torch.manual_seed(0)
    coupling = COUPLINGS[name]()
    bias, found = scores(1, coupling.blocks.dim).expand(20, -1), []
    for seed, (solver, alpha) in enumerate(itertools.product(("anderson", "splitting"), ("auto", 0.125))):
        layer = MeanFieldEquilibrium(coupling, alpha, solver, tol=1e-10, max_iter=2000)  # type: ignore[arg-type]
        with torch.no_grad():
            found.append(layer(bias, start=start_of(coupling, 20, seed)))
        assert layer.last is not None
        assert layer.last.converged
        assert layer.last.residual <= 1e-10
        assert layer.last.eigenvalues[0] >= coupling.m - 1e-9
    answers = torch.cat(found)
    torch.testing.assert_close(answers, answers[:1].expand_as(answers), rtol=0, atol=1e-6)
    with torch.no_grad():
        again = coupling.blocks.softmax(coupling(found[0]) + bias)
    torch.testing.assert_close(again, found[0], rtol=0, atol=1e-6)


def test_plain_updates_swing_for_ever_where_the_splitting_ends() -> None:
    coupling = dense([4] * 30, 6)
    bias = scores(1, 120)
    layer = MeanFieldEquilibrium(coupling, 0.125, "splitting", tol=1e-10)
    with torch.no_grad():
        q = coupling.blocks.uniform(1, bias)
        for _ in range(500):
            before, q = q, coupling.blocks.softmax(coupling(q) + bias)
        layer(bias)
    assert (q - before).abs().max() > 0.5
    assert layer.last is not None
    assert layer.last.converged
    assert layer.last.iterations < 200
    quick = MeanFieldEquilibrium(coupling, 0.125, "anderson", tol=1e-10)
    quick(bias)
    assert quick.last is not None
    assert quick.last.iterations < 0.6 * layer.last.iterations


def test_a_start_at_the_answer_ends_at_once() -> None:
    coupling, bias = dense([3] * 10, 4), scores(3, 30)
    layer = MeanFieldEquilibrium(coupling, tol=1e-6)
    q = layer(bias)
    assert layer.last is not None
    assert layer.last.iterations > 5
    layer(bias, start=q)
    assert layer.last.iterations == 1


def test_a_coupling_that_is_not_monotone_is_named_and_has_several_answers() -> None:
    layer = MeanFieldEquilibrium(Attractive(12, 0.5), tol=1e-8)
    bias, found = torch.zeros(1, 24, dtype=torch.float64), []
    for lean in (1.0, -1.0):
        toward = torch.tensor([lean, -lean]).repeat(12)[None].double()
        with pytest.warns(RuntimeWarning, match=r"not monotone: I - Phi has an eigenvalue of -\d"):
            found.append(layer(bias, start=layer.phi.blocks.softmax(3 * toward)))
    assert (found[0] - found[1]).abs().max() > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeanFieldEquilibrium(Attractive(12, 0.05), tol=1e-8)(bias)


def test_the_gradient_of_a_coupling_that_is_not_positive_is_reported() -> None:
    layer = MeanFieldEquilibrium(Attractive(12, 0.5), tol=1e-8)
    bias = torch.zeros(1, 24, dtype=torch.float64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="not monotone"):
        q = layer(bias)
    with pytest.warns(RuntimeWarning, match="gradient of the mean field is not exact"):
        q[:, ::2].sum().backward()


def test_a_solve_that_does_not_end_says_so() -> None:
    layer = MeanFieldEquilibrium(dense([4] * 30, 6), 0.05, "splitting", tol=1e-10, max_iter=5)
    with pytest.warns(RuntimeWarning, match="did not converge: residual .* after 5 steps, tol 1e-10"):
        layer(scores(1, 120))
    assert layer.last is not None
    assert not layer.last.converged
    assert layer.last.residual > 1e-10


def test_the_automatic_step_is_halved_while_a_solve_does_not_end() -> None:
    coupling = dense([4] * 30, 6)
    layer = MeanFieldEquilibrium(coupling, "auto", "splitting", tol=1e-10, max_iter=5)
    with pytest.warns(RuntimeWarning, match="after 25 steps"):
        layer(scores(1, 120))
    assert layer.last is not None
    assert layer.last.alpha == pytest.approx(1 / coupling.lipschitz() / 16)


def clamped(function: Any, coupling: Any) -> tuple[Any, Any]:
    seen, mask = observe(coupling, 3)
    return (lambda *a: function(*a, None, None)), (lambda *a: function(*a, seen, mask))


@pytest.mark.parametrize("rank", [2, 30])
def test_gradients_are_those_of_finite_differences(rank: int) -> None:
    coupling = dense([2, 2, 3, 4], rank, by=2.0)
    layer = MeanFieldEquilibrium(coupling, tol=1e-11)
    bias, weight = scores(3, 11).requires_grad_(), coupling.weight.detach().clone().requires_grad_()

    def run(bias: Tensor, weight: Tensor, seen: Any, mask: Any) -> Tensor:
        return torch.func.functional_call(layer, {"coupling.weight": weight}, (bias, seen, mask))

    for function in clamped(run, coupling):
        assert torch.autograd.gradcheck(function, (bias, weight), atol=1e-5, fast_mode=True)
    assert layer.last is not None
    layer(bias).square().sum().backward()
    assert layer.last.backward_iterations is not None
    assert 0 < layer.last.backward_iterations <= 15


@pytest.mark.parametrize("name", COUPLINGS)
def test_the_gradient_is_that_of_a_direct_solve(name: str) -> None:
    torch.manual_seed(0)
    coupling = COUPLINGS[name]()
    bias = scores(1, coupling.blocks.dim).requires_grad_()
    seen, mask = observe(coupling, 1)
    layer = MeanFieldEquilibrium(coupling, tol=1e-11, max_iter=1000)
    phi = coupling.dense()
    for clamp in ((None, None), (seen, mask)):
        q = layer(bias, *clamp)
        pull = scores(1, coupling.blocks.dim, 1)
        (found,) = torch.autograd.grad(q, bias, pull)
        p = torch.func.jacrev(lambda s: coupling.blocks.softmax(s[None])[0])(coupling(q.detach())[0] + bias[0])
        if clamp[1] is not None:
            p = p * ~coupling.blocks.spread(clamp[1])[0]
        expected = torch.linalg.solve(torch.eye(len(phi)).double() - p @ phi, p).T @ pull[0]
        torch.testing.assert_close(found[0], expected.detach(), rtol=0, atol=1e-8)


def test_convolutional_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    coupling = MonotoneHollowConv([(4, 3, 2, 2), (3, 1, 1, 1)]).double()
    layer = MeanFieldEquilibrium(coupling, tol=1e-11)
    names = [f"coupling.{n}" for n, _ in coupling.named_parameters()]
    kernels = [(3 * p).detach().requires_grad_() for p in coupling.parameters()]
    bias = scores(2, coupling.blocks.dim).requires_grad_()

    def run(bias: Tensor, *kernels: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, kernels, strict=True)), (bias,))

    assert torch.autograd.gradcheck(run, (bias, *kernels), atol=1e-5, fast_mode=True)


def test_one_step_leaves_out_the_response_of_the_equilibrium() -> None:
    coupling, bias = dense([3] * 4, 2, by=2.0), scores(2, 12).requires_grad_()
    exact, cheap = (MeanFieldEquilibrium(coupling, tol=1e-12, gradient=g) for g in ("implicit", "one_step"))  # type: ignore[arg-type]
    (full,) = torch.autograd.grad(exact(bias).square().sum(), bias)
    q = cheap(bias)
    (short,) = torch.autograd.grad(q.square().sum(), bias)
    expected = torch.func.vjp(coupling.blocks.softmax, coupling(q.detach()).detach() + bias.detach())[1](
        2 * q.detach()
    )[0]
    torch.testing.assert_close(short, expected)
    assert (short - full).abs().max() > 1e-3
    assert cheap.last is not None
    assert cheap.last.backward_iterations == 0


@pytest.mark.parametrize("solver", ["anderson", "splitting"])
def test_nothing_of_the_iterations_is_kept_for_backward(solver: Any) -> None:
    coupling, bias, kept = dense([4] * 30, 6), scores(2, 120).requires_grad_(), []
    for tol in (1e-1, 1e-10):
        layer = MeanFieldEquilibrium(coupling, 0.05, solver, tol=tol, max_iter=1000)
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, h=held: h.append(t.numel()) or t, lambda t: t):
            layer(bias)
        assert layer.last is not None
        kept.append((sum(held), layer.last.iterations))
    assert kept[0][0] == kept[1][0]
    assert kept[1][1] > 5 * kept[0][1]


def test_all_but_one_observed_gives_the_exact_conditional() -> None:
    coupling = dense([2, 3, 2, 4], 3, by=3.0)
    bias, blocks = scores(1, 11), coupling.blocks
    seen, _ = observe(coupling, 1)
    phi = coupling.dense()
    for i in range(4):
        mask = torch.ones(1, 4, dtype=torch.bool)
        mask[0, i] = False
        mine = (blocks.spread(torch.arange(4)[None])[0] == i).nonzero()[:, 0]
        energies = []
        for k in range(len(mine)):
            x = seen.clone()
            x[0, mine] = 0
            x[0, mine[k]] = 1
            energies.append(0.5 * (x @ phi @ x.T)[0, 0] + (x @ bias.T)[0, 0])
        q = MeanFieldEquilibrium(coupling, tol=1e-12)(bias, seen, mask)
        torch.testing.assert_close(q[0, mine], torch.stack(energies).softmax(0), rtol=0, atol=1e-9)
        assert torch.equal(q * blocks.spread(mask), seen * blocks.spread(mask))


def test_what_an_unmarked_variable_holds_does_not_matter() -> None:
    coupling, bias = dense([2, 3, 2], 3), scores(2, 7)
    seen, mask = observe(coupling, 2)
    noise = torch.where(coupling.blocks.spread(mask), seen, 7.5)
    layer = MeanFieldEquilibrium(coupling, tol=1e-9)
    assert torch.equal(layer(bias, seen, mask), layer(bias, noise, mask))
    whole = layer(bias, seen, torch.ones_like(mask))
    assert torch.equal(whole, seen)


@pytest.mark.parametrize("count", [1, 7, 63])
def test_odd_sizes_in_every_precision(count: int) -> None:
    coupling, bias = dense([3] * count, 5), scores(2, 3 * count)
    exact = MeanFieldEquilibrium(coupling, tol=1e-9)(bias)
    single = MeanFieldEquilibrium(coupling.float(), tol=1e-6)
    # A residual of tol leaves an error of up to tol / (alpha * m).
    torch.testing.assert_close(single(bias.float()).double(), exact, rtol=0, atol=2e-4)
    half = single(bias.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.02)


def test_under_torch_compile_the_loop_is_eager_and_the_numbers_the_same() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), MeanFieldEquilibrium(MonotoneHollow([2, 2, 3], 4)), nn.Linear(7, 2))
    x = scores(4, 5).float()
    expected = net(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with warnings.catch_warnings():
        # torch's own, where a graph goes on after the loop.
        warnings.simplefilter("ignore")
        found = torch.compile(net, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for a, b in zip((p.grad for p in net.parameters()), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_head_starts_as_the_linear_layer_and_learns_past_it() -> None:
    torch.manual_seed(0)
    head, x = EquilibriumHead(6, 2, variables=4, states=4, rank=8), torch.randn(64, 6)
    torch.testing.assert_close(head(x), F.linear(x, head.weight, head.bias), rtol=0, atol=1e-6)
    assert head(x[0]).shape == (2,)
    assert head(x.view(4, 16, 6)).shape == (4, 16, 2)
    target = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(head(x), target).backward()
        optimizer.step()
    # No line tells the sign of a product.
    assert (head(x).argmax(1) == target).float().mean() > 0.8


def test_it_is_built_from_a_recipe_node() -> None:
    layer = build({"name": "mean_field_equilibrium", "coupling": SMALL, "alpha": 0.5, "gradient": "one_step"}, "layer")
    assert isinstance(layer.coupling, MonotoneHollow)
    assert (layer.alpha, layer.gradient) == (0.5, "one_step")


def test_bad_input_is_met_with_a_sentence() -> None:
    coupling = dense([2, 2, 3], 4)
    layer, bias = MeanFieldEquilibrium(coupling), scores(2, 7)
    seen, mask = observe(coupling, 2)
    with pytest.raises(LaminaError, match="a Linear is no coupling"):
        MeanFieldEquilibrium(nn.Linear(2, 2))
    for options in ({"solver": "newton"}, {"gradient": "exact"}, {"tol": 0.0}, {"alpha": 1.5}, {"max_iter": 0}):
        with pytest.raises(LaminaError, match=next(iter(options))):
            MeanFieldEquilibrium(coupling, **options)  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="must be finite"):
        layer(bias * torch.nan)
    with pytest.raises(ShapeError, match=r"bias must be \(batch, 7\)"):
        layer(bias[:, :5])
    with pytest.raises(LaminaError, match="go together"):
        layer(bias, seen)
    with pytest.raises(ShapeError, match=r"mask must be bool \(2, 3\)"):
        layer(bias, seen, mask[:, :2])
    with pytest.raises(LaminaError, match="one-hot"):
        layer(bias, 0.5 * seen, torch.ones_like(mask))
    with pytest.raises(LaminaError, match="one-hot"):
        layer(bias, torch.zeros_like(seen), torch.ones_like(mask))
    with pytest.raises(ShapeError, match=r"takes floating-point \(\.\.\., 5\), got torch.float32 \(2, 4\)"):
        EquilibriumHead(5, 3)(torch.zeros(2, 4))
    assert layer(bias[:0]).shape == (0, 7)
