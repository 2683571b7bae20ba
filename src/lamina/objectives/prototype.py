"""Train prototypes: the four terms of a prototype network, and the two penalties beside any other objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from lamina import probe
from lamina.batches import Batch, bare, call, first_input, logits
from lamina.errors import LaminaError, ShapeError
from lamina.nn.prototype import SOURCE, PrototypeLayer, prototype_penalties
from lamina.objectives._penalized import PenalizedByWatching
from lamina.objectives.objective import Losses, target
from lamina.objectives.supervised import Classification
from lamina.registry import Slot, register


@register("objective", "prototype", source=f"{SOURCE}, equation 5")
class PrototypeObjective:
    """What a `PrototypeNetwork` is trained by: a weighted sum of four terms, all logged without their weights.

    `classification`: cross-entropy. `reconstruction`: mean over rows of the squared error summed over pixels.
    `prototype_to_data` (R1): mean over prototypes of the squared distance to the nearest row of the batch.
    `data_to_prototype` (R2): mean over rows of that to the nearest prototype. Also `accuracy` (0..1), and `dead`: how
    many prototypes are the nearest of no row. outputs: `.logits`, `.distances`, and `.reconstruction`, whose term is
    left out where it is None, as in evaluation, so that what evaluations compare (`measure`) is the classification.

    R1 looks at the whole batch, so splitting it changes the loss a little: in micro-batches it is the mean of theirs.

    Args:
        classification, reconstruction, prototype_to_data, data_to_prototype: weights, at least 0; the official ones.
        gather: in training, R1's nearest row is sought among those of all processes: the loss of the global batch.
    Raises:
        LaminaError: a negative weight, outputs without distances, or a batch without labels or images.
        ShapeError: reconstruction and image of different shapes, labels out of range.
    """

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"

    def __init__(
        self,
        classification: float = 20.0,
        reconstruction: float = 1.0,
        prototype_to_data: float = 1.0,
        data_to_prototype: float = 1.0,
        gather: bool = True,
    ) -> None:
        self.weights = {
            "classification": classification,
            "reconstruction": reconstruction,
            "prototype_to_data": prototype_to_data,
            "data_to_prototype": data_to_prototype,
        }
        _check_weights(self.weights)
        self.gather = gather
        self._classification = Classification()

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        return self.loss(call(model, batch), batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the sum and its terms."""
        distances = getattr(outputs, "distances", None)
        if not isinstance(distances, Tensor):
            raise LaminaError(
                f"the objective prototype needs .distances in the outputs, got a {type(outputs).__name__}; of a model "
                "with a PrototypeHead prototype_penalties finds them"
            )
        labels = batch["labels"] if "labels" in batch else target(batch, "targets", "prototype (or 'labels')")
        told = self._classification.loss(logits(outputs), {"labels": labels})
        terms = {"classification": told["loss"], **_penalties(distances, self.gather)}
        shown = getattr(outputs, "reconstruction", None)
        if shown is not None:
            terms["reconstruction"] = reconstruction_error(shown, first_input(batch))
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        logged = {name: term.detach() for name, term in terms.items()}
        return {
            "loss": total,
            "count": told["count"],
            "measure": logged["classification"],
            **logged,
            "accuracy": told["accuracy"],
            "dead": dead_prototypes(distances),
        }

    def parameters(self) -> Iterator[Parameter]:
        """Yield nothing: there is nothing of its own to train."""
        return iter(())


@register("objective", source=f"{SOURCE}, equations 3 and 4")
class PrototypePenalties(PenalizedByWatching[list[Tensor]]):
    """Another objective, plus the two penalties for the prototype layers of any model, such as a replaced head.

    loss = base + prototype_to_data * R1 + data_to_prototype * R2, see `PrototypeObjective`, with the distances that the
    layers compute anyway; several layers (and calls) add up. In a sequence every position is a row, padding included.
    Logs `task` (the base's loss), R1 and R2. One forward pass.

    Args:
        base: objective of the task at hand, or its recipe node.
        prototype_to_data, data_to_prototype: weights, at least 0; 0.05 is what the official ones are for a
            classification that counts once.
        gather: see `PrototypeObjective`.
    Raises:
        LaminaError: a negative weight, or (at the call) a model in which no prototype layer ran.
    """

    def __init__(
        self,
        base: Annotated[Any, Slot("objective")] = "classification",
        prototype_to_data: float = 0.05,
        data_to_prototype: float = 0.05,
        gather: bool = True,
    ) -> None:
        super().__init__(base)
        self.weights = {"prototype_to_data": prototype_to_data, "data_to_prototype": data_to_prototype}
        _check_weights(self.weights)
        self.gather = gather

    def complete(self, losses: Losses, seen: list[Tensor]) -> Losses:
        """Add R1 and R2 of every call of a prototype layer."""
        if not seen:
            raise LaminaError("prototype_penalties: the model has prototypes, and none of them was asked on this batch")
        found = [_penalties(distances, self.gather) for distances in seen]
        terms = {name: torch.stack([f[name] for f in found]).sum() for name in self.weights}
        total = losses["loss"] + torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {**losses, "loss": total, **{name: term.detach() for name, term in terms.items()}}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collect the distances that every prototype layer computes."""
        root = bare(model)
        paths = [p for p, m in root.named_modules() if isinstance(m, PrototypeLayer)]
        if not paths:
            raise LaminaError(
                f"prototype_penalties needs prototypes in the model, and {type(root).__name__} has none: "
                "Replace('head', 'prototype_head') puts some there"
            )
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append(output)

        with probe.observe(model, dict.fromkeys(paths, note)):
            yield seen


def reconstruction_error(shown: Tensor, image: Tensor) -> Tensor:
    """Return the mean over rows of the squared error summed over all else, 0-dim; (B, ...) both, at least float32.

    Raises:
        ShapeError: of different shapes.
    """
    if shown.shape != image.shape:
        raise ShapeError(f"the reconstruction must be as the image, {tuple(image.shape)}, got {tuple(shown.shape)}")
    dtype = torch.promote_types(shown.dtype, torch.float32)
    return (shown.to(dtype) - image.to(dtype)).square().sum() / max(len(image), 1)


def dead_prototypes(distances: Tensor) -> Tensor:
    """Count the prototypes that are the nearest of no row of distances (..., m), 0-dim."""
    rows = distances.detach().reshape(-1, distances.shape[-1])
    nearest = torch.zeros(rows.shape[1], device=rows.device).index_fill_(0, rows.argmin(1), 1.0)
    return (nearest == 0).sum().to(rows.dtype)


def nearest_over_processes(distances: Tensor) -> Tensor:
    """Return R1 of the rows (..., m) of all processes, 0-dim, the same number in each.

    Gradients are averaged over processes with their rows as weights, so the one that has the nearest row to a prototype
    gives that prototype's whole gradient, and the others none: together, the gradient of the global batch.
    """
    rows = distances.reshape(-1, distances.shape[-1])
    none = torch.full_like(rows[:1], torch.inf)[0] if len(rows) else rows.new_full(rows.shape[1:], torch.inf)
    own = rows.min(0).values if len(rows) else none
    told = torch.cat([own.detach(), own.new_tensor([len(rows)])])
    table = [torch.empty_like(told) for _ in range(dist.get_world_size())]
    dist.all_gather(table, told)
    everywhere = torch.stack(table)
    nearest, owner = everywhere[:, :-1].min(0)
    if not len(rows):
        return nearest.mean() + rows.sum()
    scale = everywhere[:, -1].sum() / len(rows)
    mine = (owner == dist.get_rank()).to(own.dtype) * scale
    return (nearest + mine * (own - own.detach())).mean()


def _penalties(distances: Tensor, gather: bool) -> Losses:
    first, second = prototype_penalties(distances)
    # In evaluation processes need not have equally many batches, and must not wait for each other.
    if (
        gather
        and torch.is_grad_enabled()
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    ):
        first = nearest_over_processes(distances)
    return {"prototype_to_data": first, "data_to_prototype": second}


def _check_weights(weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        if not weight >= 0:
            raise LaminaError(f"the weight {name} must be at least 0, got {weight}")
