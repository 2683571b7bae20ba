"""Knowledge that shows in images turned round: which of them belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives.distillation.logit_losses import check_temperature, hard_loss, soft_divergence
from lamina.objectives.distillation.term_loss import TermLoss, check_several


class SelfSupervisionKD(TermLoss):
    """Follow the teacher on images and on their rotations, and in telling which rotation is of which image.

    L = weights . (CE, KL of images, KL of similarities, KL of rotations); of the rotations that the teacher gets wrong
    only a share is kept, those of least error. A term names features and logits, in this order; the data set is
    `rotated(...)`, which turns every image and names the turns in the batch's `rotation`. Without it (an evaluation)
    the first two parts are left. For the first `pretrain` of the term's time only the teacher's head learns, to tell
    which rotation is of which image.

    Args:
        student_features, teacher_features: widths of the two features (maps are flattened).
        width: of the embeddings that are compared.
        temperature: of the images' divergence.
        similarity_temperature, rotation_temperature: of the other two.
        similarity_ratio, rotation_ratio: share kept of what the teacher gets wrong, 0..1.
        weights: of the four parts.
        pretrain: share of the term's time for the teacher's head, 0..1.
    Source: Xu et al., Knowledge Distillation Meets Self-Supervision (2020), arXiv 2006.07114, equations 4 to 9.
    """

    count: ClassVar[int | None] = 2
    relational: ClassVar[bool] = True

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        *,
        width: int = 128,
        temperature: float = 4.0,
        similarity_temperature: float = 0.5,
        rotation_temperature: float = 4.0,
        similarity_ratio: float = 0.75,
        rotation_ratio: float = 1.0,
        weights: tuple[float, float, float, float] = (1.0, 0.9, 10.0, 2.7),
        pretrain: float = 0.2,
    ) -> None:
        super().__init__()
        for one in (temperature, similarity_temperature, rotation_temperature):
            check_temperature(one)
        if not all(0 <= x <= 1 for x in (similarity_ratio, rotation_ratio, pretrain)):
            raise LaminaError(f"similarity_ratio, rotation_ratio and pretrain must be in 0..1, got {similarity_ratio}, {rotation_ratio} and {pretrain}")  # fmt: skip  # noqa: E501
        if len(weights) != 4 or min(weights) < 0:
            raise LaminaError(f"weights must be four numbers of at least 0, got {tuple(weights)}")
        self.student_head = _head(student_features, width)
        self.teacher_head = _head(teacher_features, width)
        self.temperatures = (temperature, similarity_temperature, rotation_temperature)
        self.ratios = (similarity_ratio, rotation_ratio)
        self.weights, self.pretrain, self.fraction = tuple(weights), pretrain, 0.0

    def set_progress(self, fraction: float) -> None:
        """Hear how far the term's time is."""
        self.fraction = fraction

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Tensor | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """[features (B, ...), logits (B, classes)] of each; `rotation` (B,) 0, 1, 2, 3, 0, ... -> 0-dim."""
        pairs = [check_several("self_supervision_kd", x, 2, "features and logits") for x in (student, teacher)]
        (features_s, logits_s), (features_t, logits_t) = pairs
        if rotation is None:
            return self._images(logits_s, logits_t, targets)
        check_rotation(rotation)
        if self.fraction < self.pretrain:
            told = rotation_cosines(self.teacher_head(features_t.flatten(1)))
            return F.cross_entropy(told, own_image(told))
        self.teacher_head.eval()
        with torch.no_grad():
            embedded = self.teacher_head(features_t.flatten(1))
        embeddings = self.student_head(features_s.flatten(1)), embedded
        return self.parts(embeddings, (logits_s, logits_t), targets)

    def parts(self, embeddings: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor], targets: Tensor | None) -> Tensor:
        """Sum the four parts of embeddings (4 N, width) and logits (4 N, classes), with targets (4 N,)."""
        s, t = logits
        labels = None if targets is None else targets[::4]
        loss = self._images(s[::4], t[::4], labels)
        similarity, goal = (rotation_cosines(x) for x in embeddings)
        kept = least_error(goal, own_image(goal), self.ratios[0])
        loss = loss + self.weights[2] * soft_divergence(similarity[kept], goal[kept], self.temperatures[1]).mean()
        if self.weights[3] and labels is not None:
            turned_s, turned_t = turned(s), turned(t)
            kept = least_error(turned_t, labels.repeat_interleave(3), self.ratios[1])
            part = soft_divergence(turned_s[kept], turned_t[kept], self.temperatures[2]).mean()
            loss = loss + self.weights[3] * part
        return loss

    def _images(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        loss = self.weights[1] * soft_divergence(student, teacher, self.temperatures[0]).mean()
        if self.weights[0]:
            loss = loss + self.weights[0] * hard_loss(student, targets, "self_supervision_kd")
        return loss


def turned(x: Tensor) -> Tensor:
    """Take the rows of rotated images: (4 N, ...) -> (3 N, ...)."""
    return x.unflatten(0, (-1, 4))[:, 1:].flatten(0, 1)


def rotation_cosines(embeddings: Tensor) -> Tensor:
    """Compare every rotation with every image: (4 N, width) -> (3 N, N)."""
    unit = F.normalize(embeddings, dim=1, eps=1e-8)
    return turned(unit) @ unit[::4].T


def own_image(cosines: Tensor) -> Tensor:
    """Number the image that each rotation is of: (3 N, N) -> (3 N,)."""
    return torch.arange(cosines.shape[1], device=cosines.device).repeat_interleave(3)


def least_error(scores: Tensor, right: Tensor, ratio: float) -> Tensor:
    """Choose rows whose right entry scores highest, and of the others a share, best ranks first: sorted row numbers.

    Args:
        scores: (rows, choices); right: (rows,); ratio: of the wrong ones, rounded down.
    """
    ranks = (scores.argsort(dim=1, descending=True) == right[:, None]).int().argmax(1)
    wrong = int((ranks > 0).sum())
    return ranks.argsort()[: len(ranks) - wrong + int(wrong * ratio)].sort().values


def check_rotation(rotation: Tensor) -> None:
    """Refuse rows that are not whole groups of an image and its three rotations.

    Raises:
        ShapeError: micro-batches cut a group, or rows were shuffled.
    """
    if len(rotation) % 4 or not torch.equal(rotation, torch.arange(4, device=rotation.device).repeat(len(rotation) // 4)):  # fmt: skip  # noqa: E501
        raise ShapeError(f"rows must come as an image and its three rotations, in groups of four; got rotations {rotation.tolist()[:8]}")  # fmt: skip  # noqa: E501


def _head(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width))
