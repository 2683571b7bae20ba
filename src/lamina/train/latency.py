"""How long the model takes for a batch: what a rewrite is often for. Seen while it is evaluated, at no extra pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ForwardTimes:
    """Times what a model itself takes of each batch: neither the data, nor the loss, nor a teacher."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        """By batch; of several calls of the model the sum."""

    @contextmanager
    def batch(self, model: nn.Module) -> Iterator[None]:
        """Time the calls of the model inside this context as one batch; a model that is never called leaves no time."""
        begun: list[float] = []
        calls: list[float] = []

        def begin(*_: object) -> None:
            begun.append(self._now())

        def end(*_: object) -> None:
            taken = self._now() - begun.pop()
            # A model that calls itself is inside its own time.
            if not begun:
                calls.append(taken)

        hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if calls:
            self.seconds.append(sum(calls))

    @property
    def median(self) -> float:
        """Seconds of a batch, the median; 0 where none was timed."""
        return statistics.median(self.seconds) if self.seconds else 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
