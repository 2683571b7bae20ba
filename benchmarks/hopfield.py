"""Hopfield against torch's multi-head attention (fused, no weights): time and peak memory; and a very large memory.

Without norms and with the same weights, one association computes the very same. "steps=3" is update_steps_max=3: three
updates and then the association that gives the output, four look-ups where attention has one; "steps=2" has three.
Memory is the peak of a process of its own, above what it held before the call (Linux), with pages given back at once.

Run: OMP_NUM_THREADS=1 python -m benchmarks hopfield
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
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.nn import Hopfield, HopfieldMemory, association_weights

WIDTH, HEADS = 256, 8
NO_NORMS: dict[str, Any] = {"norm_stored": False, "norm_state": False, "norm_projection": False}
SIZES = ((16, 128), (4, 512), (1, 2048))
"""Batch and tokens."""
STORED, ASKED, DIMENSIONS = 200_000, 512, 64
ROUNDS = 3


class Peer(nn.Module):
    """torch's attention as one calls it for its speed: no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def of(arm: str) -> nn.Module:
    torch.manual_seed(0)
    peer = Peer()
    if arm == "nn.MultiheadAttention":
        return peer
    steps = int(arm.partition("steps=")[2] or 0)
    ours = Hopfield(WIDTH, HEADS, update_steps_max=steps, **({} if "norms" in arm else NO_NORMS))
    with torch.no_grad():
        for i, layer in enumerate((ours.query, ours.key, ours.value)):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(peer.attention.in_proj_weight.chunk(3)[i])
            layer.bias.copy_(peer.attention.in_proj_bias.chunk(3)[i])
        assert ours.out is not None
        ours.out.load_state_dict(peer.attention.out_proj.state_dict())
    return ours


def runs(model: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    if mode == "training":
        given = x.clone().requires_grad_()

        def step() -> None:
            model.zero_grad()
            given.grad = None
            model(given).sum().backward()

        return step
    model = copy.deepcopy(model).eval()

    def forward() -> object:
        with torch.no_grad():
            return model(x)

    return forward


def inputs(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(0))


def memory_of(job: str) -> Callable[[], object]:
    """What a process is to hold the memory of: `arm|mode|batch|tokens`, or a look-up in 200 000 patterns."""
    if job.startswith("memory"):
        generator = torch.Generator().manual_seed(0)
        memory = HopfieldMemory(torch.randn(STORED, DIMENSIONS, generator=generator), beta=0.5)
        state = torch.randn(ASKED, DIMENSIONS, generator=generator)
        if job.endswith("blocks"):
            return lambda: memory.retrieve(state)
        return lambda: association_weights(state, memory.patterns, 0.5) @ memory.patterns
    arm, mode, batch, tokens = job.split("|")
    return runs(of(arm), inputs(int(batch), int(tokens)), mode)


def peak(job: str) -> dict[str, float]:
    """Run a job once to warm up and once measured; for a process of its own."""
    torch.set_num_threads(1)
    run = memory_of(job)
    if not job.startswith("memory"):
        run()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, start = _status("VmRSS"), time.perf_counter()
    with torch.no_grad() if job.startswith("memory") else torch.enable_grad():
        run()
    return {
        "megabytes": (_status("VmHWM") - before) / 1e6,
        "milliseconds": (time.perf_counter() - start) * 1e3,
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measured(job: str) -> dict[str, float]:
    # Every tensor gets pages of its own, which go back at once: what is resident is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.hopfield", job]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(what: str, ours: str, peer: str, names: tuple[str, str], goal: str) -> Row:
    found: dict[str, list[dict[str, float]]] = {ours: [], peer: []}
    for turn in range(ROUNDS):
        for job in (ours, peer) if turn % 2 == 0 else (peer, ours):
            found[job].append(measured(job))
    ratios = sorted(a["megabytes"] / b["megabytes"] for a, b in zip(found[ours], found[peer], strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    megabytes, milliseconds = (
        (statistics.median(r[key] for r in found[ours]), statistics.median(r[key] for r in found[peer]))
        for key in ("megabytes", "milliseconds")
    )
    row = Row(what, *names, megabytes[0] / megabytes[1], (low, high), goal, milliseconds, megabytes=megabytes)
    print(f"{what}: {names[0]} / {names[1]} = {row.ratio:.3f} [{low:.3f}, {high:.3f}]  (goal {goal})", flush=True)
    return row


def main() -> None:
    torch.set_num_threads(1)
    rows: list[Row] = []
    torchs = "nn.MultiheadAttention"
    for batch, tokens in SIZES:
        x = inputs(batch, tokens)
        torch.testing.assert_close(of("hopfield")(x), of(torchs)(x), rtol=1e-4, atol=1e-5)
        for mode in ("inference", "training"):
            peer = runs(of(torchs), x, mode)
            for arm, goal in (
                ("hopfield", "<= 1.10"),
                ("hopfield with its norms", "no goal"),
                ("hopfield, steps=2", "<= 3.5"),
                ("hopfield, steps=3", "<= 3.5"),
            ):
                what = f"{mode}, batch {batch}, {tokens} tokens"
                pair_of = (runs(of(arm), x, mode), peer)
                rows.append(pair(what, *pair_of, names=(arm, torchs), goal=goal, rounds=15, warmup=2))
    for mode in ("inference", "training"):
        for arm, goal in (("hopfield", "<= 1.10"), ("hopfield, steps=3", "<= 3.5")):
            job = f"{mode}|4|512"
            rows.append(
                memory(
                    f"peak memory, {mode}, batch 4, 512 tokens", f"{arm}|{job}", f"{torchs}|{job}", (arm, torchs), goal
                )
            )
    what = f"peak memory, {ASKED} states, {STORED} stored patterns of width {DIMENSIONS}"
    names = ("HopfieldMemory.retrieve", "softmax over the whole table")
    rows.append(memory(what, "memory in blocks", "memory whole", names, "<= 0.10"))
    write("hopfield", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(peak(sys.argv[1])))
    else:
        main()
