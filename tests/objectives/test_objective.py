import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives import Classification, Distillation, MaskedToken, NextToken, Regression, WeightedSum
from lamina.objectives.distillation import soft_divergence
from lamina.objectives.supervised import next_labels


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


@pytest.mark.parametrize("objective", [NextToken(), WeightedSum([(1.0, NextToken()), (0.5, NextToken())])])
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
    gap = F.mse_loss(student, teacher) / teacher.square().mean()
    torch.testing.assert_close(losses["loss"], plain["loss"] + 0.5 * gap)
    losses["loss"].backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert not any(m._forward_hooks for m in model.modules())


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
