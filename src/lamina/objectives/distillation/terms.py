"""A term of a distillation: which loss, between which places of student and teacher, when, and how much."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.errors import LaminaError, ShapeError, nearest
from lamina.objectives.distillation.feature_losses import (
    ActivationBoundary,
    Affinity,
    AttentionTransfer,
    DISTPlus,
    FlowOfSolution,
    Hint,
    InterChannelCorrelation,
    SimpleRepresentation,
)
from lamina.objectives.distillation.logit_losses import (
    DIST,
    KnowledgeDistillation,
    LogitStandardization,
    StreamlinedDirection,
    StreamlinedInstance,
)
from lamina.objectives.distillation.memory_losses import ContrastiveRepresentation
from lamina.objectives.distillation.places import LOGITS, Place
from lamina.objectives.distillation.relational_losses import (
    CorrelationCongruence,
    ProbabilisticKnowledgeTransfer,
    RelationalKD,
    SimilarityPreserving,
)
from lamina.objectives.distillation.self_supervision import SelfSupervisionKD
from lamina.objectives.distillation.term_loss import ChannelMap, TermLoss
from lamina.objectives.distillation.trained_losses import (
    FactorTransfer,
    KnowledgeReview,
    PredictionWithUncertainty,
    VariationalInformation,
)
from lamina.recipe import Node, build
from lamina.recipe._options import Misfit
from lamina.registry import snake_case

Layout = Literal["bchw", "btd"]

LOSSES: dict[str, type[TermLoss]] = {
    snake_case(loss.__name__): loss
    for loss in (
        *(KnowledgeDistillation, LogitStandardization, DIST, StreamlinedInstance, StreamlinedDirection),
        *(Hint, AttentionTransfer, FlowOfSolution, ActivationBoundary, InterChannelCorrelation, Affinity),
        *(SimpleRepresentation, DISTPlus, FactorTransfer, VariationalInformation, PredictionWithUncertainty),
        *(KnowledgeReview, ProbabilisticKnowledgeTransfer, RelationalKD, CorrelationCongruence, SimilarityPreserving),
        *(ContrastiveRepresentation, SelfSupervisionKD),
    )
}
"""Every loss by the name that a term gives it."""

FRAME = ("name", "student", "teacher", "weight", "from", "to", "adapter", "layout")
"""Keys of a term that are not the loss's own options."""


class Term(nn.Module):
    """One term: its loss with what is trained along, its places, its weight and its time.

    Args:
        loss: what is compared.
        name: in the log.
        student, teacher: places; none = the predictions, for a loss of logits.
        weight: of the loss, at least 0.
        start, end: fractions of training between which it counts.
        adapters: one a place of the student, or None.
        layout: of features; None = channels last where a tensor has three dimensions, else second.
    """

    def __init__(
        self,
        loss: nn.Module,
        name: str,
        *,
        student: Sequence[str] = (),
        teacher: Sequence[str] = (),
        weight: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        adapters: Sequence[nn.Module | None] = (),
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.name, self.weight, self.start, self.end, self.layout = loss, name, weight, start, end, layout
        self.of_logits = getattr(loss, "reads", "features") == "logits"
        if not student and not teacher and self.of_logits:
            student = teacher = (LOGITS,)
        self.student, self.teacher = [Place.parse(s) for s in student], [Place.parse(t) for t in teacher or student]
        self.adapters = nn.ModuleDict({str(i): a for i, a in enumerate(adapters) if a is not None})
        # Behind the two sides: entries of the batch that the loss wants.
        self.asks = list(inspect.signature(loss.forward).parameters)[2:]
        self._check(len(adapters))

    @property
    def logits_only(self) -> bool:
        """True where outputs are enough."""
        return all(p.is_logits for p in (*self.student, *self.teacher))

    def active(self, fraction: float) -> bool:
        """Say whether the term counts at this fraction of training."""
        return self.start <= fraction < self.end or fraction == self.end == 1.0

    def set_progress(self, fraction: float) -> None:
        """Hear how far training is; the loss hears how far its own time is."""
        told = getattr(self.loss, "set_progress", None)
        if told is not None:
            told(min(max((fraction - self.start) / (self.end - self.start), 0.0), 1.0))

    def forward(
        self, student: Mapping[Place, Tensor], teacher: Mapping[Place, Tensor], batch: Batch, kept: Tensor | None
    ) -> Tensor:
        """Return the loss without its weight.

        Args:
            student, teacher: tensors by place.
            kept: which predictions count, or None.
        """
        ours, theirs = [student[p] for p in self.student], [teacher[p] for p in self.teacher]
        ours = [self.adapters[str(i)](x) if str(i) in self.adapters else x for i, x in enumerate(ours)]
        labels = batch.get("labels")
        if self.of_logits:
            sides, labels = [[self._rows(x, kept) for x in side] for side in (ours, theirs)], self._labels(labels, ours[0], kept)  # fmt: skip  # noqa: E501
            if not len(sides[0][0]):
                return sides[0][0].sum() * 0.0
        else:
            mask = batch.get("attention_mask")
            sides = [[self._map(x, p, mask) for x, p in zip(*side, strict=True)] for side in ((ours, self.student), (theirs, self.teacher))]  # fmt: skip  # noqa: E501
        if getattr(self.loss, "relational", False) and len(sides[0][0]) < 2 and not torch.is_grad_enabled():
            # The last batch of an evaluation may have a single row.
            return sides[0][0].new_zeros(())
        known = {"targets": labels, **{n: batch.get(n) for n in self.asks if n != "targets"}}
        return self._compute(sides[0], sides[1], {n: known[n] for n in self.asks})

    def _compute(self, student: list[Tensor], teacher: list[Tensor], known: dict[str, Any]) -> Tensor:
        device = student[0].device
        many = getattr(self.loss, "count", 1) != 1
        with torch.autocast(device.type, enabled=False):
            values = [[x.float() for x in side] for side in (student, teacher)]
            try:
                found: Tensor = self.loss(*(v if many else v[0] for v in values), **known)
            except ShapeError as error:
                raise ShapeError(f"{self.between()}: {error}") from error
        return found

    def between(self) -> str:
        """Word the term and its places."""
        names = [" and ".join(f"{str(p)!r}" for p in side) for side in (self.student, self.teacher)]
        return f"{self.name} between {names[0]} of the student and {names[1]} of the teacher"

    def _rows(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """Return logits as (rows, classes), of the rows that count."""
        x = x.movedim(1, -1) if self.layout == "bchw" else x
        if kept is not None and kept.shape == x.shape[:-1]:
            return x[kept]
        return x.flatten(0, -2)

    def _labels(self, labels: Any, logits: Tensor, kept: Tensor | None) -> Tensor | None:
        shape = logits.movedim(1, -1).shape[:-1] if self.layout == "bchw" else logits.shape[:-1]
        if not isinstance(labels, Tensor) or labels.shape != shape:
            return None
        return (labels.flatten() if kept is None or kept.shape != shape else labels[kept]).long()

    def _map(self, x: Tensor, place: Place, mask: Any) -> Tensor:
        """Return features with channels second, without padding."""
        if place.is_logits or x.dim() < 3:
            return x
        last = self.layout == "btd" or (self.layout is None and x.dim() == 3)
        if isinstance(mask, Tensor) and last and mask.shape == x.shape[:2]:
            if getattr(self.loss, "pointwise", False):
                return x[mask.bool()]
            x = x * mask[..., None].to(x.dtype)
        return x.movedim(-1, 1) if last else x

    def _check(self, adapters: int) -> None:
        name, count = self.name, getattr(self.loss, "count", 1)
        if not self.weight >= 0:
            raise LaminaError(f"the weight of {name} must be at least 0, got {self.weight}")
        if not 0 <= self.start < self.end <= 1:
            raise LaminaError(f"{name} runs from {self.start} to {self.end}: expected 0 <= from < to <= 1")
        if self.layout not in (None, *get_args(Layout)):
            raise LaminaError(f"the layout of {name} must be 'bchw' or 'btd', got {self.layout!r}")
        if not self.student:
            raise LaminaError(f"{name} compares features: name a path in `student` (and in `teacher` where it differs)")
        if len(self.student) != len(self.teacher):
            raise LaminaError(f"{name} names {len(self.student)} places of the student and {len(self.teacher)} of the teacher")  # fmt: skip  # noqa: E501
        if count is not None and len(self.student) != count:
            raise LaminaError(f"{name} takes {count} place{'s' if count > 1 else ''} a side, got {len(self.student)}")
        if adapters not in (0, len(self.student)):
            raise LaminaError(f"{name} has {adapters} adapters for {len(self.student)} places: one each, null for none")


def make_term(node: Mapping[str, Any] | Term | nn.Module | str, index: int = 0) -> Term:
    """Build a term from its node: the loss's options are checked against its signature.

    Raises:
        LaminaError: with `terms[i]`, and the option that does not fit.
    """
    place = f"terms[{index}]"
    if isinstance(node, Term):
        return node
    if isinstance(node, nn.Module):
        return Term(node, snake_case(type(node).__name__))
    options = {"name": node} if isinstance(node, str) else dict(node)
    name = options.get("name")
    if isinstance(name, nn.Module):
        loss, name = name, snake_case(type(name).__name__)
    elif isinstance(name, str):
        loss = _loss(name, {k: v for k, v in options.items() if k not in FRAME}, place)
        name = name.rpartition(":")[2]
    else:
        raise LaminaError(f"{place}: a term is {{name: a loss, ...}}, got {node!r}")
    layout = cast(Layout | None, options.get("layout"))
    student = _list(options.get("student"), place, "student")
    adapter = options.get("adapter")
    several = isinstance(adapter, (list, tuple)) and len(adapter) == len(student) and len(student) > 1
    adapters = [_adapter(a, layout, place) for a in (adapter if several else [adapter])] if adapter is not None else []
    numbers = {k: _number(options.get(k, default), f"{place}.{k}") for k, default in (("weight", 1.0), ("from", 0.0), ("to", 1.0))}  # fmt: skip  # noqa: E501
    try:
        return Term(
            loss,
            name,
            student=student,
            teacher=_list(options.get("teacher"), place, "teacher"),
            weight=numbers["weight"],
            start=numbers["from"],
            end=numbers["to"],
            adapters=adapters,
            layout=layout,
        )
    except LaminaError as error:
        raise LaminaError(f"{place}: {error}") from error


def _loss(name: str, options: dict[str, Any], place: str) -> nn.Module:
    if name not in LOSSES and ":" not in name:
        known = (*LOSSES, *FRAME)
        raise LaminaError(f"{place}.name: no loss of distillation is called {name!r}{nearest(name, LOSSES)} (there are: {', '.join(sorted(known[:len(LOSSES)]))})")  # fmt: skip  # noqa: E501
    full = f"{LOSSES[name].__module__}:{LOSSES[name].__name__}" if name in LOSSES else name
    try:
        loss: nn.Module = build({"name": full, **options}, "objective", place)
    except Misfit as error:
        sentence = error.sentence.replace(f"objective {full!r}", f"term {name!r}")
        if ": no " not in sentence and "has no option" in sentence:
            sentence += f"; of its own a term has {', '.join(FRAME)}"
        raise LaminaError(f"{error.path}: {sentence}") from error
    return loss


def _adapter(value: Any, layout: Layout | None, place: str) -> nn.Module | None:
    """Build what brings the student's features to the teacher's: [channels, channels], a layer's node, a module."""
    if value is None or isinstance(value, nn.Module):
        return value
    if isinstance(value, (list, tuple)):
        if len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
            raise LaminaError(f"{place}.adapter: expected [student's channels, teacher's channels], got {list(value)}")
        return _Adapter(value[0], value[1], layout)
    made: nn.Module = build(cast(Node, value), "layer", f"{place}.adapter")
    return made


class _Adapter(nn.Module):
    """A map of channels, wherever the layout has them."""

    def __init__(self, student: int, teacher: int, layout: Layout | None) -> None:
        super().__init__()
        self.channels, self.layout = ChannelMap(student, teacher), layout

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "btd" or (self.layout is None and x.dim() == 3):
            x = x.movedim(-1, 1)
            return self.channels.forward(x).movedim(1, -1)
        return self.channels.forward(x)


def _list(value: Any, place: str, key: str) -> list[str]:
    values: Iterable[Any] = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        raise LaminaError(f"{place}.{key}: expected a path or a list of paths, got {value!r}")
    return list(values)


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LaminaError(f"{place}: expected a number, got {value!r}")
    return float(value)
