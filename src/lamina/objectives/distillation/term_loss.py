"""What a loss of distillation is: tensors of student and teacher in, one number out, nothing known of paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from lamina.errors import ShapeError


class TermLoss(nn.Module):
    """One loss between a student's and a teacher's tensors; means are over rows, so micro-batches can be weighted.

    `forward(student, teacher)` gets one tensor a side, or a list where the term names several paths; a forward that
    names `targets` gets the labels, one that names another entry of the batch (`index`, `rotation`) gets that.
    Feature maps arrive as (B, C, ...), logits as (rows, classes), everything in float32. Any other module with such a
    forward is a loss as well (`torch.nn:SmoothL1Loss`).
    """

    reads: ClassVar[Literal["logits", "features"]] = "features"
    """`logits`: a term that names no path compares the predictions."""
    count: ClassVar[int | None] = 1
    """How many tensors a side; None = as many as are named."""
    pointwise: ClassVar[bool] = False
    """True where positions are compared one by one: padding is then cut out, elsewhere it is set to 0."""
    relational: ClassVar[bool] = False
    """True where rows are compared with each other: a batch of one says nothing."""

    def forward(self, student: Any, teacher: Any) -> Tensor:
        """Return the loss, 0-dim."""
        raise NotImplementedError

    def set_progress(self, fraction: float) -> None:
        """Hear how far the term's own time is, 0..1; only those with a stage of preparation listen."""


def same_shape(what: str, student: Tensor, teacher: Tensor, start: int = 0) -> None:
    """Refuse two tensors of different shapes, looking at dimensions from `start` on.

    Raises:
        ShapeError: both are named, and the adapter that would make them fit.
    """
    if student.shape[start:] == teacher.shape[start:] and student.dim() == teacher.dim():
        return
    hint = ""
    if start < 2 and student.dim() == teacher.dim() and student.shape[2:] == teacher.shape[2:]:
        hint = f"; `adapter: [{student.shape[1]}, {teacher.shape[1]}]` trains a map between them"
    raise ShapeError(
        f"{what} got {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher{hint}"
    )


def check_map(what: str, *maps: Tensor) -> None:
    """Refuse what has no channels with positions: maps are (B, C, ...) with at least one more dimension."""
    for one in maps:
        if one.dim() < 3:
            raise ShapeError(f"{what} compares maps (B, C, H, W) or tokens (B, T, D), got {tuple(one.shape)}")


def check_several(what: str, values: Any, count: int, words: str) -> Sequence[Tensor]:
    """Refuse anything but a list of `count` tensors.

    Raises:
        ShapeError: `words` says what they are.
    """
    if isinstance(values, Tensor) or len(values) != count:
        raise ShapeError(f"{what} takes {count} tensors a side ({words}), got {1 if isinstance(values, Tensor) else len(values)}")  # fmt: skip  # noqa: E501
    found: Sequence[Tensor] = values
    return found


class ChannelMap(nn.Module):
    """A linear map of the channels at every position (a 1x1 convolution in any number of dimensions).

    x (B, in_channels, ...) -> (B, out_channels, ...).
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mapped channels."""
        if x.dim() < 2 or x.shape[1] != self.linear.in_features:
            raise ShapeError(f"a map of {self.linear.in_features} channels got {tuple(x.shape)}")
        if x.dim() == 2:
            mapped: Tensor = self.linear(x)
            return mapped
        flat = functional.conv1d(x.flatten(2), self.linear.weight.unsqueeze(-1), self.linear.bias)
        return flat.unflatten(2, x.shape[2:])
