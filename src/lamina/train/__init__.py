"""The training loop, its checkpoints and its report.

options     TrainOptions
trainer     Trainer: steps, rewrites on the way, evaluations, checkpoints, resume
phases      Scheduled: a pass and when it runs
run         train(recipe): everything built from a recipe
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lamina.train.options import TrainOptions as TrainOptions

if TYPE_CHECKING:
    from lamina.train.outcome import Run as Run
    from lamina.train.phases import Scheduled as Scheduled
    from lamina.train.precision import TrainingError as TrainingError
    from lamina.train.run import train as train
    from lamina.train.trainer import Trainer as Trainer

_HOMES = {"Run": "outcome", "Scheduled": "phases", "Trainer": "trainer", "TrainingError": "precision", "train": "run"}


def __getattr__(name: str) -> Any:
    # Checking a recipe reads the options alone: the loop and torch.distributed come when they are asked for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
