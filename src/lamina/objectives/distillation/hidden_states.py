"""Hidden states compared relative to how large the teacher's are; and which predictions of a batch count."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.errors import LaminaError, ShapeError, nearest
from lamina.objectives.distillation.term_loss import TermLoss
from lamina.objectives.distillation.terms import Term


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


def adaptors(widths: Mapping[str, tuple[int, int]], hidden: Mapping[str, str]) -> nn.ModuleDict:
    """Build a linear map of the last dimension for each path: student's width, teacher's width."""
    for path, pair in widths.items():
        if path not in hidden:
            raise LaminaError(f"adapt names {path!r}, which is not in hidden{nearest(path, hidden)}")
        if len(pair) != 2 or min(pair) < 1:
            raise LaminaError(f"adapt[{path!r}] must be (student's width, teacher's width), got {tuple(pair)}")
    return nn.ModuleDict({key_of(path): nn.Linear(*pair, bias=False) for path, pair in widths.items()})


def key_of(path: str) -> str:
    """Return a path as the name of a module, which has no dots."""
    return path.replace(".", "/")


def kept_of(batch: Batch, shape: torch.Size) -> Tensor | None:
    """Return which predictions count: those with a label and under the attention mask, as far as a batch has these."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    found = []
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        found.append(labels != -100)
    if isinstance(mask, Tensor) and mask.shape == shape:
        found.append(mask.bool())
    return torch.stack(found).all(0) if found else None


class _RelativeGap(TermLoss):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sum_of_gaps({self.path: (student, teacher)}, None)


def hidden_term(student: str, teacher: str, adapt: nn.ModuleDict) -> Term:
    """Word one entry of `hidden` as a term, to be checked as terms are."""
    path = key_of(student)
    adapters = [adapt[path]] if path in adapt else []
    return Term(_RelativeGap(student), "hidden", student=[student], teacher=[teacher], adapters=adapters, layout="bchw")
