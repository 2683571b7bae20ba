"""Cutting a part out of a once-for-all network, and what a sandwich step costs beside a plain one.

The part is the smallest of a ResNet-50 (25.6 M parameters, 16 blocks) and of a ViT-B-sized transformer (86 M), cut out
without calibration; the goal is in seconds, and a copy of the whole stands beside. A step is of the toy space that the
experiment trains: four networks (the whole, the smallest, two random parts) against the whole.

Run: OMP_NUM_THREADS=1 python -m benchmarks delta_eps_shrinking
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.harness import Row, pair, write
from lamina.experiments.delta_eps_shrinking import BATCH, MobileNet
from lamina.models import VisionTransformer, resnet50
from lamina.nn import supernet
from lamina.objectives import Classification, Sandwich
from lamina.objectives.objective import Objective
from lamina.rewrite import Elastic, cut_out, rewrite


def cutting(name: str, model: nn.Module, depth: tuple[int, ...]) -> Row:
    model = rewrite(model.eval(), Elastic(depth, (0.25, 0.5)))
    part = supernet(model).smallest()

    def cut() -> nn.Module:
        with warnings.catch_warnings():
            # Of the missing calibration, whose cost is that of the forward passes.
            warnings.simplefilter("ignore", UserWarning)
            return cut_out(model, part)

    what = f"the smallest part out of {name}"
    return pair(
        what, cut, lambda: copy.deepcopy(model), names=("cut_out", "deepcopy"), goal="< 1 s", rounds=5, warmup=1
    )


def step(model: nn.Module, objective: Objective, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    fraction = iter(torch.linspace(0.6, 1.0, 1000).tolist())

    def run() -> None:
        if isinstance(objective, Sandwich):
            # Other parts at every step.
            objective.set_progress(next(fraction))
        optimizer.zero_grad()
        objective(model, batch)["loss"].backward()
        optimizer.step()

    return run


def toy() -> nn.Module:
    torch.manual_seed(0)
    return MobileNet().train()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        cutting("a ResNet-50", resnet50(), (2, 3)),
        cutting("a ViT of 12 blocks of 768", VisionTransformer(224, 16, depth=12, width=768, heads=12), (6, 9)),
    ]
    batch = {"pixel_values": torch.randn(BATCH, 1, 28, 28), "labels": torch.randint(10, (BATCH,))}
    elastic = rewrite(toy(), Elastic((1, 2, 3), (1, 2, 4), (3, 5), multiple=4)).train()
    ours = step(elastic, Sandwich("classification", start=0.5, ramp=0.0), batch)
    plain = step(toy(), Classification(), batch)
    what = f"training step of the toy space, batch {BATCH}"
    rows.append(pair(what, ours, plain, names=("sandwich", "the whole alone"), goal="<= 3.2", rounds=15))
    write("delta_eps_shrinking", rows)


if __name__ == "__main__":
    main()
