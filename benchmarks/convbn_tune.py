"""A training step of a ResNet-50 with frozen batch norms: tune against deploy and evaluation mode, time and memory.

Memory is the peak of a process of its own (resident, above what it held before the model was built), over two steps
of SGD with momentum. The goal is the paper's saving for Faster R-CNN, ResNet-50, batch 2, float32: 22 %. The processes
run with a fixed malloc threshold, so that what is resident is what tensors hold.
Folding costs the same whatever the maps: a tenth of a step at 224 pixels and batch 2, a few hundredths at 512 pixels.

Run: OMP_NUM_THREADS=1 python -m benchmarks convbn_tune
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.models import resnet50
from lamina.rewrite import ConvBN, Fold, rewrite

ROUNDS = 3
SIZES = ((2, 512), (8, 224))


def in_mode(plain: nn.Module, mode: str) -> nn.Module:
    model = copy.deepcopy(plain).eval()
    if mode == "tune":
        return rewrite(model, ConvBN())
    return rewrite(model, Fold()) if mode == "deploy" else model


def step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def inputs(batch: int, pixels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, pixels, pixels, generator=generator), torch.zeros(batch, dtype=torch.long)


def resident() -> int:
    """Bytes of this process now."""
    return _status("VmRSS")


def highest() -> int:
    """The most bytes this process ever had; `ru_maxrss` would count the parent it was forked from, too."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def peak(mode: str, batch: int, pixels: int) -> dict[str, float]:
    """Train two steps and say what they took; for a process of its own."""
    torch.set_num_threads(1)
    before = resident()
    torch.manual_seed(0)
    model = in_mode(resnet50(), mode)
    one = step(model, *inputs(batch, pixels))
    one()
    start = time.perf_counter()
    one()
    seconds = time.perf_counter() - start
    return {"megabytes": (highest() - before) / 1e6, "milliseconds": seconds * 1e3}


def measured(mode: str, batch: int, pixels: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.convbn_tune", mode, str(batch), str(pixels)]
    # Every tensor gets pages of its own, which go back at once: what is resident is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(batch: int, pixels: int, goal: str) -> Row:
    found: dict[str, list[dict[str, float]]] = {"tune": [], "eval": []}
    for turn in range(ROUNDS):
        for mode in ("tune", "eval") if turn % 2 == 0 else ("eval", "tune"):
            found[mode].append(measured(mode, batch, pixels))
    ratios = sorted(a["megabytes"] / b["megabytes"] for a, b in zip(found["tune"], found["eval"], strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    megabytes, milliseconds = (
        (statistics.median(r[key] for r in found["tune"]), statistics.median(r[key] for r in found["eval"]))
        for key in ("megabytes", "milliseconds")
    )
    what = f"peak memory of training, ResNet-50, batch {batch}, {pixels} pixels"
    row = Row(what, "tune", "eval", megabytes[0] / megabytes[1], (low, high), goal, milliseconds, megabytes=megabytes)
    print(f"{what}: tune / eval = {row.ratio:.3f} [{low:.3f}, {high:.3f}]  (goal {goal})", flush=True)
    return row


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = resnet50()
    rows: list[Row] = []
    for pixels, peer, rounds in ((512, "deploy", 9), (512, "eval", 9), (224, "deploy", 21)):
        steps = [step(in_mode(plain, mode), *inputs(2, pixels)) for mode in ("tune", peer)]
        what = f"training step, ResNet-50, batch 2, {pixels} pixels"
        rows.append(pair(what, *steps, names=("tune", peer), goal="<= 1.10", rounds=rounds, warmup=1))
        del steps
    rows += [memory(*size, "<= 0.78") for size in SIZES]
    write("convbn_tune", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
