"""The folder of a run: metrics, checkpoints, environment; or nothing, for a run that leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lamina.errors import LaminaError
from lamina.train import snapshot, state
from lamina.train.distributed import World
from lamina.train.environment import write_environment
from lamina.train.metrics import Metrics
from lamina.train.options import TrainOptions
from lamina.train.precision import first_bad, no_number

MAY_DIFFER = frozenset({"device", "compile", "checkpoint_every", "keep_last"})
"""Options that a resumed run may change: the numbers stay the same."""


class RunFolder:
    """Where one run writes; with `path` None, nowhere.

    Args:
        path: made where it does not exist.
        options: of the run; a checkpoint remembers them.
    Raises:
        LaminaError: checkpoints are asked for, but there is no folder.
    """

    def __init__(self, path: Path | None, options: TrainOptions) -> None:
        if path is None and (options.checkpoint_every or options.keep_best):
            raise LaminaError("checkpoint_every and keep_best need a folder to write to: pass folder=")
        self.path, self.options = path, options
        self.world = World()
        self.metrics = Metrics(None)

    def open(self, world: World, resume: bool) -> state.Loaded | None:
        """Prepare the folder; return the checkpoint to go on from, None = begin.

        Rows and files that a killed run wrote after that checkpoint are removed.

        Raises:
            LaminaError: the folder holds another run, or one that is not to be resumed.
        """
        self.world = world
        if self.path is None:
            if resume:
                raise LaminaError("resume needs the folder of the run: pass folder=")
            return None
        found = state.checkpoints(self.path)
        if found and not resume:
            raise LaminaError(f"{self.path} holds the checkpoints of a run: resume it, or choose another folder")
        loaded = state.load(found[-1], world) if found else None
        if loaded is not None:
            self._check_same(loaded)
        self.metrics = Metrics(self.path / "metrics.jsonl" if world.first else None)
        # Nobody may look for checkpoints any more when the first process tidies up.
        world.agree(None)
        state.together(world, self.path, str(self.path), lambda: self._tidy(loaded) if world.first else None)
        return loaded

    def note(self, row: Mapping[str, Any]) -> None:
        """Add a row to the metrics.

        Raises:
            TrainingError: it could not be written (disk full, ...).
        """
        if self.path is not None and self.metrics.path is not None:
            # The first process alone: where it fails, it ends, and the others are told by `lost_peers_told`.
            state.together(World(), self.path, str(self.metrics.path), lambda: self.metrics.append(row))

    def save(self, live: snapshot.Live, step: int, trainer: Mapping[str, Any], best: int | None) -> None:
        """Write a checkpoint, then remove the ones no longer kept (never step `best`).

        Raises:
            TrainingError: it could not be written, or a weight is no number; the earlier ones are intact.
        """
        if self.path is None:
            return
        # The loss of this step was a number, but its update may have made weights that are none.
        bad = first_bad(live.placed.bare)
        self.world.agree(bad and no_number(f"{bad} after step {step}", "no number", self.last()))
        plain, tensors = snapshot.capture(live)
        plain.update(trainer=dict(trainer), options=asdict(self.options), metrics=self.metrics.length())
        state.save(self.path, step, plain, tensors, self.world)
        if self.world.first:
            state.prune(self.path, self.options.keep_last, best if self.options.keep_best else None)

    def restore_best(self, model: nn.Module, step: int) -> None:
        """Fill the model with the weights of the checkpoint of `step`."""
        if self.path is not None:
            path = self.path / "checkpoints" / state.name_of(step)
            snapshot.restore_model(model, state.load(path, self.world))

    def last(self) -> str | None:
        """Name the last complete checkpoint."""
        found = [] if self.path is None else state.checkpoints(self.path)
        return found[-1].name if found else None

    def _tidy(self, loaded: state.Loaded | None) -> None:
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            state.clean(self.path)
            self.metrics.truncate(loaded.plain["metrics"] if loaded else 0)
            write_environment(self.path / "environment.json", self.world)

    def _check_same(self, loaded: state.Loaded) -> None:
        for key, own in asdict(self.options).items():
            saved = loaded.plain["options"].get(key)
            if key not in MAY_DIFFER and saved != own:
                raise LaminaError(f"{loaded.path} belongs to a run with {key}={saved!r}, this one has {key}={own!r}")
