import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives import Classification, Distillation, MaskedToken, NextToken, Regression, WeightedSum
from lamina.objectives.distillation import relative_gap, soft_divergence
from lamina.objectives.supervised import next_labels
from lamina.recipe import build


def tokens(rows=3, context=6, vocabulary=11):
    return torch.randint(vocabulary, (rows, context), generator=torch.Generator().manual_seed(0))


def language_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11))


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))


def rows():
    g = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(5, 4, generator=g), "labels": torch.randint(3, (5,), generator=g)}


EXAMPLES = [
    Example(
        "objective",
        "next_token",
        model=language_model,
        batch=lambda: {"input_ids": tokens()},
        bad={"label_smoothing": 2.0},
    ),
    Example(
        "objective",
        "masked_token",
        options={"mask_token": 10, "vocabulary": 11, "share": 0.5},
        model=language_model,
        batch=lambda: {"input_ids": tokens()},
        bad={"share": -1.0},
    ),
    Example("objective", "classification", model=classifier, batch=rows, bad={"label_smoothing": -0.1}),
    Example(
        "objective",
        "regression",
        model=classifier,
        batch=lambda: {"inputs": torch.randn(5, 4), "labels": torch.randn(5, 3)},
        bad={"kind": "cubic"},
    ),
    Example(
        "objective",
        "distillation",
        model=language_model,
        batch=lambda: {"input_ids": tokens()},
        bad={"temperature": 0.0},
    ),
]


def test_next_token_is_the_cross_entropy_of_the_shifted_tokens():
    model, ids = language_model(), tokens()
    losses = NextToken()(model, {"input_ids": ids})
    scores = model(ids)
    by_hand = -torch.log_softmax(scores, -1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(losses["loss"], by_hand)
    assert losses["count"] == 3 * 5


def test_next_token_leaves_padding_out_and_takes_given_labels():
    model, ids = language_model(), tokens()
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    changed = ids.clone()
    changed[1, 3:] = 0
    one = NextToken()(model, {"input_ids": ids, "attention_mask": mask})
    other = NextToken()(model, {"input_ids": changed, "attention_mask": mask})
    assert one["count"] == 5 + 2 + 5
    torch.testing.assert_close(one["loss"], other["loss"])
    labels = next_labels(ids, None)
    given = NextToken()(model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(given["loss"], NextToken()(model, {"input_ids": ids})["loss"])
    torch.testing.assert_close(NextToken(shift=True)(model, {"input_ids": ids, "labels": ids})["loss"], given["loss"])


def follows_hidden():
    teacher = language_model()
    with torch.no_grad():
        # Rows of very different size, so that a normaliser over the whole batch would show.
        teacher[0].weight.mul_(torch.logspace(-1, 1, 11)[:, None])
        teacher[2].bias.add_(torch.linspace(-1, 1, 11))
    return Distillation(teacher, hidden={"1": "1"})


@pytest.mark.parametrize(
    "objective", [NextToken(), WeightedSum([(1.0, NextToken()), (0.5, NextToken())]), follows_hidden()]
)
def test_count_weighted_micro_batches_give_the_gradient_of_the_whole(objective):
    ids = tokens(4)
    mask = torch.ones_like(ids)
    mask[0, 1:] = 0  # a row that counts for nothing
    mask[1, 4:] = 0
    whole, split = language_model(), language_model()
    losses = objective(whole, {"input_ids": ids, "attention_mask": mask})
    losses["loss"].backward()
    for part in (slice(0, 1), slice(1, 4)):
        piece = objective(split, {"input_ids": ids[part], "attention_mask": mask[part]})
        (piece["loss"] * piece["count"] / losses["count"]).backward()
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_masked_token_hides_the_share_asked_and_asks_only_there():
    ids = torch.randint(9, (200, 50), generator=torch.Generator().manual_seed(3))
    objective = MaskedToken(10, 11, share=0.3, seed=5)
    masked = objective.mask({"input_ids": ids})
    asked = masked["labels"] != -100
    assert abs(asked.float().mean().item() - 0.3) < 0.02
    assert torch.equal(masked["labels"][asked], ids[asked])
    assert torch.equal(masked["input_ids"][~asked], ids[~asked])
    hidden = (masked["input_ids"] == 10)[asked].float().mean().item()
    assert abs(hidden - (0.8 + 0.1 / 11)) < 0.03
    again = MaskedToken(10, 11, share=0.3, seed=5)
    assert torch.equal(again.mask({"input_ids": ids})["input_ids"], masked["input_ids"])


def test_masked_token_ignores_other_labels_unless_the_batch_arrives_masked():
    ids, model = tokens(), language_model()
    labels = torch.full_like(ids, -100)
    labels[0, 2] = 7
    given = {"input_ids": ids, "labels": labels}
    assert MaskedToken(10, 11, masked=True)(model, given)["count"] == 1
    assert torch.equal(MaskedToken(10, 11, share=1.0).mask(given)["labels"], ids)


def test_masked_token_goes_on_where_its_saved_generator_stood():
    ids = {"input_ids": tokens(20)}
    first = MaskedToken(10, 11)
    first.mask(ids)
    state = first.state_dict()
    expected = first.mask(ids)["input_ids"]
    second = MaskedToken(10, 11)
    second.load_state_dict(state)
    assert torch.equal(second.mask(ids)["input_ids"], expected)


def test_classification_and_regression_by_hand():
    scores = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
    losses = Classification().loss(scores, {"labels": torch.tensor([0, 1, -100])})
    expected = (torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log(torch.tensor(2.0))) / 2
    torch.testing.assert_close(losses["loss"], expected)
    assert losses["count"] == 2
    assert losses["accuracy"] == 0.5
    guess = torch.tensor([[1.0], [4.0]])
    assert Regression().loss(guess, {"labels": torch.tensor([0.0, 1.0])})["loss"] == 5.0
    assert Regression("absolute").loss(guess, {"labels": torch.tensor([0.0, 1.0])})["loss"] == 2.0
    with pytest.raises(ShapeError, match=r"\(2, 1\).*\(3,\)"):
        Regression().loss(guess, {"labels": torch.zeros(3)})


def test_missing_labels_are_named():
    with pytest.raises(LaminaError, match="classification needs 'labels'"):
        Classification().loss(torch.zeros(2, 3), {"inputs": torch.zeros(2)})


def test_soft_divergence_is_kl_times_temperature_squared_and_its_gradient_meets_the_limit():
    g = torch.Generator().manual_seed(2)
    student = torch.randn(4, 7, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, generator=g, dtype=torch.float64)
    p, q = torch.softmax(teacher / 3, -1), torch.softmax(student / 3, -1)
    by_hand = 9 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(soft_divergence(student, teacher, 3.0).double(), by_hand, rtol=1e-5, atol=1e-6)
    # Hinton et al., section 2.1: at high temperature it is half the squared gap of the centred logits over n.
    hot = soft_divergence(student, teacher, 200.0).double()
    gap = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(hot, gap.square().mean(-1) / 2, rtol=0.02, atol=2e-3)


def test_distillation_is_silent_until_a_rewrite_and_then_follows_the_old_model():
    model, batch = language_model(), {"input_ids": tokens()}
    objective = Distillation()
    silent = objective(model, batch)
    assert silent["loss"] == 0.0
    assert silent["active"] == 0.0
    objective.before_rewrite(model)
    with torch.no_grad():
        assert objective(model, batch)["loss"].abs() < 1e-6
        model[2].weight.mul_(2.0)
    losses = objective(model, batch)
    assert losses["loss"] > 0.01
    losses["loss"].backward()
    assert model[2].weight.grad is not None
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert list(objective.parameters()) == []
    objective.train()
    assert not objective.teacher.training


def test_hidden_states_are_compared_at_the_named_modules_with_gradient():
    model, batch = language_model(), {"input_ids": tokens()}
    objective = Distillation(language_model(), hidden={"1": "1"}, hidden_weight=0.5)
    with torch.no_grad():
        model[1].bias.add_(1.0)
    plain = Distillation(language_model())(model, batch)
    losses = objective(model, batch)
    student = model[1](model[0](batch["input_ids"]))
    teacher = objective.teacher[1](objective.teacher[0](batch["input_ids"]))
    gap = ((student - teacher).square().mean((1, 2)) / teacher.square().mean((1, 2))).mean()
    torch.testing.assert_close(losses["loss"], plain["loss"] + 0.5 * gap)
    losses["loss"].backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert not any(m._forward_hooks for m in model.modules())


def test_a_row_without_a_kept_position_adds_nothing_to_distillation():
    model, ids = language_model(), tokens()
    mask = torch.zeros_like(ids)
    losses = follows_hidden()(model, {"input_ids": ids, "attention_mask": mask})
    assert (losses["loss"], losses["count"]) == (0, 0)
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_distillation_leaves_out_what_either_labels_or_mask_leave_out():
    model, ids = language_model(), tokens()
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :2], mask[1, 4:] = -100, 0
    both = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    assert follows_hidden()(model, both)["count"] == 3 * 6 - 4
    # States of every position beside one prediction a row: padding is left out, and rows without a label.
    g = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(3, 6, 2, generator=g), torch.randn(3, 6, 2, generator=g)
    found = relative_gap(student, teacher, torch.tensor([True, True, False]), mask)
    first = (student[0] - teacher[0]).square().mean() / teacher[0].square().mean()
    second = (student[1, :4] - teacher[1, :4]).square().mean() / teacher[1, :4].square().mean()
    torch.testing.assert_close(found, (first + second) / 2)


def test_hidden_states_of_another_width_are_adapted_by_a_map_that_is_trained_along():
    teacher = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 12), nn.Linear(12, 11))
    model, batch = language_model(), {"input_ids": tokens()}
    with pytest.raises(ShapeError, match=r"of '1' differ.*adapt=\{'1': \(8, 12\)\} trains a map"):
        Distillation(teacher, hidden={"1": "1"})(model, batch)
    with pytest.raises(LaminaError, match="adapt names '2', which is not in hidden"):
        Distillation(teacher, hidden={"1": "1"}, adapt={"2": (8, 12)})
    with pytest.raises(ShapeError, match=r"adapt\['1'\] is for a width of 7, the student has \(3, 6, 8\)"):
        Distillation(teacher, hidden={"1": "1"}, adapt={"1": (7, 12)})(model, batch)
    node = {"name": "distillation", "hidden": {"1": "1"}, "adapt": {"1": [8, 12]}}
    assert [p.shape for p in build(node, "objective").parameters()] == [(12, 8)]
    objective = Distillation(teacher, hidden={"1": "1"}, adapt={"1": (8, 12)})
    losses = objective(model, batch)
    (adaptor,) = objective.parameters()
    student, goal = model[1](model[0](batch["input_ids"])) @ adaptor.T, teacher[1](teacher[0](batch["input_ids"]))
    gap = ((student - goal).square().mean((1, 2)) / goal.square().mean((1, 2))).mean()
    torch.testing.assert_close(losses["hidden"], gap.detach())
    losses["loss"].backward()
    assert adaptor.grad.abs().sum() > 0
    assert len(list(WeightedSum([(1.0, NextToken()), (1.0, objective)]).parameters())) == 1


def test_a_sum_carries_the_state_of_every_term():
    def summed():
        return WeightedSum([(1.0, MaskedToken(10, 11)), (0.5, follows_hidden())])

    first, ids = summed(), {"input_ids": tokens(20)}
    first.terms[0].mask(ids)
    second = summed()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.terms[0].mask(ids)["input_ids"], first.terms[0].mask(ids)["input_ids"])


def test_evaluations_of_masked_tokens_can_be_compared_and_move_nothing():
    model, batch = language_model(), {"input_ids": tokens(20)}
    objective, untouched = MaskedToken(10, 11), MaskedToken(10, 11)
    evaluated = [objective(model.eval(), batch)["loss"].item() for _ in range(3)]
    assert len(set(evaluated)) == 1
    assert objective(model.train(), batch)["loss"] == untouched(model, batch)["loss"]
    assert objective(model, batch)["loss"].item() != evaluated[0]


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.tensor([0, 3]), r"labels from 0 to 3 for 3 classes: they must lie in 0\.\.2, or be -100"),
        (torch.tensor([-1, 2]), "labels from -1 to 2 for 3 classes"),
        (torch.tensor([0.0, 1.0]), "whole numbers, got torch.float32"),
        (torch.tensor([True, False]), "whole numbers, got torch.bool"),
    ],
)
def test_labels_that_are_no_class_are_refused(labels, sentence):
    with pytest.raises(ShapeError, match=sentence):
        Classification().loss(torch.zeros(2, 3), {"labels": labels})
    narrow = Classification().loss(torch.zeros(2, 3), {"labels": torch.tensor([0, 2], dtype=torch.int32)})
    torch.testing.assert_close(narrow["loss"], torch.tensor(3.0).log())


def test_a_sum_calls_the_model_once_and_adds_weighted_terms():
    model, batch = language_model(), {"input_ids": tokens()}
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    one, two = NextToken(), Distillation(language_model(), hidden={"1": "1"})
    total = WeightedSum([(2.0, one), (0.25, two)], ["text", "teacher"])
    losses = total(model, batch)
    assert len(calls) == 1
    torch.testing.assert_close(losses["loss"], 2 * one(model, batch)["loss"] + 0.25 * two(model, batch)["loss"])
    assert torch.equal(losses["measure"], one(model, batch)["loss"])
    assert total.needs == "model"
    assert {"text", "teacher", "teacher.hidden"} <= set(losses)
    with pytest.raises(LaminaError, match="teacher needs the model"):
        total.loss(model(batch["input_ids"]), batch)


def test_a_sum_refuses_nothing_and_negative_weights():
    with pytest.raises(LaminaError, match="at least one"):
        WeightedSum([])
    with pytest.raises(LaminaError, match="at least 0, got -1"):
        WeightedSum([(-1, NextToken())])
