"""Losses between maps and vectors inside the networks, without parameters: maps are (B, C, ...), vectors (B, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.objectives.distillation.logit_losses import DIST, check_temperature, pearson_distance, soft_divergence
from lamina.objectives.distillation.term_loss import TermLoss, check_map, check_several, same_shape

Reduction = Literal["mean", "sum"]


class Hint(TermLoss):
    """Squared error between the student's features (through the term's adapter where sizes differ) and the teacher's.

    Args:
        reduction: "mean" over all entries, or "sum" as FitNets' first stage is often run: a sum grows with batch and
            map, so its weight does not transfer.
    Source: Romero et al., FitNets (2014), arXiv 1412.6550, equation 3.
    """

    pointwise: ClassVar[bool] = True

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise LaminaError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Two tensors of one shape -> 0-dim."""
        same_shape("hint", student, teacher)
        return F.mse_loss(student, teacher, reduction=self.reduction)


class AttentionTransfer(TermLoss):
    """Follow where the teacher is active: maps of mean squared channels, each of length 1; channels may differ.

    Args:
        mode: "code" = mean square of the differences; "paper" = their norm a row, averaged over rows.
    Source: Zagoruyko, Komodakis, Paying More Attention to Attention (2017), arXiv 1612.03928, equation 2.
    """

    def __init__(self, mode: Literal["code", "paper"] = "code") -> None:
        super().__init__()
        if mode not in ("code", "paper"):
            raise LaminaError(f"mode must be 'code' or 'paper', got {mode!r}")
        self.mode = mode

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, C, ...) and (B, C', ...) of one size -> 0-dim."""
        check_map("attention_transfer", student, teacher)
        same_shape("attention_transfer", student, teacher, start=2)
        gap = activity(student) - activity(teacher)
        return gap.square().mean() if self.mode == "code" else gap.norm(dim=1).mean()


def activity(features: Tensor) -> Tensor:
    """Return the mean square over channels, flat and of length 1: (B, C, ...) -> (B, positions)."""
    energy: Tensor = _MeanSquare.apply(features)
    return F.normalize(energy.flatten(1))


class _MeanSquare(torch.autograd.Function):
    """The mean square over channels. The way back makes one tensor of the map's size, where two operations make three.

    (B, C, ...) -> (B, ...).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor) -> Tensor:
        return features.square().mean(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        return (grad * (2 / features.shape[1])).unsqueeze(1) * features


class FlowOfSolution(TermLoss):
    """Match how a network gets from one map to a later one: the products of their channels, averaged over positions.

    A term names two paths a side; both networks need the same numbers of channels there.

    Source: Yim et al., A Gift from Knowledge Distillation (CVPR 2017), equations 1 and 2 (the norm not squared, as in
    torchdistill).
    """

    count: ClassVar[int | None] = 2

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """[(B, C1, ...), (B, C2, ...)] of each -> 0-dim."""
        pairs = [check_several("flow_of_solution", x, 2, "an early and a late map") for x in (student, teacher)]
        s, t = (flow(*pair) for pair in pairs)
        same_shape("flow_of_solution", s, t, start=1)
        return (s - t).norm(dim=1).sum() / len(s)


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Return the products of channels over positions: (B, C1, ...), (B, C2, ...) -> (B, C1, C2).

    The larger map is max-pooled to the size of the smaller.
    """
    check_map("flow_of_solution", first, second)
    if first.dim() != second.dim():
        raise ShapeError(f"flow_of_solution got maps {tuple(first.shape)} and {tuple(second.shape)}")
    size = [min(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True)]
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[len(size)]
    one, two = (x if list(x.shape[2:]) == size else pool(x, size) for x in (first, second))
    return one.flatten(2) @ two.flatten(2).transpose(1, 2) / one.flatten(2).shape[2]


class ActivationBoundary(TermLoss):
    """Match which units are active, before their activation: each should be on the teacher's side, by a margin.

    Args:
        margin: > 0, by how much.
    Source: Heo et al., Knowledge Transfer via Distillation of Activation Boundaries (2019), arXiv 1811.03233, eq. 6.
    """

    pointwise: ClassVar[bool] = True

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        if not margin > 0:
            raise LaminaError(f"margin must be > 0, got {margin}")
        self.margin = margin

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Two tensors (B, ...) of one shape -> 0-dim: the sum over units, the mean over rows."""
        same_shape("activation_boundary", student, teacher)
        over = (student + self.margin).clamp(min=0) * (teacher <= 0)
        under = (student - self.margin).clamp(max=0) * (teacher > 0)
        return (over.square() + under.square()).sum() / len(student)


class InterChannelCorrelation(TermLoss):
    """Match how channels go together in a row: products of all pairs of channels, each row of the matrix of length 1.

    Source: Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation (ICCV 2021),
    equations 1 to 3; divided by C B^2 as published in code.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Two maps (B, C, ...) of one number of channels -> 0-dim."""
        check_map("inter_channel_correlation", student, teacher)
        s, t = (F.normalize(x.flatten(2) @ x.flatten(2).transpose(1, 2), dim=2) for x in (student, teacher))
        if s.shape != t.shape:
            same_shape("inter_channel_correlation", student, teacher)
        return (s - t).square().sum() / (s.shape[1] * len(s) ** 2)


class Affinity(TermLoss):
    """Match, channel by channel, which positions go together: products of all pairs of positions.

    The norm of the difference of two products of unit vectors is |s - t| |s + t| / sqrt(2), so no matrix is formed.

    Source: He et al., Knowledge Adaptation for Efficient Semantic Segmentation (CVPR 2019), equation 4.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Two maps (B, C, ...) of one shape -> 0-dim: the sum over channels, the mean over rows."""
        check_map("affinity", student, teacher)
        same_shape("affinity", student, teacher)
        s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
        norms = (s - t).norm(dim=2) * (s + t).norm(dim=2) / 2**0.5
        return norms.sum(1).mean() / s.shape[2]


class SimpleRepresentation(TermLoss):
    """Features first (the log of a power of all differences together), and the predictions' divergence.

    A term names features and logits, in this order; the features of the teacher are reached through an adapter.

    Args:
        exponent: of the differences, > 0.
        temperature: of the divergence, which is not multiplied by its square here.
        eps: added under the log, which would be minus infinity where both agree.
    Source: Miles, Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation (2024), arXiv
    2303.11098, equation 7.
    """

    count: ClassVar[int | None] = 2

    def __init__(self, exponent: float = 4.0, *, temperature: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        check_temperature(temperature)
        if not exponent > 0 or not eps >= 0:
            raise LaminaError(f"exponent must be > 0 and eps >= 0, got {exponent} and {eps}")
        self.exponent, self.temperature, self.eps = exponent, temperature, eps

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """[features (B, ...), logits (B, classes)] of each -> 0-dim."""
        pairs = [check_several("simple_representation", x, 2, "features and logits") for x in (student, teacher)]
        for s, t in zip(*pairs, strict=True):
            same_shape("simple_representation", s, t)
        gap = (pairs[0][0] - pairs[1][0]).abs().pow(self.exponent).sum()
        divergence = soft_divergence(pairs[0][1], pairs[1][1], self.temperature).mean() / self.temperature**2
        return 2 * torch.log(gap + self.eps) + divergence


class DISTPlus(DIST):
    """`dist` of the predictions, and correlations of maps: over channels at each position, and over rows of a batch.

    A term names logits and a map, in this order.

    Args:
        iota: weight of the channels' correlation.
        kappa: weight of the correlation, over the rows of a batch, of each position's sum over channels.
    Source: Huang et al., DIST+ (TPAMI 2025). Deviation from torchdistill: 1 - the channels' correlation is minimised;
    there the correlation itself is added, which drives the student away.
    """

    reads: ClassVar[Literal["logits", "features"]] = "features"
    count: ClassVar[int | None] = 2

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        *,
        iota: float = 1.0,
        kappa: float = 1.0,
        temperature: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(beta, gamma, temperature=temperature, eps=eps)
        self.iota, self.kappa = iota, kappa

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """[logits (B, classes), map (B, C, ...)] of each -> 0-dim."""
        pairs = [check_several("dist_plus", x, 2, "logits and a map") for x in (student, teacher)]
        (logits_s, s), (logits_t, t) = pairs
        check_map("dist_plus", s, t)
        same_shape("dist_plus", s, t)
        # Vectors of channels, one a position.
        channels = 1 - self._correlation(s, t)
        places = pearson_distance(s.sum(1).flatten(1).T, t.sum(1).flatten(1).T, self.eps)
        return super().forward(logits_s, logits_t) + self.iota * channels + self.kappa * places

    def _correlation(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (x - x.mean(1, keepdim=True) for x in (student, teacher))
        below = (s.square().sum(1) * t.square().sum(1)).clamp(min=torch.finfo(s.dtype).tiny).sqrt()
        return ((s * t).sum(1) / (below + self.eps)).mean()
