"""The slow neural loss: let the slow kernels of a network's blocks agree."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lamina.batches import Batch, bare
from lamina.errors import LaminaError
from lamina.nn.hyper_convolution.coordinate_kernel import CoordinateKernel
from lamina.nn.hyper_convolution.global_product import HyperZZWGlobal, mixer_kernels, slow_kernel_distance
from lamina.objectives._penalized import Penalized
from lamina.objectives.objective import Losses
from lamina.registry import Slot, register

SLOW_SHARE = 1e-6
"""What the norms of the slow nets count beside those of the other parameters."""


@register("objective", "slow_neural_loss", source="Zhang 2024, arXiv 2401.17948, slow neural loss")
class SlowNeuralLoss(Penalized):
    """Another objective, plus how far apart a model's slow kernels are: local feedback that needs no data.

    loss = base + weight * slow + norm_penalty * norms. slow: the sum over pairs of blocks of the mean square of the
    earlier kernel, tiled to the later one's channels, less the later one. The kernels are those of the model's
    `slow_kernels()`, or of every `HyperZZWGlobal` in it, on the largest of their grids (`mixer_kernels`); only the slow
    nets get a gradient of it. norms: the sum of the norms (not squared) of the parameters outside slow nets, and 1e-6
    times those of the weights in slow nets of two dimensions. Logs `task` (the base's loss), `slow`, `norms`.

    Args:
        base: objective of the task at hand, or its recipe node; label smoothing 0.09 in the paper.
        weight: of the distance, at least 0. norm_penalty: of the norms, at least 0; 0 = not computed.
    Raises:
        LaminaError: a negative weight, or (at the call) a model without slow kernels. ShapeError: kernels whose
            channels are no multiples of those before.
    """

    def __init__(
        self,
        base: Annotated[Any, Slot("objective")] = "classification",
        weight: float = 1.0,
        norm_penalty: float = 5e-5,
    ) -> None:
        super().__init__(base)
        for name, value in (("weight", weight), ("norm_penalty", norm_penalty)):
            if not value >= 0:
                raise LaminaError(f"{name} must be at least 0, got {value}")
        self.weight, self.norm_penalty = weight, norm_penalty

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the base's losses with the terms added."""
        root = bare(model)
        losses = self.base(model, batch)
        distance = slow_kernel_distance(*slow_kernels_of(root))
        found = {**losses, "loss": losses["loss"] + self.weight * distance, "slow": distance.detach()}
        if self.norm_penalty:
            norms = norms_of(root)
            found["loss"] = found["loss"] + self.norm_penalty * norms
            found["norms"] = norms.detach()
        return found


def slow_kernels_of(model: nn.Module) -> tuple[list[Tensor], list[int]]:
    """Return a model's slow kernels and by how much the channels widen from each to the next.

    Raises:
        LaminaError: it has none.
    """
    told = getattr(model, "slow_kernels", None)
    if told is not None:
        pairs = told()
        return [kernel for kernel, _ in pairs], [factor for _, factor in pairs]
    if any(isinstance(m, HyperZZWGlobal) for m in model.modules()):
        return mixer_kernels(model)
    raise LaminaError(
        f"slow_neural_loss needs a model with slow_kernels() or with hyper_zzw_global mixers, and "
        f"{type(model).__name__} has neither"
    )


def norms_of(model: nn.Module) -> Tensor:
    """Sum the norms of the parameters outside slow nets, and 1e-6 times those of two-dimensional slow nets' weights."""
    slow = [m for m in model.modules() if isinstance(m, CoordinateKernel)]
    inside = {id(p) for m in slow for p in m.parameters()}
    weights = [p for m in slow if m.dim == 2 for n, p in m.named_parameters() if n.endswith("weight")]
    fast = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    total = torch.zeros((), device=next(model.parameters()).device)
    for share, parameters in ((1.0, fast), (SLOW_SHARE, weights)):
        if parameters:
            total = total + share * torch.stack([torch.linalg.vector_norm(p) for p in parameters]).sum()
    return total
