"""What an objective is, and the weighted sum of several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch, call
from lamina.errors import LaminaError
from lamina.registry import snake_case

Losses = dict[str, Tensor]
"""`loss` (0-dim, a mean), `count` (0-dim: what that mean is over), the rest is logged.

`measure` (0-dim, optional) is what evaluations compare where it is not the loss: a sum's first term, so that a teacher
that comes and goes does not change what is measured.
"""


OWN_KEYS = frozenset({"loss", "count", "measure"})
"""Keys of `Losses` that have a meaning; all others are logged."""


@runtime_checkable
class Objective(Protocol):
    """What a training step minimises.

    Micro-batches, accumulation and data-parallel shards are weighted by `count`, so that splitting a batch
    gives the same gradient. Optional: `before_rewrite(model)` is called just before a pass rewrites the model
    in training (distillation keeps a frozen copy as teacher); `observing(model)`, a context manager under which
    a forward pass leaves what `loss` needs, so that several objectives share it; `rate_factors()`, pairs of
    a parameter and its learning rate over the model's; `state_dict` / `load_state_dict` where the objective
    has state.
    """

    @property
    def needs(self) -> Literal["outputs", "model"]:
        """Return `outputs` where `loss` is enough, `model` where it calls the model itself (hidden states, ...)."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses of outputs already computed; only where `needs == "outputs"`."""
        ...

    def parameters(self) -> Iterable[Parameter]:
        """Yield parameters of the objective itself, trained along with the model."""
        ...


class WeightedSum(nn.Module):
    """Sum of objectives, each with its weight, over one shared forward pass.

    The sum's `count` is the first objective's, so splitting a batch gives exactly the same gradient where the
    counts of the terms keep one proportion (tokens and tokens, rows and tokens of equal length). Terms appear in
    the result under their names (`next_token`, `distillation`, ...).

    Args:
        terms: (weight >= 0, objective) pairs.
        names: one a term, for the log; default: the class names.
    Raises:
        LaminaError: no term, or a negative weight.
    """

    def __init__(self, terms: Sequence[tuple[float, Objective]], names: Sequence[str] | None = None) -> None:
        super().__init__()
        if not terms:
            raise LaminaError("a weighted sum of objectives needs at least one")
        for weight, objective in terms:
            if not weight >= 0:
                raise LaminaError(f"the weight of {type(objective).__name__} must be at least 0, got {weight}")
        self.weights = [float(weight) for weight, _ in terms]
        self.terms = [objective for _, objective in terms]
        self.names = list(names or (snake_case(type(o).__name__) for o in self.terms))
        # Registered a second time so that state_dict and .to() reach the terms that are modules; `get_extra_state`
        # has the others.
        self.parts = nn.ModuleDict({str(i): o for i, o in enumerate(self.terms) if isinstance(o, nn.Module)})

    @property
    def needs(self) -> Literal["outputs", "model"]:
        """`model` as soon as one term needs the model."""
        return "model" if any(o.needs == "model" for o in self.terms) else "outputs"

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the weighted sum; terms that can watch a forward pass (`observing`) share one call of the model."""
        with ExitStack() as watching:
            shared = [self._watch(o, model, watching) for o in self.terms]
            outputs = call(model, batch) if any(shared) else None
        pairs = zip(self.terms, shared, strict=True)
        return self._combine([o.loss(outputs, batch) if s else o(model, batch) for o, s in pairs])

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the weighted sum from outputs alone.

        Raises:
            LaminaError: a term needs the model.
        """
        needing = [n for n, o in zip(self.names, self.terms, strict=True) if o.needs == "model"]
        if needing:
            raise LaminaError(f"the objective {needing[0]} needs the model, not only its outputs")
        return self._combine([o.loss(outputs, batch) for o in self.terms])

    @staticmethod
    def _watch(objective: Objective, model: nn.Module, stack: ExitStack) -> bool:
        if objective.needs == "outputs":
            return True
        observing = getattr(objective, "observing", None)
        if observing is not None:
            stack.enter_context(observing(model))
        return observing is not None

    def _combine(self, found: Sequence[Losses]) -> Losses:
        total: Tensor = torch.zeros((), device=found[0]["loss"].device)
        result: Losses = {}
        for name, weight, losses in zip(self.names, self.weights, found, strict=True):
            total = total + weight * losses["loss"]
            result[name] = losses["loss"].detach()
            result.update({f"{name}.{k}": v.detach() for k, v in losses.items() if k not in OWN_KEYS})
        measure = found[0].get("measure", found[0]["loss"]).detach()
        return {"loss": total, "count": found[0]["count"], "measure": measure, **result}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the terms that are no modules, by number."""
        return {i: o.state_dict() for i, o in self._stateful()}  # type: ignore[attr-defined]

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the state of those terms back."""
        for i, o in self._stateful():
            o.load_state_dict(state[i])  # type: ignore[attr-defined]

    def _stateful(self) -> list[tuple[str, Objective]]:
        return [(str(i), o) for i, o in enumerate(self.terms) if str(i) not in self.parts and hasattr(o, "state_dict")]

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield the trained parameters of all terms."""
        for o in self.terms:
            yield from o.parameters()

    def before_rewrite(self, model: nn.Module) -> None:
        """Tell every term that wants to know that the model is about to be rewritten."""
        for o in self.terms:
            told = getattr(o, "before_rewrite", None)
            if told is not None:
                told(model)

    def set_progress(self, fraction: float) -> None:
        """Tell every term how far training is."""
        for o in self.terms:
            told = getattr(o, "set_progress", None)
            if told is not None:
                told(fraction)


def mean(values: Tensor, mask: Tensor | None = None) -> Losses:
    """Average per-element losses where `mask` is true; `count` is how many there were.

    An empty mask gives loss 0 (with gradient 0) and count 0, so that a fully padded shard adds nothing.
    """
    if mask is None:
        return {"loss": values.mean(), "count": torch.tensor(float(values.numel()), device=values.device)}
    kept = mask.to(values.dtype)
    count = kept.sum()
    return {"loss": (values * kept).sum() / count.clamp(min=1), "count": count}


def target(batch: Batch, name: str, what: str) -> Tensor:
    """Take an entry the objective cannot do without.

    Raises:
        LaminaError: the batch has no such tensor.
    """
    value = batch.get(name) if isinstance(batch, Mapping) else None
    if not isinstance(value, Tensor):
        raise LaminaError(f"{what} needs {name!r} in the batch, which has {sorted(batch)}")
    return value
