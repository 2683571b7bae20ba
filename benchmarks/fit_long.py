"""FIT and full attention at 4k, 16k and 65k tokens: time, its exponent, memory, and what trains in 4 GiB.

Memory is the most that the tensors of a training step hold at once, without the weights.

Run: OMP_NUM_THREADS=1 python -m benchmarks fit_long
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from benchmarks.fit import training
from benchmarks.harness import Row, forward, pair, write
from lamina.experiments.fit import GROUP, HEADS, LATENTS, LAYERS, WIDTH, LiveBytes, full_transformer
from lamina.models import FIT

LENGTHS = (4096, 16384, 65536)
NAMES = (f"fit {LAYERS}, n = {GROUP}, m = {LATENTS}", "4 layers of full attention")
LIMIT = 4 * 2**30
"""Bytes that a training step may take in the search for the longest sequence."""


def long_fit(length: int, **options: Any) -> FIT:
    # Nearer to the balance of local and global attention where it is far off.
    group = GROUP if length <= LENGTHS[-1] else 2 * GROUP
    return FIT(LAYERS, group, length // group, LATENTS, WIDTH, WIDTH, WIDTH, HEADS, HEADS, **options)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [timed(length) for length in LENGTHS[:2]] + [
        memory(length, ("fit", "full"), NAMES) for length in LENGTHS[:2]
    ]
    rows += [memory(LENGTHS[2], ("recomputed", "fit"), ("fit, checkpoint=True", "fit"))]
    write("fit_long", rows)
    rows += longest()
    write("fit_long", rows)
    # Full attention over 65536 tokens takes a minute a pass: what is there is written down before.
    rows += [timed(LENGTHS[2], rounds=2, warmup=0)]
    write("fit_long", [*rows, exponents([rows[0], rows[1], rows[-1]])])


def timed(length: int, **often: int) -> Row:
    """A forward pass of both."""
    x, fit, full = torch.randn(1, length, WIDTH), long_fit(length).eval(), full_transformer().eval()
    runs = forward(fit, x), forward(full, x)
    options: dict[str, Any] = {"rounds": 5, "warmup": 1} | often
    return pair(f"forward, {length} tokens, width {WIDTH}", *runs, names=NAMES, goal="<= 0.33 at 16384", **options)


def exponents(rows: list[Row]) -> Row:
    """Fit the exponents with which both times grow."""
    x = [math.log(n) for n in LENGTHS]
    ours, full = (statistics.linear_regression(x, [math.log(r.milliseconds[i]) for r in rows]).slope for i in (0, 1))
    what = f"exponent of the time over {LENGTHS[0]}..{LENGTHS[-1]} tokens: {ours:.2f} against {full:.2f}"
    print(what, flush=True)
    return Row(what, *NAMES, ours / full, (ours / full,) * 2, "4/3 against 2: 0.67", (0.0, 0.0))


def memory(length: int, which: tuple[str, str], names: tuple[str, str]) -> Row:
    ours, peer = (step_bytes(name, length)[0] / 1e6 for name in which)
    what = f"memory of a training step, {length} tokens, width {WIDTH}"
    print(f"{what}: {ours:.0f} and {peer:.0f} MB", flush=True)
    return Row(what, *names, ours / peer, (ours / peer,) * 2, "reported", (0.0, 0.0), megabytes=(ours, peer))


def longest() -> list[Row]:
    """Double the sequence until a training step no longer fits into the limit."""
    rows = []
    for which, name in (("fit", "fit"), ("recomputed", "fit, checkpoint=True")):
        length, size = 2**17, 0
        # What fills more than half of it does not fit at twice the length.
        while size <= LIMIT // 2:
            length *= 2
            size, seconds = step_bytes(which, length)
            print(f"{name}: a step over {length} tokens takes {size / 1e6:.0f} MB, {seconds:.1f} s", flush=True)
            if size <= LIMIT:
                fitting = (length, size / 1e6, seconds)
        what = f"longest sequence trained in 4 GiB (by doubling): {fitting[0]} tokens in {fitting[2]:.0f} s"
        share = fitting[1] * 1e6 / LIMIT
        sizes = (fitting[1], LIMIT / 1e6)
        rows.append(Row(what, name, "4 GiB", share, (share, share), "reported", (0.0, 0.0), megabytes=sizes))
    return rows


def step_bytes(which: str, length: int) -> tuple[int, float]:
    """Run a training step; return the most that its tensors held at once, and how long it took."""
    model = full_transformer() if which == "full" else long_fit(length, checkpoint=which == "recomputed")
    run, start = training(model, torch.randn(1, length, WIDTH), model), time.perf_counter()
    with LiveBytes() as live:
        run()
    return live.most, time.perf_counter() - start


if __name__ == "__main__":
    main()
