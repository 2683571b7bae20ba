"""What a run hands back, and the stages between two rewrites that its table compares."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass
class Stage:
    """The time between two rewrites; one row of a run's table."""

    name: str
    """`start`, or the pass that made this model."""
    parameters: int
    loss_before: float | None = None
    """Evaluation loss as the stage begins."""
    loss_after: float | None = None
    """Evaluation loss as it ends."""
    steps: int = 0
    seconds: float = 0.0
    """Spent in training steps."""
    items: int = 0
    """Tokens (or rows) of all processes trained on."""
    latency: float = 0.0
    """Median seconds that the model, as the stage ended, took for an evaluation batch; 0 where none was timed."""
    memory: int = 0
    """Peak bytes: allocated on the GPU, or resident on a CPU (seen at log points)."""

    def trained(self, steps: int, seconds: float, memory: int) -> float:
        """Add the time of so many steps (counted in `steps` and `items` already); return their rate."""
        self.seconds += seconds
        self.memory = max(self.memory, memory)
        return self.items / self.steps * steps / seconds

    @property
    def rate(self) -> float:
        """Tokens (or rows) a second; 0 where nothing was trained."""
        return self.items / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """The result of `Trainer.fit`."""

    model: nn.Module
    """Bare, whole, on the training device, in evaluation mode."""
    steps: int
    """Steps done."""
    loss: float
    """Training loss at the last log point."""
    evaluation: float | None
    """Evaluation loss of `model`; None without an evaluation set."""
    measured: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    """What else the objective logs (accuracy) over the evaluation set."""
    stages: tuple[Stage, ...]
    """One a model: the original, then what each rewrite made of it."""
    unit: str
    """What rates count: tokens or rows."""
    best: dict[str, Any] | None = None
    """`step` and `loss` of the best evaluation since the latest rewrite."""
    stopped_early: bool = False
    folder: Path | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Of the data, as the model was built with."""


def count(model: nn.Module) -> int:
    """Return the number of parameters, sharded or not."""
    return sum(p.numel() for p in model.parameters())


def peak_memory(device: torch.device) -> int:
    """Return the peak of allocated bytes since `forget_peak` (CUDA), or the bytes resident now (elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        import os

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak(device: torch.device) -> None:
    """Begin a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Stopwatch:
    """Seconds between two looks, pauses left out."""

    def __init__(self) -> None:
        self.mark = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap or reset."""
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        return seconds

    def reset(self) -> None:
        """Leave out what came since the last lap."""
        self.mark = time.perf_counter()
