"""Take the statistics of batch norms anew over many batches, before a model is deployed.

    model = rewrite(model.eval(), Calibrate(200), data=batches)

Dropout and dropped paths shift variances between training and evaluation, and a running average remembers old weights.
Source: Guo et al., SLAB (2024), arXiv 2405.11582, implementation details (statistics updated with frozen weights).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lamina import anatomy
from lamina.batches import Batch, bare, call, to_device
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.nn import RepBN
from lamina.registry import register


@dataclass(frozen=True)
class Statistics:
    """Of one norm."""

    mean: tuple[float, ...]
    var: tuple[float, ...]


@dataclass(frozen=True)
class CalibrateDecision:
    """The statistics of every norm."""

    batches: int
    """How many were looked at."""
    statistics: dict[str, Statistics]
    """By the norm's path."""

    def table(self) -> str:
        """Word the decision for people."""
        return f"statistics of {len(self.statistics)} norms over {self.batches} batches"


@register("pass", source="Guo et al., SLAB (2024), arXiv 2405.11582")
class Calibrate:
    """Average the statistics of all batch norms (`RepBN` too) over many batches, with every weight as it stands.

    Only the norms run as in training; dropout and dropped paths are off. Weights are not touched. Frozen blocks of
    `ConvBN` keep their statistics.

    Args:
        batches: how many to look at, at least 1; fewer where the data ends before.
    Raises:
        LaminaError: batches below 1.
        AnatomyError: no norm with running statistics, or no data; a norm that does not run.
    Source: implementation details, arXiv 2405.11582. Deviation: a plain average over batches (the paper runs 10 epochs
        with a moving one).
    Example:
        >>> from lamina.rewrite import rewrite
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> rewrite(model, Calibrate(), data=[{"inputs": torch.tensor([[1.0], [3.0]])}])[0].running_mean.item()
        2.0
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(self, batches: int = 200) -> None:
        if batches < 1:
            raise LaminaError(f"Calibrate: batches must be at least 1, got {batches}")
        self.batches = batches

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> CalibrateDecision:
        """Run the batches; afterwards the model is as it was."""
        model = bare(model)
        norms = {path: m for path, m in model.named_modules() if _has_statistics(m)}
        if not norms:
            raise AnatomyError(f"{type(model).__name__} has no norm with running statistics: nothing to calibrate")
        if data is None:
            raise AnatomyError("Calibrate takes statistics, so it needs data: pass batches")
        device = next((t.device for m in norms.values() for t in m.buffers()), torch.device("cpu"))
        if device.type == "meta":
            raise AnatomyError(f"the weights of {type(model).__name__} are not there (meta device): nothing to measure")
        count = 0
        unseeded = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        with unseeded, torch.no_grad(), anatomy.undisturbed(model):
            for norm in norms.values():
                _start(norm)
            for batch in itertools.islice(data, self.batches):
                call(model, to_device(batch, device))
                count += 1
            return CalibrateDecision(count, {path: _read(path, norm) for path, norm in norms.items()})

    def apply(self, model: nn.Module, decision: CalibrateDecision, lineage: Lineage) -> nn.Module:
        """Write the statistics into new buffers."""
        for path, found in decision.statistics.items():
            norm: Any = anatomy.get(model, path)
            norm.running_mean = torch.tensor(found.mean, dtype=torch.float64).to(norm.running_mean)
            norm.running_var = torch.tensor(found.var, dtype=torch.float64).to(norm.running_var)
            norm.num_batches_tracked = torch.full_like(norm.num_batches_tracked, decision.batches)
        return model


def _has_statistics(module: nn.Module) -> bool:
    known = isinstance(module, (_BatchNorm, RepBN)) and getattr(module, "running_mean", None) is not None
    return known and not getattr(module, "freeze_statistics", False)


def _start(norm: Any) -> None:
    """Begin a plain average, in buffers of its own: `undisturbed` puts the old ones back."""
    norm.training, norm.momentum = True, None
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, torch.zeros_like(getattr(norm, name)))


def _read(path: str, norm: Any) -> Statistics:
    if not int(norm.num_batches_tracked):
        raise AnatomyError(f"the norm at {path!r} saw no batch: there was no data, or it does not run")
    return Statistics(tuple(norm.running_mean.tolist()), tuple(norm.running_var.tolist()))
