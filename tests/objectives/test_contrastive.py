from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import EachView, ResNet
from lamina.nn import ProjectionHead
from lamina.objectives import Distillation, WeightedContrastive, WeightedSum, anatomical, rbf, weighted_contrastive_loss
from lamina.objectives.contrastive import anchor_losses
from lamina.recipe import build

MODES = ("exp", "y_aware", "threshold")
AGE: dict[str, Any] = {"name": "age", "similarity": {"name": "rbf", "width": 5.0}}
PSI: dict[str, Any] = {"name": "psi", "similarity": {"name": "anatomical", "by": "region"}, "weight": 0.5}
VIEW: dict[str, Any] = {"name": "view", "similarity": "identity"}
HEAD = {"name": "projection", "in_features": 3, "width": 5}


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def subjects(rows: int = 7) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randn(rows, 4, generator=draw),
        "age": 20 + 20 * torch.rand(rows, generator=draw),
        "psi": torch.randn(rows, 5, 3, generator=draw),
    }


EXAMPLES = [
    Example(
        "objective",
        "weighted_contrastive",
        {"attributes": [AGE, PSI]},
        model=encoder,
        batch=lambda: subjects(6),
        bad={"temperature": 0.0},
    )
]


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)), dim=-1)


def likeness(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rbf(8 * torch.rand(rows, dtype=dtype, generator=torch.Generator().manual_seed(2)), 1.0)


def by_hand(z: Tensor, w: Tensor, mode: str, temperature: float) -> Tensor:
    """The formulas, pair by pair."""
    s, found = z @ z.T / temperature, []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        terms, total = torch.zeros((), dtype=z.dtype), 0.0
        for j in others:
            repelling = [s[i, k] * (1 - w[i, k] if mode == "exp" else 1) for k in others]
            if mode == "threshold":
                repelling = [s[i, k] for k in others if w[i, k] < w[i, j]]
            if repelling and w[i, j] > 0:
                terms = terms + w[i, j] * (s[i, j] - torch.stack(repelling).logsumexp(0))
                total = total + w[i, j]
        if total > 0:
            found.append(-terms / total)
    return torch.stack(found).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [3, 7])
def test_it_is_the_formula_in_values_and_gradients(mode: str, rows: int) -> None:
    z, w = features(rows, 5, dtype=torch.float64).requires_grad_(), likeness(rows, torch.float64)
    found, expected = weighted_contrastive_loss(z, w, mode, 0.2), by_hand(z, w, mode, 0.2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (found, expected)))


@pytest.mark.parametrize("mode", MODES)
def test_equal_weights_are_ties_not_less(mode: str) -> None:
    z, w = features(7, 5), (3 * likeness(7)).round() / 3
    torch.testing.assert_close(weighted_contrastive_loss(z, w, mode), by_hand(z, w, mode, 0.1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", [False, True])
def test_gradients_of_every_row(mode: str, shift: bool) -> None:
    z, w = features(6, 4, dtype=torch.float64).requires_grad_(), likeness(6, torch.float64)
    # Of a normalised row the largest similarity, to itself, is a constant, as the official code has it.
    assert torch.autograd.gradcheck(lambda x: anchor_losses(F.normalize(x, dim=1), w, mode, 0.5, shift)[0], z)


def test_by_hand_with_one_positive_of_three() -> None:
    s = torch.tensor([0.3, -0.5]) / 0.1
    z = torch.tensor([[1.0, 0, 0], [0.3, math.sqrt(0.91), 0], [-0.5, 0, math.sqrt(0.75)]])
    w = torch.zeros(3, 3)
    w[0, 1] = 1.0
    # The positive repels no more, so that exp(0) of it is left; rows without a positive are no part of the mean.
    torch.testing.assert_close(weighted_contrastive_loss(z, w, "exp"), -s[0] + (1 + s[1].exp()).log())
    torch.testing.assert_close(weighted_contrastive_loss(z, w, "y_aware"), -s[0] + s.logsumexp(0))
    torch.testing.assert_close(weighted_contrastive_loss(z, w, "threshold"), -s[0] + s[1])


def test_labels_make_it_supcon() -> None:
    z, labels = features(9, 5), torch.tensor([0, 1, 2] * 3)
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    log_share = logits.log_softmax(1).fill_diagonal_(0)
    positive = (labels[:, None] == labels).float().fill_diagonal_(0)
    supcon = -((positive * log_share).sum(1) / positive.sum(1)).mean()
    w = (labels[:, None] == labels).float()
    torch.testing.assert_close(weighted_contrastive_loss(z, w, "y_aware"), supcon)


def test_the_identity_with_two_views_makes_it_simclr() -> None:
    z = features(7, 2, 5)
    flat = torch.cat([z[:, 0], z[:, 1]])
    logits = (flat @ flat.T / 0.1).fill_diagonal_(-torch.inf)
    simclr = F.cross_entropy(logits, torch.arange(14).roll(7))
    torch.testing.assert_close(weighted_contrastive_loss(z, torch.eye(7), "y_aware"), simclr)
    found = WeightedContrastive([VIEW], "y_aware")(nn.Identity(), {"inputs": z})
    torch.testing.assert_close(found["loss"], simclr)


def test_who_attracts_fully_does_not_repel() -> None:
    z = features(7, 5, dtype=torch.float64)
    ones = weighted_contrastive_loss(z, torch.ones(7, 7), "exp")
    s = z @ z.T / 0.1
    off = ~torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(ones, -s[off].mean() + math.log(6))
    # A single positive of weight 1: its similarity enters the loss with -1 and nothing else.
    w = torch.zeros(7, 7, dtype=torch.float64)
    w[0, 1] = 1.0
    other = z.clone()
    other[1] = F.normalize(z[1] + 0.1 * z[0], dim=0)
    rise = (other[1] - z[1]) @ z[0] / 0.1
    found = weighted_contrastive_loss(other, w, "exp") - weighted_contrastive_loss(z, w, "exp")
    torch.testing.assert_close(found, -rise)
    aware = weighted_contrastive_loss(other, w, "y_aware") - weighted_contrastive_loss(z, w, "y_aware")
    assert not torch.isclose(aware, -rise)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_rows_and_of_views_is_no_matter(mode: str) -> None:
    z, w, order = features(7, 2, 5), likeness(7), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    whole = weighted_contrastive_loss(z, w, mode)
    torch.testing.assert_close(weighted_contrastive_loss(z[order], w[order][:, order], mode), whole)
    torch.testing.assert_close(weighted_contrastive_loss(z.flip(1), w, mode), whole)


def test_the_official_shift_changes_exp_and_threshold_and_not_y_aware() -> None:
    z, w = features(20, 5), likeness(20)
    for mode in MODES:
        plain, shifted = (weighted_contrastive_loss(z, w, mode, official_shift=s) for s in (False, True))
        assert torch.allclose(plain, shifted) == (mode == "y_aware"), mode


def official(z: Tensor, w: Tensor, mode: str) -> Tensor:
    """The released computation, with everything as large as it has it."""
    m, s = len(z), z @ z.T / 0.1
    s = s - s.max(1, keepdim=True).values.detach()
    off = 1 - torch.eye(m)
    repelled = s.exp() * off
    if mode == "exp":
        repelled = (s * (1 - w)).exp() * off
    elif mode == "threshold":
        repelled = repelled * (w[:, :, None] > w[:, None, :]).sum(-1).T
    log_share = s - repelled.sum(1, keepdim=True).log()
    return -((w * off * log_share).sum(1) / (w * off).sum(1)).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [7, 63])
def test_official_shift_is_the_released_code(mode: str, rows: int) -> None:
    z, w = features(rows, 8).requires_grad_(), likeness(rows)
    found, expected = weighted_contrastive_loss(z, w, mode, official_shift=True), official(z, w, mode)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (found, expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", [False, True])
def test_rows_without_weight_count_nothing_and_stay_finite(mode: str, shift: bool) -> None:
    z, w = features(5, 4).requires_grad_(), likeness(5)
    w[0] = w[:, 0] = 0.0
    loss = weighted_contrastive_loss(z, w, mode, official_shift=shift)
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    counted = anchor_losses(z, w, mode, 0.1, shift)[1]
    assert counted[0] == 0
    nothing = weighted_contrastive_loss(z, torch.zeros(5, 5), mode, official_shift=shift)
    (gradient,) = torch.autograd.grad(nothing, z)
    assert nothing == 0
    assert torch.equal(gradient, torch.zeros(5, 4))
    # All alike: nobody is less alike than another.
    assert torch.isfinite(torch.autograd.grad(weighted_contrastive_loss(z, torch.ones(5, 5), mode, official_shift=shift), z)[0]).all()  # fmt: skip  # noqa: E501


def test_temperature_divides_and_base_temperature_scales() -> None:
    z, w = features(7, 5), likeness(7)
    halved = anchor_losses(z * math.sqrt(0.5), w, "exp", 0.1)[0].mean()
    torch.testing.assert_close(weighted_contrastive_loss(z, w, temperature=0.2), halved)
    batch = {"inputs": z, "age": torch.arange(7.0)}
    plain, scaled = (WeightedContrastive([AGE], base_temperature=b)(nn.Identity(), batch)["loss"] for b in (None, 0.07))
    torch.testing.assert_close(scaled, plain * 0.1 / 0.07)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_features_are_compared_in_float32(mode: str) -> None:
    z, w = features(63, 16), likeness(63)
    exact = weighted_contrastive_loss(z.bfloat16().float(), w, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = weighted_contrastive_loss(z.bfloat16(), w, mode)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)
    batch = {"inputs": z, "age": torch.arange(63.0)}
    objective = WeightedContrastive([AGE], mode)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            objective(nn.Identity(), batch)["loss"], objective.cpu()(nn.Identity(), batch)["loss"]
        )
        inside = objective(nn.Identity(), batch)["loss"]
    torch.testing.assert_close(inside, objective(nn.Identity(), batch)["loss"], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["exp", *(pytest.param(m, marks=pytest.mark.slow) for m in MODES[1:])])
def test_it_compiles_without_a_graph_break(mode: str) -> None:
    torch.compiler.reset()
    z, psi = features(5, 4).requires_grad_(), subjects(5)["psi"]

    def loss(z: Tensor, psi: Tensor) -> Tensor:
        return weighted_contrastive_loss(z, anatomical(psi), mode)

    found, expected = torch.compile(loss, backend="aot_eager", fullgraph=True)(z, psi), loss(z, psi)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (found, expected)))


def test_the_objective_adds_its_attributes_each_with_its_weight() -> None:
    net, batch = encoder(), subjects()
    found = WeightedContrastive([AGE, PSI], temperature=0.3)(net, batch)
    z = F.normalize(net(batch["inputs"]), dim=1)
    age = weighted_contrastive_loss(z, rbf(batch["age"], 5.0), temperature=0.3)
    psi = weighted_contrastive_loss(z, anatomical(batch["psi"]), temperature=0.3)
    torch.testing.assert_close(found["loss"], age + 0.5 * psi)
    torch.testing.assert_close(found["age"], age.detach())
    torch.testing.assert_close(found["psi"], psi.detach())
    assert found["count"] == 7


def test_views_go_one_by_one_through_an_encoder_that_takes_single_ones() -> None:
    torch.manual_seed(0)
    net = ResNet((1,), (4,), stem="small", channels=1, classes=1, head="identity").eval()
    images = torch.randn(5, 2, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": images, "age": torch.arange(5.0)}
    objective = WeightedContrastive([AGE])
    z = torch.stack([net(images[:, v]) for v in range(2)], dim=1)
    expected = weighted_contrastive_loss(F.normalize(z, dim=-1), rbf(batch["age"], 5.0))
    torch.testing.assert_close(objective(EachView(net), batch)["loss"], expected)
    torch.testing.assert_close(WeightedSum([(1.0, objective)])(EachView(net), batch)["loss"], expected)


def test_the_head_is_trained_along_and_no_part_of_the_model() -> None:
    torch.manual_seed(0)
    head, net, batch = ProjectionHead(3, 5), encoder(), subjects()
    objective = WeightedContrastive([AGE], head=head)
    assert list(objective.parameters()) == list(head.parameters())
    assert list(WeightedContrastive([AGE]).parameters()) == []
    projected = F.normalize(head(net(batch["inputs"])), dim=1)
    torch.testing.assert_close(
        objective(net, batch)["loss"], weighted_contrastive_loss(projected, rbf(batch["age"], 5.0))
    )
    objective(net, batch)["loss"].backward()
    assert all(p.grad is not None for p in head.parameters())
    built = build({"name": "weighted_contrastive", "attributes": [AGE], "head": HEAD}, "objective")
    assert isinstance(built.head, ProjectionHead)
    assert set(built.state_dict()) == {f"head.{n}" for n in built.head.state_dict()}


def test_what_is_not_known_is_refused_or_dropped() -> None:
    net, batch = encoder(), subjects()
    batch["age"][2] = torch.nan
    with pytest.raises(LaminaError, match="'age' has NaN in the batch; with missing='drop'"):
        WeightedContrastive([AGE])(net, batch)
    found = WeightedContrastive([AGE | {"missing": "drop"}])(net, batch)
    w = rbf(torch.where(batch["age"].isnan(), 0.0, batch["age"]), 5.0)
    w[2] = w[:, 2] = 0.0
    z = F.normalize(net(batch["inputs"]), dim=1)
    torch.testing.assert_close(found["loss"], weighted_contrastive_loss(z, w))


def test_a_transformer_of_somebody_else_is_pretrained_by_it() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=6
    )
    model = transformers.BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(32, (6, 5)), "attention_mask": torch.ones(6, 5, dtype=torch.long)}
    batch["score"] = torch.arange(6.0)
    terms = WeightedSum([(1.0, WeightedContrastive([AGE | {"name": "score"}])), (0.5, Distillation())])
    terms.before_rewrite(model)
    before = terms(model, batch)["loss"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss = terms(model, batch)["loss"]
        loss.backward()
        optimizer.step()
    assert loss < before - 0.1


SIMPLE = {"inputs": torch.zeros(3, 4), "age": torch.zeros(3)}
BAD: list[tuple[Any, str]] = [
    (lambda: WeightedContrastive([]), "needs an attribute; "),
    (lambda: WeightedContrastive([AGE, AGE]), r"a name each, .* got \['age', 'age'\]"),
    (lambda: WeightedContrastive([AGE | {"name": "loss"}]), "none of them 'loss' or 'count'"),
    (lambda: WeightedContrastive([{"name": "age"}]), r"attributes\[0\] must be a mapping with 'name' and 'similarity'"),
    (
        lambda: WeightedContrastive([AGE | {"wieght": 1}]),
        r"attributes\[0\] has no option 'wieght'; did you mean 'weight'",
    ),
    (lambda: WeightedContrastive([AGE | {"weight": -1}]), r"attributes\[0\].weight must be at least 0, got -1"),
    (lambda: WeightedContrastive([AGE | {"missing": "ok"}]), "must be 'refuse' or 'drop', got 'ok'"),
    (
        lambda: WeightedContrastive([AGE | {"similarity": "rbff"}]),
        "similarity must be one of rbf, .* did you mean 'rbf'",
    ),
    (lambda: WeightedContrastive([AGE | {"similarity": {"name": "rbf", "with": 1}}]), "rbf has no option 'with'"),
    (
        lambda: WeightedContrastive([VIEW, AGE | {"similarity": {"name": "gaussian", "width": 0.1}}]),
        r"attributes\[1\].similarity: a gaussian of width 0\.1",
    ),
    (lambda: WeightedContrastive([AGE], "expo"), "mode must be 'exp', 'y_aware' or 'threshold', got 'expo'"),
    (lambda: WeightedContrastive([AGE], temperature=-1.0), "temperature must be above 0, got -1.0"),
    (lambda: WeightedContrastive([AGE], base_temperature=0.0), "base_temperature must be above 0, or None, got 0.0"),
    (lambda: WeightedContrastive([AGE], head={"name": "projection"}), "needs the option 'in_features'"),
    (lambda: WeightedContrastive([AGE])(encoder(), {"inputs": torch.zeros(3, 4)}), "weighted_contrastive needs 'age'"),
    (lambda: WeightedContrastive([AGE])(encoder(), {**SIMPLE, "age": torch.zeros(2)}), "'age' has 2 rows, .* have 3"),
    (lambda: WeightedContrastive([VIEW])(encoder(), {"inputs": torch.zeros(1, 4)}), "compares rows with each other"),
    (
        lambda: WeightedContrastive([VIEW]).loss(torch.zeros(3), SIMPLE),
        r"features \(N, d\) or \(N, views, d\), got \(3,",
    ),
    (
        lambda: WeightedContrastive([AGE | {"similarity": lambda v: torch.full((3, 3), 2.0)}])(encoder(), SIMPLE),
        r"w must be in 0\.\.1, got 2 to 2",
    ),
    (lambda: WeightedContrastive([AGE, VIEW])(encoder(), {**SIMPLE, "age": torch.zeros(3)}), "'view': by identity"),
    (lambda: WeightedContrastive([VIEW]).loss(torch.ones(3, 1, 4), SIMPLE), "the views of a row are alike"),
    (lambda: weighted_contrastive_loss(features(1, 4), torch.ones(1, 1)), r"of at least two rows, got \(1, 4\)"),
    (lambda: weighted_contrastive_loss(features(3, 4), torch.ones(3, 2)), r"w must be \(3, 3\), .* got \(3, 2\)"),
    (lambda: weighted_contrastive_loss(features(3, 4), -torch.ones(3, 3)), r"w must be in 0\.\.1, got -1 to -1"),
    (lambda: weighted_contrastive_loss(features(3, 4), torch.full((3, 3), torch.nan)), r"w must be in 0\.\.1, got nan"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_bad_input_is_met_with_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises((LaminaError, RecipeError, ShapeError), match=sentence):
        call()


def test_rows_that_are_not_of_length_1_are_told_of() -> None:
    with pytest.warns(UserWarning, match="the rows of z are not of length 1"):
        weighted_contrastive_loss(2 * features(3, 4), torch.ones(3, 3))
