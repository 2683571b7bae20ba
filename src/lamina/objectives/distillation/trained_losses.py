"""Losses with heads of their own between student and teacher; the objective has the heads trained along."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives.distillation.term_loss import ChannelMap, TermLoss, check_map, check_several, same_shape


class FactorTransfer(TermLoss):
    """Follow the teacher's maps as a small autoencoder sums them up; a translator brings the student's there.

    For the first `pretrain` of the term's time only the autoencoder (the paraphraser) learns, to give the teacher's map
    back; then it is fixed and the translator and the student learn.

    Args:
        student_channels, teacher_channels: of the two maps (B, C, H, W) of one size.
        ratio: channels of the summary over the teacher's, > 0; 0.25 to 0.5.
        pretrain: share of the term's time for the paraphraser, 0..1.
        order: of the norm of the difference; 1 = the mean absolute difference.
        unit: order of the norm that summaries are divided by.
    Source: Kim et al., Paraphrasing Complex Network (2018), arXiv 1802.04977, equations 1 to 4; with other orders the
    knowledge translation of He et al. (CVPR 2019).
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        ratio: float = 0.5,
        pretrain: float = 0.2,
        order: int = 1,
        unit: int = 2,
    ) -> None:
        super().__init__()
        if not ratio > 0 or not 0 <= pretrain <= 1 or order < 1 or unit < 1:
            raise LaminaError(f"ratio must be > 0, pretrain in 0..1, order and unit >= 1, got {ratio}, {pretrain}, {order}, {unit}")  # fmt: skip  # noqa: E501
        middle = max(round(teacher_channels * ratio), 1)
        self.paraphraser = _stack(nn.Conv2d, (teacher_channels, teacher_channels, middle, middle))
        self.reconstruction = _stack(nn.ConvTranspose2d, (middle, middle, teacher_channels, teacher_channels))
        self.translator = _stack(nn.Conv2d, (student_channels, student_channels, middle, middle))
        self.pretrain, self.order, self.unit, self.fraction = pretrain, order, unit, 0.0

    def set_progress(self, fraction: float) -> None:
        """Hear how far the term's time is."""
        self.fraction = fraction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, C, H, W) and (B, C', H, W) -> 0-dim: the reconstruction's error first, the factors' distance later."""
        check_map("factor_transfer", student, teacher)
        same_shape("factor_transfer", student, teacher, start=2)
        if self.fraction < self.pretrain:
            return F.mse_loss(self.reconstruction(self.paraphraser(teacher)), teacher)
        self.paraphraser.eval()
        with torch.no_grad():
            factor = self.paraphraser(teacher)
        return factor_distance(self.translator(student), factor, self.order, self.unit)


def factor_distance(student: Tensor, teacher: Tensor, order: int = 1, unit: int = 2) -> Tensor:
    """Return the distance of flat rows of length 1: the mean absolute difference, or the mean norm of another order."""
    s, t = (F.normalize(x.flatten(1), p=unit) for x in (student, teacher))
    return F.l1_loss(s, t) if order == 1 else (s - t).norm(p=order, dim=1).mean()


def _stack(kind: type[nn.Module], sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [kind(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class VariationalInformation(TermLoss):
    """Make the student's features tell the teacher's: the likelihood of these under a mean and a variance a channel.

    Args:
        student_channels, teacher_channels: of features (B, C, ...) with equal positions.
        hidden: channels between; None = twice the teacher's.
        variance: at the start, > eps.
        eps: below which no variance falls, > 0.
    Source: Ahn et al., Variational Information Distillation (2019), arXiv 1904.05835, equations 5 and 6.
    """

    pointwise: ClassVar[bool] = True

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        hidden: int | None = None,
        variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not eps > 0 or not variance > eps:
            raise LaminaError(f"eps must be above 0 and variance above eps, got {eps} and {variance}")
        between = hidden or 2 * teacher_channels
        maps = [ChannelMap(student_channels, between), nn.ReLU(), ChannelMap(between, between), nn.ReLU()]
        self.mean = nn.Sequential(*maps, ChannelMap(between, teacher_channels))
        self.spread = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(variance - eps))))
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, C, ...) and (B, C', ...) -> 0-dim."""
        mean = self.mean(student)
        same_shape("variational_information", mean, teacher)
        variance = F.softplus(self.spread) + self.eps
        return gaussian_surprise(mean, variance.reshape(-1, *[1] * (mean.dim() - 2)), teacher)


def gaussian_surprise(mean: Tensor, variance: Tensor, value: Tensor) -> Tensor:
    """Return minus the log density of a Gaussian without its constant, the mean over all entries."""
    return 0.5 * ((mean - value).square() / variance + variance.log()).mean()


class PredictionWithUncertainty(TermLoss):
    """Squared error of embeddings, each entry weighed by a variance that the student's embedding predicts.

    What cannot be learned yet counts less. Begin it (`from`) when a plain `hint` has trained the same features.

    Args:
        features: width of both embeddings (B, features).
        eps: added to the variances.
    Source: Zhang et al., Prime-Aware Adaptive Distillation (ECCV 2020), arXiv 2008.01458, equation 5.
    """

    pointwise: ClassVar[bool] = True

    def __init__(self, features: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.estimator = nn.Sequential(nn.Linear(features, features), nn.BatchNorm1d(features))
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, features) of both (maps of one position too) -> 0-dim."""
        s, t = student.flatten(1), teacher.flatten(1)
        same_shape("prediction_with_uncertainty", s, t)
        if s.shape[1] != self.estimator[0].in_features:
            raise ShapeError(f"features is {self.estimator[0].in_features}, the student has {tuple(s.shape)} there")
        return uncertain_error(s, t, self.estimator(s), self.eps)


def uncertain_error(student: Tensor, teacher: Tensor, log_variance: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the mean of (t - s)^2 / (eps + exp(v)) + v."""
    return ((teacher - student).square() / (eps + log_variance.exp()) + log_variance).mean()


class KnowledgeReview(TermLoss):
    """Let early stages be taught by all later ones too: the student's maps are fused from the last to the first.

    A term names the student's maps from the first stage to the last, and as many of the teacher's.

    Args:
        student_channels, teacher_channels: of the maps (B, C, H, W), in the same order; sizes are equal pair by pair.
        width: channels in which the fusing is done.
    Source: Chen et al., Distilling Knowledge via Knowledge Review (2021), arXiv 2104.09044, equations 6, 7.
    """

    count: ClassVar[int | None] = None

    def __init__(self, student_channels: list[int], teacher_channels: list[int], *, width: int = 64) -> None:
        super().__init__()
        if not student_channels or len(student_channels) != len(teacher_channels):
            raise LaminaError(f"student_channels and teacher_channels name one map each, got {student_channels} and {teacher_channels}")  # fmt: skip  # noqa: E501
        self.enter = nn.ModuleList(_normed(c, width, 1) for c in student_channels)
        self.weigh = nn.ModuleList(nn.Conv2d(2 * width, 2, 1) for _ in student_channels[1:])
        self.leave = nn.ModuleList(_normed(width, c, 3) for c in teacher_channels)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Lists of maps (B, C, H, W), from first to last -> 0-dim, the sum over the maps."""
        pairs = [check_several("knowledge_review", x, len(self.enter), "maps, first to last") for x in (student, teacher)]  # fmt: skip  # noqa: E501
        fused: Tensor | None = None
        losses = []
        for i in range(len(self.enter) - 1, -1, -1):
            check_map("knowledge_review", pairs[0][i])
            x = self.enter[i](pairs[0][i])
            if fused is not None:
                fused = F.interpolate(fused, x.shape[2:], mode="nearest")
                share = self.weigh[i](torch.cat([x, fused], 1)).sigmoid()
                x = x * share[:, :1] + fused * share[:, 1:]
            fused = x
            losses.append(hierarchical_context(self.leave[i](x), pairs[1][i]))
        return torch.stack(losses).sum()


def hierarchical_context(student: Tensor, teacher: Tensor, sizes: Sequence[int] = (4, 2, 1)) -> Tensor:
    """Return squared errors of maps as they are and averaged to smaller sizes, each half the weight of the last one.

    Two maps (B, C, H, W) -> 0-dim; sizes not below H are left out, weights sum to 1.
    """
    same_shape("knowledge_review", student, teacher)
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for size in sizes:
        if size < student.shape[2]:
            weight /= 2
            total += weight
            ours, theirs = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
            loss = loss + weight * F.mse_loss(ours, theirs)
    return loss / total


def _normed(channels: int, out: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, size, padding=size // 2, bias=False), nn.BatchNorm2d(out))
