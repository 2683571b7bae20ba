"""Paired timings: ours and the peer take turns in one process, and the figure is the ratio of the medians.

Machines are noisy and drift; alternating runs see the same drift, so the ratio holds where seconds do not.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One comparison; a ratio below 1 means ours is faster (or takes less)."""

    what: str
    ours: str
    peer: str
    ratio: float
    spread: tuple[float, float]
    """Quartiles of the ratios pair by pair."""
    goal: str
    milliseconds: tuple[float, float]
    """Medians, ours and peer, on this machine: for orientation only."""
    added_seconds: float | None = None
    """Median of ours - peer, pair by pair, where the goal is about that."""
    megabytes: tuple[float, float] | None = None
    """Medians, ours and peer, where the ratio is of memory."""


def pair(
    what: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    names: tuple[str, str],
    goal: str,
    rounds: int = 15,
    warmup: int = 2,
) -> Row:
    """Time two callables in alternating order and return their ratio."""
    for _ in range(warmup):
        ours()
        peer()
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (ours, peer)[which]()
            times[which].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    middle = statistics.median(times[0]), statistics.median(times[1])
    row = Row(what, *names, middle[0] / middle[1], (low, high), goal, (middle[0] * 1e3, middle[1] * 1e3))
    print(f"{what}: {names[0]} / {names[1]} = {row.ratio:.3f} [{low:.3f}, {high:.3f}]  (goal {goal})", flush=True)
    return row


def forward(model: Callable[..., object], *inputs: Tensor) -> Callable[[], object]:
    """Return what to time: a pass without gradients."""

    def run() -> object:
        with torch.inference_mode():
            return model(*inputs)

    return run


def training(model: nn.Module, *inputs: Tensor) -> Callable[[], object]:
    """Return what to time: a pass and the gradients of the outputs' mean square."""

    def run() -> object:
        model.zero_grad()
        model(*inputs).square().mean().backward()
        return None

    return run


def write(name: str, rows: list[Row], packages: tuple[str, ...] = ()) -> Path:
    """Write the rows of one benchmark to `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {p: version(p) for p in ("torch", *packages)},
    }
    path.write_text(
        json.dumps({"machine": machine, "rows": [asdict(r) for r in rows]}, indent=1) + "\n", encoding="utf-8"
    )
    return path
