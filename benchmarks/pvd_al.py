"""Active learning of fields: a step of volume distillation with hard points, and with hard rays, against a plain one.

Hash tables teach a perceptron of 64, 128 rays of 64 samples, all stages, forward and backward. Points of every ray
count (no background), so nothing is saved by rays that hit nothing; the pool of rays is full, a step has 140 rays.

Run: OMP_NUM_THREADS=1 python -m benchmarks pvd_al
"""

from __future__ import annotations

import torch

from benchmarks.fields import RAYS, SAMPLES, distilling
from benchmarks.harness import Row, pair, write
from lamina.objectives import HardPoints, HardRays

ARMS = (
    ("hard points", [HardPoints(min_opacity=0.0)], "<= 1.1"),
    ("hard rays and points", [HardRays(capacity=RAYS), HardPoints(min_opacity=0.0)], "<= 1.2"),
)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = distilling((0.0, 0.0))
    rows: list[Row] = []
    for name, active, goal in ARMS:
        what = f"a step of distillation, {RAYS} rays of {SAMPLES} samples"
        mined = distilling((0.0, 0.0), active)
        # A tenth of the rays a step: after the warm-up the pool is full.
        rows.append(pair(what, mined, plain, names=(name, "plain"), goal=goal, rounds=25, warmup=12))
    write("pvd_al", rows)


if __name__ == "__main__":
    main()
