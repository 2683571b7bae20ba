"""Distillation that needs no more of a student than its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from torch import nn

from lamina.errors import LaminaError
from lamina.objectives.distillation.distillation import Distillation
from lamina.objectives.distillation.teachers import Average
from lamina.objectives.distillation.terms import Term
from lamina.recipe import Node
from lamina.registry import Slot, register


@register("objective", source="Hinton et al., Distilling the Knowledge in a Neural Network (2015), arXiv 1503.02531")
class LogitDistillation(Distillation):
    """Follow a teacher's predictions alone: `distillation` for where only outputs are at hand (compiled, pipelined).

    Args:
        teacher: as in `Distillation`.
        temperature: as in `Distillation`, where there are no `terms`.
        terms: losses of logits: a name, or `{name: dist, weight: 2.0}`.
        average: of several teachers.
        cache: as in `Distillation`.
    Raises:
        LaminaError: a term names a place inside a model.
    """

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"

    def __init__(
        self,
        teacher: Annotated[nn.Module | Node | Sequence[nn.Module | Node] | None, Slot("model")] = None,
        *,
        temperature: float = 2.0,
        terms: Sequence[Mapping[str, Any] | str | Term] | None = None,
        average: Average = "logits",
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(teacher, temperature=temperature, terms=terms, average=average, cache=cache)
        for i, term in enumerate(self._all_terms()):
            if not term.logits_only:
                raise LaminaError(f"terms[{i}]: {term.between()} looks inside the models, which `distillation` does")
