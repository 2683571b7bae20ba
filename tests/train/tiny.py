"""A model, data and passes small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lamina.batches import Batch
from lamina.data import Columns, Data
from lamina.lineage import Lineage
from lamina.objectives import Classification
from lamina.train.metrics import read
from lamina.train.options import TrainOptions
from lamina.train.trainer import Trainer

CLASSES = 5


class Net(nn.Module):
    """Residual blocks with dropout and batch norm: random numbers and buffers are part of its state."""

    def __init__(self, depth: int = 3, width: int = 8, dropout: float = 0.1, batch_norm: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.norm: nn.Module = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(self.embed(inputs))
        for block in self.blocks:
            x = x + self.dropout(block(x).relu())
        return self.head(x)


@dataclass(frozen=True)
class Widened:
    rows: tuple[int, ...]


class WidenClasses:
    """Test pass: gives the head other rows (-1 = a new one), with its lineage."""

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "nothing"

    def __init__(self, rows: tuple[int, ...] = (*range(CLASSES), -1)) -> None:
        self.rows = rows

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> Widened:
        assert data is None or len([b["inputs"].sum() for b in data]) > 0
        return Widened(self.rows)

    def apply(self, model: nn.Module, decision: Widened, lineage: Lineage) -> nn.Module:
        old: Any = model.head
        index = torch.tensor(decision.rows)
        new = nn.Linear(old.in_features, len(index), device=old.weight.device)
        with torch.no_grad():
            for name in ("weight", "bias"):
                a, b = getattr(new, name), getattr(old, name)
                a.copy_(torch.where((index >= 0).view(-1, *[1] * (a.ndim - 1)), b[index.clamp(min=0)], 0.0))
                lineage.derive(a, b, index)
        model.head = new
        return model


class DropLast:
    """Test pass: removes the last block."""

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> Widened:
        return Widened((len(model.blocks) - 1,))

    def apply(self, model: nn.Module, decision: Widened, lineage: Lineage) -> nn.Module:
        del model.blocks[decision.rows[0]]
        return model


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def data(rows: int = 48, batch: int = 8, padded: bool = False) -> Data:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 6, generator=generator)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    if padded:
        # Unevenly, so that equal weights for unequal counts would show.
        labels[torch.arange(rows) % 3 == 0] = -100
        labels[: rows // 3] = -100
    columns = {"inputs": inputs, "labels": labels}
    split = {k: v[: rows * 3 // 4] for k, v in columns.items()}, {k: v[rows * 3 // 4 :] for k, v in columns.items()}
    return Data(Columns(split[0]), Columns(split[1]), batch, {"classes": CLASSES}, "tiny")


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2)


def trainer(
    folder: Path | None = None,
    *,
    model: nn.Module | None = None,
    on: Data | None = None,
    objective: Any = None,
    optimizer: Callable[[nn.Module], Optimizer] = adamw,
    steps: int = 12,
    rewrites: Any = (),
    reducer: Any = None,
    placement: Any = None,
    schedule: Any = None,
    **options: Any,
) -> Trainer:
    return Trainer(
        model or net(),
        on or data(),
        objective or Classification(),
        optimizer,
        options=TrainOptions(steps=steps, **{"log_every": 1, "device": "cpu", **options}),
        rewrites=rewrites,
        reducer=reducer,
        placement=placement,
        folder=folder,
        schedule=schedule,
    )


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without wall-clock figures."""
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in read(folder / "metrics.jsonl")]


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe of parts that only this module knows."""
    return {
        "model": {"name": "tests.train.tiny:Net", "depth": 3},
        "data": "tests.train.tiny:data",
        "objective": ["classification", {"name": "distillation", "weight": 0.5}],
        "optimizer": {"name": "adamw", "lr": 1e-2, "schedule": {"name": "warmup_cosine", "warmup": 0.2}},
        "rewrite": [{"name": "tests.train.tiny:DropLast", "at": 0.5}],
        "train": {"steps": 12, "evaluate_every": 4, "checkpoint_every": 3, "log_every": 1, "device": "cpu"},
        **changes,
    }
