"""What several frozen classifiers say of a batch together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.batches import TARGETS, Batch, call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.objectives.distillation.teachers import Average, as_teacher
from lamina.recipe import build

Transform = Callable[[Tensor], Tensor]
Precision = Literal["same", "fp32", "bf16"]
Transforms = Any
LabelMap = Sequence[int] | Sequence[Sequence[int] | None] | None


@dataclass(frozen=True)
class Opinion:
    """One answer of several teachers."""

    probabilities: Tensor
    """(..., classes), float32."""
    logits: Tensor
    """Mean of the teachers' logits, (..., classes), float32."""


def average_of(found: Sequence[Tensor], average: Average = "probabilities", temperature: float = 1.0) -> Opinion:
    """Return the mean of the teachers' softmax, or the softmax of their mean logits: K of (..., classes) -> same.

    Args:
        average: of what.
        temperature: divides the logits, > 0.
    Raises:
        ShapeError: the teachers' logits differ in shape.
    Example:
        >>> two = [torch.tensor([10.0, 0.0]), torch.tensor([0.0, 0.0])]
        >>> [round(float(average_of(two, how).probabilities[0]), 4) for how in ("probabilities", "logits")]
        [0.75, 0.9933]
    """
    if len({x.shape for x in found}) > 1:
        raise ShapeError(f"the teachers' logits differ: {', '.join(str(tuple(x.shape)) for x in found)}; label_map says which class is which")  # fmt: skip  # noqa: E501
    together = torch.stack([at_least_float32(x) for x in found])
    mean = together.mean(0)
    if average == "logits":
        return Opinion((mean / temperature).softmax(-1), mean)
    return Opinion((together / temperature).softmax(-1).mean(0), mean)


class Teachers:
    """Frozen models that are asked together. No module: nothing of them is trained, saved, or told to train.

    Args:
        given: models, or their recipe nodes; one, or a list.
        average, temperature: see `average_of`.
        transforms: what each teacher sees of the input, one for all or one a teacher: a callable, the node of a layer,
            None = the input.
        label_map: each teacher's class for every class of the student, one for all or one a teacher.
        precision: in which they run; `same` = as the student does.
    Raises:
        LaminaError: no teacher, or as many transforms or maps as there are not teachers.
    """

    def __init__(
        self,
        given: Any,
        *,
        average: Average = "probabilities",
        temperature: float = 1.0,
        transforms: Transforms = None,
        label_map: LabelMap = None,
        precision: Precision = "same",
    ) -> None:
        if average not in ("logits", "probabilities"):
            raise LaminaError(f"average must be 'probabilities' or 'logits', got {average!r}")
        if not temperature > 0:
            raise LaminaError(f"temperature must be above 0, got {temperature}")
        if precision not in ("same", "fp32", "bf16"):
            raise LaminaError(f"teacher_precision must be 'same', 'fp32' or 'bf16', got {precision!r}")
        many = list(given) if isinstance(given, (list, tuple)) else [given]
        if not many:
            raise LaminaError("an ensemble of teachers needs at least one: models, or their recipe nodes")
        self.models: list[nn.Module] = [as_teacher(one).eval().requires_grad_(False) for one in many]
        self.average, self.temperature, self.precision = average, temperature, precision
        made = [None if t is None else build(t, "layer") for t in _each(transforms, len(many), "input_transforms")]
        self.transforms: list[Transform | None] = [_silent(t) for t in made]
        flat = label_map is not None and all(isinstance(c, int) for c in label_map)
        maps = _each([label_map] * len(many) if flat else label_map, len(many), "label_map")
        self.maps = [None if m is None else _class_map(m) for m in maps]

    @property
    def classes(self) -> int | None:
        """How many classes the answer has, where a map says it."""
        return next((len(m) for m in self.maps if m is not None), None)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change every parameter and buffer, as `nn.Module.to` does of a part of a model."""
        for part in self.modules():
            part._apply(function)

    def modules(self) -> list[nn.Module]:
        """List the teachers, and their transforms that are modules."""
        return [*self.models, *(t for t in self.transforms if isinstance(t, nn.Module))]

    def logits(self, batch: Batch) -> list[Tensor]:
        """Ask each teacher: (..., classes), float32, classes in the student's order.

        Raises:
            LaminaError: a teacher has been made trainable.
        """
        return self.mapped([t.clone() for t in self._raw(batch)])

    def cached(self, batch: Batch) -> dict[str, Tensor]:
        """Ask each teacher: what a cache keeps, by the teacher's number and transform."""
        return dict(zip(self.names(), (t.clone() for t in self._raw(batch)), strict=True))

    def names(self) -> list[str]:
        """Name each teacher's answer: a cache must not take one for that to another view of the input."""
        return [str(i) if t is None else f"{i} of {_name(t)}" for i, t in enumerate(self.transforms)]

    def mapped(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Bring each teacher's classes into the student's order.

        Raises:
            ShapeError: a map names a class that the teacher does not have.
        """
        return [x if m is None else _mapped(x, m, i) for i, (x, m) in enumerate(zip(found, self.maps, strict=True))]

    def opinion(self, found: Sequence[Tensor]) -> Opinion:
        """Return what they say together.

        Raises:
            LaminaError: numbers that are none.
        """
        said = average_of(found, self.average, self.temperature)
        if not said.probabilities.is_meta and not bool(torch.isfinite(said.logits).all()):
            broken = [str(i) for i, x in enumerate(found) if not bool(torch.isfinite(x).all())]
            raise LaminaError(f"teacher {', '.join(broken)} answered with NaN or infinite logits: its weights or its inputs are broken")  # fmt: skip  # noqa: E501
        return said

    def _raw(self, batch: Batch) -> list[Tensor]:
        for i, model in enumerate(self.models):
            if any(p.requires_grad for p in model.parameters()):
                raise LaminaError(f"teacher {i} requires gradients, and an optimizer that holds it would train it: leave teachers frozen, and out of the optimizer")  # fmt: skip  # noqa: E501
            if any(m.training for m in model.modules()):
                warnings.warn(f"teacher {i} was in training mode: it is set to evaluation", stacklevel=2)
                model.eval()
        with torch.inference_mode(), self._cast(batch):
            views = [batch if t is None else _seen(batch, t) for t in self.transforms]
            return [at_least_float32(logits(call(m, view))) for m, view in zip(self.models, views, strict=True)]

    def _cast(self, batch: Batch) -> AbstractContextManager[Any]:
        if self.precision == "same":
            return nullcontext()
        device = next((v.device.type for v in batch.values() if isinstance(v, Tensor)), "cpu")
        if device == "meta":
            return nullcontext()
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def _each(given: Any, count: int, what: str) -> list[Any]:
    """Return one entry a teacher: a list of them, or one for all."""
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise LaminaError(f"{what} has {len(given)} entries for {count} teachers: one a teacher, or one for all")
    return list(given)


def _silent(made: Any) -> Any:
    return made.eval().requires_grad_(False) if isinstance(made, nn.Module) else made


def _name(transform: Any) -> str:
    if isinstance(transform, nn.Module):
        return " ".join(repr(transform).split())
    return getattr(transform, "__qualname__", type(transform).__qualname__)


def _seen(batch: Batch, transform: Transform) -> Mapping[str, Any]:
    name = next(n for n, v in batch.items() if n not in TARGETS and isinstance(v, Tensor))
    return {**batch, name: transform(batch[name])}


def _class_map(given: Sequence[int]) -> Tensor:
    found = torch.as_tensor(given)
    if found.dim() != 1 or len(found) < 2 or found.is_floating_point() or int(found.min()) < 0:
        raise LaminaError(f"a label_map lists the teacher's class, from 0, for each of the student's classes, got {list(given)[:8]}")  # fmt: skip  # noqa: E501
    return found.long()


def _mapped(found: Tensor, classes: Tensor, number: int) -> Tensor:
    if int(classes.max()) >= found.shape[-1]:
        raise ShapeError(f"label_map names class {int(classes.max())} of teacher {number}, which has {found.shape[-1]}")
    return found[..., classes.to(found.device)]
