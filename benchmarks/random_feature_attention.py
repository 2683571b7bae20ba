"""Features of random-feature attention against the plain 4-D einsum, in time and memory; and what a fit costs on them.

Memory is what is allocated at the highest point of one call, above what stood before (torch's own profiler).

Run: OMP_NUM_THREADS=1 python -m benchmarks random_feature_attention
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Row, pair, write
from lamina.nn import RandomFeatureAttention, fit_ridge
from lamina.nn._ridge_system import GRID

ROWS, HEADS, WIDTH, KEYS = 1024, 1000, 16, 16
"""The setting of the card: 17 000 features."""


def sets(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = F.normalize(torch.randn(rows, KEYS + 1, WIDTH, generator=generator), dim=-1)
    return drawn[:, 0], drawn[:, 1:]


def naive(layer: RandomFeatureAttention, query: Tensor, keys: Tensor) -> Tensor:
    """The definition in two einsums."""
    q, k = F.pad(query, (0, 1), value=1.0), F.pad(keys, (0, 1), value=1.0)
    scores = torch.einsum("ba,mac,bnc->bmn", q, layer.features.weight, k).relu() / KEYS
    return torch.einsum("bmn,bnc->bmc", scores, k).flatten(1)


def four_dimensional(layer: RandomFeatureAttention, query: Tensor, keys: Tensor) -> Tensor:
    """The definition as one writes it down: every head's weighted keys, then their mean."""
    q, k = F.pad(query, (0, 1), value=1.0), F.pad(keys, (0, 1), value=1.0)
    scores = torch.einsum("ba,mac,bnc->bmn", q, layer.features.weight, k).relu()
    return (scores[..., None] * k[:, None]).mean(2).flatten(1)


def peak(run: Callable[[], object]) -> float:
    """Megabytes allocated at the highest point of a call, what it returns included."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()
    del kept
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 1e6


def memory(what: str, ours: Callable[[], object], peer: Callable[[], object], names: tuple[str, str], goal: str) -> Row:
    found = peak(ours), peak(peer)
    ratio = found[0] / found[1]
    print(
        f"{what}: {names[0]} / {names[1]} = {ratio:.3f}  ({found[0]:.0f}, {found[1]:.0f} MB, goal {goal})", flush=True
    )
    return Row(what, *names, ratio, (ratio, ratio), goal, (0.0, 0.0), megabytes=found)


def seconds(run: Callable[[], object], limit: float) -> Row:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    times.sort()
    what = f"features, {ROWS} sets of {KEYS} in {WIDTH} dimensions, {HEADS} heads, one thread, over {limit:g} s"
    print(f"{what}: {times[3]:.3f} s", flush=True)
    spread = times[1] / limit, times[5] / limit
    return Row(what, "RandomFeatureAttention", "clock", times[3] / limit, spread, "<= 1", (times[3] * 1e3, limit * 1e3))


def penalties_one_by_one(phi: Tensor, y: Tensor) -> Callable[[], object]:
    """Choose among as many penalties on as many held-out rows, by a fit each; in float64, in which ours is solved."""

    def run() -> object:
        rows, columns = phi.double().numpy(), y.double().numpy()
        cut = len(rows) * 4 // 5
        train, goal = rows[:cut], columns[:cut]
        scale = ((train - train.mean(0)) ** 2).sum(1).mean()

        def error(alpha: float) -> float:
            return float(((Ridge(alpha).fit(train, goal).predict(rows[cut:]) - columns[cut:]) ** 2).mean())

        return Ridge(min((float(g * scale) for g in GRID), key=error)).fit(rows, columns)

    return run


def main() -> None:
    torch.set_num_threads(1)
    rows: list[Row] = []
    layer, (query, keys) = RandomFeatureAttention(WIDTH, HEADS), sets(ROWS)
    y = torch.stack([keys[..., 0].mean(1), keys[..., 0].square().mean(1)], 1)
    phi = layer.features(query, keys)
    torch.testing.assert_close(phi, naive(layer, query, keys), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(phi, four_dimensional(layer, query, keys), rtol=1e-4, atol=1e-5)

    def ours() -> object:
        return layer.features(query, keys)

    rows.append(seconds(ours, 3.0))
    what = f"features, {ROWS} sets of {KEYS} in {WIDTH} dimensions, {HEADS} heads"
    peers = {"two einsums": naive, "4-D product and mean": four_dimensional}
    for name, peer in peers.items():
        names, goal = ("RandomFeatureAttention", name), "<= 1" if peer is naive else "<= 0.25"
        rows.append(pair(what, ours, lambda f=peer: f(layer, query, keys), names=names, goal="<= 1", rounds=7))
        rows.append(memory(f"memory of the {what}", ours, lambda f=peer: f(layer, query, keys), names, goal))
    names, learner = ("features kept", "features anew"), RandomFeatureAttention(WIDTH, HEADS, 2)
    what = "one gradient step on the values, features computed once or in every step"

    def step(read: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> object:
            learner.value.grad = None
            F.mse_loss(read(), y).backward()
            return learner.value.grad

        return run

    kept, anew = step(lambda: learner.read(phi)), step(lambda: learner(query, keys))
    rows.append(pair(what, kept, anew, names=names, goal="<= 0.5"))
    names = ("fit_ridge", "scikit-learn Ridge, float64")
    what = f"fit of 2 targets to 17 000 features of {ROWS} sets, the penalty of 21 by held-out rows"
    by_one = penalties_one_by_one(phi, y)
    rows.append(pair(what, lambda: fit_ridge(phi, y), by_one, names=names, goal="<= 0.5", rounds=3, warmup=0))
    what = f"fit of 2 targets to 17 000 features of {ROWS} sets, the penalty given"
    alpha = 1e-3 * ROWS
    plain = lambda: Ridge(alpha).fit(phi.double().numpy(), y.double().numpy())  # noqa: E731
    rows.append(pair(what, lambda: fit_ridge(phi, y, 1e-3), plain, names=names, goal="<= 1.2", rounds=9, warmup=1))
    write("random_feature_attention", rows, ("scikit-learn",))


if __name__ == "__main__":
    main()
