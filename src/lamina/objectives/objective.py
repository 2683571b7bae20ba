"""What an objective is, and the weighted sum of several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch

Losses = dict[str, Tensor]
"""`loss` (0-dim, a mean), `count` (0-dim: what that mean is over), the rest is logged."""


@runtime_checkable
class Objective(Protocol):
    """What a training step minimises.

    Micro-batches, accumulation and data-parallel shards are weighted by `count`, so that splitting a batch
    gives the same gradient. Optional: `before_rewrite(model)` is called just before a pass rewrites the model
    in training (distillation keeps a frozen copy as teacher); `state_dict` / `load_state_dict` where the
    objective has state.
    """

    needs: ClassVar[Literal["outputs", "model"]]

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses of outputs already computed; only where `needs == "outputs"`."""
        ...

    def parameters(self) -> Iterable[Parameter]:
        """Yield parameters of the objective itself, trained along with the model."""
        ...
