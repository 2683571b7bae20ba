"""Distillation: follow a teacher's logits and, where named, its hidden states."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina import probe
from lamina.batches import Batch, bare, call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.objectives.objective import Losses, mean
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("objective", source="Hinton et al., Distilling the Knowledge in a Neural Network (2015), arXiv 1503.02531")
class Distillation(nn.Module):
    """Follow a frozen teacher: temperature**2 * KL(teacher || student) of the logits, plus hidden states.

    Without a `teacher` the model as it was just before its latest rewrite becomes one (`before_rewrite`); until
    then the loss is 0 and costs nothing. Positions with label -100 or attention mask 0 are left out.

    Args:
        teacher: a model, or the recipe node of one; None: the model before its latest rewrite.
        temperature: softens both distributions, > 0.
        hidden: student path -> teacher path of modules whose outputs are compared by mean squared error,
            divided by the mean square of the teacher's.
        hidden_weight: of that term beside the logits' term.
    Raises:
        LaminaError: temperature or weight out of range.
        ShapeError: two compared tensors differ in shape.
    """

    def __init__(
        self,
        teacher: Annotated[nn.Module | Node | None, Slot("model")] = None,
        *,
        temperature: float = 2.0,
        hidden: Mapping[str, str] | None = None,
        hidden_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not hidden_weight >= 0:
            raise LaminaError(f"temperature must be > 0 and hidden_weight >= 0, got {temperature} and {hidden_weight}")
        self.temperature = temperature
        self.hidden = dict(hidden or {})
        self.hidden_weight = hidden_weight
        self.fixed = teacher is not None
        self.teacher: nn.Module | None = None
        self._seen: probe.Captured | None = None
        if teacher is not None:
            self._take(teacher if isinstance(teacher, nn.Module) else factory("model", teacher)())

    @property
    def needs(self) -> Literal["outputs", "model"]:
        """`model` where hidden states are compared."""
        return "model" if self.hidden else "outputs"

    def before_rewrite(self, model: nn.Module) -> None:
        """Keep a frozen copy of the model as teacher, unless one was given."""
        if not self.fixed:
            self._take(copy.deepcopy(bare(model)))

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Run student and teacher and return the losses."""
        with self.observing(model):
            outputs = call(model, batch)
        return self.loss(outputs, batch)

    def observing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Watch the student's hidden states during the forward pass inside this context."""
        return self._watch(model) if self.hidden and self.teacher is not None else nullcontext()

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses for the student's outputs on this batch."""
        student = logits(outputs)
        kept = _kept(batch, student.shape[:-1])
        if self.teacher is None:
            # Zero, but with the count it will have later: weights of micro-batches stay comparable.
            return {**mean(student.new_zeros(student.shape[:-1]), kept), "active": student.new_zeros(())}
        seen, self._seen = self._seen, None
        watching = probe.capture(self.teacher, outputs=list(self.hidden.values())) if self.hidden else nullcontext()
        with torch.no_grad(), watching as taught:
            goal = logits(call(self.teacher, batch))
        if goal.shape != student.shape:
            raise ShapeError(f"distillation got student logits {tuple(student.shape)}, teacher {tuple(goal.shape)}")
        losses = mean(soft_divergence(student, goal, self.temperature), kept)
        losses["active"] = student.new_ones(())
        if self.hidden:
            if seen is None or taught is None:
                raise LaminaError("distillation of hidden states needs the model: call the objective, not its loss()")
            term = sum_of_gaps([(seen.tensor(s), taught.tensor(t)) for s, t in self.hidden.items()], kept)
            losses["hidden"] = term.detach()
            losses["loss"] = losses["loss"] + self.hidden_weight * term
        return losses

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield nothing: the teacher is frozen."""
        return iter(())

    def train(self, mode: bool = True) -> Distillation:
        """Set the mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def _take(self, teacher: nn.Module) -> None:
        self.teacher = teacher.eval().requires_grad_(False)

    @contextmanager
    def _watch(self, model: nn.Module) -> Iterator[None]:
        with probe.capture(model, outputs=list(self.hidden), detach=False) as seen:
            yield
        self._seen = seen


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return temperature**2 * KL(softmax(teacher / T) || softmax(student / T)): (..., classes) -> (...), float32."""
    goal = F.log_softmax(teacher.float() / temperature, dim=-1)
    guess = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(guess, goal, reduction="none", log_target=True).sum(-1)


def sum_of_gaps(pairs: list[tuple[Tensor, Tensor]], kept: Tensor | None) -> Tensor:
    """Sum over (student, teacher) pairs of mean((s - t)**2) / mean(t**2), over kept positions."""
    total = pairs[0][0].new_zeros((), dtype=torch.float32)
    for student, teacher in pairs:
        if student.shape != teacher.shape:
            raise ShapeError(f"hidden states differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
        s, t = student.float(), teacher.float()
        mask = kept if kept is not None and kept.shape == s.shape[:-1] else None
        total = total + mean((s - t).square().mean(-1), mask)["loss"] / mean(t.square().mean(-1), mask)["loss"]
    return total


def _kept(batch: Batch, shape: torch.Size) -> Tensor | None:
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        return labels != -100
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None
