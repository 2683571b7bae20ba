from __future__ import annotations

import math

import pytest
import torch
from tests.train.tiny import DropLast, WidenClasses, adamw, data, net, numbers, trainer
from torch import nn

from lamina.data import Columns, Data, Loader
from lamina.errors import LaminaError, PlanError
from lamina.gradients import Mean
from lamina.objectives import Classification
from lamina.parallel.data_parallel import Placement
from lamina.train.metrics import read
from lamina.train.phases import Scheduled
from lamina.train.precision import TrainingError


def plain_loop(model: nn.Module, on: Data, steps: int, schedule=None, clip=None) -> list[float]:
    torch.manual_seed(0)
    loader, objective, optimizer = Loader(on.train, on.batch, seed=0), Classification(), adamw(model)
    losses = []
    for step in range(steps):
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * schedule((step + 1) / steps)
        optimizer.zero_grad()
        loss = objective(model, next(loader))["loss"]
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("schedule", "clip"), [(None, None), (lambda f: 1 - f / 2, 0.1)])
def test_the_trainer_is_the_plain_loop_bit_by_bit(tmp_path, schedule, clip) -> None:
    expected = plain_loop(model := net(), data(), 12, schedule, clip)
    run = trainer(tmp_path, schedule=schedule, clip=clip).fit()
    assert [r["loss"] for r in numbers(tmp_path) if r["event"] == "step"] == expected
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), run.model.state_dict().values(), strict=True)
    )


def test_micro_batches_of_a_padded_batch_give_the_same_gradient(tmp_path) -> None:
    # Batch norm would see other rows; dropout other random numbers.
    runs = []
    for parts in (1, 2, 8):
        folder = tmp_path / str(parts)
        trainer(folder, model=net(dropout=0.0, batch_norm=False), on=data(padded=True), accumulate=parts).fit()
        runs.append([r["loss"] for r in numbers(folder) if r["event"] == "step"])
    assert runs[1] == pytest.approx(runs[0], rel=2e-5)
    assert runs[2] == pytest.approx(runs[0], rel=2e-5)


def test_log_every_averages_the_steps_in_between_by_count(tmp_path) -> None:
    trainer(tmp_path / "a", on=data(padded=True)).fit()
    trainer(tmp_path / "b", on=data(padded=True), log_every=4).fit()
    every = [r["loss"] for r in numbers(tmp_path / "a") if r["event"] == "step"]
    seldom = [r["loss"] for r in numbers(tmp_path / "b") if r["event"] == "step"]
    loader = Loader(data(padded=True).train, 8, seed=0)
    counts = [int((next(loader)["labels"] >= 0).sum()) for _ in range(12)]
    expected = [
        sum(loss * c for loss, c in zip(every[i : i + 4], counts[i : i + 4], strict=True)) / sum(counts[i : i + 4])
        for i in (0, 4, 8)
    ]
    assert seldom == pytest.approx(expected, rel=1e-12)


def test_evaluation_is_the_mean_over_the_whole_set(tmp_path) -> None:
    on = data(rows=44, padded=True)
    run = trainer(tmp_path, on=on, evaluate_every=6).fit()
    batch = on.evaluation.batch(torch.arange(len(on.evaluation)))
    with torch.no_grad():
        outputs = run.model(batch["inputs"])
        expected = nn.functional.cross_entropy(outputs, batch["labels"])
    assert run.evaluation == pytest.approx(expected.item(), rel=1e-6)
    real = batch["labels"] != -100
    right = (outputs.argmax(-1) == batch["labels"])[real].double().mean()
    assert 0 < real.sum() < real.numel()
    assert run.measured == {"accuracy": pytest.approx(right.item(), rel=1e-6)}
    rows = [r for r in numbers(tmp_path) if r["event"] == "evaluation"]
    assert [r["step"] for r in rows] == [6, 12]
    assert rows[-1]["accuracy"] == run.measured["accuracy"]


class Poisoned(nn.Module):
    """An objective whose loss is no number at one call."""

    needs = "outputs"

    def __init__(self, at: int, value: float) -> None:
        super().__init__()
        self.inner, self.at, self.value, self.calls = Classification(), at, value, 0

    def forward(self, model, batch):
        losses = self.inner(model, batch)
        self.calls += self.training
        return {**losses, "loss": losses["loss"] * self.value} if self.calls == self.at else losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_step_and_checkpoint(tmp_path, value) -> None:
    with pytest.raises(TrainingError, match=r"loss of step 7 is (nan|inf); the last good checkpoint is step-000005"):
        trainer(tmp_path, objective=Poisoned(7, value), checkpoint_every=5, log_every=100).fit()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


class Progress(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 5)
        self.told: list[float] = []

    def set_progress(self, fraction: float) -> None:
        self.told.append(fraction)


def test_progress_is_told_from_first_to_last_step() -> None:
    model = Progress()
    trainer(model=model, steps=4).fit()
    assert model.told == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_early_stop_counts_evaluations_without_a_better_loss() -> None:
    frozen = trainer(
        model=net(batch_norm=False),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0),
        steps=50,
        evaluate_every=2,
        patience=3,
    ).fit()
    assert frozen.stopped_early
    assert frozen.steps == 8
    assert frozen.best["step"] == 2


def test_keep_best_ends_with_the_best_weights(tmp_path) -> None:
    def rate(fraction: float) -> float:
        return 1.0 if fraction <= 0.5 else 300.0

    run = trainer(tmp_path, steps=20, evaluate_every=2, keep_best=True, keep_last=1, schedule=rate).fit()
    rows = [r for r in numbers(tmp_path) if r["event"] == "evaluation"]
    best = min(rows, key=lambda r: r["loss"])
    assert rows[-1]["loss"] > best["loss"]
    assert run.best == {"step": best["step"], "loss": best["loss"]}
    assert run.evaluation == best["loss"]


class Unmeasurable(Classification):
    """Its first evaluation is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __call__(self, model, batch):
        losses = super().__call__(model, batch)
        self.seen += not model.training
        return {**losses, "measure": losses["loss"] * math.nan} if self.seen == 1 else losses


def test_an_evaluation_that_is_no_number_is_never_the_best(tmp_path) -> None:
    run = trainer(tmp_path, objective=Unmeasurable(), evaluate_every=4, keep_best=True).fit()
    rows = [r for r in numbers(tmp_path) if r["event"] == "evaluation"]
    assert math.isnan(rows[0]["loss"])
    assert run.best == min(({"step": r["step"], "loss": r["loss"]} for r in rows[1:]), key=lambda b: b["loss"])


def test_rewrites_run_before_during_and_after(tmp_path) -> None:
    rewrites = [
        Scheduled(DropLast(), "before"),
        Scheduled(WidenClasses(), 0.5),
        Scheduled(DropLast(), "after"),
    ]
    run = trainer(tmp_path, rewrites=rewrites).fit()
    rows = [r for r in numbers(tmp_path) if r["event"] == "rewrite"]
    assert [(r["step"], r["at"]) for r in rows] == [(0, "before"), (6, 0.5), (12, "after")]
    assert rows[1]["kept"] == len(list(run.model.parameters())) - 2 + 2
    assert rows[1]["derived"] == ["head.weight", "head.bias"]
    assert rows[1]["dropped"] == ["head.weight", "head.bias"]
    assert [s.steps for s in run.stages] == [0, 6, 6, 0]
    block = 8 * 8 + 8
    assert run.stages[0].parameters - run.stages[1].parameters == block
    assert run.stages[2].parameters - run.stages[1].parameters == 9
    assert run.stages[0].loss_after == run.stages[0].loss_before
    assert run.stages[3].loss_after == run.evaluation
    assert all(s.loss_before is not None and s.loss_after is not None for s in run.stages)
    assert all(s.latency > 0 for s in run.stages)
    assert run.model.head.weight.shape == (6, 8)


def test_calibration_does_not_move_the_training_data(tmp_path) -> None:
    trainer(tmp_path / "a", model=net(dropout=0.0)).fit()
    # Six classes of which the sixth starts at 0: only the steps before the rewrite are comparable.
    trainer(tmp_path / "b", model=net(dropout=0.0), rewrites=[Scheduled(WidenClasses(), 1.0)]).fit()
    a, b = ([r["loss"] for r in numbers(tmp_path / f) if r["event"] == "step"] for f in "ab")
    assert a == b


class Adapted(nn.Module):
    """An objective with a parameter of its own."""

    needs = "outputs"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, model, batch):
        losses = Classification()(model, batch)
        return {**losses, "loss": losses["loss"] * self.scale.square()}


def test_an_objectives_own_parameters_are_trained() -> None:
    objective = Adapted()
    trainer(objective=objective, steps=3).fit()
    assert objective.scale.item() < 1


def test_a_reducer_in_one_process_changes_nothing_where_it_averages(tmp_path) -> None:
    trainer(tmp_path / "a").fit()
    trainer(tmp_path / "b", reducer=Mean()).fit()
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_like_full(tmp_path, precision) -> None:
    full = trainer(model=net(dropout=0.0), steps=30).fit()
    low = trainer(model=net(dropout=0.0), steps=30, precision=precision).fit()
    assert low.loss == pytest.approx(full.loss, rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_compiled_model_gives_the_same_curve(tmp_path) -> None:
    # A fresh model in the middle, so that the second half is compiled anew.
    for name, compile in (("a", False), ("b", True)):
        rewrites = [Scheduled(WidenClasses(), 0.5)]
        trainer(tmp_path / name, model=net(dropout=0.0), compile=compile, rewrites=rewrites, steps=6).fit()
    a, b = ([r["loss"] for r in numbers(tmp_path / f) if r["event"] == "step"] for f in "ab")
    assert b == pytest.approx(a, rel=1e-4)


def test_fit_runs_once() -> None:
    one = trainer(steps=1)
    one.fit()
    with pytest.raises(LaminaError, match="was called already"):
        one.fit()


class Elsewhere(Mean):
    def tasks(self, step, rank, world):
        return (rank, rank + 1)


def test_what_cannot_run_is_refused_at_once() -> None:
    with pytest.raises(PlanError, match="Elsewhere gives a process other shards than its own"):
        trainer(reducer=Elsewhere()).fit()
    with pytest.raises(PlanError, match="use bf16 with shard"):
        trainer(placement=Placement(shard=2), precision="fp16")
    with pytest.raises(LaminaError, match="need a folder to write to"):
        trainer(checkpoint_every=1)
    with pytest.raises(LaminaError, match="accumulate is 9, but a process has only 8 rows"):
        trainer(accumulate=9).fit()


def test_a_folder_with_a_run_is_not_overwritten(tmp_path) -> None:
    trainer(tmp_path, checkpoint_every=6).fit()
    with pytest.raises(LaminaError, match="holds the checkpoints of a run: resume it"):
        trainer(tmp_path, checkpoint_every=6).fit()
    with pytest.raises(LaminaError, match="seed=0, this one has seed=3"):
        trainer(tmp_path, checkpoint_every=6, seed=3).fit(resume=True)


def test_evaluation_without_a_set_is_refused_at_once() -> None:
    alone = Data(Columns({"inputs": torch.zeros(8, 6)}), None, 4)
    with pytest.raises(LaminaError, match="evaluate_every is 5, but data has no evaluation set"):
        trainer(on=alone, evaluate_every=5)


def test_metrics_can_be_read_while_they_are_written(tmp_path) -> None:
    trainer(tmp_path, steps=3).fit()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"event": "st')
    assert [r["event"] for r in read(path)] == ["step", "step", "step", "end"]
