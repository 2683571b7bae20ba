"""One training step of Trainer, of Lightning and of transformers.Trainer against the same step in a bare PyTorch loop.

All train the model of `recipes/first.yaml` (its data in memory, its LAMB and schedule, precision and clipping; no
rewrite) from the same weights on the same batches, in turn. The bare loop and the two frameworks take torch's own
cross entropy and a list of ready batches and log nothing; ours runs its objective and its loader and logs as it does by
default. The clock is a hook on the model's forward: setting up a fit counts in none of them.
Run: python -m benchmarks trainer (ROUNDS=5: quicker; OMP_NUM_THREADS=1: one thread).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from benchmarks.harness import Row, write
from lamina.data import Columns, Data, Loader
from lamina.recipe import check, load
from lamina.train import Trainer, TrainOptions
from lamina.train.distributed import World
from lamina.train.run import trainer as from_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "first.yaml"
SMALL = ("model.depth=2", "model.width=64", "data.context=64", "data.batch=4")
"""Hardly any arithmetic: what remains is the overhead of the step."""
SKIP, WINDOW = 5, 10
"""First steps left out; steps of one timing: as many as lie between two logs of ours."""


@dataclass(frozen=True)
class Task:
    """What every contestant is given."""

    model: nn.Module
    data: Data
    batches: list[dict[str, Tensor]]
    make_optimizer: Callable[[nn.Module], Optimizer]
    schedule: Callable[[float], float]
    objective: Any
    options: TrainOptions

    def optimize(self, model: nn.Module) -> tuple[Optimizer, LambdaLR]:
        optimizer = self.make_optimizer(model)
        return optimizer, LambdaLR(optimizer, lambda step: self.schedule(min(1.0, (step + 1) / self.options.steps)))


@dataclass
class Clock:
    """Notes when each forward pass of a model begins.

    Wall time; with one thread the CPU time of this process, which other programs disturb less.
    """

    stamps: list[float] = field(default_factory=list)

    def watch(self, model: nn.Module) -> nn.Module:
        now = time.perf_counter if torch.get_num_threads() > 1 else time.process_time
        model.register_forward_pre_hook(lambda *_: self.stamps.append(now()))
        return model

    def steps(self) -> list[float]:
        """Seconds a step, one figure a window."""
        edges = self.stamps[SKIP::WINDOW]
        return [(b - a) / WINDOW for a, b in itertools.pairwise(edges)]


def task(*overrides: str, windows: int) -> Task:
    """Build the recipe's parts, and batches enough for the windows (the last stamp opens a step of its own)."""
    recipe = load(RECIPE, [*overrides, "rewrite=[]", "objective=next_token", "train.checkpoint_every=0"])
    made = from_recipe(check(recipe), World(), None)
    steps, batch, seed = SKIP + windows * WINDOW + 1, made.data.batch, made.options.seed
    rows = made.data.train.batch(torch.arange(steps * batch))
    data = dataclasses.replace(made.data, train=Columns(rows), evaluation=None)
    options = dataclasses.replace(made.options, steps=steps, evaluate_every=0, evaluate_batches=None)
    loader = Loader(data.train, batch, seed=seed)
    batches = [next(loader) for _ in range(steps)]
    assert made.schedule is not None
    return Task(made.model, data, batches, made.make_optimizer, made.schedule, made.objective, options)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def ours(given: Task, model: nn.Module) -> None:
    Trainer(
        model,
        given.data,
        given.objective,
        given.make_optimizer,
        options=given.options,
        schedule=given.schedule,
    ).fit()


def bare_loop(given: Task, model: nn.Module) -> None:
    optimizer, schedule = given.optimize(model)
    bf16, clip = given.options.precision == "bf16", given.options.clip
    for batch in given.batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, batch)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()


def lightning(given: Task, model: nn.Module) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def configure_optimizers(self) -> Any:
            optimizer, schedule = given.optimize(model)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return loss_of(self.net, batch)

    L.Trainer(
        max_steps=given.options.steps,
        accelerator="cpu",
        precision="bf16-mixed" if given.options.precision == "bf16" else "32-true",
        gradient_clip_val=given.options.clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), DataLoader(given.batches, batch_size=None))


def hugging_face(given: Task, model: nn.Module) -> None:
    import transformers

    class WithLoss(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            loss = loss_of(model, inputs)
            return (loss, {}) if return_outputs else loss

        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(given.batches, batch_size=None)

    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=given.options.steps,
            bf16=given.options.precision == "bf16",
            max_grad_norm=given.options.clip or 0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = WithLoss(model, options, train_dataset=given.batches, optimizers=given.optimize(model))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


CONTESTANTS: dict[str, Callable[[Task, nn.Module], None]] = {
    "bare loop": bare_loop,
    "lamina Trainer": ours,
    "Lightning": lightning,
    "transformers.Trainer": hugging_face,
}


def fit(name: str, given: Task) -> tuple[list[float], nn.Module]:
    """Train a copy of the model; return the seconds of a step, window by window, and the copy."""
    clock, model = Clock(), copy.deepcopy(given.model).train()
    gc.collect()
    CONTESTANTS[name](given, clock.watch(model))
    assert len(clock.stamps) == given.options.steps, (name, len(clock.stamps))
    return clock.steps(), model


def agree(given: Task) -> None:
    """See that all train alike: the same loss on the first batch at the end, as far as the rounding of bf16 goes."""
    losses = {}
    for name in CONTESTANTS:
        _, model = fit(name, given)
        with torch.no_grad():
            losses[name] = loss_of(model.train(), given.batches[0]).item()
    reached = losses["bare loop"]
    assert all(abs(v - reached) < 0.02 * reached for v in losses.values()), f"they train differently: {losses}"
    print("   losses", {k: round(v, 4) for k, v in losses.items()}, flush=True)


def measure(what: str, given: Task, rounds: int, goals: dict[str, str]) -> list[Row]:
    """Let all take turns, in changing order; compare each one's windows with the bare loop's of the same round."""
    agree(given)
    windows: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for turn in range(rounds):
        names = list(CONTESTANTS)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            windows[name] += fit(name, given)[0]
    return [row(what, name, windows, rounds, goals.get(name, "none")) for name in CONTESTANTS if name != "bare loop"]


def row(what: str, name: str, windows: dict[str, list[float]], rounds: int, goal: str) -> Row:
    a, b = windows[name], windows["bare loop"]
    each = len(a) // rounds
    per_round = [
        statistics.median(a[i : i + each]) / statistics.median(b[i : i + each]) for i in range(0, len(a), each)
    ]
    low, _, high = statistics.quantiles(per_round, n=4)
    middle = statistics.median(a), statistics.median(b)
    print(
        f"{what}: {name} / bare loop = {middle[0] / middle[1]:.3f} [{low:.3f}, {high:.3f}]  "
        f"({1e3 * middle[0]:.2f} ms, {1e3 * middle[1]:.2f} ms; goal {goal})",
        flush=True,
    )
    milliseconds = middle[0] * 1e3, middle[1] * 1e3
    return Row(what, name, "bare loop", middle[0] / middle[1], (low, high), goal, milliseconds)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    rounds = int(os.environ.get("ROUNDS", "15"))
    goals = {"lamina Trainer": "<= 1.02"}
    rows = measure("step of the default model", task(windows=2), rounds, goals)
    rows += measure("step of a small model (2 layers of 64)", task(*SMALL, windows=10), rounds, {})
    write("trainer", rows, ("lightning", "transformers", "accelerate"))


if __name__ == "__main__":
    main()
