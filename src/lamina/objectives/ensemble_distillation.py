"""Ensemble distillation: a trained classifier follows the average opinion of several teachers, without labels."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.anatomy import find_head, get, undisturbed
from lamina.batches import Batch, bare, call, logits, to_device
from lamina.errors import LaminaError, ShapeError
from lamina.objectives._opinion import LabelMap, Opinion, Precision, Teachers, Transform, at_least_float32
from lamina.objectives.distillation.hidden_states import kept_of
from lamina.objectives.distillation.teachers import Average
from lamina.objectives.objective import Losses, mean, target
from lamina.objectives.teacher_cache import INDEX, TeacherCache, refuse_random_rows
from lamina.recipe import Node
from lamina.registry import Slot, register

_log = logging.getLogger(__name__)

SOFT_LABEL = "soft_label"
"""Batch entry with stored probabilities (B, classes), which stand in for asking the teachers."""
LOOKED_AT = 64
"""Rows on which a student is compared with a guess before training."""
COMPARED = 10
"""Batches over which students and teachers are compared on labels, where there are any."""
KNOWS = 0.95
"""Of a uniform guess's divergence from the teachers: a student above that has not been trained."""
TELLS = 0.25
"""Of ln(classes): teachers from whom a guess is nearer than that say too little to tell by."""

Role = Literal["cooperative", "adversarial"]


@register("objective", source="Shen and Savvides, MEAL V2 (2020), arXiv 2009.08453")
class EnsembleDistillation(nn.Module):
    """Fine-tune a trained classifier on what several stronger ones say on average: no labels, no tricks, no decay.

    loss = -sum_c p_c log softmax(z)_c, the mean over rows, p the mean of the teachers' probabilities: the divergence
    KL(p || student) and the entropy of p, which is a constant. A published student starts from its own trained weights
    and trains by SGD at a rate of 0.01, weight decay 0. Sequences count position by position; those with label -100 or
    attention mask 0 are left out. float32 inside; safe under autocast.

    Teachers are asked for the batch that the student saw (mixed and cropped as it is), in evaluation mode whatever
    else is told, under inference_mode. They are no submodules: not in `state_dict()`, not in `parameters()`. Where the
    batch has a `soft_label` (see `SoftLabelStore`), that is followed and they rest. Without teachers the model as it
    was before its latest rewrite becomes the only one (`before_rewrite`), to heal what a pass cost.

    Logs `kl` (nats), `agreement` (share of rows for which both have the same first class), `accuracy` where there are
    labels, `discriminator` where there is one.

    Args:
        teachers: models, or recipe nodes of them; one, or several.
        average: `probabilities` (published) or `logits`, which the surest teacher decides.
        temperature: divides all logits, > 0; the loss is multiplied by its square.
        hard_weight: of the labels' cross-entropy beside, >= 0; the method has none.
        discriminator: a small network that tells the student's logits from the teachers' mean logits, trained along.
            `cooperative` (the released code): the student too makes that easy; `adversarial` (as the paper words it):
            it makes it hard. Little comes of either. With stored labels it compares probabilities.
        discriminator_weight: of its loss, >= 0.
        discriminator_rate: its learning rate over the student's: the trainer gives it a group of its own in the
            optimizer, as a loop of one's own should (`rate_factors`). 0.01 is the published 1e-4 beside 0.01.
        final_relu: a ReLU on its two outputs, as the released code has it.
        input_transforms: what a teacher sees of the first input (its own size, its own normalisation): a callable or
            a layer's node (`{name: "torch.nn:Upsample", size: 380}`), for all or one a teacher.
        label_map: where teachers have other classes, or another order: the teacher's class for each of the student's,
            for all or one a teacher. The classes left out count as if they were not there.
        allow_scratch: True = a student that knows nothing yet is not refused.
        cache: folder in which the teachers' logits are kept by row, see `TeacherCache`; not with random augmentation.
        teacher_precision: in which teachers run; `same` as the student, `bf16` is faster where the device has it.
        classes: of the student, for the discriminator; None = the data's, the map's, or the first teacher's head's.
        model: the student, which must not be one of the teachers; the trainer offers it.
    Raises:
        LaminaError: no teacher in the list, an option out of range, a student that is its own teacher, or one that was
            not trained; teachers that require gradients or answer with NaN; outputs of a regression.
        ShapeError: student and teachers differ in classes.
    Source: Shen and Savvides (2020), arXiv 2009.08453, equations 1 to 5; parent: Shen et al., MEAL (2019), arXiv
        1812.02425. Deviations: the discriminator is off by default and has its own rate, as the paper says (the
        released script sets all rates alike); with few classes its hidden layers have 2 units.
    Example:
        >>> student, first, second = (nn.Linear(4, 3) for _ in range(3))
        >>> objective = EnsembleDistillation([first, second], allow_scratch=True)
        >>> sorted(objective(student, {"inputs": torch.randn(5, 4)}))
        ['active', 'agreement', 'count', 'kl', 'loss']
    """

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"

    def __init__(
        self,
        teachers: Annotated[nn.Module | Node | Sequence[nn.Module | Node] | None, Slot("model")] = None,
        *,
        average: Average = "probabilities",
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        discriminator: Role | None = None,
        discriminator_weight: float = 1.0,
        discriminator_rate: float = 0.01,
        final_relu: bool = False,
        input_transforms: Annotated[Transform | Node | Sequence[Transform | Node | None] | None, Slot("layer")] = None,
        label_map: LabelMap = None,
        allow_scratch: bool = False,
        cache: str | Path | None = None,
        teacher_precision: Precision = "same",
        classes: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not hard_weight >= 0 or not discriminator_weight >= 0 or not discriminator_rate >= 0:
            raise LaminaError(f"temperature must be > 0 and weights and rates >= 0, got {temperature}, {hard_weight}, {discriminator_weight}, {discriminator_rate}")  # fmt: skip  # noqa: E501
        if discriminator not in (None, "cooperative", "adversarial"):
            raise LaminaError(f"discriminator must be 'cooperative', 'adversarial' or None, got {discriminator!r}")
        if teachers is None and (cache is not None or input_transforms is not None or label_map is not None):
            raise LaminaError("cache, input_transforms and label_map are for teachers: name them")
        self.options: dict[str, Any] = {"average": average, "temperature": temperature, "precision": teacher_precision}
        self.temperature, self.hard_weight, self.role = temperature, hard_weight, discriminator
        self.discriminator_weight, self.discriminator_rate = discriminator_weight, discriminator_rate
        self.allow_scratch, self.fixed = allow_scratch, teachers is not None
        self.teachers: Teachers | None = None
        self.cache: TeacherCache | None = None
        self._looked, self._lead, self._compared = False, torch.zeros(()), 0
        if teachers is not None:
            self.teachers = Teachers(teachers, transforms=input_transforms, label_map=label_map, **self.options)
        if cache is not None and self.teachers is not None:
            self.cache = TeacherCache(cache, nn.ModuleList(self.teachers.modules()))
        self.discriminator: nn.Module | None = None
        if discriminator is not None:
            known = self._classes(classes, model)
            self.discriminator = make_discriminator(known, final_relu=final_relu)
        if model is not None:
            self._refuse_shared(model)

    @classmethod
    def official(cls, teachers: nn.Module | Node | Sequence[nn.Module | Node], **options: Any) -> EnsembleDistillation:
        """Build what the released code optimises: a cooperative discriminator with a ReLU on its outputs."""
        return cls(teachers, **{"discriminator": "cooperative", "final_relu": True, **options})

    def before_rewrite(self, model: nn.Module) -> None:
        """Keep a frozen copy of the model as the only teacher, unless some were given."""
        if not self.fixed:
            self.teachers = Teachers(copy.deepcopy(bare(model)), **self.options)

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Run student and teachers and return the losses."""
        if not self._looked:
            self._refuse_shared(model)
        return self.loss(call(model, batch), batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses for the student's outputs on this batch; inputs are in the batch, for the teachers."""
        student = at_least_float32(logits(outputs))
        refuse_regression(student, batch)
        kept = kept_of(batch, student.shape[:-1])
        said = self._stored(batch) if SOFT_LABEL in batch else self._asked(batch)
        if said is None:
            # Zero, but with the count it will have later: weights of micro-batches stay comparable.
            return {**mean(student.sum(-1) * 0.0, kept), "active": student.new_zeros(())}
        if said.probabilities.shape != student.shape:
            raise ShapeError(f"ensemble_distillation got student logits {tuple(student.shape)}, of the teachers {tuple(said.probabilities.shape)}: label_map says which class is which")  # fmt: skip  # noqa: E501
        similarity = soft_cross_entropy(student / self.temperature, said.probabilities)
        losses = mean(self.temperature**2 * similarity, kept)
        own = torch.special.entr(said.probabilities).sum(-1)
        losses["active"] = student.new_ones(())
        losses["kl"] = _mean(similarity.detach() - own, kept)
        same = student.argmax(-1) == said.probabilities.argmax(-1)
        losses["agreement"] = _mean(same.float(), kept)
        self._look(losses, own, kept, student)
        self._add_labels(losses, student, said, batch, kept)
        if self.discriminator is not None:
            pair = (student, said.logits)
            if SOFT_LABEL in batch:
                pair = (student.softmax(-1), said.probabilities)
            found = _mean(self._told_apart(*pair), kept)
            losses["discriminator"] = found.detach()
            losses["loss"] = losses["loss"] + self.discriminator_weight * found
        return losses

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield the discriminator's; teachers are frozen."""
        if self.discriminator is not None:
            yield from self.discriminator.parameters()

    def rate_factors(self) -> Iterator[tuple[Parameter, float]]:
        """Yield each parameter with its learning rate over the student's."""
        return ((p, self.discriminator_rate) for p in self.parameters())

    def fits(self, model: nn.Module, data: Any = None, until: float = 1.0) -> None:
        """Say before training whether student and teachers go together; weights may be on `meta`.

        Args:
            data: with `train`, of which some rows are shown to both; None = nothing is shown.
            until: fraction of training up to which the model stays as it is.
        Raises:
            LaminaError: a student that is its own teacher, or was not trained; no teacher, and none to come.
            ShapeError: other classes.
        """
        self._refuse_shared(model)
        if data is None:
            return
        if self.cache is not None:
            refuse_random_rows(data.train, "cache")
        batch = data.train.batch(torch.arange(min(LOOKED_AT, len(data.train))))
        if self.cache is not None and INDEX not in batch:
            raise LaminaError("cache needs each row's number in the batch: wrap the data set in `indexed`")
        if self.teachers is None and SOFT_LABEL not in batch and until >= 1:
            raise LaminaError("ensemble_distillation has no teachers: name them in `teachers`, store their answers as soft labels, or rewrite the model in training")  # fmt: skip  # noqa: E501
        if any(p.is_meta for p in (*model.parameters(), *self._teacher_parameters())):
            return
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        beside = copy.copy(self)
        # Nothing that this look finds is kept: neither cached answers nor comparisons.
        beside.cache = None
        with torch.random.fork_rng(devices=[]), torch.no_grad(), undisturbed(model):
            beside.forward(model, to_device(batch, device))

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the weights of a teacher that the model was before a rewrite; those that were given are not saved."""
        if self.fixed or self.teachers is None:
            return {}
        return dict(self.teachers.models[0].state_dict())

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take that teacher's weights back."""
        if state and self.teachers is not None:
            self.teachers.models[0].load_state_dict(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EnsembleDistillation:
        super()._apply(fn, recurse)
        if self.teachers is not None:
            self.teachers.apply(fn)
        return self

    @property
    def _healing(self) -> bool:
        """True where the teacher is what the model was."""
        return not self.fixed and self.teachers is not None

    def _asked(self, batch: Batch) -> Opinion | None:
        if self.teachers is None:
            return None
        if self.cache is None:
            return self.teachers.opinion(self.teachers.logits(batch))
        found = self.cache.outputs(batch, self.teachers.cached)
        missing = [name for name in self.teachers.names() if name not in found]
        if missing:
            raise LaminaError(f"{self.cache.folder} does not hold the answers of teacher {missing[0]}: name another folder")  # fmt: skip  # noqa: E501
        return self.teachers.opinion(self.teachers.mapped([found[name] for name in self.teachers.names()]))

    def _stored(self, batch: Batch) -> Opinion:
        stored = at_least_float32(target(batch, SOFT_LABEL, "ensemble_distillation"))
        return Opinion(stored, stored)

    def _add_labels(self, losses: Losses, student: Tensor, said: Opinion, batch: Batch, kept: Tensor | None) -> None:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.shape != student.shape[:-1]:
            if self.hard_weight:
                target(batch, "labels", "hard_weight")
                raise ShapeError(f"hard_weight needs one label a row of {tuple(student.shape)}, got {tuple(labels.shape)}")  # type: ignore[union-attr]  # fmt: skip  # noqa: E501
            return
        right = student.argmax(-1) == labels
        losses["accuracy"] = _mean(right.float(), kept)
        if self.hard_weight:
            each = F.cross_entropy(student.flatten(0, -2), labels.flatten().long(), ignore_index=-100, reduction="none")
            losses["loss"] = losses["loss"] + self.hard_weight * _mean(each.reshape(labels.shape), kept)
        if not self._healing and student.requires_grad and self._compared < COMPARED:
            self._compare(_mean((said.probabilities.argmax(-1) == labels).float(), kept) - losses["accuracy"])

    def _compare(self, lead: Tensor) -> None:
        """Add up how much better the teachers are on the first batches, and say so where they are not."""
        self._lead, self._compared = self._lead.to(lead.device) + lead.detach(), self._compared + 1
        if self._compared == COMPARED and float(self._lead) <= 0:
            _log.warning("over the first %d batches the teachers together are no better than the student: there is little to learn from them", COMPARED)  # fmt: skip  # noqa: E501

    def _look(self, losses: Losses, own: Tensor, kept: Tensor | None, student: Tensor) -> None:
        """Once, see that the student knows more of what the teachers say than a uniform guess does."""
        if self._looked or self._healing or self.allow_scratch or student.is_meta or not float(losses["count"]):
            return
        self._looked = True
        most = math.log(student.shape[-1])
        guess, found = most - float(_mean(own, kept)), float(losses["kl"])
        if guess >= TELLS * most and not found < KNOWS * guess:
            raise LaminaError(
                f"the student was not trained: it is {found:.3g} nats from what the teachers say, a uniform guess "
                f"{guess:.3g}; begin with its trained weights, or say allow_scratch=True"
            )

    def _told_apart(self, student: Tensor, taught: Tensor) -> Tensor:
        """Return the discriminator's loss of each row (...), the mean over both sides and both outputs."""
        assert self.discriminator is not None
        seen = reversed_gradient(student) if self.role == "adversarial" else student
        with torch.autocast(student.device.type, enabled=False):
            found: Tensor = self.discriminator(torch.stack([seen, taught]))
        goal = torch.eye(2, device=found.device).reshape(2, *[1] * (found.dim() - 2), 2).expand_as(found)
        return F.binary_cross_entropy_with_logits(found, goal, reduction="none").mean((0, -1))

    def _classes(self, given: int | None, model: nn.Module | None) -> int:
        known = given if self.teachers is None else self.teachers.classes or given
        if known is None:
            source = model if self.teachers is None else self.teachers.models[0]
            if source is None:
                raise LaminaError("a discriminator needs the number of classes: say classes=")
            known = int(get(bare(source), find_head(source)).out_features)  # type: ignore[arg-type]
        if known < 2:
            raise LaminaError(f"ensemble_distillation is for classes, at least 2, got classes={known}")
        return known

    def _teacher_parameters(self) -> list[Parameter]:
        return [] if self.teachers is None else [p for m in self.teachers.models for p in m.parameters()]

    def _refuse_shared(self, model: nn.Module) -> None:
        held = {id(p) for p in self._teacher_parameters()}
        if any(id(p) in held for p in bare(model).parameters()):
            raise LaminaError("a teacher shares parameters with the student, which it would freeze: pass copy.deepcopy of the model")  # fmt: skip  # noqa: E501


def soft_cross_entropy(student: Tensor, probabilities: Tensor) -> Tensor:
    """Return -sum_c p_c log softmax(z)_c of each row: (..., classes) twice -> (...), at least float32.

    Source: Shen and Savvides (2020), equation 2.
    """
    return -(probabilities * student.log_softmax(-1)).sum(-1)


def make_discriminator(classes: int, *, final_relu: bool = False) -> nn.Sequential:
    """Build the network that tells a student's logits (..., classes) from its teachers': (..., 2), student first.

    Args:
        final_relu: on the two outputs as well.
    Source: Shen and Savvides (2020), section 3.3; three layers of classes/8, classes/64 and 2 units.
    """
    first, second = max(2, classes // 8), max(2, classes // 64)
    layers = [nn.Linear(classes, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2)]
    return nn.Sequential(*layers, *([nn.ReLU()] if final_relu else []))


def reversed_gradient(x: Tensor) -> Tensor:
    """Return x, to the bit, whose gradient goes back with the other sign (Ganin, Lempitsky, 2015, arXiv 1409.7495)."""
    return 2 * x.detach() - x


def refuse_regression(student: Tensor, batch: Batch) -> None:
    """Refuse outputs that are not scores of classes.

    Raises:
        LaminaError: a single number a row, or labels that are numbers.
    """
    labels = batch.get("labels")
    numbers = isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() < student.dim()
    if student.dim() < 2 or student.shape[-1] < 2 or numbers:
        raise LaminaError(f"ensemble_distillation is for classes, not for regression: the model gives {tuple(student.shape)}, softmax needs at least 2 a row, and labels are class numbers")  # fmt: skip  # noqa: E501


def _mean(values: Tensor, kept: Tensor | None) -> Tensor:
    return mean(values, kept)["loss"]
