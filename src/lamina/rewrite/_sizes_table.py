"""What a model is worth and costs at each size, as figures and as a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lamina.batches import Batch, call

Metric = Callable[[nn.Module, Sequence[Batch]], float]
"""From a model that gives embeddings (B, width), and batches, to a number."""


@dataclass(frozen=True)
class Size:
    """One size of a model."""

    layers: int
    width: int
    metric: float
    milliseconds: float
    """Of one batch, median."""
    bytes: int
    """Of the model's weights."""
    embedding_bytes: int
    """Of one embedding."""


@dataclass(frozen=True)
class Sizes:
    """All sizes that were asked for."""

    rows: tuple[Size, ...]

    def table(self) -> str:
        """Word them for people: quality, time a batch, bytes of the model and of one embedding."""
        head = f"{'layers':>6} {'width':>6} {'metric':>9} {'ms':>9} {'model':>12} {'embedding':>9}"
        lines = [
            f"{r.layers:>6} {r.width:>6} {r.metric:>9.4f} {r.milliseconds:>9.2f} {r.bytes:>12,} {r.embedding_bytes:>9,}"
            for r in self.rows
        ]
        return "\n".join([head, *lines])


@torch.no_grad()
def measured(model: nn.Module, batches: Sequence[Batch], metric: Metric, layers: int, width: int, rounds: int) -> Size:
    """Measure one truncated model."""
    embedding = call(model, batches[0])
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call(model, batches[0])
        if embedding.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    vector = embedding[0].numel() * embedding.element_size()
    return Size(layers, width, float(metric(model, batches)), 1e3 * statistics.median(times), weights, vector)
