import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import nn

from lamina.errors import LaminaError
from lamina.nn import HyperNetwork, TaskCondition
from lamina.objectives import Classification, Distillation, HyperNetworkDrift, MaskedToken, WeightedSum


def rows():
    g = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(5, 4, generator=g), "labels": torch.randint(3, (5,), generator=g)}


def classifier(count=1):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return HyperNetwork(net, TaskCondition(count, 4), chunk_size=16, hidden=(8,))


EXAMPLES = [Example("objective", "hypernetwork_drift", model=classifier, batch=rows, bad={"weight": -1.0})]


def test_it_is_the_base_until_something_is_remembered_and_then_adds_the_drift():
    model, batch = classifier(3), {**rows(), "condition": torch.tensor(2)}
    objective = HyperNetworkDrift(Classification(label_smoothing=0.1), weight=0.5)
    plain = Classification(label_smoothing=0.1)(model, batch)
    first = objective(model, batch)
    assert first["drift"] == 0
    for key in ("loss", "count"):
        torch.testing.assert_close(first[key], plain[key])
    model.remember([0, 1])
    with torch.no_grad():
        model.generator.heads[0].weight.mul_(1.1)
    losses, plain = objective(model, batch), Classification(label_smoothing=0.1)(model, batch)
    torch.testing.assert_close(losses["loss"], plain["loss"] + 0.5 * model.drift())
    assert torch.equal(losses["task"], plain["loss"])
    assert torch.equal(losses["measure"], plain["loss"])
    assert torch.equal(losses["drift"], model.drift())
    assert torch.equal(losses["task.accuracy"], plain["accuracy"])


def test_the_length_of_the_weights_of_the_batch_s_condition_can_be_weighed():
    model, batch = classifier(3), {**rows(), "condition": torch.tensor([2, 0, 1, 1, 1])}
    losses = HyperNetworkDrift(magnitude_weight=0.1)(model, batch)
    lengths = [sum(t.square().sum() for t in model.generate(int(c)).values()) for c in batch["condition"]]
    torch.testing.assert_close(losses["magnitude"], torch.stack(lengths).mean())
    torch.testing.assert_close(losses["loss"], losses["task"] + 0.1 * losses["magnitude"])


def test_every_hypernetwork_inside_a_model_counts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = classifier(), classifier()

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Two()
    model.a.remember([0])
    model.b.remember([0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    losses = HyperNetworkDrift()(model, rows())
    torch.testing.assert_close(losses["drift"], model.a.drift() + model.b.drift())


def test_two_tasks_one_after_the_other_are_kept_by_the_drift_alone():
    def accuracy_after(weight):
        torch.manual_seed(0)
        g = torch.Generator().manual_seed(0)
        model = classifier(2)
        objective = HyperNetworkDrift(weight=weight)
        x = torch.randn(60, 4, generator=g)
        # The same inputs with the classes swapped: one network cannot do both.
        tasks = [(x[:, 0] > 0).long(), (x[:, 0] <= 0).long()]
        for t, labels in enumerate(tasks):
            optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
            for _ in range(60):
                optimizer.zero_grad()
                objective(model, {"inputs": x, "labels": labels, "condition": torch.tensor(t)})["loss"].backward()
                optimizer.step()
            model.remember([t])
        return (model(x, 0).argmax(1) == tasks[0]).float().mean()

    assert accuracy_after(1.0) > 0.95
    assert accuracy_after(0.0) < 0.6


def test_the_base_is_told_of_rewrites_and_keeps_its_state():
    model = classifier()
    objective = HyperNetworkDrift(Distillation())
    objective.before_rewrite(model)
    assert objective(model, rows())["task.active"] == 1
    masked = HyperNetworkDrift(MaskedToken(10, 11, seed=3))
    masked.base.terms[0].generator.manual_seed(5)
    other = HyperNetworkDrift(MaskedToken(10, 11, seed=3))
    other.load_state_dict(masked.state_dict())
    draws = [torch.rand(2, generator=o.base.terms[0].generator) for o in (masked, other)]
    assert torch.equal(*draws)


def test_it_goes_into_a_sum_and_needs_the_model():
    model, batch = classifier(), rows()
    total = WeightedSum([(1.0, HyperNetworkDrift()), (0.5, Classification())])
    assert total.needs == "model"
    expected = 1.5 * F.cross_entropy(model(batch["inputs"]), batch["labels"])
    torch.testing.assert_close(total(model, batch)["loss"], expected)
    with pytest.raises(LaminaError, match="call the objective, not its loss"):
        HyperNetworkDrift().loss(torch.zeros(5, 3), batch)


def test_bad_weights_and_other_models_are_refused():
    with pytest.raises(LaminaError, match="magnitude_weight must be at least 0, got -1"):
        HyperNetworkDrift(magnitude_weight=-1)
    with pytest.raises(LaminaError, match="needs a HyperNetwork in the model, and Linear has none"):
        HyperNetworkDrift()(nn.Linear(4, 3), rows())
