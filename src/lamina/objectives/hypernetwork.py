"""Learning task after task with a hypernetwork: keep the weights of the tasks before where they are."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import nn

from lamina.batches import Batch, bare
from lamina.errors import LaminaError
from lamina.nn.hypernetwork import HyperNetwork
from lamina.objectives._penalized import Penalized
from lamina.objectives.objective import Losses
from lamina.registry import Slot, register


@register("objective", "hypernetwork_drift", source="von Oswald et al. 2020, arXiv 1906.00695, equation 2")
class HyperNetworkDrift(Penalized):
    """Another objective, plus what it costs to move the weights of remembered conditions.

    loss = base + weight * drift + magnitude_weight * |theta|^2, where drift is the mean over remembered conditions of
    the squared distance of their generated weights from those remembered (`HyperNetwork.remember`; 0 before). Logs
    `task` (the base's loss), `drift`, and `magnitude` where it is weighed. Every `HyperNetwork` in the model counts.

    Args:
        base: objective of the task at hand, or its recipe node.
        weight: of the drift.
        magnitude_weight: of the squared length of the weights that the batch's `condition` generates: weight decay on
            the generator does not shrink them.
    Raises:
        LaminaError: a negative weight, or (at the call) a model without a hypernetwork.
    """

    def __init__(
        self,
        base: Annotated[Any, Slot("objective")] = "classification",
        weight: float = 0.01,
        *,
        magnitude_weight: float = 0.0,
    ) -> None:
        super().__init__(base)
        for name, value in (("weight", weight), ("magnitude_weight", magnitude_weight)):
            if not value >= 0:
                raise LaminaError(f"{name} must be at least 0, got {value}")
        self.weight, self.magnitude_weight = weight, magnitude_weight

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the base's losses with the terms added."""
        hypernetworks = [m for m in bare(model).modules() if isinstance(m, HyperNetwork)]
        if not hypernetworks:
            raise LaminaError(f"hypernetwork_drift needs a HyperNetwork in the model, and {type(bare(model)).__name__} has none")  # fmt: skip  # noqa: E501
        losses = self.base(model, batch)
        drift = torch.stack([h.drift() for h in hypernetworks]).sum()
        found = {**losses, "loss": losses["loss"] + self.weight * drift, "drift": drift.detach()}
        if self.magnitude_weight:
            magnitude = torch.stack([h.magnitude(batch.get("condition")) for h in hypernetworks]).sum()
            found["loss"] = found["loss"] + self.magnitude_weight * magnitude
            found["magnitude"] = magnitude.detach()
        return found
