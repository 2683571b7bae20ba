"""The training loop: steps, rewrites on the way, evaluations, checkpoints, resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lamina.batches import Batch, bare, to_device
from lamina.data import Data, Loader
from lamina.errors import LaminaError, PlanError
from lamina.gradients.reducer import Reducer
from lamina.objectives.objective import Objective
from lamina.parallel.data_parallel import Placement, place, same_buffers, same_everywhere, take_back
from lamina.rewrite.rewriting import Pass, Record, history
from lamina.train import distributed, phases, snapshot, state
from lamina.train.coded import ChunkLoader, coded_gradients, is_coded
from lamina.train.folder import RunFolder
from lamina.train.latency import ForwardTimes
from lamina.train.losses import PendingLosses
from lamina.train.options import TrainOptions
from lamina.train.outcome import Run, Stage, Stopwatch, count, forget_peak, peak_memory
from lamina.train.phases import Scheduled
from lamina.train.precision import loss_scaler
from lamina.train.progress import display
from lamina.train.step import Losses, clip_gradients, complete_optimizer, evaluate, gradients, set_rates, size_of


class Trainer:
    """Trains a model and rewrites it on the way; the same numbers whether or not it was killed and resumed.

        Trainer(model, data, NextToken(), lambda m: AdamW(m.parameters()), options=TrainOptions(steps=100)).fit()

    One process, or several started by torchrun (then data-parallel: every process calls this alike). The global
    random state is seeded with `seed` + rank when training begins.

    Args:
        model: any module; it is trained in place (a pass may return a new root, a sharded model is a new one).
        data: training and evaluation rows, global batch.
        objective: what to minimise; its own parameters join the optimizer as a group of theirs.
        optimizer: makes the optimizer from the model, once the model is where it trains.
        options: how long, how precisely, how carefully.
        rewrites: passes with their times; a bare pass runs before training.
        reducer: how gradients of several processes become one; None = their mean.
        placement: how the processes share the model; None = a replica each.
        folder: of metrics and checkpoints; None = nothing is written.
        schedule: multiplier of the learning rate from the fraction of training, (step + 1) / steps; None = 1.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        objective: Objective,
        optimizer: Callable[[nn.Module], Optimizer],
        *,
        options: TrainOptions,
        rewrites: Sequence[Scheduled | Pass[Any]] = (),
        reducer: Reducer | None = None,
        placement: Placement | None = None,
        folder: str | Path | None = None,
        schedule: Callable[[float], float] | None = None,
    ) -> None:
        if data.evaluation is None and options.evaluate_every:
            raise LaminaError(f"evaluate_every is {options.evaluate_every}, but {data.name} has no evaluation set")
        if options.precision == "fp16" and placement is not None and placement.shard > 1:
            raise PlanError("fp16 scales the loss by whole gradients, and shard has only parts: use bf16 with shard")
        self.model, self.data, self.objective, self.make_optimizer = bare(model), data, objective, optimizer
        self.options, self.reducer, self.placement, self.schedule = options, reducer, placement, schedule
        self.rewrites = phases.in_order(rewrites, options.steps)
        self.folder = RunFolder(None if folder is None else Path(folder), options)
        self.step = self.done = self.without_better = 0
        self.best: dict[str, Any] | None = None
        self.loss = float("nan")
        self.unit = "rows"
        self.losses = PendingLosses()
        self.optimizer: Optimizer | None = None

    def fit(self, resume: bool = False) -> Run:
        """Train to the end and return what came out.

        Args:
            resume: go on from the last checkpoint in the folder; without one, begin.
        Raises:
            TrainingError: the loss is no number, a checkpoint cannot be written, another process ended.
            LaminaError: the folder holds another run.
        """
        self.world = distributed.start(self.options.device)
        with distributed.lost_peers_told(self.world):
            self._begin(resume)
            with display(self.options.steps, start=self.step, unit=self.unit, shown=self.world.first) as self.display:
                while self.step < self.options.steps and not self._stopped():
                    for scheduled in self._due():
                        self._rewrite(scheduled)
                    self._train()
                    self._look_around()
            return self._end()

    def _begin(self, resume: bool) -> None:
        o, world = self.options, self.world
        if self.step or self.optimizer is not None:
            raise LaminaError("fit() was called already: make another Trainer")
        torch.manual_seed(o.seed + world.rank)
        if isinstance(self.objective, nn.Module):
            same_everywhere(self.objective.to(world.device))
        self.scaler = loss_scaler(o.precision, world.device)
        self.loader: Loader | ChunkLoader = Loader(
            self.data.train, self.data.batch, seed=o.seed, rank=world.rank, world=world.size
        )
        if is_coded(self.reducer, world):
            chunks = self.reducer.chunks(world.size)  # type: ignore[union-attr]
            self.loader = ChunkLoader(self.data.train, self.data.batch, seed=o.seed, chunks=chunks)
        self.unit = size_of(self.data.train.batch(torch.tensor([0])))[1]
        loaded = self.folder.open(world, resume)
        if loaded is not None:
            records = [Record(**r) for r in loaded.plain["trainer"]["history"]]
            self.model = phases.replay_training(self.model, self.objective, records)
        self._place()
        self.stages = [Stage("start", count(self.model))]
        if loaded is None and self.rewrites:
            self.stages[0].loss_before = self._measure()["loss"]
        while loaded is None and self.done < len(self.rewrites) and self.rewrites[self.done].at == "before":
            self._rewrite(self.rewrites[self.done])
        self.optimizer = complete_optimizer(self.make_optimizer(self.model), self.objective)
        if loaded is not None:
            self._restore(loaded)
        self._tell(self.step / o.steps)
        self.watch = Stopwatch()

    def _place(self) -> None:
        self.placed = place(
            self.model,
            self.placement or Placement(data=self.world.size),
            device=self.world.device,
            reducer=self.reducer,
            compile=self.options.compile,
            optimizer=self.optimizer,
        )
        self.placed.module.train()
        self.listeners = phases.listeners(self.model, self.objective)

    def _train(self) -> None:
        """One optimizer step; nothing here waits for the device."""
        o, optimizer = self.options, self._optimizer()
        self._tell((self.step + 1) / o.steps)
        optimizer.zero_grad(set_to_none=True)
        weighted, counted, losses, batch = self._gradients()
        if o.clip is not None:
            self.scaler.unscale_(optimizer)
            clip_gradients([p for g in optimizer.param_groups for p in g["params"]], o.clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.losses.add(weighted, counted, losses)
        self.step += 1
        self.stages[-1].steps += 1
        self.stages[-1].items += size_of(batch)[0] * self.world.size

    def _gradients(self) -> tuple[Tensor, Tensor, Losses, Batch]:
        """Set the gradients of this step; return loss * count and count, the losses, and this process's rows."""
        o, world = self.options, self.world
        if isinstance(self.loader, ChunkLoader):
            return coded_gradients(
                self.placed,
                self.objective,
                self.loader,
                self.step,
                world=world,
                parts=o.accumulate,
                precision=o.precision,
            )
        batch = to_device(next(self.loader), world.device)
        return *gradients(
            self.placed,
            self.objective,
            batch,
            world=world,
            parts=o.accumulate,
            precision=o.precision,
            scaler=self.scaler,
        ), batch

    def _look_around(self) -> None:
        """After a step: log, evaluate and save where it is time."""
        o, last = self.options, self.step == self.options.steps
        evaluating = bool(o.evaluate_every) and self.step % o.evaluate_every == 0
        saving = bool(o.checkpoint_every) and (self.step % o.checkpoint_every == 0 or last)
        if evaluating or saving or last or self._due() or self.step % o.log_every == 0:
            self._log()
        better = evaluating and self._evaluate()
        if saving or (better and o.keep_best):
            self._save()
        if evaluating or saving:
            self.watch.reset()

    def _log(self) -> None:
        """Read the losses since the last look, refuse what is no number, and write a row."""
        if not self.losses:
            return
        self.loss, steps = self.losses.read(self.step, self.world, self.folder.last())
        rate = self.stages[-1].trained(steps, self.watch.lap(), peak_memory(self.world.device))
        lr = float(self._optimizer().param_groups[0]["lr"])
        row = {"event": "step", "step": self.step, "loss": self.loss, "lr": lr}
        self.folder.note({**row, f"{self.unit}_per_second": round(rate, 1), **self.losses.beside()})
        self.display.update(self.step, self.loss, rate)

    def _evaluate(self) -> bool:
        """Measure the evaluation loss; return whether it is the best since the latest rewrite."""
        found = self._measure()
        loss = found["loss"]
        self.folder.note({"event": "evaluation", "step": self.step, **found})
        better = math.isfinite(loss) and (self.best is None or loss < self.best["loss"])
        self.without_better = 0 if better else self.without_better + 1
        if better:
            self.best = {"step": self.step, "loss": loss}
        return better

    def _measure(self) -> dict[str, float]:
        same_buffers(self.placed)
        batches = phases.held_out(self.data, self.options, self.world)
        times = ForwardTimes(self.world.device)
        found = evaluate(
            self.placed, self.objective, batches, world=self.world, precision=self.options.precision, times=times
        )
        self.stages[-1].latency = times.median
        return found

    def _stopped(self) -> bool:
        """Early stop; never with a rewrite still to come in training."""
        patience = self.options.patience
        coming = any(r.at != "after" for r in self.rewrites[self.done :])
        return patience is not None and self.without_better >= patience and not coming

    def _due(self) -> list[Scheduled]:
        return [r for r in self.rewrites[self.done :] if r.due(self.options.steps) <= self.step]

    def _rewrite(self, scheduled: Scheduled) -> None:
        """Take the model back, let the pass rewrite it, place it again, and measure it before and after."""
        ended = self.stages[-1]
        ended.loss_after = self._measure()["loss"] if ended.steps else ended.loss_before
        self.model = take_back(self.placed, optimizer=self.optimizer)
        self.model, row = phases.carry_out(
            scheduled,
            self.model,
            self.objective,
            data=self.data,
            seed=self.options.seed,
            device=self.world.device,
            optimizer=self.optimizer,
        )
        self._place()
        self._tell(self.step / self.options.steps)
        forget_peak(self.world.device)
        self.done += 1
        self.best, self.without_better = None, 0
        self.stages.append(Stage(row["pass"], count(self.model)))
        self.stages[-1].loss_before = self._measure()["loss"]
        row.update(step=self.step, loss_before=ended.loss_after, loss_after=self.stages[-1].loss_before)
        self.folder.note(row)
        self.watch = Stopwatch()

    def _tell(self, fraction: float) -> None:
        """Say how far training is: to whatever has `set_progress`, and to the learning rate."""
        for listener in self.listeners:
            listener.set_progress(fraction)
        if self.schedule is not None and self.optimizer is not None:
            set_rates(self.optimizer, self.schedule(fraction))

    def _save(self) -> None:
        same_buffers(self.placed)
        own = {
            "done": self.done,
            "best": self.best,
            "without_better": self.without_better,
            "loss": self.loss,
            "stages": [asdict(s) for s in self.stages],
            "history": [asdict(r) for r in history(self.model)],
        }
        self.folder.save(self._live(), self.step, own, self.best["step"] if self.best else None)

    def _restore(self, loaded: state.Loaded) -> None:
        snapshot.restore(self._live(), loaded)
        own = loaded.plain["trainer"]
        self.step, self.done, self.best, self.loss = loaded.step, own["done"], own["best"], own["loss"]
        self.without_better = own["without_better"]
        self.stages = [Stage(**s) for s in own["stages"]]

    def _end(self) -> Run:
        """Go back to the best weights where asked, run the passes that come after, and measure."""
        stopped = self.step < self.options.steps
        if self.options.keep_best and self.best is not None and self.best["step"] != self.step:
            self.folder.restore_best(self.model, self.best["step"])
            self._tell(self.best["step"] / self.options.steps)
        best = self.best
        self.optimizer = None
        for scheduled in self.rewrites[self.done :]:
            self._rewrite(scheduled)
        measured = {} if self.data.evaluation is None else self._measure()
        evaluation = measured.pop("loss", None)
        self.stages[-1].loss_after = evaluation if evaluation is not None else self.loss
        self.folder.note({"event": "end", "step": self.step, "loss": self.loss, "evaluation": evaluation})
        self.model = take_back(self.placed)
        return Run(
            model=self.model.eval(),
            steps=self.step,
            loss=self.loss,
            evaluation=evaluation,
            measured=measured,
            stages=tuple(self.stages),
            unit=self.unit,
            best=best,
            stopped_early=stopped,
            folder=self.folder.path,
            sizes=self.data.sizes,
        )

    def _live(self) -> snapshot.Live:
        return snapshot.Live(
            self.placed, self._optimizer(), self.objective, self.loader, self.scaler, self.reducer, self.world
        )

    def _optimizer(self) -> Optimizer:
        if self.optimizer is None:
            raise LaminaError("the optimizer exists between the passes before and those after training only")
        return self.optimizer
