from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor

from lamina import io
from lamina.batches import call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.models import ConvMonotoneDBM, MonotoneDBM
from lamina.models.boltzmann import grey_levels
from lamina.objectives import Classification, MaskedMarginals
from lamina.recipe import build

LOOP = "the solver stops when it has converged: a loop whose length is known only as it runs"
VARIABLES = [("pixel", 6, 2), ("hidden", 3, 3), ("label", 1, 4)]
TIERS = [(3, 4, 4, 1), (6, 2, 2, 2)]


def levels(rows: int, count: int, states: int) -> Tensor:
    return torch.randint(states, (rows, count), generator=torch.Generator().manual_seed(0))


EXAMPLES = [
    Example(
        "model",
        "monotone_dbm",
        {"variables": VARIABLES, "rank": 4},
        batch=lambda: {"inputs": levels(5, 6, 2), "labels": torch.arange(5) % 4},
        bad={"m": 1.0},
        no_compile=LOOP,
    ),
    Example(
        "model",
        "conv_monotone_dbm",
        {"tiers": TIERS, "classes": 3},
        batch=lambda: {"inputs": levels(4, 16, 3).view(4, 4, 4), "labels": torch.arange(4) % 3},
        bad={"observed_fraction": 1.5},
        no_compile=LOOP,
    ),
]


def binary(count: int, strength: float, tol: float = 1e-12) -> MonotoneDBM:
    """Binary variables only, in float64, weakly coupled by scaling the weights down."""
    torch.manual_seed(1)
    solve = {"name": "mean_field_equilibrium", "tol": tol}
    model = MonotoneDBM([("pixel", count - 1, 2), ("label", 1, 2)], 3, equilibrium=solve).double()
    with torch.no_grad():
        model.coupling.weight.mul_(strength)
        model.bias.copy_(0.5 * torch.randn(2 * count))
    return model.eval()


def enumerate_all(model: MonotoneDBM, count: int) -> tuple[Tensor, Tensor]:
    """Every configuration, and its unnormalised log-probability from the definition, pair by pair."""
    phi, bias, every, values = model.coupling.dense(), model.bias.detach(), [], []
    for x in itertools.product((0, 1), repeat=count):
        at = [2 * i + s for i, s in enumerate(x)]
        pairs = sum(phi[at[i], at[j]] for i in range(count) for j in range(i + 1, count))
        every.append(x)
        values.append(pairs + bias[at].sum())
    return torch.tensor(every), torch.stack(values)


def test_energies_are_those_of_the_definition() -> None:
    model = binary(4, 1.5)
    every, values = enumerate_all(model, 4)
    with torch.no_grad():
        torch.testing.assert_close(-model.energy({"pixel": every[:, :3], "label": every[:, 3:]}), values)


def test_marginals_of_a_weak_coupling_are_exact_to_second_order_and_the_bound_is_a_bound() -> None:
    errors = []
    for strength in (0.4, 0.2):
        model = binary(4, strength)
        every, values = enumerate_all(model, 4)
        exact = (values.softmax(0)[:, None] * every).sum(0)
        nothing = {"pixel": torch.zeros(1, 3, dtype=torch.bool), "label": torch.zeros(1, 1, dtype=torch.bool)}
        anything = {"pixel": torch.zeros(1, 3, dtype=torch.long), "label": torch.zeros(1, 1, dtype=torch.long)}
        with torch.no_grad():
            q = model.infer(anything, nothing)
            bound = model.elbo(q)
        found = torch.cat([q["pixel"][0, :, 1], q["label"][0, :, 1]])
        errors.append(float((found - exact).abs().max()))
        assert float(bound) <= float(values.logsumexp(0))
        assert float(values.logsumexp(0) - bound) < strength**4
    # Phi is quadratic in the weights, the error quadratic in Phi: half the weights, a sixteenth of the error.
    assert errors[1] < errors[0] / 10
    assert errors[0] < 0.02


def test_the_bound_is_stationary_at_the_marginals() -> None:
    model = binary(5, 2.0)
    with torch.no_grad():
        q = model.infer({"pixel": torch.zeros(1, 4).long()}, {"pixel": torch.zeros(1, 4).bool()})
    leaves = {n: v.clone().requires_grad_() for n, v in q.items()}
    grads = torch.autograd.grad(model.elbo(leaves).sum(), list(leaves.values()))
    for g in grads:
        # The same for all states of a variable, so 0 along the simplex.
        assert (g - g.mean(-1, keepdim=True)).abs().max() < 1e-8
    for seed in range(20):
        other = {n: torch.rand(v.shape, generator=torch.Generator().manual_seed(seed)).double() for n, v in q.items()}
        other = {n: v / v.sum(-1, keepdim=True) for n, v in other.items()}
        assert model.elbo(other) < model.elbo(q)


@pytest.mark.parametrize("make", [lambda: MonotoneDBM(VARIABLES, 4), lambda: ConvMonotoneDBM(TIERS, 4)])
def test_any_part_given_any_other(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    run = model.groups["pixel"]
    x = levels(3, run.count, run.states)
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    q = model.infer({"pixel": x}, {"pixel": seen})
    for name, group in model.groups.items():
        assert q[name].shape == (3, group.count, group.states)
        torch.testing.assert_close(q[name].sum(-1), torch.ones(3, group.count))
    assert (q["pixel"].argmax(-1) == x)[seen].all()
    assert (q["pixel"].max(-1).values == 1)[seen].all()
    complete = model.complete(x, seen)
    assert torch.equal(complete[seen], x[seen])
    assert torch.equal(complete[~seen], q["pixel"].argmax(-1)[~seen])
    assert torch.equal(model.classify(x, seen), q["label"][:, 0].argmax(-1))
    assert model.infer({"label": torch.tensor([1, 2])})["pixel"].shape == (2, run.count, run.states)
    again = model.infer({"pixel": x}, {"pixel": seen}, start=q)
    assert model.equilibrium.last.iterations <= 2
    torch.testing.assert_close(again["label"], q["label"], rtol=0, atol=1e-3)


def test_the_logits_are_what_the_marginals_are_the_softmax_of() -> None:
    torch.manual_seed(0)
    model = MonotoneDBM(
        VARIABLES, 4, temperature=2.0, equilibrium={"name": "mean_field_equilibrium", "tol": 1e-7}
    ).eval()
    x = levels(3, 6, 2)
    out, q = model(x), model.infer({"pixel": x})
    torch.testing.assert_close((out["label"] / 4).softmax(-1), q["label"], rtol=0, atol=1e-5)
    torch.testing.assert_close(out["hidden"].softmax(-1), q["hidden"], rtol=0, atol=1e-5)
    assert torch.equal(out["logits"], out["label"][:, 0])
    assert torch.equal(logits(out), out["logits"])


def test_training_hides_and_evaluation_shows_all() -> None:
    torch.manual_seed(0)
    model, x = MonotoneDBM([("pixel", 64, 2), ("label", 1, 3)], 4, observed_fraction=0.3), levels(40, 64, 2)
    seen = model(x)["mask"]["pixel"]
    assert float(seen.float().mean()) == pytest.approx(0.3, abs=0.03)
    drawn = [model(x, generator=torch.Generator().manual_seed(5))["mask"]["pixel"] for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], seen)
    assert model.eval()(x)["mask"]["pixel"].all()
    assert torch.equal(model(x, mask=seen)["mask"]["pixel"], seen)


def test_one_model_learns_to_classify_and_to_complete() -> None:
    """Three blobs, half of each image seen."""
    torch.manual_seed(0)
    patterns = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    y = torch.arange(90) % 3
    model = MonotoneDBM([("pixel", 6, 2), ("hidden", 4, 3), ("label", 1, 3)], 8)
    objective = MaskedMarginals(focal=0.0, class_balance=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        objective(model, {"inputs": patterns[y], "targets": y})["loss"].backward()
        optimizer.step()
    seen = torch.tensor([[True, False] * 3]).expand(3, -1)
    assert model.classify(patterns, seen).tolist() == [0, 1, 2]
    assert torch.equal(model.complete(patterns, seen), patterns)
    assert torch.equal(model.infer({"label": torch.arange(3)})["pixel"].argmax(-1), patterns)
    assert model.coupling.min_eigenvalue() >= 0.1 - 1e-5


def test_a_classifier_s_objective_takes_its_outputs() -> None:
    torch.manual_seed(0)
    model = MonotoneDBM(VARIABLES, 4)
    loss = Classification()(model, {"inputs": levels(5, 6, 2), "labels": torch.arange(5) % 4})
    loss["loss"].backward()
    assert model.coupling.weight.grad is not None


def test_grey_levels_are_bins_of_equal_width() -> None:
    values = torch.tensor([0.0, 0.04, 0.05, 0.5, 0.99, 1.0])
    assert grey_levels(values, 20).tolist() == [0, 0, 1, 10, 19, 19]
    edges = torch.linspace(0, 1, 21)
    edges[-1] = 1.1
    grid = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grey_levels(grid, 20), torch.bucketize(grid, edges, right=True) - 1)
    with pytest.raises(LaminaError, match="values from 0 to 1"):
        grey_levels(torch.tensor([0.0, 255.0]), 20)
    with pytest.raises(LaminaError, match="values from 0 to 1"):
        grey_levels(torch.tensor([torch.nan]), 20)


def test_images_are_cut_into_the_grey_levels_of_the_pixels() -> None:
    torch.manual_seed(0)
    model, x = ConvMonotoneDBM(TIERS, 4).eval(), levels(2, 16, 3)
    found = model(pixel_values=(x.view(2, 1, 4, 4) + 0.5) / 3)
    assert torch.equal(found["states"]["pixel"], x)
    assert torch.equal(found["logits"], model(x)["logits"])


def test_the_paper_s_net_has_its_sizes() -> None:
    with torch.device("meta"):
        model = ConvMonotoneDBM()
    assert {n: (r.count, r.states) for n, r in model.groups.items()} == {
        "pixel": (784, 20),
        "hidden1": (1960, 4),
        "hidden2": (980, 4),
        "label": (1, 10),
    }
    assert [tuple(k.shape) for k in model.coupling.kernels][-2:] == [(10, 80, 7, 7), (10, 10, 1, 1)]


def test_it_comes_from_a_recipe_and_back_from_disk(tmp_path: Any) -> None:
    node = {"name": "monotone_dbm", "variables": [["pixel", 6, 2], ["label", 1, 3]], "rank": 4}
    node["equilibrium"] = {"name": "mean_field_equilibrium", "gradient": "one_step"}
    torch.manual_seed(0)
    model = build(node, "model").eval()
    assert model.equilibrium.gradient == "one_step"
    io.save(model, tmp_path / "model")
    loaded = io.load(tmp_path / "model")
    batch = {"inputs": levels(2, 6, 2)}
    assert torch.equal(call(loaded, batch)["logits"], call(model, batch)["logits"])


def test_bad_input_is_met_with_a_sentence() -> None:
    model = MonotoneDBM(VARIABLES, 4).eval()
    x = levels(3, 6, 2)
    with pytest.raises(LaminaError, match=r"pixel has 2 states, 0\.\.1, got values from 0 to 5"):
        model(x.clone().fill_(5).index_fill(1, torch.tensor([0]), 0))
    with pytest.raises(LaminaError, match=r"must be states, whole numbers from 0 to 1, got torch\.float32"):
        model(x.float())
    with pytest.raises(ShapeError, match=r"pixel is 6 variables a row, got \(3, 5\)"):
        model(x[:, :5])
    with pytest.raises(LaminaError, match="either inputs"):
        model()
    with pytest.raises(LaminaError, match="no group of variables is called 'pixels'; did you mean 'pixel'"):
        model.infer({"pixels": x})
    with pytest.raises(LaminaError, match="nothing is observed"):
        model.infer({})
    with pytest.raises(LaminaError, match="missing: hidden, label"):
        model.energy({"pixel": x})
    with pytest.raises(LaminaError, match="target names no group of variables: 'class'"):
        MonotoneDBM(VARIABLES, 4, target="class")
    with pytest.raises(LaminaError, match="a name of its own"):
        MonotoneDBM([("a", 1, 2), ("a", 2, 2)], 4, inputs="a", target="a")
    with pytest.raises(ShapeError, match="at least 2 states"):
        MonotoneDBM([("pixel", 6, 1), ("label", 1, 3)], 4)
    with pytest.raises(ShapeError, match="first tier holds the pixels"):
        ConvMonotoneDBM([(4, 4, 4, 2)])
