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
from lamina.errors import LaminaError, ShapeError, nearest
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
            divided by the mean square of the teacher's in the same row.
        hidden_weight: of that term beside the logits' term.
        adapt: student path -> (its width, the teacher's): a linear map of the student's last dimension, trained
            along, for hidden states that differ in it (Romero et al., FitNets (2014), arXiv 1412.6550, equation 3).
    Raises:
        LaminaError: temperature, weight or width out of range, or a path in adapt that is not in hidden.
        ShapeError: two compared tensors differ in shape.
    """

    def __init__(
        self,
        teacher: Annotated[nn.Module | Node | None, Slot("model")] = None,
        *,
        temperature: float = 2.0,
        hidden: Mapping[str, str] | None = None,
        hidden_weight: float = 1.0,
        adapt: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not hidden_weight >= 0:
            raise LaminaError(f"temperature must be > 0 and hidden_weight >= 0, got {temperature} and {hidden_weight}")
        self.temperature = temperature
        self.hidden = dict(hidden or {})
        self.hidden_weight = hidden_weight
        self.adapt = _adaptors(adapt or {}, self.hidden)
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
            pairs = {s: (self._adapted(s, seen.tensor(s)), taught.tensor(t)) for s, t in self.hidden.items()}
            term = sum_of_gaps(pairs, kept, batch.get("attention_mask"))
            losses["hidden"] = term.detach()
            losses["loss"] = losses["loss"] + self.hidden_weight * term
        return losses

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield those of the adaptors; the teacher is frozen."""
        return self.adapt.parameters()

    def train(self, mode: bool = True) -> Distillation:
        """Set the mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def _adapted(self, path: str, state: Tensor) -> Tensor:
        key = _key(path)
        if key not in self.adapt:
            return state
        width = int(self.adapt[key].in_features)  # type: ignore[arg-type]
        if state.shape[-1] != width:
            raise ShapeError(f"adapt[{path!r}] is for a width of {width}, the student has {tuple(state.shape)} there")
        adapted: Tensor = self.adapt[key](state)
        return adapted

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


def sum_of_gaps(pairs: Mapping[str, tuple[Tensor, Tensor]], kept: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Sum `relative_gap` over (student, teacher) pairs, by the student's path.

    Raises:
        ShapeError: a pair differs in shape; the path is named.
    """
    gaps = []
    for path, (student, teacher) in pairs.items():
        if student.shape != teacher.shape:
            hint = ""
            if student.shape[:-1] == teacher.shape[:-1]:
                hint = f"; adapt={{{path!r}: ({student.shape[-1]}, {teacher.shape[-1]})}} trains a map between them"
            raise ShapeError(
                f"hidden states of {path!r} differ: student {tuple(student.shape)}, "
                f"teacher {tuple(teacher.shape)}{hint}"
            )
        gaps.append(relative_gap(student.float(), teacher.float(), kept, mask))
    return torch.stack(gaps).sum()


def relative_gap(student: Tensor, teacher: Tensor, kept: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Return mean((s - t)**2) / mean(t**2) of each row (B, ...), averaged over rows by how many predictions each keeps.

    Normalised within its row, a batch gives the same however it is cut up.

    Args:
        kept: predictions that count, (B, ...); as positions they are taken where the shape allows it.
        mask: attention mask (B, T); padding is left out of states (B, T, ...).
    """
    weight, inside = teacher.new_ones(len(teacher)), torch.ones_like(teacher)
    if kept is not None and len(kept) == len(teacher):
        weight = kept.flatten(1).sum(1).to(teacher.dtype) if kept.dim() > 1 else kept.to(teacher.dtype)
    for chosen in (kept, mask):
        if chosen is not None and chosen.shape == teacher.shape[: chosen.dim()]:
            inside = inside * chosen.reshape(*chosen.shape, *[1] * (teacher.dim() - chosen.dim()))
    gap = ((student - teacher).square() * inside).flatten(1).sum(1)
    size = (teacher.square() * inside).flatten(1).sum(1)
    # A row without a kept position has neither gap nor size, and no weight.
    ratio = gap / size.clamp(min=torch.finfo(size.dtype).eps)
    return (ratio * weight).sum() / weight.sum().clamp(min=1)


def _adaptors(widths: Mapping[str, tuple[int, int]], hidden: Mapping[str, str]) -> nn.ModuleDict:
    for path, pair in widths.items():
        if path not in hidden:
            raise LaminaError(f"adapt names {path!r}, which is not in hidden{nearest(path, hidden)}")
        if len(pair) != 2 or min(pair) < 1:
            raise LaminaError(f"adapt[{path!r}] must be (student's width, teacher's width), got {tuple(pair)}")
    return nn.ModuleDict({_key(path): nn.Linear(*pair, bias=False) for path, pair in widths.items()})


def _key(path: str) -> str:
    """Return a path as the name of a module, which has no dots."""
    return path.replace(".", "/")


def _kept(batch: Batch, shape: torch.Size) -> Tensor | None:
    """Return which predictions count: those with a label and under the attention mask, as far as a batch has these."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    found = []
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        found.append(labels != -100)
    if isinstance(mask, Tensor) and mask.shape == shape:
        found.append(mask.bool())
    return torch.stack(found).all(0) if found else None
