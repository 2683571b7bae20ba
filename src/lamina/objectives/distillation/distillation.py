"""Distillation: follow a teacher in its predictions and, where named, in what goes on inside."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.anatomy import get
from lamina.batches import Batch, bare, call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.objectives.distillation.fitting import check_fit
from lamina.objectives.distillation.hidden_states import adaptors, hidden_term, kept_of, key_of, sum_of_gaps
from lamina.objectives.distillation.logit_losses import soft_divergence
from lamina.objectives.distillation.places import PREDICTION, Place, captured, missing_from, tensors, watch
from lamina.objectives.distillation.teachers import Average, as_teacher
from lamina.objectives.distillation.terms import Term, make_term
from lamina.objectives.objective import Losses, mean
from lamina.objectives.teacher_cache import TeacherCache
from lamina.recipe import Node
from lamina.registry import Slot, register


@register(
    "objective",
    source="Hinton et al., Distilling the Knowledge in a Neural Network (2015), arXiv 1503.02531; terms: Matsubara, "
    "torchdistill (2021), arXiv 2011.12913",
)
class Distillation(nn.Module):
    """Follow a frozen teacher: its logits, hidden states, or any list of terms between places of the two models.

    Without `terms` the loss is temperature**2 * KL(teacher || student) of the logits, plus `hidden`. Without a
    `teacher` the model as it was just before its latest rewrite becomes one (`before_rewrite`); until then the loss is
    0 and costs nothing. Positions with label -100 or attention mask 0 are left out.

    A term is `{name: attention_transfer, student: layer3, teacher: layer2, weight: 100}` and whatever options its loss
    has (`LOSSES` lists all, `module:Class` is one of your own). A place is a module's path (its output), `path:input`,
    or `.logits`; a list of places where a loss takes several. `from` and `to`, fractions of training told by
    `set_progress`, say when it counts; `adapter: [student's channels, teacher's]` trains a linear map between (or a
    layer's node, a module; one a place); `layout: bchw | btd` says where channels are (default: second of four
    dimensions, last of three). The teacher runs no further than the last place that is asked for.

    Args:
        teacher: a model, or the recipe node of one, or a list of these, which answer as one (places `0.path`, ...);
            None: the model before its latest rewrite.
        temperature: softens both distributions, > 0; a term has its own.
        hidden: student path -> teacher path of modules whose outputs are compared by mean squared error,
            divided by the mean square of the teacher's in the same row.
        hidden_weight: of that term beside the logits' term.
        adapt: student path -> (its width, the teacher's): a linear map of the student's last dimension, trained
            along, for hidden states that differ in it (Romero et al., FitNets (2014), arXiv 1412.6550, equation 3).
        terms: what is compared, in place of logits and `hidden`; the loss is the sum of weight * term.
        average: of several teachers.
        cache: folder in which the teacher's outputs are kept by row (see `TeacherCache`; needs `index` in the batch).
        stop: end the student's pass behind the last place as well, while no running term asks for its logits: cheap
            stages of hints. The objective then stands alone, not in a sum, and not under DistributedDataParallel.
        frozen: paths of the student that are not trained while this is the objective: no gradient, evaluation mode.
        model: the student, for `frozen`; the trainer offers it.
    Raises:
        LaminaError: temperature, weight or width out of range, a path in adapt that is not in hidden, a term that is
            none, or options that exclude each other.
        ShapeError: two compared tensors differ in shape.
    Example:
        >>> hint = {"name": "hint", "student": "0", "adapter": [4, 8]}
        >>> student, teacher = (nn.Sequential(nn.Linear(2, n), nn.Linear(n, 3)) for n in (4, 8))
        >>> objective = Distillation(teacher, terms=["knowledge_distillation", hint])
        >>> sorted(objective(student, {"inputs": torch.randn(5, 2)}))
        ['active', 'count', 'hint', 'knowledge_distillation', 'loss']
    """

    def __init__(
        self,
        teacher: Annotated[nn.Module | Node | Sequence[nn.Module | Node] | None, Slot("model")] = None,
        *,
        temperature: float = 2.0,
        hidden: Mapping[str, str] | None = None,
        hidden_weight: float = 1.0,
        adapt: Mapping[str, tuple[int, int]] | None = None,
        terms: Sequence[Mapping[str, Any] | str | Term] | None = None,
        average: Average = "logits",
        cache: str | Path | None = None,
        stop: bool = False,
        frozen: Sequence[str] = (),
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not hidden_weight >= 0:
            raise LaminaError(f"temperature must be > 0 and hidden_weight >= 0, got {temperature} and {hidden_weight}")
        if terms is not None and (hidden or adapt or temperature != 2.0 or not terms):
            raise LaminaError("terms are at least one, and stand in place of temperature, hidden and adapt: a term `hint` compares hidden states")  # fmt: skip  # noqa: E501
        if stop and terms is None:
            raise LaminaError("stop ends a pass behind the last place of a term: it needs terms")
        if cache is not None and teacher is None:
            raise LaminaError("cache keeps what a teacher says that stays the same: it needs a teacher")
        self.temperature = temperature
        self.hidden = dict(hidden or {})
        self.hidden_weight = hidden_weight
        self.adapt = adaptors(adapt or {}, self.hidden)
        self.terms = nn.ModuleList(make_term(t, i) for i, t in enumerate(terms or ()))
        self.stop, self.frozen, self.fraction = stop, tuple(frozen), 0.0
        self.fixed = teacher is not None
        self.teacher: nn.Module | None = None
        self.cache: TeacherCache | None = None
        self._seen: dict[Place, Tensor] | None = None
        if teacher is not None:
            self._take(as_teacher(teacher, average))
        if cache is not None and self.teacher is not None:
            self.cache = TeacherCache(cache, self.teacher)
        if model is not None:
            self._freeze(model)

    @property
    def needs(self) -> Literal["outputs", "model"]:
        """`model` where anything but predictions is compared, or parts are frozen."""
        inside = self.hidden or self.frozen or any(not t.logits_only for t in self._all_terms())
        return "model" if inside else "outputs"

    def before_rewrite(self, model: nn.Module) -> None:
        """Keep a frozen copy of the model as teacher, unless one was given."""
        if not self.fixed:
            self._take(copy.deepcopy(bare(model)))

    def set_progress(self, fraction: float) -> None:
        """Hear how far training is, 0..1: terms come and go by their `from` and `to`."""
        self.fraction = fraction
        for term in self._all_terms():
            term.set_progress(fraction)

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Run student and teacher and return the losses."""
        # First, while the student has no graph yet: what the teacher needs on its way is given back before.
        taught = self._taught(batch)
        if self.stop and self.teacher is not None and PREDICTION not in self._places("student"):
            return self._stopped(model, batch, taught)
        with self._observe(model):
            outputs = call(model, batch)
        return self._compared(outputs, batch, taught)

    @property
    def observing(self) -> Callable[[nn.Module], AbstractContextManager[None]] | None:
        """A context in which a forward pass leaves the student's places; None where passes are cut short."""
        return None if self.stop else self._observe

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses for the student's outputs on this batch.

        Raises:
            LaminaError: places inside the model are compared, and nobody watched them.
        """
        return self._compared(outputs, batch, self._taught(batch))

    def _compared(self, outputs: Any, batch: Batch, taught: Mapping[Place, Tensor]) -> Losses:
        student = logits(outputs)
        kept = kept_of(batch, student.shape[:-1])
        if self.teacher is None:
            # Zero, but with the count it will have later: weights of micro-batches stay comparable.
            return {**mean(student.new_zeros(student.shape[:-1]), kept), "active": student.new_zeros(())}
        seen, self._seen = self._seen or {}, None
        if self.terms:
            count = (
                torch.tensor(float(student.shape[:-1].numel()), device=student.device)
                if kept is None
                else kept.sum().float()
            )
            return self._sum({**seen, PREDICTION: student}, taught, batch, kept, count)
        goal = taught[PREDICTION]
        if goal.shape != student.shape:
            raise ShapeError(f"distillation got student logits {tuple(student.shape)}, teacher {tuple(goal.shape)}")
        losses = mean(soft_divergence(student, goal, self.temperature), kept)
        losses["active"] = student.new_ones(())
        if self.hidden:
            self._check_watched(seen, [Place(s) for s in self.hidden])
            pairs = {s: (self._adapted(s, seen[Place(s)]), taught[Place(t)]) for s, t in self.hidden.items()}
            term = sum_of_gaps(pairs, kept, batch.get("attention_mask"))
            losses["hidden"] = term.detach()
            losses["loss"] = losses["loss"] + self.hidden_weight * term
        return losses

    def fits(self, model: nn.Module, data: Any = None, until: float = 1.0) -> None:
        """Say before training whether all paths are there and all shapes fit; weights may be on `meta`.

        Args:
            data: with `train`, of which two rows are shown to both models; None = paths only.
            until: fraction of training up to which the model stays as it is; nothing is said of terms that begin later.
        Raises:
            LaminaError: what does not fit, with the nearest existing path.
        """
        for path in self.frozen:
            get(bare(model), path)
        terms = {f"terms[{i}]": t for i, t in enumerate(self._all_terms())}
        terms |= {f"hidden[{s!r}]": hidden_term(s, t, self.adapt) for s, t in self.hidden.items()}
        check_fit(terms, model, self.teacher, data, self.cache is not None, until)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield those of adapters and of losses with heads of their own; the teacher is frozen."""
        yield from self.adapt.parameters()
        yield from self.terms.parameters()

    def train(self, mode: bool = True) -> Distillation:
        """Set the mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def active_terms(self) -> list[Term]:
        """List the terms that count at this time of training."""
        return [t for t in self._all_terms() if t.active(self.fraction)]

    def _all_terms(self) -> list[Term]:
        return [t for t in self.terms if isinstance(t, Term)]

    def _sum(
        self,
        student: Mapping[Place, Tensor],
        taught: Mapping[Place, Tensor],
        batch: Batch,
        kept: Tensor | None,
        count: Tensor,
    ) -> Losses:
        terms = self.active_terms()
        self._check_watched(student, [p for t in terms for p in t.student])
        found: Losses = {}
        parts: list[Tensor] = []
        for term in terms:
            value = term(student, taught, batch, kept)
            parts.append(value if term.weight == 1.0 else term.weight * value)
            name = term.name if term.name not in found else f"{term.name}_{len(found)}"
            found[name] = value.detach()
        # Without a term there is nothing to learn, but something to go back through.
        total = sum(parts[1:], parts[0]) if parts else student[PREDICTION].sum() * 0.0
        active = torch.tensor(float(bool(terms)), device=count.device)
        return {"loss": total, "count": count, "active": active, **found}

    def _stopped(self, model: nn.Module, batch: Batch, taught: Mapping[Place, Tensor]) -> Losses:
        """End the student's pass behind the last place; rows are what a mean is over."""
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise LaminaError("stop cuts the student's pass short, which DistributedDataParallel cannot follow: leave it out")  # fmt: skip  # noqa: E501
        self._hold_still(model)
        student = captured(model, batch, self._places("student"), detach=False, stop=True)
        first = next(iter(student.values()))
        return self._sum(student, taught, batch, None, torch.tensor(float(len(first)), device=first.device))

    def _taught(self, batch: Batch) -> dict[Place, Tensor]:
        """Return what the teacher says at every place that is asked for, from the cache where there is one."""
        if self.teacher is None or (self.terms and not self.active_terms()):
            return {}
        if self.cache is None:
            return self._asked(batch, self._places("teacher"))
        # All places, whenever their terms run: a row is written once.
        every = self._places("teacher", everyone=True)
        by_name = {str(p): p for p in every}
        found = self.cache.outputs(batch, lambda b: {str(p): t for p, t in self._asked(b, every).items()})
        missing = [name for name in by_name if name not in found]
        if missing:
            raise LaminaError(f"{self.cache.folder} does not hold {missing[0]!r} of the teacher, only {', '.join(found)}: name another folder")  # fmt: skip  # noqa: E501
        return {place: found[name] for name, place in by_name.items()}

    def _asked(self, batch: Batch, places: Sequence[Place]) -> dict[Place, Tensor]:
        assert self.teacher is not None
        if self.teacher.training:
            warnings.warn("the teacher was in training mode: it is set to evaluation", stacklevel=2)
            self.teacher.eval()
        with torch.no_grad():
            return captured(self.teacher, batch, places, detach=True, stop=PREDICTION not in places)

    def _places(self, side: Literal["student", "teacher"], everyone: bool = False) -> list[Place]:
        """List the places that are asked for now (or at any time), each once."""
        if not self.terms:
            paths = self.hidden if side == "student" else self.hidden.values()
            return [PREDICTION, *(Place(p) for p in dict.fromkeys(paths))]
        terms = self._all_terms() if everyone else self.active_terms()
        return list(dict.fromkeys(p for t in terms for p in getattr(t, side)))

    @contextmanager
    def _observe(self, model: nn.Module) -> Iterator[None]:
        self._hold_still(model)
        places = [p for p in self._places("student") if p != PREDICTION] if self.teacher is not None else []
        with watch(model, places, detach=False) if places else nullcontext() as seen:
            yield
        self._seen = None if seen is None else tensors(model, seen, places)

    def _adapted(self, path: str, state: Tensor) -> Tensor:
        key = key_of(path)
        if key not in self.adapt:
            return state
        width = int(self.adapt[key].in_features)  # type: ignore[arg-type]
        if state.shape[-1] != width:
            raise ShapeError(f"adapt[{path!r}] is for a width of {width}, the student has {tuple(state.shape)} there")
        adapted: Tensor = self.adapt[key](state)
        return adapted

    @staticmethod
    def _check_watched(seen: Mapping[Place, Tensor], places: Sequence[Place]) -> None:
        if missing_from(seen, places):
            raise LaminaError("distillation of hidden states needs the model: call the objective, not its loss()")

    def _take(self, teacher: nn.Module) -> None:
        self.teacher = teacher.eval().requires_grad_(False)

    def _freeze(self, model: nn.Module) -> None:
        for path in self.frozen:
            get(bare(model), path).requires_grad_(False)

    def _hold_still(self, model: nn.Module) -> None:
        """Keep the frozen parts in evaluation mode, whoever set the model to training; freeze what a rewrite made."""
        for path in self.frozen:
            get(bare(model), path).requires_grad_(False).eval()
