"""MEAL V2: an epoch on stored soft labels against one that asks two teachers at every step; teachers in bf16.

Run: OMP_NUM_THREADS=1 python -m benchmarks meal_v2
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import pair, write
from lamina.data import Columns, Crops, Data, Examples, Loader, random_crops
from lamina.models import ResNet
from lamina.objectives import EnsembleDistillation, SoftLabelStore

ROWS, BATCH, CLASSES, SIDE = 128, 64, 10, 32


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet(depths=(1, 1, 1), widths=(width, 2 * width, 4 * width), stem="small", channels=3, classes=CLASSES)


def epoch_of(objective: Any, student: nn.Module, rows: Examples) -> Callable[[], object]:
    """Return one epoch of steps."""
    loader = Loader(rows, BATCH, seed=0)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def step(batch: Mapping[str, Tensor]) -> None:
        optimizer.zero_grad()
        objective(student, batch)["loss"].backward()
        optimizer.step()

    def run() -> object:
        for _ in range(loader.batches_per_epoch):
            step(next(loader))
        return None

    return run


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = Columns({"pixel_values": torch.rand(ROWS, 3, SIDE, SIDE, generator=generator)})
    teachers, student = [network(32, s).eval() for s in (1, 2)], network(16, 0)
    cropped = random_crops(Data(rows, None, BATCH)).train
    asked = epoch_of(EnsembleDistillation(teachers, allow_scratch=True), student, cropped)
    with tempfile.TemporaryDirectory() as folder:
        store = SoftLabelStore(folder, 5, Crops(), count=2)
        store.record(rows, teachers)
        stored = epoch_of(EnsembleDistillation(allow_scratch=True), copy.deepcopy(student), store.wrap(rows))
        what = f"epoch of {ROWS} images of {SIDE} x {SIDE}, two teachers twice as wide as the student"
        names = ("stored crops and soft labels", "teachers asked at every step")
        found = [pair(what, stored, asked, names=names, goal="<= 0.5", rounds=7, warmup=1)]
    if not any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16")):
        # Emulated, they take twenty times as long, which says nothing of a machine that one would use them on.
        print("this processor has no bf16 products: teachers in bf16 are not timed")
        write("meal_v2", found, ())
        return
    exact = epoch_of(EnsembleDistillation(teachers, allow_scratch=True, teacher_precision="fp32"), student, cropped)
    low = epoch_of(EnsembleDistillation(teachers, allow_scratch=True, teacher_precision="bf16"), student, cropped)
    names = ("teachers in bf16", "teachers in fp32")
    goal = "<= 0.77 where the processor has bf16 products"
    found.append(pair(f"epoch of {ROWS} images, teachers' precision", low, exact, names=names, goal=goal, rounds=3, warmup=1))  # fmt: skip  # noqa: E501
    write("meal_v2", found, ())


if __name__ == "__main__":
    main()
