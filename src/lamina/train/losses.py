"""The losses of the steps since the last look: kept on the device until somebody wants to know."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lamina.objectives.objective import OWN_KEYS
from lamina.train.distributed import World
from lamina.train.precision import check_finite


def logged(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what an objective gives to be logged beside its loss."""
    return {k: v for k, v in losses.items() if k not in OWN_KEYS and v.numel() == 1}


class PendingLosses:
    """Collects a step's loss without waiting for the device; `read` waits once for all of them."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.last: Mapping[str, Tensor] = {}

    def add(self, weighted: Tensor, count: Tensor, losses: Mapping[str, Tensor]) -> None:
        """Add one step: this process's sum of loss * count, its count, and the losses to log beside."""
        self.pairs.append((weighted, count))
        self.last = losses

    def read(self, step: int, world: World, checkpoint: str | None) -> tuple[float, int]:
        """Return the mean loss over the steps since the last read, up to `step`, and how many those were.

        Args:
            checkpoint: the last good one, for the error.
        Raises:
            TrainingError: one of them is NaN or infinite; every process raises.
        """
        table = world.total(torch.stack([torch.stack(pair) for pair in self.pairs])).tolist()
        self.pairs.clear()
        check_finite([weighted / (count or 1.0) for weighted, count in table], step - len(table) + 1, checkpoint)
        return sum(w for w, _ in table) / (sum(c for _, c in table) or 1.0), len(table)

    def beside(self) -> dict[str, float]:
        """Return the last step's other losses (of this process's last micro-batch)."""
        return {k: float(v) for k, v in logged(self.last).items()}

    def __len__(self) -> int:
        return len(self.pairs)
