"""Hypernetworks: 64 conditions at once against a loop over them, and a materialised target against the plain one.

The loop is what hypnettorch leaves a user to do: one set of weights at a time through the target. It is given its
weights ready-made in the second row, where only the runs of the target are compared.

Run: OMP_NUM_THREADS=1 python -m benchmarks hypernetwork
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.harness import Row, pair, write
from lamina.nn import HyperLinear, HyperNetwork, TaskCondition

CONDITIONS = 64


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


def without_gradient(run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with torch.no_grad():
            return run()

    return inside


def with_gradient(h: nn.Module, run: Callable[[], Tensor]) -> Callable[[], object]:
    def step() -> object:
        h.zero_grad()
        run().square().mean().backward()
        return None

    return step


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    h = HyperNetwork(mlp(), TaskCondition(CONDITIONS, 16), chunk_size=256)
    tasks, x, shared = torch.arange(CONDITIONS), torch.randn(CONDITIONS, 32), torch.randn(16, 32)
    rows: list[Row] = []

    def at_once() -> Tensor:
        return h(x, tasks)

    def loop() -> Tensor:
        return torch.cat([h(x[i : i + 1], i) for i in range(CONDITIONS)])

    def every() -> Tensor:
        return h.for_each(shared, tasks)

    def every_in_a_loop() -> Tensor:
        return torch.stack([h(shared, i) for i in range(CONDITIONS)])

    torch.testing.assert_close(at_once(), loop())
    torch.testing.assert_close(every(), every_in_a_loop())
    names = (f"{CONDITIONS} conditions at once", "Python loop over them")
    what = "2-layer MLP 32-64-8, chunked generator"
    for run, peer, kind in ((at_once, loop, "a row each"), (every, every_in_a_loop, "16 shared rows each")):
        forward = f"forward, {what}, {kind}"
        rows.append(pair(forward, without_gradient(run), without_gradient(peer), names=names, goal="<= 0.10"))
        train = f"forward and backward, {what}, {kind}"
        rows.append(pair(train, with_gradient(h, run), with_gradient(h, peer), names=names, goal="<= 0.10"))

    with torch.no_grad():
        weights = h.generate(tasks)
    target = mlp()

    def ready_made() -> Tensor:
        each = ({n: w[i] for n, w in weights.items()} for i in range(CONDITIONS))
        return torch.cat([functional_call(target, w, (x[i : i + 1],)) for i, w in enumerate(each)])

    names = (f"{CONDITIONS} conditions at once, generation and all", "loop of functional_call on ready weights")
    what = "forward, 2-layer MLP 32-64-8, a row each"
    rows.append(pair(what, without_gradient(at_once), without_gradient(ready_made), names=names, goal="<= 1"))

    layer, c = HyperLinear(64, 64, 16), torch.randn(CONDITIONS, 16)
    wide = torch.randn(CONDITIONS, 64)

    def one_by_one() -> Tensor:
        return torch.cat([layer(wide[i : i + 1], c[i]) for i in range(CONDITIONS)])

    torch.testing.assert_close(layer(wide, c), one_by_one(), rtol=1e-4, atol=1e-5)
    names = (f"HyperLinear, {CONDITIONS} rows with weights of their own", "loop over the rows")
    what = "forward, HyperLinear 64-64, 16 numbers a condition"
    rows.append(pair(what, without_gradient(lambda: layer(wide, c)), without_gradient(one_by_one), names=names, goal="<= 0.10"))  # fmt: skip  # noqa: E501

    plain, original = h.materialize(3), mlp()
    batch = torch.randn(256, 32)
    rows.append(
        pair(
            "forward, 256 rows",
            without_gradient(lambda: plain(batch)),
            without_gradient(lambda: original(batch)),
            names=("materialised target", "the target never wrapped"),
            goal="<= 1.05",
            rounds=101,
            warmup=20,
        )
    )
    write("hypernetwork", rows)


if __name__ == "__main__":
    main()
