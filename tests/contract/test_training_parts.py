"""What every objective, optimizer, schedule and reducer must do."""

import copy
import warnings

import pytest
import torch
from tests.contract.collect import label, make, of
from torch import nn

from lamina.errors import LaminaError
from lamina.gradients import attach
from lamina.objectives import WeightedSum
from lamina.optim import parameter_groups
from lamina.registry import describe


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3, bias=False))


def rows(seed):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def optimize(example, model):
    return make(example, params=parameter_groups(model, example.options.get("weight_decay", 0.0)), model=model)


def train(model, optimizer, steps, start=0):
    losses = []
    for i in range(start, start + steps):

        def closure(i=i):
            optimizer.zero_grad()
            loss = (model(rows(i)) - 1).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())
    return torch.stack(losses)


@pytest.mark.parametrize("example", of("optimizer"), ids=label)
def test_an_optimizer_moves_against_the_gradient_and_stays_finite(example):
    model = small()
    before = (model(rows(0)) - 1).square().mean()
    losses = train(model, optimize(example, model), 30)
    assert torch.isfinite(losses).all()
    assert (model(rows(0)) - 1).square().mean() < before


@pytest.mark.parametrize("example", of("optimizer"), ids=label)
def test_an_optimizer_killed_and_resumed_equals_one_never_killed(example):
    whole = small()
    expected = train(whole, optimize(example, whole), 6)
    model = small()
    optimizer = optimize(example, model)
    first = train(model, optimizer, 3)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model = small()
    optimizer = optimize(example, model)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert torch.equal(torch.cat([first, train(model, optimizer, 3, start=3)]), expected)


@pytest.mark.parametrize("example", of("optimizer"), ids=label)
def test_an_optimizer_leaves_a_parameter_without_gradient_alone(example):
    model = small()
    extra = nn.Parameter(torch.ones(3))
    groups = parameter_groups(model, 0.0)
    groups[0]["params"] = [*groups[0]["params"], extra]
    train(model, make(example, params=groups, model=model), 2)
    assert torch.equal(extra.detach(), torch.ones(3))


@pytest.mark.parametrize("example", of("schedule"), ids=label)
def test_a_schedule_is_a_finite_multiplier_over_all_of_training(example):
    schedule = describe("schedule", example.name).target
    values = [schedule(i / 100, **example.options) for i in range(101)]
    assert all(isinstance(v, float) and 0.0 <= v <= 10.0 for v in values)
    assert max(values) > 0
    for outside in (-0.01, 1.01):
        with pytest.raises(LaminaError, match=r"fraction must be within 0..1"):
            schedule(outside, **example.options)


def losses_of(example, model, part):
    torch.manual_seed(1)
    batch = example.batch()
    return part(model, batch)


@pytest.mark.parametrize("example", of("objective"), ids=label)
def test_an_objective_gives_a_loss_with_its_count_and_a_gradient(example):
    model, part = example.model(), make(example)
    if hasattr(part, "before_rewrite"):
        part.before_rewrite(example.model())
    losses = losses_of(example, model, part)
    assert losses["loss"].shape == ()
    assert losses["count"] > 0
    assert torch.isfinite(losses["loss"])
    losses["loss"].backward()
    assert any(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        again = losses_of(example, model, make(example) if not hasattr(part, "before_rewrite") else part)
    assert again["loss"].dtype == torch.float32
    torch.testing.assert_close(again["loss"], losses["loss"], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("example", of("objective"), ids=label)
def test_an_objective_of_outputs_gives_the_same_from_outputs(example):
    model, part = example.model(), make(example)
    if part.needs == "outputs":
        torch.manual_seed(1)
        batch = example.batch()
        outputs = model(next(iter(batch.values())))
        torch.testing.assert_close(part.loss(outputs, batch)["loss"], part(model, batch)["loss"])
    else:
        assert part.needs == "model"


def follow(example, model, part, steps):
    """Train by an objective, its own parameters along; a model in place of the teacher that it may want."""
    if hasattr(part, "before_rewrite"):
        part.before_rewrite(example.model())
    optimizer = torch.optim.SGD([*model.parameters(), *part.parameters()], lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(losses_of(example, model, part)["loss"])
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


@pytest.mark.parametrize("example", of("objective"), ids=label)
@pytest.mark.parametrize("summed", [False, True], ids=["alone", "in-a-sum"])
def test_an_objective_killed_and_resumed_equals_one_never_killed(example, summed):
    def fresh():
        torch.manual_seed(0)
        part = make(example)
        return WeightedSum([(0.5, part)]) if summed else part

    expected = follow(example, example.model(), fresh(), 4)
    model, part = example.model(), fresh()
    first = follow(example, model, part, 2)
    state = copy.deepcopy(part.state_dict()) if hasattr(part, "state_dict") else None
    part = fresh()
    if hasattr(part, "before_rewrite"):
        part.before_rewrite(example.model())
    if state is not None:
        part.load_state_dict(state)
    assert torch.equal(torch.cat([first, follow(example, model, part, 2)]), expected)


@pytest.mark.parametrize("example", of("objective"), ids=label)
def test_a_deep_copy_of_an_objective_is_equal_and_independent(example):
    model, part = example.model(), make(example)
    other = copy.deepcopy(part)
    first = losses_of(example, model, other)["loss"]
    assert torch.equal(losses_of(example, model, part)["loss"], first)


@pytest.mark.parametrize("example", of("objective"), ids=label)
def test_an_objective_compiles_with_the_model(example):
    torch.compiler.reset()
    model, part = example.model(), make(example)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    if part.needs == "model":
        # An objective that looks at what modules give has the model run eagerly, and says so.
        warnings.filterwarnings("ignore", ".*a compiled graph cannot be looked into")
    torch.testing.assert_close(
        losses_of(example, compiled, part)["loss"], losses_of(example, model, make(example))["loss"]
    )


@pytest.mark.parametrize("example", of("reducer"), ids=label)
def test_a_reducer_alone_changes_no_gradient_and_its_state_comes_back(example):
    model, other = small(), small()
    reducer = make(example)
    handle = attach(model, reducer)
    for m in (model, other):
        m(rows(0)).square().sum().backward()
    handle.reduce()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    fresh = make(example)
    fresh.load_state_dict(copy.deepcopy(reducer.state_dict()))
    assert fresh.bytes_sent() == reducer.bytes_sent() == 0
    assert reducer.granularity in ("bucket", "model")
    assert [list(reducer.tasks(7, r, 4)) for r in range(4)]
