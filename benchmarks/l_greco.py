"""L-GreCo: bytes of its plans against a uniform knob; time of kernels, solver, and of reducers under DDP."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Row, pair, write
from lamina.experiments.l_greco import UNIFORM, planned, transformer_gradients
from lamina.gradients import LGreCo, Mean, PowerSGD, Reducer, TopK, attach, budget, reducer, solve_budget
from lamina.gradients.compression.powersgd import orthonormal, outer, times
from lamina.gradients.compression.qsgd import add_dequantized, quantize
from lamina.gradients.compression.top_k import largest

NEVER = 10**9
TOKENS = 1024
"""Rows of a step in which compression is off: eight sequences of 128 tokens a worker, still a small batch."""
GOALS = {"powersgd_4": 1.4, "powersgd_8": 1.4, "topk_1": 4.0, "topk_5": 4.0, "qsgd_4": 1.1}
"""How many times smaller a plan must be."""


def plans() -> list[Row]:
    """Bytes at no larger true error, on the gradients of the experiment's transformer, seed 0."""
    gradients = transformer_gradients(0, torch.device("cpu"))
    rows = []
    for name, make in UNIFORM.items():
        found = planned(make(), gradients)
        assert found["true_error"] <= found["budget"] * (1 + 1e-9)
        sizes = found["bytes"] / 1e6, found["uniform_bytes"] / 1e6
        ratio = sizes[0] / sizes[1]
        what = f"bytes of a plan, {name}"
        goal = f"<= {1 / GOALS[name]:.3f}"
        rows.append(Row(what, "L-GreCo", "uniform", ratio, (ratio, ratio), goal, (0.0, 0.0), megabytes=sizes))
        print(f"{what}: {ratio:.3f} of uniform, {1 / ratio:.2f} times smaller (goal {goal})", flush=True)
    return rows


def kernels() -> list[Row]:
    """Compression of 6.25M numbers against a copy of them."""
    x = torch.randn(2500, 2500, generator=torch.Generator().manual_seed(0))
    flat, target, q = x.view(-1), torch.empty_like(x), torch.randn(2500, 4)
    total, codes = torch.zeros_like(flat), quantize(flat, 4)

    def low_rank() -> object:
        p = orthonormal(times(x, orthonormal(q)))
        return outer(p, times(x.T, p))

    compress: dict[str, Callable[[], object]] = {
        "QSGD, 4 bits: quantize and pack": lambda: quantize(flat, 4),
        "QSGD, 8 bits: quantize": lambda: quantize(flat, 8),
        "QSGD, 3 bits: quantize and pack": lambda: quantize(flat, 3),
        "QSGD, 4 bits: unpack and add": lambda: add_dequantized(total, *codes, 4),
        "TopK, 0.1 %: select": lambda: largest(flat, 6_250),
        "TopK, 1 %: select": lambda: largest(flat, 62_500),
        "PowerSGD, rank 4: factors and product": low_rank,
    }
    return [
        pair(what, one, lambda: target.copy_(x), names=("lamina", "copy"), goal="<= 4", rounds=25)
        for what, one in compress.items()
    ]


def solver() -> list[Row]:
    """The dynamic programme, and the same one without leaving options out beforehand."""
    rows = []
    for layers in (200, 500):
        g = np.random.default_rng(0)
        scale = g.lognormal(0, 2, (layers, 1))
        errors = np.sort(g.random((layers, 16)), axis=1)[:, ::-1] * scale
        sizes = np.sort(g.integers(1, 100_000, (layers, 16)), axis=1)
        limit, default = float(errors[:, 8].sum()), [8] * layers

        def solve(e: object = errors, s: object = sizes, b: float = limit, d: object = default) -> object:
            return solve_budget(e, s, b, default=d)  # type: ignore[arg-type]

        def whole(solve: Callable[[], object] = solve) -> object:
            with mock.patch.object(budget, "_worth_trying", lambda steps, s, room: np.isfinite(s)):
                return solve()

        goal = "ours < 50 ms" if layers == 200 else "ours: milliseconds"
        rows.append(
            pair(f"solver, {layers} layers x 16 options", solve, whole, names=("pruned", "whole table"), goal=goal)
        )
    return rows


def under_ddp() -> list[Row]:
    """Steps of two processes; the other one walks along and says nothing."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=_work, args=(r, folder, queue)) for r in range(2)]
        for worker in workers:
            worker.start()
        try:
            found: list[Row] = queue.get(timeout=400)
        finally:
            for worker in workers:
                worker.join(30)
                if worker.is_alive():
                    worker.kill()
    return found


def _work(rank: int, folder: str, queue: object) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(io.StringIO()):
        plain, rows = _step(lambda model: None, TOKENS), []
        for name, make in (
            ("Mean", Mean),
            ("PowerSGD before its first step", lambda: PowerSGD(4, start_step=NEVER)),
            ("L-GreCo before its first step", lambda: LGreCo(TopK(), start_step=NEVER)),
        ):
            ours = _step(lambda m, make=make: attach(m, make()), TOKENS)
            what = f"one step, compression off: {name}"
            rows += [
                pair(what, ours, plain, names=(name, "DDP"), goal="<= 1.01", rounds=61, warmup=4),
                _hook_share(name, make),
            ]
        # One bucket: torch's hook mixes up the collectives of several over gloo.
        torch_s = PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        rows.append(
            pair(
                "one step, rank 4",
                _step(lambda m: attach(m, PowerSGD(4)), bucket_cap_mb=100),
                _step(lambda m: m.register_comm_hook(torch_s, powerSGD_hook), bucket_cap_mb=100),
                names=("lamina PowerSGD", "torch powerSGD_hook"),
                goal="<= 1.0",
                rounds=21,
                warmup=4,
            )
        )
    if rank == 0:
        queue.put(rows)  # type: ignore[attr-defined]
    dist.barrier()
    dist.destroy_process_group()


def _hook_share(name: str, make: Callable[[], Reducer]) -> Row:
    """Count the processor's time in a reducer's hook, whole, although plain DDP begins an all-reduce there, too.

    What a step takes on the clock is noisier than the per cent that is asked for.
    """
    spent, shares, steps = [0.0], [], []

    def timed(hook, bucket):  # type: ignore[no-untyped-def]
        begun = time.thread_time()
        later = reduce_bucket(hook, bucket)
        spent[-1] += time.thread_time() - begun
        return later

    reduce_bucket = reducer._reduce_bucket
    with mock.patch.object(reducer, "_reduce_bucket", timed):
        step = _step(lambda model: attach(model, make()), TOKENS)
    for _ in range(45):
        spent.append(0.0)
        begun = time.process_time()
        step()
        steps.append(time.process_time() - begun)
    spent, steps = spent[-40:], steps[-40:]
    shares = [a / b for a, b in zip(spent, steps, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    hook, whole = statistics.median(spent), statistics.median(steps)
    what = f"processor's time of the hook, compression off: {name}"
    print(f"{what}: {1e6 * hook:.0f} us, {middle:.4f} [{low:.4f}, {high:.4f}] of a step  (goal <= 0.01)", flush=True)
    return Row(what, name, "its step", middle, (low, high), "<= 0.01", (1e3 * hook, 1e3 * whole), added_seconds=hook)


def _step(
    prepare: Callable[[DistributedDataParallel], object], rows: int = 128, **options: int
) -> Callable[[], object]:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(384, 384), nn.GELU())]
    wrapped = DistributedDataParallel(nn.Sequential(*layers), **options)
    prepare(wrapped)
    x = torch.randn(rows, 384)

    def step() -> object:
        wrapped.zero_grad()
        return wrapped(x).square().mean().backward()

    return step


def main() -> None:
    torch.set_num_threads(1)
    write("l_greco", [*plans(), *kernels(), *solver(), *under_ddp()])


if __name__ == "__main__":
    main()
