"""Losses between predictions: logits (rows, classes) of student and teacher."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError
from lamina.objectives.distillation.term_loss import TermLoss, same_shape


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return temperature**2 * KL(softmax(teacher / T) || softmax(student / T)): (..., classes) -> (...), float32."""
    goal = F.log_softmax(teacher.float() / temperature, dim=-1)
    guess = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(guess, goal, reduction="none", log_target=True).sum(-1)


def standardized(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Take each row's mean off and divide by its standard deviation (of n - 1) plus eps: (rows, classes) -> same."""
    return (logits - logits.mean(-1, keepdim=True)) / (eps + logits.std(-1, keepdim=True))


def pearson_distance(student: Tensor, teacher: Tensor, eps: float = 1e-8) -> Tensor:
    """Return 1 - the mean over rows of the correlation of both sides' row: (rows, n) twice -> 0-dim."""
    s, t = (x - x.mean(1, keepdim=True) for x in (student, teacher))
    return 1 - F.cosine_similarity(s, t, dim=1, eps=eps).mean()


class _FromLogits(TermLoss):
    reads: ClassVar[Literal["logits", "features"]] = "logits"


class KnowledgeDistillation(_FromLogits):
    """KL divergence from the teacher's softened distribution, beside the labels' cross-entropy where `alpha` is given.

    L = alpha * CE + beta * T^2 * KL(softmax(t / T) || softmax(s / T)), the mean over rows.

    Args:
        temperature: T > 0, softens both.
        alpha: of the cross-entropy, 0..1; None = the divergence alone.
        beta: of the divergence; None = 1 - alpha.
        scale: False leaves T^2 out (the published packages do so where they have no labels).
    Raises:
        LaminaError: a number out of range; (at the batch) `alpha` without labels.
    Source: Hinton et al., Distilling the Knowledge in a Neural Network (2015), arXiv 1503.02531, section 2.
    """

    def __init__(
        self, temperature: float = 4.0, *, alpha: float | None = None, beta: float | None = None, scale: bool = True
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        if alpha is not None and not 0 <= alpha <= 1:
            raise LaminaError(f"alpha must be in 0..1, got {alpha}")
        self.temperature, self.alpha, self.scale = temperature, alpha or 0.0, scale
        self.beta = 1 - self.alpha if beta is None else beta

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (rows, classes) of both, `targets` (rows,) where alpha is given -> 0-dim."""
        same_shape("knowledge_distillation", student, teacher)
        soft = soft_divergence(student, teacher, self.temperature).mean()
        if not self.scale:
            soft = soft / self.temperature**2
        return self.beta * soft + self.alpha * hard_loss(student, targets, "knowledge_distillation") if self.alpha else self.beta * soft  # fmt: skip  # noqa: E501


class LogitStandardization(_FromLogits):
    """Knowledge distillation of standardised logits: the student need not reach the teacher's mean and spread.

    Args:
        temperature: T > 0, applied after standardisation.
        alpha: weight of the labels' cross-entropy; 0 = none.
        beta: weight of T^2 * KL.
        eps: added to the standard deviations.
    Source: Sun et al., Logit Standardization in Knowledge Distillation (2024), arXiv 2403.01427, algorithm 1.
    """

    def __init__(self, temperature: float = 2.0, *, alpha: float = 0.1, beta: float = 9.0, eps: float = 1e-7) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.alpha, self.beta, self.eps = temperature, alpha, beta, eps

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (rows, classes) of both, `targets` (rows,) unless alpha is 0 -> 0-dim."""
        same_shape("logit_standardization", student, teacher)
        pair = standardized(student, self.eps), standardized(teacher, self.eps)
        loss = self.beta * soft_divergence(*pair, self.temperature).mean()
        return loss + self.alpha * hard_loss(student, targets, "logit_standardization") if self.alpha else loss


class DIST(_FromLogits):
    """Correlation in place of divergence: of each row's probabilities, and of each class's over the rows of the batch.

    L = T^2 [beta (1 - mean row correlation) + gamma (1 - mean column correlation)] of softmax(logits / T).

    Args:
        beta: weight of the rows (between classes).
        gamma: weight of the columns (within a class, over the batch).
        temperature: T > 0.
        eps: below which a norm counts as eps.
    Source: Huang et al., Knowledge Distillation from A Stronger Teacher (2022), arXiv 2205.10536, equations 7 to 10.
    """

    relational: ClassVar[bool] = True

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, *, temperature: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        check_temperature(temperature)
        self.beta, self.gamma, self.temperature, self.eps = beta, gamma, temperature, eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits (rows, classes) of both -> 0-dim."""
        same_shape("dist", student, teacher)
        s, t = (torch.softmax(x / self.temperature, dim=1) for x in (student, teacher))
        rows, columns = pearson_distance(s, t, self.eps), pearson_distance(s.T, t.T, self.eps)
        return self.temperature**2 * (self.beta * rows + self.gamma * columns)


class StreamlinedInstance(_FromLogits):
    """Knowledge distillation on the half of the rows that the teacher is less sure of.

    T^2 * KL, set to 0 where the teacher's highest probability is above the batch's median, averaged over all rows.

    Args:
        temperature: T > 0.
    Source: Jeong et al., Streamlined Knowledge Distillation (CVPR 2026), instance-wise term as published in code; the
    paper's own formula is `knowledge_distillation` with `scale: false`.
    """

    relational: ClassVar[bool] = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits (rows, classes) of both -> 0-dim."""
        same_shape("streamlined_instance", student, teacher)
        confidence = teacher.softmax(1).amax(1)
        unsure = confidence <= confidence.quantile(0.5)
        return (soft_divergence(student, teacher, self.temperature) * unsure).mean()


class StreamlinedDirection(_FromLogits):
    """Mahalanobis distance between the rows of the two batches' cosine matrices.

    Args:
        tikhonov: added to the diagonal of the covariance of the differences, > 0.
    Source: Jeong et al., Streamlined Knowledge Distillation (CVPR 2026), direction-wise term.
    """

    relational: ClassVar[bool] = True

    def __init__(self, tikhonov: float = 0.1) -> None:
        super().__init__()
        if not tikhonov > 0:
            raise LaminaError(f"tikhonov must be above 0, got {tikhonov}")
        self.tikhonov = tikhonov

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits (rows, classes) of both -> 0-dim."""
        same_shape("streamlined_direction", student, teacher, start=2)
        s, t = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        gap = s @ s.T - t @ t.T
        covariance = torch.cov(gap.T) + self.tikhonov * torch.eye(len(gap), device=gap.device, dtype=gap.dtype)
        solved = torch.cholesky_solve(gap.T, torch.linalg.cholesky(covariance))
        squares = (gap * solved.T).sum(1)
        # The root has no slope at 0, where student and teacher agree.
        return torch.where(squares > 0, squares, 1.0).sqrt().mul(squares > 0).mean()


def hard_loss(student: Tensor, targets: Tensor | None, what: str) -> Tensor:
    """Return the cross-entropy with the labels.

    Raises:
        LaminaError: there are none.
    """
    if targets is None:
        raise LaminaError(f"{what} has a weight for the cross-entropy, but the batch has no labels that fit the logits")
    return F.cross_entropy(student, targets)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0."""
    if not temperature > 0:
        raise LaminaError(f"temperature must be > 0, got {temperature}")
