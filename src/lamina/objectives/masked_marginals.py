"""Fit the marginals of what was hidden: the training loss of Boltzmann machines without a partition function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch, call
from lamina.errors import LaminaError, ShapeError, nearest
from lamina.objectives.objective import Losses
from lamina.registry import register


@register("objective", source="Feng, Winston, Kolter 2023, arXiv 2307.04990, section 5")
class MaskedMarginals:
    """Cross-entropy of the variables that were not observed, group by group.

    outputs: a mapping with logits (B, count, states) a group, `mask` (group -> bool (B, count), True = observed) and
    maybe `states` (group -> whole numbers (B, count), what was put in): that of `MonotoneDBM`. The targets of a group
    with a mask are those states, else `inputs` of the batch; of one without, all of which counts, `targets` or
    `labels` of the batch. Either may be a mapping from group to states.

    A row's loss in a group is the mean over what was hidden of it, so that however a batch is split, the gradient stays
    the same (with `class_balance` up to its weights, which are counted in the batch at hand). Logs each group's
    accuracy.

    Args:
        weights: group -> weight of its cross-entropy, at least 0.
        focal: exponent of (1 - p)**focal, by which masked groups weigh what is told already less; 0 = none.
        class_balance: beta of (1 - beta) / (1 - beta**n), n the hidden variables in a state, by which masked groups
            weigh rare states more, mean 1; 0..1 (1 excluded); None = none.
    Raises:
        LaminaError: an option out of range, or a group the outputs or the batch do not have.
    Source: focal: Lin et al. (2017), arXiv 1708.02002; balance: Cui et al. (2019), arXiv 1901.05555, equation 2.
    """

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        focal: float = 2.0,
        class_balance: float | None = 0.9999,
    ) -> None:
        self.weights = dict({"pixel": 0.5, "label": 0.5} if weights is None else weights)
        if not self.weights or not all(w >= 0 for w in self.weights.values()):
            raise LaminaError(f"weights must name at least one group, each at least 0, got {self.weights}")
        if not focal >= 0 or not (class_balance is None or 0 <= class_balance < 1):
            raise LaminaError(f"focal must be >= 0 and class_balance in 0..1 or None, got {focal} and {class_balance}")
        self.focal, self.class_balance = focal, class_balance

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        return self.loss(call(model, batch), batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the weighted mean over rows, each group's share, and its accuracy (0..1) where it was hidden."""
        result: Losses = {}
        total: Tensor | None = None
        for name, weight in self.weights.items():
            logits = _logits(outputs, name)
            mask = (outputs.get("mask") or {}).get(name)
            states = _states(name, logits, outputs, batch, masked=mask is not None)
            hidden = torch.ones_like(states, dtype=torch.bool) if mask is None else ~mask
            values = self._losses(logits, states, hidden, masked=mask is not None)
            each = (values * hidden).sum(1) / hidden.sum(1).clamp(min=1)
            share = each.mean() if len(each) else each.sum()
            total = weight * share if total is None else total + weight * share
            result[name] = share.detach()
            right = ((logits.argmax(-1) == states) & hidden).sum() / hidden.sum().clamp(min=1)
            result[f"{name}_accuracy"] = right.detach()
        assert total is not None
        return {"loss": total, "count": torch.tensor(float(len(states)), device=total.device), **result}

    def parameters(self) -> Iterator[Parameter]:
        """Yield nothing: there is nothing of its own to train."""
        return iter(())

    def _losses(self, logits: Tensor, states: Tensor, hidden: Tensor, *, masked: bool) -> Tensor:
        """Weighted cross-entropies (B, count) in float32."""
        values = F.cross_entropy(logits.float().movedim(-1, 1), states, reduction="none")
        if masked and self.focal:
            values = values * (1.0 - (-values).exp()).clamp(min=0.0) ** self.focal
        if masked and self.class_balance is not None:
            values = values * balance(states, hidden, logits.shape[-1], self.class_balance)
        return values


def balance(states: Tensor, hidden: Tensor, classes: int, beta: float) -> Tensor:
    """Weigh each variable by how rare its state is among the hidden ones; their mean is 1. (B, count) -> same."""
    counts = torch.bincount(states[hidden], minlength=classes).float()
    of_state = (1.0 - beta) / (1.0 - beta**counts).clamp(min=torch.finfo(torch.float32).tiny)
    of_state = torch.where(counts > 0, of_state, 0.0)
    mean = (of_state * counts).sum() / counts.sum().clamp(min=1)
    return of_state[states] / mean.clamp(min=torch.finfo(torch.float32).tiny)


def _logits(outputs: Any, name: str) -> Tensor:
    groups = [k for k, v in outputs.items() if isinstance(v, Tensor)] if isinstance(outputs, Mapping) else []
    if name not in groups:
        raise LaminaError(f"masked_marginals needs logits of {name!r} among the outputs{nearest(name, groups)}")
    logits: Tensor = outputs[name]
    if logits.dim() != 3:
        raise ShapeError(f"logits of {name!r} must be (batch, variables, states), got {tuple(logits.shape)}")
    return logits


def _states(name: str, logits: Tensor, outputs: Any, batch: Batch, *, masked: bool) -> Tensor:
    """Find a group's target states and view them as (B, count)."""
    places = [(outputs.get("states") or {}).get(name) if masked else None]
    for key in ("inputs",) if masked else ("targets", "labels"):
        value = batch.get(key)
        places.append(value.get(name) if isinstance(value, Mapping) else value)
    found = next((p for p in places if isinstance(p, Tensor)), None)
    if found is None:
        what = "'inputs'" if masked else "'targets' or 'labels'"
        raise LaminaError(
            f"masked_marginals needs the states of {name!r} as {what} in the batch, it has {sorted(batch)}"
        )
    if found.is_floating_point() or found.numel() != logits[..., 0].numel():
        raise ShapeError(
            f"targets of {name!r} must be whole numbers {tuple(logits.shape[:2])}, got {found.dtype} "
            f"{tuple(found.shape)}"
        )
    return found.reshape(logits.shape[:2]).long()
