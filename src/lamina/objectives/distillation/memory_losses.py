"""Contrast with a memory of what earlier batches looked like."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives._gather_rows import gather_rows, row_counts, several_processes
from lamina.objectives.distillation.term_loss import TermLoss


class ContrastiveRepresentation(TermLoss):
    """Tell a row's own teacher (and student) embedding from those of other rows, which a memory keeps.

    Needs `index`, each row's number in the training set, in the batch (the data set `indexed` adds it). Rows beyond
    the memory, those of an evaluation, count for nothing.

    Args:
        rows: of the training set, which is how many embeddings each of the two memories holds.
        student_features, teacher_features: widths of the two features (maps are flattened).
        width: of the embeddings, which have length 1.
        negatives: other rows drawn for each row, uniformly.
        temperature: > 0.
        momentum: of the memories, 0..1: share of the old embedding.
        eps: added to densities.
        seed: of the memories' first values and of the draws.
    Source: Tian et al., Contrastive Representation Distillation (2020), arXiv 1910.10699, equations 17 to 19; noise
    contrastive estimation with the normalisation fixed at the first batch, as in the official code.
    """

    relational: ClassVar[bool] = True
    memory: Tensor
    normalizers: Tensor
    draws: Tensor

    def __init__(
        self,
        rows: int,
        student_features: int,
        teacher_features: int,
        *,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        eps: float = 1e-7,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(rows, width, negatives) < 1 or not temperature > 0 or not 0 <= momentum <= 1:
            raise LaminaError(
                "rows, width and negatives must be at least 1, temperature > 0 and momentum in 0..1, got "
                f"{rows}, {width}, {negatives}, {temperature} and {momentum}"
            )
        self.rows, self.negatives, self.temperature, self.momentum = rows, negatives, temperature, momentum
        self.eps, self.seed = eps, seed
        self.student_embedding = nn.Linear(student_features, width)
        self.teacher_embedding = nn.Linear(teacher_features, width)
        bound = 1 / math.sqrt(width / 3)
        drawn = torch.rand(2, rows, width, generator=torch.Generator().manual_seed(seed))
        # Student's and teacher's.
        self.register_buffer("memory", (2 * drawn - 1) * bound)
        self.register_buffer("normalizers", torch.zeros(2))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor | None = None) -> Tensor:
        """(B, ...), (B, ...), `index` (B,) -> 0-dim."""
        if index is None:
            raise LaminaError("contrastive_representation needs 'index' in the batch: wrap the data set in `indexed`")
        kept = index < self.rows
        if torch.is_grad_enabled() and not bool(kept.all()):
            raise LaminaError(f"a row has the number {int(index.max())}, the memory has {self.rows} rows (rows of contrastive_representation)")  # fmt: skip  # noqa: E501
        if not bool(kept.any()):
            return student.new_zeros(())
        s, t = self._embed(self.student_embedding, student[kept]), self._embed(self.teacher_embedding, teacher[kept])
        return self.contrast(s, t, index[kept], self._draw(index[kept]))

    def fits(self, data: Any) -> None:
        """Refuse a data set of another number of training rows.

        Raises:
            LaminaError: both numbers are named.
        """
        if len(data.train) != self.rows:
            raise LaminaError(f"rows of contrastive_representation is {self.rows}, the data set has {len(data.train)} training rows")  # fmt: skip  # noqa: E501

    def contrast(self, student: Tensor, teacher: Tensor, index: Tensor, others: Tensor) -> Tensor:
        """Contrast embeddings (B, width) of rows `index` with the rows `others` (B, 1 + negatives), own row first."""
        memories = self.memory[:, others].detach()
        # Each is held against the memory of the other one.
        scores = torch.stack([memories[1] @ student[..., None], memories[0] @ teacher[..., None]]).squeeze(-1)
        scores = (scores / self.temperature).exp()
        if torch.is_grad_enabled():
            self._normalize(scores.detach())
            self._remember(student.detach(), teacher.detach(), index)
        normalizers = torch.where(self.normalizers > 0, self.normalizers, scores.detach().mean((1, 2)) * self.rows)
        return noise_contrast(scores / normalizers[:, None, None], self.rows, self.eps)

    def _embed(self, embedding: nn.Linear, features: Tensor) -> Tensor:
        flat = features.flatten(1)
        if flat.shape[1] != embedding.in_features:
            raise ShapeError(f"contrastive_representation embeds {embedding.in_features} features, got {tuple(features.shape)}")  # fmt: skip  # noqa: E501
        return F.normalize(embedding(flat), dim=1)

    def _draw(self, index: Tensor) -> Tensor:
        """Draw the other rows; the draw is known by its number, so a resumed run draws the same."""
        rank = dist.get_rank() if several_processes() else 0
        generator = torch.Generator().manual_seed((self.seed << 40) + (rank << 32) + int(self.draws))
        if torch.is_grad_enabled():
            self.draws += 1
        others = torch.randint(self.rows, (len(index), self.negatives), generator=generator)
        return torch.cat([index[:, None], others.to(index.device)], 1)

    def _normalize(self, scores: Tensor) -> None:
        if bool((self.normalizers > 0).all()):
            return
        means = scores.mean((1, 2))
        if several_processes():
            dist.all_reduce(means.div_(dist.get_world_size()))
        self.normalizers.copy_(means * self.rows)

    def _remember(self, student: Tensor, teacher: Tensor, index: Tensor) -> None:
        """Move the memories towards the batch's embeddings, on every process towards all processes'."""
        new = torch.stack([student, teacher], 1)
        if several_processes():
            counts = row_counts(len(index), index.device)
            index, new = gather_rows(index, counts), gather_rows(new, counts)
        for memory, embeddings in zip(self.memory, new.unbind(1), strict=True):
            moved = self.momentum * memory[index] + (1 - self.momentum) * embeddings
            memory[index] = F.normalize(moved, dim=1)


def noise_contrast(densities: Tensor, rows: int, eps: float = 1e-7) -> Tensor:
    """Tell each row's first density from the others': (sides, B, 1 + negatives) -> 0-dim, summed over sides and others.

    L = - mean over rows of log d0 / (d0 + m/n) + sum over others of log (m/n) / (d + m/n), m negatives among n rows.
    """
    noise = (densities.shape[-1] - 1) / rows
    right = densities[..., 0] / (densities[..., 0] + noise + eps)
    wrong = noise / (densities[..., 1:] + noise + eps)
    return -(right.log().sum() + wrong.log().sum()) / densities.shape[1]
