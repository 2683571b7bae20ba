"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.batches import logits
from lamina.errors import LaminaError, ShapeError
from lamina.recipe import Node, factory

Average = Literal["logits", "probabilities"]


class TeacherEnsemble(nn.Module):
    """Several models that answer as one: the mean of their logits, or the log of their mean probabilities.

    Places inside a member begin with its number (`0.layer3`). The members take the same inputs.

    Args:
        members: at least one.
        average: of what.
    """

    def __init__(self, members: Sequence[nn.Module], average: Average = "logits") -> None:
        super().__init__()
        if not members:
            raise LaminaError("an ensemble of teachers needs at least one")
        if average not in ("logits", "probabilities"):
            raise LaminaError(f"average must be 'logits' or 'probabilities', got {average!r}")
        for i, member in enumerate(members):
            self.add_module(str(i), member)
        self.average = average

    @property
    def lamina_wrapped(self) -> nn.Module:
        """The member whose signature says which entries of a batch all are given."""
        return next(self.children())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Whatever a member takes -> logits (..., classes), float32."""
        found = [logits(member(*args, **kwargs)).float() for member in self.children()]
        if len({x.shape for x in found}) > 1:
            raise ShapeError(f"the teachers' logits differ: {', '.join(str(tuple(x.shape)) for x in found)}")
        together = torch.stack(found)
        if self.average == "probabilities":
            return together.log_softmax(-1).logsumexp(0) - torch.tensor(len(found)).log()
        return together.mean(0)


def as_teacher(given: Any, average: Average = "logits") -> nn.Module:
    """Build the teacher: a model, a model's node, or a list of these, which become an ensemble."""
    if isinstance(given, (list, tuple)):
        return TeacherEnsemble([as_teacher(one) for one in given], average)
    made: nn.Module = given if isinstance(given, nn.Module) else _build(given)
    return made


def _build(node: Node) -> Any:
    return factory("model", node)()
