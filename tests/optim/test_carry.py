from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.lineage import Lineage
from lamina.optim import LAMB
from lamina.optim.carry import carry
from lamina.optim.groups import parameter_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, extra: Tensor | None = None) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        loss = model(x).square().mean()
        if extra is not None:
            loss = loss + extra.square().sum()
        loss.backward()
        optimizer.step()


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(p): n for n, p in model.named_parameters()}


def halve(model: Net, lineage: Lineage) -> None:
    """Keep rows 5, 0 of the first layer and put a fresh row between them."""
    old = model.first
    model.first = nn.Linear(4, 3)
    model.first.weight.data[0], model.first.weight.data[2] = old.weight.data[5], old.weight.data[0]
    lineage.derive(model.first.weight, old.weight, [5, -1, 0])
    lineage.derive(model.first.bias, old.bias, [5, -1, 0])
    model.norm, model.last = nn.LayerNorm(3), nn.Linear(3, 3)


def test_adam_state_follows_rows_and_the_step_goes_along() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(parameter_groups(model, 0.1), lr=1e-2)
    train(model, optimizer)
    old, before = model.first.weight, names_of(model)
    moments = optimizer.state[old]["exp_avg"].clone()
    lineage = Lineage()
    halve(model, lineage)
    model.last.bias = Parameter(torch.zeros(3))
    carried = carry(optimizer, model, lineage, old_names=before)

    state = optimizer.state[model.first.weight]
    assert torch.equal(state["exp_avg"], torch.stack([moments[5], torch.zeros(4), moments[0]]))
    assert float(state["step"]) == 3
    assert set(carried.derived) == {"first.weight", "first.bias"}
    assert set(carried.fresh) == {"norm.weight", "norm.bias", "last.weight", "last.bias"}
    assert carried.dropped == ("first.weight", "last.weight", "first.bias", "norm.weight", "norm.bias", "last.bias")
    assert old not in optimizer.state
    train(model, optimizer)
    assert float(optimizer.state[model.first.weight]["step"]) == 6
    assert float(optimizer.state[model.last.weight]["step"]) == 3


def test_groups_by_role_and_in_the_models_order() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    before, lineage = names_of(model), Lineage()
    halve(model, lineage)
    carry(optimizer, model, lineage, old_names=before)
    now = names_of(model)
    assert [[now[id(p)] for p in g["params"]] for g in optimizer.param_groups] == [
        ["first.weight", "last.weight"],
        ["first.bias", "norm.weight", "norm.bias", "last.bias"],
    ]


def test_the_reverse_order_of_groups_and_the_group_of_the_origin_win() -> None:
    model = Net()
    groups = parameter_groups(model, 0.1)
    special = {"params": [model.first.weight], "lr": 5.0, "weight_decay": 0.1}
    groups[0]["params"].remove(model.first.weight)
    optimizer = torch.optim.AdamW([groups[1], special, groups[0]], lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    rates = [(g["lr"], g["initial_lr"]) for g in optimizer.param_groups]
    before, lineage = names_of(model), Lineage()
    halve(model, lineage)
    carry(optimizer, model, lineage, old_names=before)
    assert any(p is model.first.weight for p in optimizer.param_groups[1]["params"])
    assert any(p is model.last.weight for p in optimizer.param_groups[1]["params"]), "the first decayed group"
    assert any(p is model.norm.weight for p in optimizer.param_groups[0]["params"])
    assert [(g["lr"], g["initial_lr"]) for g in optimizer.param_groups] == rates


def test_kept_parameters_keep_the_very_same_state_and_the_dropped_are_gone() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    before, gone = names_of(model), [*model.norm.parameters()]
    momentum = optimizer.state[model.first.weight]["momentum_buffer"]
    model.norm = nn.Identity()  # type: ignore[assignment]
    carried = carry(optimizer, model, Lineage(), old_names=before)
    assert carried.kept == ("first.weight", "first.bias", "last.weight", "last.bias")
    assert carried.dropped == ("norm.weight", "norm.bias")
    assert not carried.derived
    assert not carried.fresh
    assert optimizer.state[model.first.weight]["momentum_buffer"] is momentum
    assert not any(p in optimizer.state for p in gone)
    assert len(optimizer.param_groups[0]["params"]) == 4
    train(model, optimizer)


def test_stacked_parameter_takes_the_momentum_of_both() -> None:
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)
    model = nn.ModuleList([a, b])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.full_like(p, float(p.shape[0]))
    optimizer.step()
    before, lineage = names_of(model), Lineage()
    stacked = nn.ModuleList([nn.Linear(2, 5, bias=False)])
    new = stacked[0].weight
    lineage.derive(new, a.weight, [0, 1, -1, -1, -1])
    lineage.derive(new, b.weight, [-1, -1, 0, 1, 2])
    carry(optimizer, stacked, lineage, old_names=before)
    assert optimizer.state[new]["momentum_buffer"].tolist() == [[2.0, 2.0]] * 2 + [[3.0, 3.0]] * 3


def test_a_parameter_made_in_two_stages() -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    old = model[0].weight
    old.grad = torch.arange(8.0).reshape(4, 2)
    optimizer.step()
    before, lineage = names_of(model), Lineage()
    middle, new = Parameter(torch.zeros(3, 2)), nn.Linear(2, 2, bias=False)
    lineage.derive(middle, old, [3, 2, 1])
    lineage.derive(new.weight, middle, [2, 0])
    model[0] = new
    carried = carry(optimizer, model, lineage, old_names=before)
    assert optimizer.state[new.weight]["momentum_buffer"].tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert carried.derived == ("0.weight",)


def test_the_objectives_own_group_stays() -> None:
    model, adaptor = Net(), Parameter(torch.ones(3))
    groups = [*parameter_groups(model, 0.1), {"params": [adaptor], "weight_decay": 0.0}]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    train(model, optimizer, extra=adaptor)
    before, lineage = names_of(model), Lineage()
    halve(model, lineage)
    carried = carry(optimizer, model, lineage, old_names=before)
    assert optimizer.param_groups[2]["params"][0] is adaptor
    assert len(optimizer.param_groups[2]["params"]) == 1
    assert float(optimizer.state[adaptor]["step"]) == 3
    assert len(carried.dropped) == 6


def test_left_out_parameters_stay_out() -> None:
    model = Net()
    model.norm.requires_grad_(False)
    optimizer = torch.optim.SGD(model.last.parameters(), lr=0.1)
    before, lineage = names_of(model), Lineage()
    old = model.first
    model.first = nn.Linear(4, 6)
    lineage.derive(model.first.weight, old.weight)
    lineage.derive(model.first.bias, old.bias)
    carried = carry(optimizer, model, lineage, old_names=before)
    assert carried.kept == ("last.weight", "last.bias")
    assert carried.derived == carried.fresh == carried.dropped == ()


def test_without_names_every_parameter_was_the_models() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lineage = Lineage()
    halve(model, lineage)
    carried = carry(optimizer, model, lineage)
    assert len(carried.dropped) == 6
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 6


def test_factored_moments_cannot_follow_and_start_fresh() -> None:
    model = Net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    train(model, optimizer)
    before, lineage = names_of(model), Lineage()
    halve(model, lineage)
    carried = carry(optimizer, model, lineage, old_names=before)
    assert "first.weight" in carried.fresh
    assert "first.bias" in carried.derived
    train(model, optimizer)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "NAdam", "Adagrad"])
def test_the_state_dict_goes_into_an_optimizer_made_on_the_rewritten_model(name: str) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    model = Net()
    optimizer = getattr(torch.optim, name)(parameter_groups(model, 0.1), lr=1e-2, **options)
    train(model, optimizer)
    before, lineage = names_of(model), Lineage()
    halve(model, lineage)
    carry(optimizer, model, lineage, old_names=before)
    train(model, optimizer)
    again = getattr(torch.optim, name)(parameter_groups(model, 0.1), lr=1e-2, **options)
    again.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                assert torch.equal(value, again.state[parameter][key])


def test_names_beside_the_parameters_follow() -> None:
    model, adaptor = Net(), Parameter(torch.ones(3))
    optimizer = LAMB(model.named_parameters(), lr=1e-2)
    optimizer.add_param_group({"params": [("adaptor", adaptor)]})
    train(model, optimizer, extra=adaptor)
    before, lineage = names_of(model), Lineage()
    halve(model, lineage)
    model.norm = nn.Identity()  # type: ignore[assignment]
    carry(optimizer, model, lineage, old_names=before)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    assert optimizer.param_groups[1]["param_names"] == ["adaptor"]
    optimizer.record = True
    train(model, optimizer, extra=adaptor)
    assert optimizer.trust_ratios().keys() == {"first.weight", "first.bias", "last.weight", "last.bias", "adaptor"}


def test_rows_that_stay_train_on_as_if_nothing_had_been_cut() -> None:
    """Cut away a part that never had a gradient: ratio off, the rest must take the steps it would have taken."""

    def loss_of(rows: Tensor) -> Tensor:
        return (rows - torch.arange(8.0).reshape(2, 4)).square().sum()

    def train_rows(cut: bool) -> Tensor:
        layer = nn.Linear(4, 5, bias=False)
        layer.weight.data = torch.linspace(-1, 1, 20).reshape(5, 4)
        model = nn.Sequential(layer)
        optimizer = LAMB([{"params": list(model.parameters()), "adapt": False}], lr=0.1)
        chosen = [4, 1]
        for step in range(6):
            if cut and step == 3:
                before, lineage = names_of(model), Lineage()
                small = nn.Linear(4, 2, bias=False)
                small.weight.data = layer.weight.data[chosen].clone()
                lineage.derive(small.weight, layer.weight, chosen)
                model[0] = small
                carry(optimizer, model, lineage, old_names=before)
                chosen = [0, 1]
            optimizer.zero_grad()
            loss_of(model[0].weight[chosen]).backward()
            optimizer.step()
        return model[0].weight.detach()[chosen]

    torch.testing.assert_close(train_rows(cut=True), train_rows(cut=False), rtol=1e-6, atol=1e-7)


def test_a_replaced_first_layer_stands_first_in_its_group_again() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, lineage, old = names_of(model), Lineage(), model.first
    model.first = nn.Linear(4, 6)
    lineage.derive(model.first.weight, old.weight)
    lineage.derive(model.first.bias, old.bias)
    carry(optimizer, model, lineage, old_names=before)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
