"""Time of one LAMB step against pytorch-optimizer's Lamb and torch's AdamW, on 100 tensors of 25M parameters in all."""

from __future__ import annotations

import logging
import warnings

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from benchmarks.harness import pair, write
from lamina.errors import require
from lamina.optim import LAMB

SHAPES = [(512, 488)] * 99 + [(488,)]


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [Parameter(0.05 * torch.randn(s, generator=generator)) for s in SHAPES]
    for p in found:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    theirs = require("pytorch_optimizer", "bench").Lamb
    same = {"lr": 1e-3, "weight_decay": 0.01}
    peers: list[tuple[str, Optimizer, str]] = [
        ("pytorch-optimizer Lamb (default)", theirs(parameters(), weight_decouple=False, **same), "<= 0.333"),
        (
            "pytorch-optimizer Lamb, foreach=False",
            theirs(parameters(), weight_decouple=False, foreach=False, **same),
            "none",
        ),
        ("torch AdamW, fused", AdamW(parameters(), fused=True, **same), "<= 2.0"),
        ("torch AdamW, foreach", AdamW(parameters(), foreach=True, **same), "<= 1.6"),
    ]
    ours = LAMB(parameters(), **same)
    rows = [
        pair(
            "step, 100 tensors, 25M", ours.step, peer.step, names=("lamina LAMB", name), goal=goal, rounds=31, warmup=3
        )
        for name, peer, goal in peers
    ]
    write("lamb", rows, ("pytorch-optimizer",))


if __name__ == "__main__":
    main()
