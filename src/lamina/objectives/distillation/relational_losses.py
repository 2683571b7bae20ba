"""Losses between what rows of a batch are to each other; the features themselves may be of any two sizes."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives.distillation.term_loss import TermLoss


class _OfRows(TermLoss):
    relational: ClassVar[bool] = True


class ProbabilisticKnowledgeTransfer(_OfRows):
    """Match, for every row, the distribution of its similarity to the others.

    Args:
        eps: added to norms and under the log.
    Source: Passalis, Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer (2018), arXiv
    1803.10837, equations 5 to 8 with the cosine kernel; the mean over all pairs of rows.
    """

    def __init__(self, eps: float = 1e-7) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, ...) and (B, ...) -> 0-dim."""
        s, t = (self._distributions(rows(x)) for x in (student, teacher))
        return (t * torch.log((t + self.eps) / (s + self.eps))).mean()

    def _distributions(self, x: Tensor) -> Tensor:
        unit = x / (x.norm(dim=1, keepdim=True) + self.eps)
        likeness = (unit @ unit.T + 1) / 2
        return likeness / likeness.sum(1, keepdim=True)


class RelationalKD(_OfRows):
    """Match distances between rows, in units of their mean, and the angles of all triples; scale and rotation are free.

    Args:
        distance: weight of the distances.
        angle: weight of the angles, whose memory grows with the cube of the batch; 0 = none are formed.
    Source: Park et al., Relational Knowledge Distillation (2019), arXiv 1904.05068, equations 4 to 9.
    """

    def __init__(self, distance: float = 1.0, angle: float = 2.0) -> None:
        super().__init__()
        if distance < 0 or angle < 0 or distance + angle == 0:
            raise LaminaError(f"distance and angle must be at least 0 and not both 0, got {distance} and {angle}")
        self.distance, self.angle = distance, angle

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, ...) and (B, ...) -> 0-dim."""
        s, t = rows(student), rows(teacher)
        loss = s.new_zeros(())
        if self.distance:
            loss = loss + self.distance * F.smooth_l1_loss(relative_distances(s), relative_distances(t))
        if self.angle:
            loss = loss + self.angle * F.smooth_l1_loss(triple_cosines(s), triple_cosines(t))
        return loss


def relative_distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Return Euclidean distances between rows over their mean, 0 on the diagonal: (B, n) -> (B, B)."""
    squares = x.square().sum(1)
    off = 1 - torch.eye(len(x), device=x.device, dtype=x.dtype)
    found = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=eps).sqrt() * off
    return found / (found.sum() / (found > 0).sum().clamp(min=1))


def triple_cosines(x: Tensor) -> Tensor:
    """Return the cosine of the angle at row i between rows j and k: (B, n) -> (B, B, B)."""
    unit = F.normalize(x[None] - x[:, None], dim=2)
    return unit @ unit.transpose(1, 2)


class CorrelationCongruence(_OfRows):
    """Match the kernel matrix of the batch's rows, of linear embeddings of equal width where sizes are given.

    Args:
        kernel: "gaussian" (a Taylor polynomial of it, for rows of length 1), or "bilinear".
        gamma: of the Gaussian, > 0.
        order: of the polynomial, at least 1.
        student_features, teacher_features: widths of the two; given, each goes through a linear map of its own.
        width: of the embeddings.
    Source: Peng et al., Correlation Congruence for Knowledge Distillation (2019), arXiv 1904.01802, equations 6 to 8.
    """

    def __init__(
        self,
        kernel: Literal["gaussian", "bilinear"] = "gaussian",
        *,
        gamma: float = 0.4,
        order: int = 2,
        student_features: int | None = None,
        teacher_features: int | None = None,
        width: int = 128,
    ) -> None:
        super().__init__()
        if kernel not in ("gaussian", "bilinear") or not gamma > 0 or order < 1:
            raise LaminaError(f"kernel must be 'gaussian' or 'bilinear', gamma > 0 and order >= 1, got {kernel!r}, {gamma}, {order}")  # fmt: skip  # noqa: E501
        if (student_features is None) != (teacher_features is None):
            raise LaminaError("give student_features and teacher_features, or neither")
        self.kernel, self.gamma, self.order = kernel, gamma, order
        embeds = student_features is not None and teacher_features is not None
        self.student_embedding = nn.Linear(student_features or 1, width) if embeds else None
        self.teacher_embedding = nn.Linear(teacher_features or 1, width) if embeds else None

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, ...) and (B, ...) -> 0-dim."""
        s, t = rows(student), rows(teacher)
        if self.student_embedding is not None and self.teacher_embedding is not None:
            # Rows of length 1: what the polynomial is an approximation for.
            s, t = F.normalize(self.student_embedding(s), dim=1), F.normalize(self.teacher_embedding(t), dim=1)
        return (self.congruence(s) - self.congruence(t)).norm() / len(s) ** 2

    def congruence(self, x: Tensor) -> Tensor:
        """Return the kernel matrix: (B, n) -> (B, B)."""
        products = x @ x.T
        if self.kernel == "bilinear":
            return products
        powers = [(2 * self.gamma) ** p / math.factorial(p) * products**p for p in range(self.order + 1)]
        return math.exp(-2 * self.gamma) * torch.stack(powers).sum(0)


class SimilarityPreserving(_OfRows):
    """Match which rows of a batch are alike: products of all pairs of rows, each row of the matrix of length 1.

    Args:
        row_norm: 2 as in the paper; 1 is what torchdistill computes.
    Source: Similarity-Preserving Knowledge Distillation (ICCV 2019), arXiv 1907.09682, equations 1 to 4.
    """

    def __init__(self, row_norm: Literal[1, 2] = 2) -> None:
        super().__init__()
        if row_norm not in (1, 2):
            raise LaminaError(f"row_norm must be 1 or 2, got {row_norm}")
        self.row_norm = row_norm

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, ...) and (B, ...) -> 0-dim."""
        s, t = (F.normalize(x @ x.T, p=self.row_norm) for x in (rows(student), rows(teacher)))
        return (s - t).square().sum() / len(s) ** 2


def rows(x: Tensor) -> Tensor:
    """Flatten each row: (B, ...) -> (B, n).

    Raises:
        ShapeError: a single row, which has nothing to be compared with.
    """
    if len(x) < 2:
        raise ShapeError(f"rows of a batch are compared with each other, and this one has {len(x)}")
    return x.flatten(1)
