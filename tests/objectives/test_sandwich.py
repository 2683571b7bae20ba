"""The sandwich objective: when parts begin to count, what they follow, and that the whole does not notice before."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.batches import call, logits
from lamina.errors import LaminaError
from lamina.models import Transformer
from lamina.nn import supernet
from lamina.objectives import Classification, MaskedToken, Sandwich, WeightedSum
from lamina.objectives.sandwich import soft_cross_entropy, undistracted
from lamina.optim.schedule import warmup_cosine
from lamina.rewrite import Elastic, rewrite


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1)
        self.norm, self.dropout = nn.BatchNorm2d(8), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(torch.relu(self.norm(self.up(x)))))


class Small(nn.Module):
    """With dropout and batch norm: both must not notice the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.blocks = nn.Sequential(*(Residual() for _ in range(3)))
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(pixel_values)).mean((2, 3)))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def elastic(**options: object) -> nn.Module:
    return rewrite(plain(), Elastic((1, 2), (0.5,), multiple=4, **options)).train()


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def perceptrons() -> nn.Module:
    """Without batch norm: two processes with half of a batch each must agree with one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Sequential(*(Perceptron() for _ in range(3))), nn.Linear(8, 3))
    return rewrite(net, Elastic((1,), (0.5,))).train()


def vectors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (6,), generator=generator)
    return {"inputs": torch.randn(6, 5, generator=generator), "labels": labels}


def batch(seed: int = 0, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, 7, 7, generator=generator)
    return {"pixel_values": x, "labels": torch.randint(3, (rows,), generator=generator)}


EXAMPLES = [
    Example(
        "objective",
        "sandwich",
        options={"base": "classification", "start": 0.0, "ramp": 0.0},
        model=perceptrons,
        batch=vectors,
        bad={"ramp": 0.5},
    ),
]


def gradients(model: nn.Module, *losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def test_the_share_is_zero_then_linear_then_one() -> None:
    steps = 200
    one = Sandwich("classification", start=0.5, ramp=0.1)
    shares = [one.share((step + 1) / steps) for step in range(steps)]
    assert shares[:80] == [0.0] * 80
    assert shares[80:100] == pytest.approx([(s + 1) / 20 for s in range(20)])
    assert shares[100:] == [1.0] * 100
    sudden = Sandwich("classification", start=0.5, ramp=0.0, multiplier=0.5)
    assert [sudden.share((s + 1) / 4) for s in range(4)] == [0.0, 0.0, 0.5, 0.5]
    assert Sandwich("classification", start=0.0, ramp=0.0).share(0.0) == 1.0


def test_what_the_parts_are_trained_with_grows_linearly_to_the_rate_at_the_start() -> None:
    schedule = {"name": "warmup_cosine", "warmup": 0.1}
    one = Sandwich("classification", start=0.5, ramp=0.1, schedule=schedule)
    rate = lambda fraction: warmup_cosine(fraction, warmup=0.1)  # noqa: E731
    assert one.share(0.45) * rate(0.45) == pytest.approx(rate(0.5) / 2)
    assert one.share(0.5) == pytest.approx(1.0), "continuous"
    assert one.share(0.405) * rate(0.405) == pytest.approx(rate(0.5) * 0.05)


@pytest.mark.parametrize("mode", ["slice", "mask"])
def test_the_gradient_of_a_step_is_the_sum_of_four_made_by_hand(mode: str) -> None:
    model = elastic(mode=mode)
    supernet(model).set(supernet(model).smallest())
    objective = Sandwich("classification", start=0.5, ramp=0.2, temperature=2.0, seed=3)
    objective.set_progress(0.4)
    share, net, rows = 0.5, supernet(model), batch()
    torch.manual_seed(7)
    losses = objective(model, rows)
    found = gradients(model, losses["loss"])
    torch.manual_seed(7)
    predictions = model(rows["pixel_values"])
    whole = F.cross_entropy(predictions, rows["labels"])
    goal = torch.softmax(predictions.detach() / 2, -1)
    terms = []
    drawn = objective.draw(net)
    assert drawn[0] == net.smallest()
    assert len(drawn) == 3
    for part in drawn:
        with net.running_as(part), undistracted(model):
            guess = torch.log_softmax(model(rows["pixel_values"]) / 2, -1)
        terms.append(share * 4 * -(goal * guess).sum(-1).mean())
    expected = gradients(model, whole, *terms)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"], whole + sum(terms))
    torch.testing.assert_close(losses["smallest"], terms[0].detach() / share)
    assert losses["measure"] == whole
    torch.manual_seed(7)
    parts = gradients(model, *objective.parts(model, rows))
    for name in expected:
        torch.testing.assert_close(parts[name], expected[name], rtol=1e-4, atol=1e-6)


def test_followed_predictions_have_no_gradient_and_the_loss_is_no_divergence() -> None:
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = soft_cross_entropy(student, teacher.detach(), 3.0)
    p, q = torch.softmax(teacher / 3, -1), torch.log_softmax(student / 3, -1)
    entropy = -(p * p.log()).sum(-1)
    divergence = F.kl_div(q, p.log(), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(loss, 9 * (divergence + entropy))
    model, objective = elastic(), Sandwich("classification", start=0.0, ramp=0.0, samples=0)
    torch.manual_seed(1)
    head = gradients(model, *list(objective.parts(model, batch()))[1:])["head.bias"]
    with torch.no_grad():
        torch.manual_seed(1)
        goal = torch.softmax(model(batch()["pixel_values"]), -1)
        net = supernet(model)
        with net.running_as(net.smallest()), undistracted(model):
            guess = torch.softmax(model(batch()["pixel_values"]), -1)
    torch.testing.assert_close(head, (guess - goal).mean(0), rtol=1e-4, atol=1e-6)


def train(model: nn.Module, objective: object, steps: int = 6) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    for step in range(steps):
        if isinstance(objective, Sandwich):
            objective.set_progress((step + 1) / steps)
        optimizer.zero_grad()
        objective(model.train(), batch(step))["loss"].backward()
        optimizer.step()
    return [t.clone() for t in model.state_dict().values()]


def test_before_its_time_the_run_is_plain_training_bit_by_bit() -> None:
    expected = train(plain(), Classification())
    late = Sandwich("classification", start=1.0, ramp=0.0)
    assert all(map(torch.equal, train(elastic(), late), expected))
    early = Sandwich("classification", start=0.0, ramp=0.0)
    assert all(map(torch.equal, train(plain(), early), expected)), "no part to train: not elastic"
    never = Sandwich("classification", start=0.0, ramp=0.0, multiplier=0.0)
    assert all(map(torch.equal, train(elastic(), never), expected))


def test_parts_touch_neither_the_random_stream_nor_the_statistics_of_the_whole() -> None:
    found = []
    for objective in (Classification(), Sandwich("classification", start=0.0, ramp=0.0)):
        model = elastic()
        torch.manual_seed(5)
        objective(model, batch())
        found.append((torch.get_rng_state(), *model.buffers()))
        assert all(m.training for m in model.modules())
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(map(torch.equal, *found))
    view = supernet(model)
    assert view.running(view.full()) == [p for p, b in view.blocks.items() if not b.elastic_skipped]


def test_the_parts_learn_what_the_whole_knows() -> None:
    model = elastic(sort=True)
    objective = Sandwich("classification", start=0.0, ramp=0.0)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(12):
        objective.set_progress((step + 1) / 12)
        optimizer.zero_grad()
        found = objective(model, batch(0, 12))
        found["loss"].backward()
        optimizer.step()
        losses.append(float(found["smallest"]))
    assert losses[-1] < 0.95 * losses[0]


def test_draws_hang_on_seed_and_progress_alone() -> None:
    net = supernet(elastic())
    one, two, other = (Sandwich("classification", seed=s) for s in (1, 1, 2))
    seen = []
    for fraction in (0.6, 0.7, 0.8):
        for objective in (one, two, other):
            objective.set_progress(fraction)
        assert one.draw(net) == two.draw(net)
        assert one.draw(net) == one.draw(net)
        seen += [*one.draw(net)[1:], *other.draw(net)[1:]]
    assert len(set(seen)) > 4


def test_in_evaluation_it_is_the_base_alone() -> None:
    model, objective = elastic().eval(), Sandwich("classification", start=0.0, ramp=0.0)
    assert objective(model, batch())["loss"] == Classification()(model, batch())["loss"]
    assert set(objective(model, batch())) == {"loss", "count", "measure", "task", "task.accuracy"}


def test_beside_another_objective_and_over_one_that_masks_its_batch() -> None:
    torch.manual_seed(0)
    model = Transformer(3, 16, 2, vocabulary=32, context=8, causal=False)
    model = rewrite(model, Elastic((1,), (0.5,))).train()
    rows = {"input_ids": torch.randint(30, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    rows["attention_mask"][0, 5:] = 0
    base = MaskedToken(31, 32, share=0.5)
    objective = Sandwich(copy.deepcopy(base), start=0.0, ramp=0.0, samples=0)
    losses = objective(model, rows)
    masked = base.mask(rows)
    goal = logits(call(model, masked)).detach()
    net = supernet(model)
    with net.running_as(net.smallest()), undistracted(model):
        each = soft_cross_entropy(logits(call(model, masked)), goal)
    kept = rows["attention_mask"].bool()
    torch.testing.assert_close(losses["smallest"], each[kept].mean())
    rows["labels"] = torch.full((4, 8), 3)
    rows["labels"][1:3, 2:] = -100
    followed = Sandwich("next_token", start=0.0, ramp=0.0, samples=0)(model, rows)["smallest"]
    with torch.no_grad():
        goal = logits(call(model, rows))
        with net.running_as(net.smallest()):
            each = soft_cross_entropy(logits(call(model, rows)), goal)
    torch.testing.assert_close(followed, each[kept & (rows["labels"] != -100)].mean())
    both = WeightedSum([(1.0, objective), (0.5, Classification())], ["sandwich", "classes"])
    assert both.needs == "model"
    objective.set_progress(0.3)
    both.set_progress(0.6)
    assert objective.fraction == 0.6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ramp": 0.6}, "a ramp of 0.6 does not fit before start, at 0.55 of the training"),
        ({"start": 1.5}, "start must be in 0..1"),
        ({"ramp": -0.1}, "ramp not negative"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"samples": -1}, "samples must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(LaminaError, match=said):
        Sandwich("classification", **options)


def test_outputs_alone_are_not_enough() -> None:
    with pytest.raises(LaminaError, match="sandwich needs the model"):
        Sandwich("classification").loss(torch.zeros(2, 3), batch())
