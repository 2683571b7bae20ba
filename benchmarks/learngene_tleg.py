"""Linear expansion against the same model with blocks of its own: training steps, memory, and models of many depths.

The peer is what `Expand` makes of the expanded model: equal numbers, twelve blocks. Memory is the most that a process
of its own held, beyond what it held before the model.

Run: OMP_NUM_THREADS=1 python -m benchmarks learngene_tleg
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.convbn_tune import highest, resident
from benchmarks.harness import Row, forward, pair, training, write
from lamina.models import Transformer
from lamina.rewrite import Expand, LinearExpansion, descendants, rewrite

LAYERS, WIDTH, VOCABULARY, CONTEXT = 12, 256, 256, 256
NAMES = ("base and slope, 12 layers", "12 blocks")


def fresh(layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(layers, WIDTH, 4, vocabulary=VOCABULARY, context=CONTEXT)


def models(layers: int = LAYERS) -> tuple[nn.Module, nn.Module]:
    ours = rewrite(fresh(layers), LinearExpansion())
    return ours, rewrite(copy.deepcopy(ours), Expand())


def step(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    optimizer, one = torch.optim.AdamW(model.parameters(), lr=1e-5), training(model, ids)

    def run() -> None:
        one()
        optimizer.step()

    return run


def peak(which: str, rows: int) -> float:
    """Train two steps and return the megabytes they took; for a process of its own."""
    torch.set_num_threads(1)
    before = resident()
    model = fresh()
    if which == "ours":
        model = rewrite(model, LinearExpansion())
    one = step(model, torch.randint(VOCABULARY, (rows, CONTEXT)))
    one()
    one()
    return (highest() - before) / 1e6


def measured(which: str, rows: int) -> float:
    # Every tensor gets pages of its own, which go back at once: what is resident is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.learngene_tleg", which, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: float = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(rows: int) -> Row:
    ours, peer = (measured(which, rows) for which in ("ours", "peer"))
    what, ratio = f"memory of a training step (AdamW), {rows} x {CONTEXT} tokens", ours / peer
    print(f"{what}: {ours:.0f} / {peer:.0f} MB = {ratio:.3f}  (goal <= 1.0)", flush=True)
    return Row(what, *NAMES, ratio, (ratio, ratio), "<= 1.0", (0.0, 0.0), megabytes=(ours, peer))


def built(ours: nn.Module) -> list[nn.Module]:
    """The plain way to models of eleven depths: build each and copy tensors into it."""
    found: list[nn.Module] = []
    source = rewrite(copy.deepcopy(ours), Expand()).state_dict()
    for depth in range(2, 13):
        model = Transformer(depth, WIDTH, 4, vocabulary=VOCABULARY, context=CONTEXT)
        model.load_state_dict({name: source[name] for name in model.state_dict()})
        found.append(model)
    return found


def main() -> None:
    torch.set_num_threads(1)
    ours, peer = models()
    rows = []
    for count in (2, 8):
        ids = torch.randint(VOCABULARY, (count, CONTEXT))
        what = f"{count} x {CONTEXT} tokens, width {WIDTH}"
        rows.append(pair(f"training step (AdamW), {what}", step(copy.deepcopy(ours), ids),
                         step(copy.deepcopy(peer), ids), names=NAMES, goal="<= 1.15", rounds=9))  # fmt: skip
    ids = torch.randint(VOCABULARY, (2, CONTEXT))
    what = f"2 x {CONTEXT} tokens, width {WIDTH}"
    rows.append(pair(f"forward, {what}", forward(ours, ids), forward(peer, ids), names=NAMES, goal="<= 1.15"))
    both = [torch.compile(m, fullgraph=True) for m in models(4)]
    rows.append(pair(f"training step (AdamW), compiled, {what}", step(both[0], ids), step(both[1], ids),
                     names=("base and slope, 4 layers", "4 blocks"), goal="<= 1.15", rounds=9))  # fmt: skip
    rows.append(pair("models of depth 2 to 12", lambda: descendants(ours, range(2, 13)), lambda: built(ours),
                     names=("descendants", "models built and tensors copied"), goal="reported", rounds=5))  # fmt: skip
    rows += [memory(2), memory(8)]
    write("learngene_tleg", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
