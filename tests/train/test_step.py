"""The optimizer's groups: an objective's own parameters, at rates of their own."""

import pytest
import torch
from torch import nn

from lamina.objectives import Classification, Distillation, EnsembleDistillation, Sandwich, WeightedSum
from lamina.train.step import complete_optimizer, set_rates


def rows():
    return {"inputs": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(6) % 3}


def parts(rate=0.01):
    torch.manual_seed(3)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    follow = EnsembleDistillation(teacher, discriminator="cooperative", discriminator_rate=rate, allow_scratch=True)
    return student, follow


@pytest.mark.parametrize("within", ["alone", "a sum", "a sum in a sum"])
def test_an_objectives_parameters_move_at_their_own_rate_under_adamw(within):
    student, follow = parts()
    objective = follow if within == "alone" else WeightedSum([(1.0, Classification()), (1.0, follow)])
    if within == "a sum in a sum":
        objective = WeightedSum([(1.0, objective)])
    optimizer = complete_optimizer(torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.5), objective)
    twin, beside = parts()
    groups = [{"params": list(twin.parameters()), "lr": 0.05}, {"params": list(beside.parameters()), "lr": 0.0005}]
    by_hand = torch.optim.AdamW(groups, weight_decay=0.5)
    whole = beside if within == "alone" else WeightedSum([(1.0, Classification()), (1.0, beside)])
    set_rates(optimizer, 0.5)
    assert [g["initial_lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.001])
    for _ in range(3):
        for each, sought, model in ((optimizer, objective, student), (by_hand, whole, twin)):
            each.zero_grad()
            sought(model, rows())["loss"].backward()
            each.step()
    torch.testing.assert_close(list(follow.parameters()), list(beside.parameters()))
    torch.testing.assert_close(list(student.parameters()), list(twin.parameters()))


def test_an_objective_inside_another_one_keeps_its_rate():
    student, follow = parts()
    objective = Sandwich(follow)
    optimizer = complete_optimizer(torch.optim.SGD(student.parameters(), lr=0.2), objective)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.002])


def test_rates_that_nobody_asks_for_are_the_models_and_what_is_held_is_not_added_again():
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 5)
    taught = Distillation(teacher, terms=[{"name": "hint", "student": ".", "adapter": [3, 5]}])
    optimizer = complete_optimizer(torch.optim.SGD(student.parameters(), lr=0.2), taught)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.2]
    assert len(complete_optimizer(optimizer, taught).param_groups) == 2
    student, follow = parts(rate=1.0)
    optimizer = complete_optimizer(torch.optim.SGD(student.parameters(), lr=0.2), follow)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.2]
