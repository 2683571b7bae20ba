"""Batch norm with a skip (RepBN), and the norm that begins as layer norm and ends as it (PRepBN).

    norm = PRepBN(64)                                # in training: lam * layer norm + (1 - lam) * RepBN; lam 1 -> 0
    norm.set_progress(step / steps)                  # before each optimizer step; the trainer does it
    norm.eval()(x)                                   # RepBN alone: scale * x + shift, which folds into what comes next

The passes around it are `lamina.rewrite.ProgressiveNorm`, `Calibrate` and `Fold`.
Source: Guo, Chen, Tang, Wang, SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
Re-parameterized Batch Normalization (ICML 2024), arXiv 2405.11582.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import LaminaError, ShapeError
from lamina.nn.layer_norm import LayerNorm, RMSNorm, TokenBatchNorm
from lamina.registry import register

SOURCE = "Guo et al., SLAB (2024), arXiv 2405.11582"

BASES: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
"""What a progressive norm may begin as."""

Moments = tuple[Tensor, Tensor, Tensor]
"""(mean, biased variance, how many tokens), the first two (C,)."""


class TokenNorm(nn.Module):
    """What norms of tokens share: features last, (..., num_features), and a mask of the tokens that are real."""

    takes_mask: ClassVar[bool] = True
    """Read by models that know the mask."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        if num_features < 1:
            raise ShapeError(f"{type(self).__name__} needs at least one feature, got num_features={num_features}")
        self.num_features = num_features

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        name = f"{type(self).__name__}({self.num_features})"
        if x.dim() < 2 or x.shape[-1] != self.num_features or not x.is_floating_point():
            raise ShapeError(f"{name} takes floating-point (..., {self.num_features}), got {x.dtype} {tuple(x.shape)}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ShapeError(f"{name}: the mask must be {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")


@register("norm", source=f"{SOURCE}, RepBN")
class RepBN(TokenNorm):
    """Batch norm plus a learned multiple of its input: BN(x) + skip * x, statistics over all tokens of the batch.

    For slots meant for layer norm, where the model shall have no norms left at inference: in evaluation it is
    scale * x + shift for every feature. x (..., num_features) -> same shape and dtype; statistics are float32 whatever
    x is (unless the module itself is cast).

    Args:
        eps: added to the variance, inside the root.
        momentum: share of the newest batch in the running statistics, 0..1; None = average of all batches.
        skip_init: where the skip starts. 1 for vision; 0, with scale_init=0, for language models: then it starts as
            the zero map.
        scale_init: where the gains start; the shifts start at 0.
        sync: take the statistics of a training batch over all processes (gradients too), as SyncBatchNorm does.
    Raises:
        ShapeError: the last dimension is not num_features, a mask of another shape, fewer than two tokens in training.
    Source: the definition of RepBN, arXiv 2405.11582. Deviation: the skip is an array of one number, which can be
        sharded.
    Example:
        >>> RepBN(8)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        skip_init: float = 1.0,
        scale_init: float = 1.0,
        sync: bool = False,
    ) -> None:
        super().__init__(num_features)
        if not eps > 0:
            raise LaminaError(f"RepBN: eps must be positive, got {eps}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise LaminaError(f"RepBN: momentum must lie in 0..1 (or be None), got {momentum}")
        self.eps, self.momentum, self.sync = eps, momentum, sync
        self.weight = Parameter(torch.full((num_features,), float(scale_init)))
        self.bias = Parameter(torch.zeros(num_features))
        self.skip = Parameter(torch.full((1,), float(skip_init)))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training by the batch's own statistics.

        Args:
            mask: (...) bool or 0/1, True = a real token: the others are normalised too, but not counted.
        """
        self._check(x, mask)
        if not self.training:
            return torch.addcmul(*_affine_of(x, *self.scale_and_shift())).to(x.dtype)
        rows = x.reshape(-1, self.num_features)
        if mask is None and not (self.sync and _several_processes()):
            normed = self._by_torch(rows)
        else:
            mean, var, count = token_moments(rows, None if mask is None else mask.reshape(-1), self.sync)
            self._remember(mean.detach(), var.detach(), count)
            normed = (rows - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias
        return torch.addcmul(normed.to(x.dtype), rows, self.skip.to(x.dtype)).view(x.shape)

    def scale_and_shift(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the per-feature (scale, shift) of evaluation, both (num_features,); differentiable.

        scale = weight / sqrt(running_var + eps) + skip, shift = bias - running_mean * weight / sqrt(running_var + eps).

        Args:
            dtype: to compute in; None = the parameters'.
        """
        dtype = self.weight.dtype if dtype is None else dtype
        gain = self.weight.to(dtype) * torch.rsqrt(self.running_var.to(dtype) + self.eps)
        return gain + self.skip.to(dtype), self.bias.to(dtype) - self.running_mean.to(dtype) * gain

    def merged(self) -> TokenBatchNorm:
        """Make the plain batch norm that computes the same in evaluation: the skip goes into its gains.

        weight' = weight + skip * sqrt(running_var + eps), bias' = bias + skip * running_mean: the lemma after RepBN.
        """
        made = TokenBatchNorm(self.num_features, self.eps, self.momentum).to(self.weight)
        with torch.no_grad():
            made.weight.copy_(self.weight + self.skip * (self.running_var + self.eps).sqrt())
            made.bias.copy_(self.bias + self.skip * self.running_mean)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            getattr(made, name).copy_(getattr(self, name))
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, sync={self.sync}"

    def _by_torch(self, rows: Tensor) -> Tensor:
        if len(rows) < 2:
            raise ShapeError(
                f"RepBN({self.num_features}) in training takes its statistics from the batch, and {len(rows)} token "
                "has none: give more, or call eval() (a decoder generates in evaluation mode)"
            )
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, True, share, self.eps)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = (
            self.num_batches_tracked.reciprocal() if self.momentum is None else torch.full_like(count, self.momentum)
        )
        # A batch of less than two real tokens has no variance to remember; torch's running variance is unbiased.
        share = torch.where(count > 1, share.to(count.dtype), 0.0)
        unbiased = var * (count / (count - 1).clamp(min=1))
        for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            kept.lerp_(new.to(kept.dtype), share.to(kept.dtype))


@register("norm", "prep_bn", source=f"{SOURCE}, PRepBN")
class PRepBN(TokenNorm):
    """Layer norm that turns into batch norm while it is trained: lam * norm(x) + (1 - lam) * rep(x), lam from 1 to 0.

    For transformers that shall run without norms: trained with batch norm alone they may collapse. x (...,
    num_features) -> same shape. In evaluation `rep` alone computes, at any lam: an evaluation before lam is 0 says
    little. Both branches run in training at every lam, so that no parameter is ever without a gradient.

    Args:
        base: what it begins as: "layer_norm" or "rms_norm" (torch's, the child `norm`).
        base_eps: of that.
        decay_fraction: share of training over which lam falls to 0; 0 < decay_fraction <= 1.
        warm_fraction: share of training before that, in which lam stays at `start`; >= 0.
        start: lam of the first step, 0..1.
        rep_options: of the child `rep`, see `RepBN`: eps, momentum, skip_init, scale_init, sync.
    Raises:
        LaminaError: a fraction outside its range, or lam would not reach 0 before training ends; an unknown base.
        ShapeError: see `RepBN`.
    Source: the definition of PRepBN, arXiv 2405.11582; RMS norm as base, zero start and warm_fraction: its LLaMA code.
        Deviation: the code counts steps and skips `rep` while warm; here a fraction is told, and `rep` always runs.
    Example:
        >>> norm = PRepBN(8)
        >>> norm.set_progress(0.4)
        >>> round(float(norm.lam), 4)
        0.5
    """

    lam: Tensor

    def __init__(
        self,
        num_features: int,
        base: Literal["layer_norm", "rms_norm"] = "layer_norm",
        base_eps: float = 1e-5,
        decay_fraction: float = 0.8,
        warm_fraction: float = 0.0,
        start: float = 1.0,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        skip_init: float = 1.0,
        scale_init: float = 1.0,
        sync: bool = False,
    ) -> None:
        super().__init__(num_features)
        if base not in BASES:
            raise LaminaError(f"PRepBN: base must be one of {', '.join(BASES)}, got {base!r}")
        check_decay("PRepBN", decay_fraction, warm_fraction)
        if not 0 <= start <= 1:
            raise LaminaError(f"PRepBN: start must lie in 0..1, got {start}")
        self.decay_fraction, self.warm_fraction, self.start = decay_fraction, warm_fraction, start
        self.norm = BASES[base](num_features, base_eps)
        self.rep = RepBN(num_features, eps, momentum, skip_init, scale_init, sync)
        self.register_buffer("lam", torch.tensor(float(start)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training the blend of both, see the class.

        Args:
            mask: (...) bool or 0/1, True = a real token: `rep` counts no others.
        """
        self._check(x, mask)
        rep: Tensor = self.rep(x, mask)
        if not self.training:
            return rep
        begun: Tensor = self.norm(x)
        return torch.lerp(rep.to(begun.dtype), begun, self.lam.to(begun.dtype))

    def set_progress(self, fraction: float) -> None:
        """Set lam for the next step; the trainer calls it once per optimizer step.

        Args:
            fraction: of training that is over, 0..1.
        """
        if not 0 <= fraction <= 1:
            raise LaminaError(f"PRepBN: the fraction of training must lie in 0..1, got {fraction}")
        self.lam.fill_(self.start * blend_weight(fraction, self.decay_fraction, self.warm_fraction))

    def extra_repr(self) -> str:
        """Show when it turns."""
        return f"decay_fraction={self.decay_fraction:g}, warm_fraction={self.warm_fraction:g}, start={self.start:g}"


def blend_weight(fraction: float, decay_fraction: float, warm_fraction: float = 0.0) -> float:
    """Return how much of the first norm is left at a fraction of training: 1, then linearly to 0."""
    left = 1.0 - (fraction - warm_fraction) / decay_fraction
    # Rounding must not leave a trace of it at the end.
    return min(1.0, left) if left > 1e-9 else 0.0


def check_decay(name: str, decay_fraction: float, warm_fraction: float) -> None:
    """Refuse fractions with which the blend would begin with no decay, or not end.

    Raises:
        LaminaError: names both.
    """
    if not (decay_fraction > 0 and warm_fraction >= 0):
        raise LaminaError(
            f"{name}: decay_fraction must be positive and warm_fraction not negative, got {decay_fraction} and "
            f"{warm_fraction}"
        )
    if warm_fraction + decay_fraction > 1 + 1e-9:
        raise LaminaError(
            f"{name}: warm_fraction {warm_fraction} and decay_fraction {decay_fraction} are more than the whole of "
            "training: lam would not reach 0, and the first norm could not go"
        )


def token_moments(rows: Tensor, mask: Tensor | None = None, sync: bool = False) -> Moments:
    """Return the moments of the features over the tokens, in two passes and float32 or better; differentiable.

    Args:
        rows: (tokens, C).
        mask: (tokens,), True = counts.
        sync: over the tokens of all processes.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    weight = torch.ones_like(wide[:, :1]) if mask is None else mask.to(wide.dtype)[:, None]
    over = _summed if sync and _several_processes() else _as_is
    count = over(weight.sum())
    least = count.clamp(min=1)
    mean = over((wide * weight).sum(0)) / least
    var = over(((wide - mean).square() * weight).sum(0)) / least
    return mean, var, count


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _summed(x: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(x)
    return total


def _as_is(x: Tensor) -> Tensor:
    return x


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _affine_of(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order the arguments of addcmul, in one dtype that no half-precision product is taken in."""
    dtype = torch.promote_types(x.dtype, scale.dtype)
    return shift.to(dtype), x.to(dtype), scale.to(dtype)
