import math

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import DataCondition, NoiseCondition, TaskCondition, VectorCondition
from lamina.nn.hypernetwork_conditions import JointCondition


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "layer",
        "task_condition",
        {"count": 3, "dim": 4},
        inputs=lambda: (torch.tensor([2, 0, 2]),),
        bad={"count": 0},
    ),
    Example(
        "layer",
        "vector_condition",
        {"dim": 2, "encode": "cos_sin"},
        inputs=lambda: (torch.rand(3, 2, generator=torch.Generator().manual_seed(0)),),
        bad={"dim": 0},
    ),
    Example(
        "layer",
        "data_condition",
        {"encoder": {"name": "torch.nn:Linear", "in_features": 5, "out_features": 4}},
        inputs=lambda: (normal(3, 5),),
        bad={"dim": -1},
    ),
    Example("layer", "noise_condition", {"dim": 3}, inputs=lambda: (normal(2, 3),), bad={"dim": 0}),
]


def test_a_task_is_a_row_of_the_table_of_unit_length_on_average():
    torch.manual_seed(0)
    condition = TaskCondition(400, 16)
    assert torch.equal(condition(3), condition.embedding[3])
    assert torch.equal(condition(torch.tensor([5, 1])), condition.embedding[[5, 1]])
    assert abs(condition.embedding.square().sum(1).mean().item() - 1) < 0.1


@pytest.mark.parametrize("given", [3, -1, torch.tensor([0, 3]), torch.tensor(-2)])
def test_a_task_out_of_range_is_named(given):
    with pytest.raises(LaminaError, match=r"tasks are 0\.\.2, got (3|-1|-2)"):
        TaskCondition(3)(given)


@pytest.mark.parametrize("given", [0.5, torch.tensor([True]), torch.zeros(2, 2, dtype=torch.long)])
def test_a_task_that_is_no_number_of_one_is_refused(given):
    with pytest.raises(LaminaError, match="a task is a whole number or a row"):
        TaskCondition(3)(given)


def test_only_a_single_task_need_not_be_given():
    assert TaskCondition(1).fill(None) == 0
    with pytest.raises(LaminaError, match=r"one of the tasks 0\.\.1"):
        TaskCondition(2).fill(None)


def test_cos_sin_codes_have_one_length_and_reach_both_ends():
    condition = VectorCondition(1, "cos_sin")
    code = condition(torch.linspace(0, 1, 9))
    torch.testing.assert_close(code.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(code[[0, 4, 8]], torch.tensor([[1.0, 0.0], [math.sqrt(0.5)] * 2, [0.0, 1.0]]))
    torch.testing.assert_close(condition(0.5), code[4])


def test_vectors_of_the_wrong_size_or_range_are_refused():
    with pytest.raises(ShapeError, match=r"2 numbers a condition, got \(3,\)"):
        VectorCondition(2)(torch.zeros(3))
    with pytest.raises(LaminaError, match=r"numbers of 0..1, got 1.5"):
        VectorCondition(1, "cos_sin")(torch.tensor([0.5, 1.5]))
    with pytest.raises(LaminaError, match=r"numbers of 0..1, got nan"):
        VectorCondition(1, "cos_sin")(float("nan"))
    with pytest.raises(LaminaError, match="'none' or 'cos_sin'"):
        VectorCondition(1, "fourier")


def test_the_width_of_an_encoder_is_that_of_its_last_layer():
    assert DataCondition(nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())).width == 6
    assert DataCondition(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2), nn.Tanh())).width == 2
    with pytest.raises(LaminaError, match="pass dim to DataCondition"):
        DataCondition(nn.Flatten())
    with pytest.raises(ShapeError, match=r"must return \(B, 4\), got \(3, 5\)"):
        DataCondition(nn.Flatten(), dim=4)(normal(3, 5))


def test_noise_is_drawn_from_the_generator_given_and_follows_the_dtype():
    condition = NoiseCondition(3)
    first, again = (condition.draw(2, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert condition.draw().shape == (3,)
    assert condition.double().draw().dtype == torch.float64
    with pytest.raises(ShapeError, match=r"z of width 3, got \(4,\)"):
        condition(torch.zeros(4))


def test_several_conditions_stand_side_by_side():
    joint = JointCondition([TaskCondition(2, 4), VectorCondition(1), NoiseCondition(2)])
    values = joint.complete((torch.tensor([1, 0, 1]), 0.25, None), None)
    code = joint(values)
    assert code.shape == (3, 7)
    assert torch.equal(code[:, :4], joint.conditions[0].embedding[[1, 0, 1]])
    assert (code[:, 4] == 0.25).all()
    assert torch.equal(code[0, 5:], code[2, 5:]), "one draw of noise stands for every row"
    with pytest.raises(LaminaError, match="2 conditions must be given as a tuple"):
        joint.complete(torch.tensor(1), None)
    with pytest.raises(LaminaError, match="there are 3 conditions, and 2 values"):
        joint.complete((0, 1), None)
    with pytest.raises(ShapeError, match=r"batches of \[2, 3\]"):
        joint((torch.tensor([0, 1]), torch.zeros(3, 1), torch.zeros(2)))


def test_a_value_goes_to_the_only_condition_that_does_not_fill_itself():
    joint = JointCondition([NoiseCondition(2), TaskCondition(3)])
    noise, task = joint.complete(2, None)
    assert task == 2
    assert noise.shape == (2,)
