from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives import Distillation, Ponder, WeightedExits, WeightedSum
from lamina.objectives.ponder import kl_divergence, log_prior, truncated


class Exiting(nn.Module):
    """Two exits without a pass: what the objectives see."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head, self.chance = nn.Linear(6, classes), nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        h, x = [], inputs
        for layer in self.layers:
            x = torch.tanh(layer(x))
            h.append(x)
        stacked = torch.stack(h, 1)
        a = self.chance(stacked)[..., 0]
        # As in the real model, answers lead to every parameter: data-parallel processes wait for all of them.
        scores = self.head(stacked) + 0.0 * a[..., None]
        log_p = torch.cat((F.logsigmoid(a[:, :-1]), torch.zeros_like(a[:, :1])), 1)
        log_p = log_p + F.pad(F.logsigmoid(-a[:, :-1]).cumsum(1), (1, 0))
        return {"logits": scores[:, -1], "exit_logits": scores, "exit_log_p": log_p, "lambda_logits": a}


def network() -> nn.Module:
    torch.manual_seed(0)
    return Exiting()


def batch(rows: int = 6) -> dict[str, Tensor]:
    inputs = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    return {"inputs": inputs, "labels": torch.arange(rows) % 3}


EXAMPLES = [
    Example("objective", "ponder", model=network, batch=batch, bad={"prior": 1.0}),
    Example("objective", "weighted_exits", model=network, batch=batch, bad={"base": "hinge"}),
]


def outputs(log_p: Tensor, scores: Tensor) -> dict[str, Tensor]:
    return {"exit_logits": scores, "exit_log_p": log_p}


def test_the_two_directions_of_the_divergence_by_hand() -> None:
    p, g = torch.tensor([[0.9, 0.1]]).log(), log_prior(2, 0.5).float()
    torch.testing.assert_close(g.exp(), torch.tensor([0.5, 0.5]))
    default = Ponder(prior=0.5, beta=1.0).loss(outputs(p, torch.zeros(1, 2, 3)), {"labels": torch.tensor([0])})
    assert float(default["kl"]) == pytest.approx(0.5108, abs=1e-4)
    assert float(kl_divergence(p, g, "posterior_to_prior")) == pytest.approx(0.3681, abs=1e-4)
    reference = F.kl_div(p, g.exp()[None], reduction="batchmean")
    torch.testing.assert_close(default["kl"], reference)
    torch.testing.assert_close(default["loss"], math.log(3) + default["kl"])


def test_the_prior_is_truncated_geometric_and_no_divergence_from_itself() -> None:
    for n in (1, 2, 7, 63):
        g = log_prior(n, 0.2)
        assert float(g.exp().sum()) == pytest.approx(1.0)
        for direction in ("prior_to_posterior", "posterior_to_prior"):
            clamped = g.clamp(min=math.log(1e-8))
            assert float(kl_divergence(clamped[None], clamped, direction)) == pytest.approx(0.0, abs=1e-12)
        other = log_prior(n, 0.25)
        assert (float(kl_divergence(g[None], other)) > 1e-4) == (n > 1)
    assert [round(float(v), 6) for v in log_prior(3, 0.1).exp()] == [0.1, 0.09, 0.81]
    normal = log_prior(4, 0.5, "normal").exp()
    expected = torch.tensor([math.exp(-((i - 2) ** 2)) for i in range(1, 5)]).double()
    torch.testing.assert_close(normal, expected / expected.sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_mean_over_exits_and_rows(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    scores, p = torch.randn(rows, 4, 3, dtype=dtype), torch.rand(rows, 4).softmax(1)
    labels = torch.arange(rows) % 3
    found = Ponder(prior=0.3, beta=0.7).loss(outputs(p.log(), scores), {"labels": labels})
    g = [0.3, 0.21, 0.147, 0.343]
    task, kl = 0.0, 0.0
    for r in range(rows):
        for i in range(4):
            ce = -scores[r, i].float().log_softmax(0)[labels[r]]
            task += float(p[r, i] * ce) / rows
            kl += g[i] * (math.log(g[i]) - math.log(p[r, i])) / rows
    assert float(found["task"]) == pytest.approx(task, rel=1e-4)
    assert float(found["kl"]) == pytest.approx(kl, rel=1e-4)
    assert float(found["loss"]) == pytest.approx(task + 0.7 * kl, rel=1e-4)
    assert float(found["depth"]) == pytest.approx(float((p * torch.arange(1, 5)).sum(1).mean()), rel=1e-4)
    assert found["count"] == rows


def test_all_the_mass_on_one_layer_is_that_layers_cross_entropy() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(5, 3, 4), torch.tensor([0, 1, -100, 2, 3])
    log_p = torch.full((5, 3), -80.0)
    log_p[:, 1] = 0.0
    found = Ponder(beta=0.0).loss(outputs(log_p, scores), {"labels": labels})
    torch.testing.assert_close(found["loss"], F.cross_entropy(scores[:, 1], labels))
    assert found["count"] == 4, "a row without a label counts for nothing"
    torch.testing.assert_close(found["accuracy"], (scores[:, 1].argmax(1) == labels)[labels >= 0].float().mean())


@pytest.mark.parametrize("options", [
    {}, {"kl": "posterior_to_prior"}, {"kind": "normal"}, {"truncate_eps": 0.05}, {"base": "squared"}
])  # fmt: skip
def test_the_gradient_of_the_whole_loss_is_right(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    classes = 1 if options.get("base") == "squared" else 3
    labels = torch.randn(3).double() if classes == 1 else torch.tensor([0, 2, 1])
    objective = Ponder(prior=0.3, **options)

    def loss(a: Tensor, scores: Tensor) -> Tensor:
        stay = F.pad(F.logsigmoid(-a[:, :-1]).cumsum(1), (1, 0))
        log_p = stay + torch.cat((F.logsigmoid(a[:, :-1]), torch.zeros_like(a[:, :1])), 1)
        found = {"exit_logits": scores, "exit_log_p": log_p, "lambda_logits": a}
        return objective.loss(found, {"labels": labels})["loss"]

    a = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(3, 4, classes, dtype=torch.float64, requires_grad=True)
    if "base" in options:
        # Squares are of float32: the check is of the formula, at its precision.
        torch.testing.assert_close(
            Ponder(beta=0.0).loss(outputs(torch.zeros(3, 4) - math.log(4), scores.float()), {"labels": labels})["loss"],
            (scores.float()[..., 0] - labels[:, None].float()).square().mean(),
        )
        return
    assert torch.autograd.gradcheck(loss, (a, scores))


def test_the_official_truncation_by_hand() -> None:
    lam = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.3, 0.3]], dtype=torch.float64)
    p = truncated(lam.logit(), 0.05).exp()
    expected = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.9, 0.09, 0.0125, 0.0125]], dtype=torch.float64)
    torch.testing.assert_close(p, expected)
    a = lam.logit().requires_grad_()
    truncated(a, 0.05)[1, 2:].sum().backward()
    assert not a.grad.any(), "the constant has no gradient"


def test_weighted_exits_weigh_by_layer() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(5, 3, 4), torch.tensor([0, 1, 2, 3, 0])
    found = WeightedExits().loss({"exit_logits": scores}, {"labels": labels})
    each = [F.cross_entropy(scores[:, i], labels) for i in range(3)]
    torch.testing.assert_close(found["loss"], (each[0] + 2 * each[1] + 3 * each[2]) / 6)
    torch.testing.assert_close(found["task"], each[2])


def test_numbers_are_squared_and_a_function_may_be_given() -> None:
    scores, p = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[0.25, 0.75]])
    found = Ponder(beta=0.0).loss(outputs(p.log(), scores), {"labels": torch.tensor([2.0])})
    assert float(found["loss"]) == pytest.approx(1.0)
    assert "accuracy" not in found
    given = Ponder(lambda s, y: (s[:, 0] - y).abs(), beta=0.0).loss(
        outputs(p.log(), scores), {"labels": torch.tensor([0.0])}
    )
    assert float(given["loss"]) == pytest.approx(0.25 * 1 + 0.75 * 3)


def test_in_evaluation_it_is_the_loss_where_each_row_left() -> None:
    scores, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    left = {"logits": scores, "exit_layer": torch.tensor([1, 4])}
    for objective in (Ponder(), WeightedExits()):
        found = objective.loss(left, {"labels": labels})
        torch.testing.assert_close(found["loss"], F.cross_entropy(scores, labels))
        assert (found["depth"], found["accuracy"], found["count"]) == (2.5, 0.5, 2)
        # Before it has exits a model is measured as it is: training evaluates it ahead of the first rewrite.
        plain = objective.loss(scores, {"labels": labels})
        assert torch.equal(plain["loss"], found["loss"])
        assert "depth" not in plain
    for waiting in (Ponder(wait=True), WeightedExits(wait=True)):
        trained = scores.clone().requires_grad_()
        assert torch.equal(waiting.loss(trained, {"labels": labels})["loss"], F.cross_entropy(trained, labels))


def test_it_goes_beside_a_teacher() -> None:
    both = WeightedSum([(1.0, Ponder(prior=0.3)), (0.5, Distillation())])
    model = network()
    both.before_rewrite(model)
    found = both(model, batch())
    found["loss"].backward()
    assert found["ponder.kl"] > 0


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Ponder(prior=0.0), "0 < prior < 1"),
    (lambda: Ponder(beta=-1.0), "not be negative"),
    (lambda: Ponder(kl="forward"), "prior_to_posterior"),  # type: ignore[arg-type]
    (lambda: Ponder(truncate_eps=1.0), "0 < truncate_eps < 1"),
    (lambda: Ponder(kind="flat"), "geometric"),  # type: ignore[arg-type]
    (lambda: WeightedExits("hinge"), "cross_entropy"),  # type: ignore[arg-type]
])  # fmt: skip
def test_bad_options_are_refused(make: Any, words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        make()


@pytest.mark.parametrize(("given", "labels", "words"), [
    ({"logits": torch.zeros(2, 3, requires_grad=True)}, [0, 1], "rewrite it first"),
    (outputs(torch.zeros(2, 4), torch.zeros(2, 4, 3)), [0, 3], "from 0 to 3 for 3 classes"),
    (outputs(torch.zeros(2, 4), torch.zeros(2, 4, 3)), [0, -1], "from -1 to 0 for 3 classes"),
    (outputs(torch.zeros(2, 4), torch.zeros(2, 4, 3)), [[0], [1]], "one a row"),
    (outputs(torch.zeros(2, 4), torch.zeros(2, 4, 3)), [0.5, 1.0], "whole numbers"),
    (outputs(torch.zeros(2, 4), torch.zeros(2, 4)), [0, 1], "exit_logits"),
    (outputs(torch.zeros(2, 3), torch.zeros(2, 4, 3)), [0, 1], "exit_log_p"),
    ({"exit_logits": torch.zeros(2, 4, 3)}, [0, 1], "no lambda head"),
])  # fmt: skip
def test_outputs_and_labels_that_do_not_fit_are_refused(given: Any, labels: Any, words: str) -> None:
    with pytest.raises((LaminaError, ShapeError), match=words):
        Ponder().loss(given, {"labels": torch.tensor(labels)})
