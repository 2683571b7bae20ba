"""Time of one aggregation of 15 workers' gradients of 25M parameters (3 may be faulty), by rule, on one thread."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Row, pair, write
from lamina.gradients import Bulyan, FlagAggregator, GeometricMedian, Krum, MeaMed, Median, Phocas, TrimmedMean

WORKERS, FAULTY = 15, 3

PEERS: dict[str, Callable[[Tensor], Tensor]] = {
    "FlagAggregator, 1 step": FlagAggregator(iters=1).aggregate,
    "FlagAggregator, pair terms": FlagAggregator(lam=1.0).aggregate,
    "Krum": Krum(FAULTY).aggregate,
    "geometric median": GeometricMedian().aggregate,
    "median": Median().aggregate,
    "trimmed mean": TrimmedMean(FAULTY).aggregate,
    "MeaMed": MeaMed(FAULTY).aggregate,
    "Phocas": Phocas(FAULTY).aggregate,
    "Bulyan": Bulyan(FAULTY).aggregate,
    "torch mean": lambda rows: rows.mean(0),
}


def gradients(parameters: int) -> Tensor:
    """Return rows that share a direction, as workers' gradients do."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(WORKERS, parameters, generator=generator)
    rows += torch.randn(parameters, generator=generator)
    return rows


def against(rows: Tensor, peer: Callable[[Tensor], Tensor], name: str, goal: str = "none", rounds: int = 3) -> Row:
    """Time Flag Aggregator and another rule in turns."""
    ours = FlagAggregator()
    return pair(
        f"aggregation, {WORKERS} workers, {rows.shape[1] // 10**6}M",
        lambda: ours.aggregate(rows),
        lambda: peer(rows),
        names=("lamina FlagAggregator, 5 steps", name if name.startswith("torch") else f"lamina {name}"),
        goal=goal,
        rounds=rounds,
        warmup=1,
    )


def main() -> None:
    torch.set_num_threads(1)
    rows = gradients(25_000_000)
    found = [against(rows, Krum(FAULTY, "multi").aggregate, "Multi-Krum", "<= 1.5", 9)]
    found += [against(rows, peer, name) for name, peer in PEERS.items()]
    found.append(against(rows[:, :10_000_000].contiguous(), PEERS["torch mean"], "torch mean"))
    write("flag_aggregator", found)


if __name__ == "__main__":
    main()
