"""Ensemble distillation: closed forms, teachers that stay as they are, a discriminator of two signs, bad input."""

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import nn

from lamina.data import Columns, Data, indexed
from lamina.errors import LaminaError, ShapeError
from lamina.objectives import Classification, EnsembleDistillation, WeightedSum
from lamina.objectives.ensemble_distillation import make_discriminator, reversed_gradient
from lamina.recipe import build


def net(seed=0, classes=5, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, classes)
    )


def still(seed=0, classes=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes))


def rows(count=7, labels=False):
    g = torch.Generator().manual_seed(1)
    batch = {"inputs": torch.randn(count, 4, generator=g)}
    return {**batch, "labels": torch.randint(5, (count,), generator=g)} if labels else batch


def ensemble(*teachers, **options):
    return EnsembleDistillation(list(teachers), **{"allow_scratch": True, **options})


EXAMPLES = [
    Example(
        "objective",
        "ensemble_distillation",
        options={
            "teachers": [{"name": f"{__name__}:still", "seed": 8}, {"name": f"{__name__}:still", "seed": 9}],
            "discriminator": "adversarial",
            "allow_scratch": True,
        },
        model=still,
        batch=rows,
        bad={"average": "votes"},
    )
]


def test_a_student_that_is_its_teacher_has_no_gradient_and_no_divergence():
    teacher = still()
    z = teacher(rows()["inputs"]).detach().requires_grad_()
    losses = ensemble(copy.deepcopy(teacher)).loss(z, rows())
    losses["loss"].backward()
    assert z.grad.abs().max() < 1e-8
    assert losses["kl"].abs() < 1e-6
    assert losses["agreement"] == 1
    entropy = torch.distributions.Categorical(logits=z.detach()).entropy().mean()
    torch.testing.assert_close(losses["loss"].detach(), entropy)


@pytest.mark.parametrize("count", [1, 7, 63])
def test_the_loss_is_cross_entropy_of_mean_probabilities_and_its_gradient_is_their_difference(count):
    teachers, batch = [still(s).double() for s in (1, 2, 3)], {"inputs": torch.randn(count, 4).double()}
    z = torch.randn(count, 5, dtype=torch.float64, requires_grad=True)
    losses = ensemble(*copy.deepcopy(teachers)).loss(z, batch)
    p = torch.stack([t(batch["inputs"]).softmax(-1) for t in teachers]).mean(0).detach()
    losses["loss"].backward()
    torch.testing.assert_close(z.grad, (z.detach().softmax(-1) - p) / count, atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(z, p))
    kl = F.kl_div(z.log_softmax(-1), p, reduction="batchmean")
    torch.testing.assert_close(losses["kl"], kl.detach())
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(losses["loss"], kl + entropy)
    assert losses["count"] == count


def test_probabilities_are_averaged_not_logits_and_temperature_softens_both():
    def said(bias):
        model = nn.Linear(1, 2)
        nn.init.zeros_(model.weight)
        model.bias.data = torch.tensor(bias)
        return model

    pair, batch = [said([10.0, 0.0]), said([0.0, 0.0])], {"inputs": torch.zeros(1, 1)}
    z = torch.zeros(1, 2)
    for average, first in (("probabilities", 0.75), ("logits", 0.9933)):
        y = z.clone().requires_grad_()
        ensemble(*copy.deepcopy(pair), average=average).loss(y, batch)["loss"].backward()
        assert float(0.5 - y.grad[0, 0]) == pytest.approx(first, abs=1e-4)
    y = torch.tensor([[0.3, -1.0]], requires_grad=True)
    losses = ensemble(*copy.deepcopy(pair), temperature=4.0).loss(y, batch)
    p = (torch.tensor([2.5, 0.0]).softmax(-1) + 0.5) / 2
    torch.testing.assert_close(losses["loss"], 16 * F.cross_entropy(y / 4, p[None]))


def test_teachers_stay_as_they_are_while_the_student_trains():
    teachers, student = [net(1), net(2)], net()
    objective = ensemble(*teachers, discriminator="cooperative")
    before = copy.deepcopy([t.state_dict() for t in teachers])
    box = nn.ModuleList([student, objective]).train()
    optimizer = torch.optim.SGD([*student.parameters(), *objective.parameters()], lr=0.05, momentum=0.9)
    for step in range(20):
        torch.manual_seed(step)
        optimizer.zero_grad()
        batch = {"inputs": torch.randn(8, 4)}
        losses = objective(student, batch)
        losses["loss"].backward()
        optimizer.step()
    assert student.training
    for teacher, old in zip(teachers, before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in teacher.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert not any(m.training for m in teacher.modules())
    assert not torch.equal(student[1].running_mean, net()[1].running_mean)
    expected = torch.stack([t(batch["inputs"]).softmax(-1) for t in teachers]).mean(0)
    torch.testing.assert_close(objective.teachers.opinion(objective.teachers.logits(batch)).probabilities, expected)
    assert len(list(box.parameters())) == len(list(student.parameters())) + 6
    teachers[1][1].train()
    with pytest.warns(UserWarning, match="teacher 1 was in training mode: it is set to evaluation"):
        objective(student, batch)


def test_only_the_student_is_saved_and_evaluates_as_without_the_objective():
    student, batch = net().eval(), rows()
    before = student(batch["inputs"])
    objective = ensemble(net(1))
    objective(student, batch)
    assert torch.equal(student(batch["inputs"]), before)
    net().load_state_dict(student.state_dict())
    assert list(objective.parameters()) == []
    assert objective.state_dict() == {"_extra_state": {}}
    assert not any(m._forward_hooks for m in student.modules())
    moved = ensemble(net(1)).to(torch.float64)
    assert moved.teachers.models[0][0].weight.dtype == torch.float64, "teachers move along"


def test_a_discriminator_that_knows_nothing_costs_ln_2_and_its_sign_turns_at_the_students_logits_alone():
    batch, found = rows(), {}
    z = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    for role in (None, "cooperative", "adversarial"):
        y = z.clone().requires_grad_()
        torch.manual_seed(4)
        objective = ensemble(still(1), still(2), discriminator=role, discriminator_rate=1.0, discriminator_weight=2.0)
        for p in objective.parameters():
            # Two hidden units are easily dead at all of seven rows.
            p.data += 0.5 * (p.dim() == 1)
        losses = objective.loss(y, batch)
        losses["loss"].backward()
        found[role] = (losses, y.grad, [p.grad for p in objective.parameters()])
    plain = found[None][1]
    ours, theirs = (found[r][1] - plain for r in ("cooperative", "adversarial"))
    assert ours.abs().sum() > 1e-4
    torch.testing.assert_close(theirs, -ours)
    assert all(torch.equal(a, b) for a, b in zip(found["cooperative"][2], found["adversarial"][2], strict=True))
    losses, head = found["cooperative"][0], objective.discriminator
    taught = torch.stack([still(1)(batch["inputs"]), still(2)(batch["inputs"])]).mean(0)
    goal = torch.eye(2).repeat_interleave(7, 0)
    expected = F.binary_cross_entropy_with_logits(head(torch.cat([z, taught])), goal)
    torch.testing.assert_close(losses["discriminator"], expected.detach())
    torch.testing.assert_close(losses["loss"], found[None][0]["loss"] + 2 * expected)
    for p in objective.parameters():
        nn.init.zeros_(p)
    y = z.clone().requires_grad_()
    losses = objective.loss(y, batch)
    losses["loss"].backward()
    assert float(losses["discriminator"]) == pytest.approx(math.log(2))
    torch.testing.assert_close(y.grad, plain)


def test_the_discriminator_says_its_rate_and_keeps_its_gradient():
    batch, slopes = rows(), {}
    for rate in (0.01, 1.0):
        torch.manual_seed(4)
        objective = ensemble(still(1), discriminator="cooperative", discriminator_rate=rate)
        objective.loss(torch.ones(7, 5), batch)["loss"].backward()
        slopes[rate] = [p.grad for p in objective.parameters()]
        assert [(id(p), f) for p, f in objective.rate_factors()] == [(id(p), rate) for p in objective.parameters()]
    assert len(slopes[1.0]) == 6
    torch.testing.assert_close(slopes[0.01], slopes[1.0], atol=0, rtol=0)


def test_the_official_preset_and_the_sizes_of_the_discriminator():
    objective = EnsembleDistillation.official(still(1), allow_scratch=True)
    assert objective.role == "cooperative"
    assert isinstance(objective.discriminator[-1], nn.ReLU)
    sizes = [m.out_features for m in make_discriminator(1000) if isinstance(m, nn.Linear)]
    assert sizes == [125, 15, 2]
    assert [m.out_features for m in objective.discriminator if isinstance(m, nn.Linear)] == [2, 2, 2]
    x = torch.randn(7)
    assert torch.equal(reversed_gradient(x), x)


def test_labels_count_only_where_they_are_asked_for():
    batch, z = rows(labels=True), torch.randn(7, 5)
    plain = ensemble(still(1)).loss(z, batch)
    assert torch.equal(plain["loss"], ensemble(still(1)).loss(z, rows())["loss"])
    torch.testing.assert_close(plain["accuracy"], Classification().loss(z, batch)["accuracy"])
    both = ensemble(still(1), hard_weight=0.5).loss(z, batch)["loss"]
    torch.testing.assert_close(both, plain["loss"] + 0.5 * F.cross_entropy(z, batch["labels"]))
    with pytest.raises(LaminaError, match="hard_weight needs 'labels' in the batch"):
        ensemble(still(1), hard_weight=0.5).loss(z, rows())


def test_padded_positions_count_for_nothing_and_a_split_batch_gives_the_same_gradient():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6))
    whole, split = (nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 6)) for _ in range(2))
    split.load_state_dict(whole.state_dict())
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    batch = {"inputs": torch.randint(9, (3, 5)), "attention_mask": mask}
    objective = ensemble(teacher, discriminator="adversarial")
    losses = objective(whole, batch)
    assert losses["count"] == 8
    losses["loss"].backward()
    for part in (slice(0, 1), slice(1, 3)):
        piece = objective(split, {k: v[part] for k, v in batch.items()})
        (piece["loss"] * piece["count"] / losses["count"]).backward()
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_classes_of_other_teachers_are_mapped_and_views_are_theirs():
    batch, z = rows(), torch.randn(7, 3)
    maps = [[4, 0, 2], None]
    found = ensemble(still(1), still(2, classes=3), label_map=maps).loss(z, batch)["loss"]
    goals = [still(1)(batch["inputs"])[:, [4, 0, 2]], still(2, classes=3)(batch["inputs"])]
    expected = F.cross_entropy(z, torch.stack([g.softmax(-1) for g in goals]).mean(0))
    torch.testing.assert_close(found, expected)
    views = [None, torch.neg]
    found = ensemble(still(1), still(2), input_transforms=views).loss(torch.zeros(7, 5), batch)
    said = torch.stack([still(1)(batch["inputs"]).softmax(-1), still(2)(-batch["inputs"]).softmax(-1)]).mean(0)
    entropy = -(said * said.log()).sum(-1).mean()
    torch.testing.assert_close(found["kl"], math.log(5) - entropy.detach())
    node = {"name": "torch.nn:Upsample", "size": 8}
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    image = {"pixel_values": torch.rand(2, 1, 4, 4)}
    found = ensemble(teacher, input_transforms=node).teachers.logits(image)[0]
    torch.testing.assert_close(found, teacher(F.interpolate(image["pixel_values"], 8)))


def test_teachers_in_bf16_say_nearly_the_same_and_autocast_leaves_the_loss_in_float32():
    batch, z = rows(), torch.randn(7, 5)
    exact = ensemble(still(1)).loss(z, batch)["loss"]
    low = ensemble(still(1), teacher_precision="bf16").loss(z, batch)["loss"]
    assert not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        kept = ensemble(still(1), teacher_precision="fp32").loss(z, batch)["loss"]
    assert torch.equal(kept, exact)


def test_cached_teachers_rest_from_the_second_time_on(tmp_path):
    teachers, ran = [still(1), still(2)], []
    batch = {**rows(), "index": torch.arange(7)}
    z = torch.randn(7, 5)
    plain = ensemble(*teachers).loss(z, batch)["loss"]
    teachers[0].register_forward_hook(lambda *a: ran.append(1))
    found = [ensemble(*teachers, cache=tmp_path).loss(z, batch)["loss"] for _ in range(2)]
    assert ran == [1]
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], plain)
    with pytest.raises(LaminaError, match=r"does not hold the answers of teacher 0 of .*neg"):
        ensemble(*teachers, cache=tmp_path, input_transforms=torch.neg).loss(z, batch)
    data = Data(Columns(rows(labels=True)), None, 2)
    objective = ensemble(*teachers, cache=tmp_path / "other")
    assert objective.fits(still(), indexed(data)) is None
    assert not (tmp_path / "other").exists()
    with pytest.raises(LaminaError, match="cache needs each row's number"):
        objective.fits(still(), data)


def test_without_teachers_the_model_before_its_rewrite_teaches_and_is_saved_with_the_objective():
    student, batch = still(), rows()
    objective = EnsembleDistillation()
    losses = objective(student, batch)
    assert (losses["loss"], losses["active"], losses["count"]) == (0, 0, 7)
    losses["loss"].backward()
    objective.before_rewrite(student)
    with torch.no_grad():
        student[0].weight.mul_(0.5)
    losses = objective(student, batch)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(student(batch["inputs"]), still()(batch["inputs"]).softmax(-1)))  # fmt: skip  # noqa: E501
    resumed = WeightedSum([(1.0, EnsembleDistillation())])
    resumed.before_rewrite(still(3))
    resumed.load_state_dict(WeightedSum([(1.0, objective)]).state_dict())
    assert torch.equal(resumed(student, batch)["loss"], losses["loss"])
    given = ensemble(still(1))
    given.before_rewrite(student)
    torch.testing.assert_close(given(student, batch)["loss"], ensemble(still(1))(student, batch)["loss"])


def test_a_hugging_face_student_and_a_home_made_one_follow_a_teacher_of_either_kind():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4, num_channels=1, num_labels=3)  # fmt: skip  # noqa: E501
    vit, own = ViTForImageClassification(config), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    ours = build({"name": "resnet", "depths": [1], "widths": [4], "stem": "small", "channels": 1, "classes": 3}, "model")  # fmt: skip  # noqa: E501
    batch = {"pixel_values": torch.rand(2, 1, 8, 8), "labels": torch.tensor([0, 2])}
    for student, teacher in ((vit, own), (own, ours), (ours, vit)):
        copied = copy.deepcopy(student).train()
        objective = ensemble(copy.deepcopy(teacher), discriminator="cooperative")
        assert objective.discriminator[0].in_features == 3, "read off the teacher's head"
        losses = objective(copied, batch)
        losses["loss"].backward()
        assert all(p.grad is not None for p in [*copied.parameters(), *objective.parameters()])


def test_a_student_that_was_not_trained_is_refused_at_the_first_step_and_before():
    teacher = still(1)
    with torch.no_grad():
        teacher[2].weight.mul_(20)
    data = Data(Columns(rows(40, labels=True)), None, 4)
    objective = EnsembleDistillation(teacher)
    for see in (lambda m: objective.fits(m, data), lambda m: objective(m, rows(40))):
        with pytest.raises(LaminaError, match=r"the student was not trained: it is \S+ nats .*, a uniform guess"):
            see(still(7))
    trained = copy.deepcopy(teacher).requires_grad_().train()
    assert objective.fits(trained, data) is None
    assert trained.training
    objective(trained, rows(40))
    objective(still(7), rows(40))["loss"].backward()
    assert ensemble(teacher).fits(still(7), data) is None
    stored = {**rows(40), "soft_label": teacher(rows(40)["inputs"]).softmax(-1).detach()}
    with pytest.raises(LaminaError, match="the student was not trained"):
        EnsembleDistillation()(still(7), stored)


def test_teachers_no_better_than_the_student_are_told_of(caplog):
    batch = rows(40)
    good = still(1)
    batch["labels"] = good(batch["inputs"]).argmax(-1)
    for student, teacher, said in ((good, still(2), 1), (still(2), good, 0)):
        objective = ensemble(copy.deepcopy(teacher))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(12):
                objective(student, batch)
        assert sum("no better than the student" in r.message for r in caplog.records) == said


def test_what_cannot_be_is_refused():
    batch, z = rows(), torch.randn(7, 5)
    with pytest.raises(LaminaError, match="an ensemble of teachers needs at least one"):
        EnsembleDistillation([])
    student = still()
    with pytest.raises(LaminaError, match=r"a teacher shares parameters with the student.*copy.deepcopy"):
        ensemble(student)(student, batch)
    with pytest.raises(LaminaError, match=r"a teacher shares parameters with the student"):
        ensemble(student, model=student)
    with pytest.raises(ShapeError, match=r"student logits \(7, 5\), of the teachers \(7, 3\): label_map"):
        ensemble(still(1, classes=3)).loss(z, batch)
    with pytest.raises(ShapeError, match=r"the teachers' logits differ: \(7, 5\), \(7, 3\); label_map"):
        ensemble(still(1), still(2, classes=3)).loss(z, batch)
    with pytest.raises(ShapeError, match="label_map names class 6 of teacher 0, which has 5"):
        ensemble(still(1), label_map=[0, 6]).loss(torch.zeros(7, 2), batch)
    with pytest.raises(LaminaError, match="label_map has 3 entries for 2 teachers"):
        ensemble(still(1), still(2), label_map=[None, None, [0, 1]])
    with pytest.raises(LaminaError, match=r"a label_map lists the teacher's class, from 0.*got \[0, -1\]"):
        ensemble(still(1), label_map=[0, -1])
    trainable = ensemble(still(1))
    trainable.teachers.models[0].requires_grad_()
    with pytest.raises(LaminaError, match="teacher 0 requires gradients, and an optimizer that holds it would train"):
        trainable.loss(z, batch)
    broken = still(2)
    broken[2].bias.data[1] = math.nan
    with pytest.raises(LaminaError, match="teacher 1 answered with NaN or infinite logits"):
        ensemble(still(1), broken).loss(z, batch)
    for outputs, labels in ((torch.randn(7, 1), None), (z, torch.randn(7))):
        with pytest.raises(LaminaError, match="is for classes, not for regression"):
            ensemble(still(1)).loss(outputs, batch if labels is None else {**batch, "labels": labels})
    for options, sentence in (
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"hard_weight": -1.0}, "weights and rates >= 0"),
        ({"discriminator": "kind"}, "discriminator must be 'cooperative', 'adversarial' or None, got 'kind'"),
        ({"teacher_precision": "fp8"}, "teacher_precision must be 'same', 'fp32' or 'bf16'"),
        ({"discriminator": "adversarial", "classes": 1}, "at least 2, got classes=1"),
    ):
        with pytest.raises(LaminaError, match=sentence):
            ensemble(still(1), **options)
    with pytest.raises(LaminaError, match="cache, input_transforms and label_map are for teachers"):
        EnsembleDistillation(cache="folder")
    with pytest.raises(LaminaError, match="a discriminator needs the number of classes: say classes="):
        EnsembleDistillation(discriminator="cooperative")
    with pytest.raises(LaminaError, match="has no teachers: name them in `teachers`"):
        EnsembleDistillation().fits(still(), Data(Columns(rows()), None, 2))
