"""The mean-field layer at the size of the digits experiment (330 states, batch 100): against torchdeq's Anderson and
its implicit gradient on the same map, autograd through the same steps, and for the prox nested Newton loops.

Run: OMP_NUM_THREADS=1 python -m benchmarks equilibrium   (the row of torchdeq: pip install torchdeq==0.1.0)
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, pair, write
from lamina.nn import MeanFieldEquilibrium, MonotoneHollow, prox_softmax

SIZES, RANK, BATCH, ALPHA, TOL = [2] * 64 + [8] * 24 + [10], 192, 100, 0.125, 1e-3


def nested(x: Tensor, alpha: float, tol: float = 1e-6) -> Tensor:
    """The card's way: Newton on the multiplier, and for each of its values a Halley solve of every log z."""
    beta = 1.0 - alpha
    x = x - x.amax(-1, keepdim=True)
    nu = torch.full_like(x[..., :1], beta)
    y = x + nu
    log_z = torch.where(y <= 0, y / alpha, torch.minimum(y / alpha, (y / beta).clamp(min=1e-30).log()))
    for _ in range(50):
        for _ in range(20):
            e = beta * log_z.exp()
            h, slope = alpha * log_z + e - (x + nu), alpha + e
            step = 2 * h * slope / (2 * slope * slope - h * e)
            log_z = log_z - step
            if float(step.abs().max()) <= 1e-6:
                break
        z = log_z.exp()
        over = z.sum(-1, keepdim=True) - 1
        if float(over.abs().max()) <= tol:
            break
        nu = nu - over / (z / (alpha + beta * z)).sum(-1, keepdim=True)
    return z / z.sum(-1, keepdim=True)


def train_step(forward: Callable[[Tensor], Tensor], coupling: MonotoneHollow, bias: Tensor) -> Callable[[], object]:
    def run() -> object:
        coupling.zero_grad()
        forward(bias).square().sum().backward()
        return None

    return run


def splitting(coupling: MonotoneHollow, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """The map whose fixed point the layer is, for solvers that take any map."""
    prepared, blocks = coupling.prepare(), coupling.blocks

    def step(q: Tensor) -> Tensor:
        scores = (1 - ALPHA) * q + ALPHA * (coupling.product(q, *prepared) + bias)
        return blocks.join([prox_softmax(x, ALPHA, 2) for x in blocks.split(scores)])

    return step


def unrolled(coupling: MonotoneHollow, bias: Tensor, steps: int) -> Tensor:
    step, q = splitting(coupling, bias), coupling.blocks.uniform(len(bias), bias)
    for _ in range(steps):
        q = step(q)
    return q


def kept_bytes(forward: Callable[[Tensor], Tensor], bias: Tensor) -> int:
    seen: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = forward(bias)
    del out
    return sum(seen.values())


def against_torchdeq(coupling: MonotoneHollow, bias: Tensor, ours: Callable[[], object], like: Tensor) -> list[Row]:
    if importlib.util.find_spec("torchdeq") is None:
        print("torchdeq is not installed: its row is left out")
        return []
    torchdeq: Any = importlib.import_module("torchdeq")
    solve = torchdeq.get_deq(
        f_solver="anderson", b_solver="anderson", f_max_iter=100, b_max_iter=100, f_tol=TOL, b_tol=TOL
    )

    def peer(bias: Tensor) -> Tensor:
        out: Tensor = solve(splitting(coupling, bias), coupling.blocks.uniform(len(bias), bias))[0][-1]
        return out

    assert (peer(bias) - like).abs().max() < 0.05
    names = ("MeanFieldEquilibrium", "torchdeq 0.1.0, anderson")
    what = "forward and backward to a residual of 1e-3"
    return [pair(what, ours, train_step(peer, coupling, bias), names=names, goal="<= 1", rounds=11)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    scores = torch.randn(BATCH * 24, 8)
    assert (nested(scores, ALPHA) - prox_softmax(scores, ALPHA)).abs().max() < 1e-5
    names = ("prox_softmax", "nested Newton and Halley")
    what = "prox of 2400 variables of 8 states, cold start"
    rows.append(
        pair(
            what,
            lambda: prox_softmax(scores, ALPHA),
            lambda: nested(scores, ALPHA),
            names=names,
            goal="<= 1",
            rounds=25,
        )
    )
    coupling, bias = MonotoneHollow(SIZES, RANK), torch.randn(BATCH, sum(SIZES))
    layer = MeanFieldEquilibrium(coupling, ALPHA, tol=TOL)
    q = layer(bias)
    ours = train_step(layer, coupling, bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows += against_torchdeq(coupling, bias, ours, q.detach())
    plain = MeanFieldEquilibrium(coupling, ALPHA, "splitting", tol=TOL)
    plain(bias)
    assert plain.last is not None
    steps = plain.last.iterations

    def through(b: Tensor) -> Tensor:
        return unrolled(coupling, b, steps)

    names = ("MeanFieldEquilibrium", f"autograd through {steps} steps")
    row = pair("forward and backward", ours, train_step(through, coupling, bias), names=names, goal="<= 1", rounds=11)
    kept = kept_bytes(layer, bias), kept_bytes(through, bias)
    ratio = kept[0] / kept[1]
    print(f"bytes kept for backward: {kept[0]} / {kept[1]} = {ratio:.3f}")
    rows += [
        row,
        replace(row, what="bytes kept for backward", ratio=ratio, spread=(ratio, ratio), milliseconds=(0.0, 0.0)),
    ]
    write("equilibrium", rows, ("torchdeq",) if importlib.util.find_spec("torchdeq") else ())


if __name__ == "__main__":
    main()
