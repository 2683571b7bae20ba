"""Whether two models have what a distillation compares: every path, and shapes that pair up, before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy import get, undisturbed
from lamina.batches import bare, to_device
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.objectives.distillation.hidden_states import kept_of
from lamina.objectives.distillation.places import LOGITS, PREDICTION, Place, captured
from lamina.objectives.distillation.terms import Term
from lamina.objectives.teacher_cache import INDEX, refuse_random_rows


def check_fit(
    terms: Mapping[str, Term], model: nn.Module, teacher: nn.Module | None, data: Any, cached: bool, until: float
) -> None:
    """See that both models have the places of every term, and that each term's loss takes what stands there.

    The losses are computed once, of random numbers in the shapes that two rows of the data give; nothing is trained.

    Args:
        terms: by what an error calls them.
        teacher: None = there will be one, a copy of the model.
        data: with `train`; None = paths only.
        cached: the teacher's outputs are kept by row: rows must look the same each time.
        until: terms that begin later are left out.
    Raises:
        LaminaError: the term, and what does not fit.
    """
    for name, term in terms.items():
        if term.start < until:
            _check_paths(bare(model), term.student, f"{name}: student")
        if teacher is not None:
            _check_paths(teacher, term.teacher, f"{name}: teacher")
    if data is None:
        return
    if cached:
        refuse_random_rows(data.train, "cache")
    batch = data.train.batch(torch.arange(min(2, len(data.train))))
    if cached and INDEX not in batch:
        raise LaminaError("cache needs each row's number in the batch: wrap the data set in `indexed`")
    _check_losses({n: t for n, t in terms.items() if t.start < until}, bare(model), teacher, data, batch)


def _check_losses(
    terms: Mapping[str, Term], model: nn.Module, teacher: nn.Module | None, data: Any, batch: dict[str, Any]
) -> None:
    ours = _shapes(model, [*(p for t in terms.values() for p in t.student), PREDICTION], batch)
    if teacher is None or ours is None:
        return
    theirs = _shapes(teacher, [*(p for t in terms.values() for p in t.teacher), PREDICTION], batch)
    if theirs is None:
        return
    generator = torch.Generator().manual_seed(0)
    student, taught = ({p: torch.rand(s, generator=generator) for p, s in x.items()} for x in (ours, theirs))
    for name, term in terms.items():
        said = getattr(term.loss, "fits", None)
        try:
            if said is not None:
                said(data)
            with torch.no_grad(), undisturbed(term):
                term(student, taught, batch, kept_of(batch, student[PREDICTION].shape[:-1]))
        except LaminaError as error:
            kind = ShapeError if isinstance(error, ShapeError) else LaminaError
            raise kind(f"{name}: {error}") from error
        except RuntimeError as error:
            words = " ".join(str(error).split())
            raise ShapeError(f"{name}: {term.between()}, shapes {_named(term.student, ours)} and {_named(term.teacher, theirs)}: {words}") from error  # fmt: skip  # noqa: E501


def _check_paths(model: nn.Module, places: Sequence[Place], where: str) -> None:
    for place in places:
        if place.path != LOGITS:
            try:
                get(model, place.path)
            except AnatomyError as error:
                raise AnatomyError(f"{where}: {error}") from error


def _shapes(model: nn.Module, places: Sequence[Place], batch: dict[str, Any]) -> dict[Place, torch.Size] | None:
    """Return the shape at each place; None where a model without memory cannot be run."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    unique = list(dict.fromkeys(places))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), undisturbed(model):
            found: dict[Place, Tensor] = captured(model, to_device(batch, device), unique, detach=True, stop=False)
    except LaminaError:
        raise
    except Exception as error:
        # What needs real numbers on the way says so, in one of torch's several ways.
        if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
            return None
        raise
    return {place: tensor.shape for place, tensor in found.items()}


def _named(places: Sequence[Place], shapes: dict[Place, torch.Size]) -> str:
    return ", ".join(str(tuple(shapes[p])) for p in places)
