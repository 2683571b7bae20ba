"""Time of one LAMB step against pytorch-optimizer's Lamb and torch's AdamW, on 100 tensors of 25M parameters in all.

Rounds in alternating order; each ratio is the median over rounds of (ours / theirs) within the round.
Run: OMP_NUM_THREADS=2 python benchmarks/lamb.py [rounds]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from importlib.metadata import version

import torch
from torch.nn import Parameter

from lamina.optim import LAMB

SHAPES = [(512, 488)] * 99 + [(488,)]


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [Parameter(0.05 * torch.randn(s, generator=generator)) for s in SHAPES]
    for p in found:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return found


def contestants() -> dict[str, torch.optim.Optimizer]:
    found: dict[str, torch.optim.Optimizer] = {
        "lamina LAMB": LAMB(parameters(), lr=1e-3, weight_decay=0.01),
        "lamina LAMB literal": LAMB(parameters(), lr=1e-3, weight_decay=0.01, foreach=False),
        "torch AdamW foreach": torch.optim.AdamW(parameters(), lr=1e-3, weight_decay=0.01, foreach=True),
        "torch AdamW fused": torch.optim.AdamW(parameters(), lr=1e-3, weight_decay=0.01, fused=True),
    }
    try:
        import pytorch_optimizer
    except ImportError:
        return found
    for foreach in (False, True):
        options = {"weight_decay": 0.01, "weight_decouple": False, "foreach": foreach}
        found[f"pytorch-optimizer Lamb foreach={foreach}"] = pytorch_optimizer.Lamb(parameters(), lr=1e-3, **options)
    return found


def measure(rounds: int) -> dict[str, list[float]]:
    running = contestants()
    times: dict[str, list[float]] = {name: [] for name in running}
    for i in range(rounds + 2):
        order = list(running) if i % 2 else list(running)[::-1]
        for name in order:
            start = clock()
            running[name].step()
            times[name].append(clock() - start)
    return {name: t[2:] for name, t in times.items()}


def clock() -> float:
    """Wall time; with one thread, the CPU time of this thread, which other programs disturb less."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return round(low, 3), round(middle, 3), round(high, 3)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    times = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
    ours = times["lamina LAMB"]
    for name, taken in times.items():
        ratio = quartiles([t / o for t, o in zip(taken, ours, strict=True)])
        medians = round(statistics.median(taken) / statistics.median(ours), 3)
        print(
            json.dumps(
                {
                    "name": name,
                    "ms (quartiles)": quartiles([1e3 * t for t in taken]),
                    "time / ours (quartiles)": ratio,
                    "ratio of medians": medians,
                }
            )
        )
    versions = {"torch": torch.__version__, "pytorch-optimizer": version("pytorch-optimizer")} if len(times) > 4 else {}
    print(json.dumps({"threads": torch.get_num_threads(), "load": os.getloadavg(), **versions}))


if __name__ == "__main__":
    main()
