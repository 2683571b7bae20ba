"""EvoNorm: normalisation and activation as one layer, found by evolution over their formulas.

Source: Liu, Brock, Simonyan, Le, Evolving Normalization-Activation Layers (2020), arXiv 2004.02967.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError, nearest
from lamina.nn._evonorm_formulas import channel_groups, evaluate, evaluate_recomputed
from lamina.registry import register

SOURCE = "Liu, Brock, Simonyan, Le, Evolving Normalization-Activation Layers (2020), arXiv 2004.02967"

Variant = Literal["b0", "b1", "b2", "s0", "s1", "s2"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@register("norm", "evonorm", source=f"{SOURCE}, table 3")
class EvoNorm(nn.Module):
    """Norm and activation in one layer, for convolutional nets with the norm before the convolution.

    It takes the place of a batch norm *and* of the activation after it. The B variants use the statistics of the
    batch; the S variants those of one example, so that they work at batch size 1 and are the same in training and
    evaluation. x (N, C, *positions) -> same shape and dtype; float32 inside for half precision.

    Args:
        num_features: C, at least 1.
        variant: "b0", "b1", "b2" (batch), "s0", "s1", "s2" (one example); b0 and s0 are the paper's best.
        groups: of channels that share a statistic, in the S variants; where C is not divisible by it, the largest
            number below that divides C.
        nonlinearity: False: gain and shift alone, for a norm that no activation follows.
        eps: added to every variance and mean square, inside the root; above 0.
        momentum: share of the newest batch in `running_var`, 0..1.
        unbiased_running_var: keep the batch's variance times n / (n - 1), as `nn.BatchNorm2d` does; the official code
            keeps the biased one.
        sync: batch statistics over all processes of torch.distributed instead of this one alone.
    Attributes:
        weight, bias: gain and shift, (C,), start at 1 and 0. v1: slope of the gate, (C,), starts at 1; b0 and s0 only.
        running_var: variance over batches, (C,), starts at 1; B variants with nonlinearity only.
    Raises:
        LaminaError: an unknown variant, or an option outside its range.
        ShapeError: num_features or groups below 1; at the call x without C channels in dimension 1, without a position,
            or, B variants in training, with one value a channel.
        TypeError: x is not floating point.
    Source: arXiv 2004.02967, table 3 (B0, S0) and appendix (the others); the official code for eps and the decay.
    Example:
        >>> EvoNorm(8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    ranks: ClassVar[tuple[int, ...]] = ()
    """How many dimensions x may have; empty = 2 or more."""
    weight: nn.Parameter
    bias: nn.Parameter
    v1: nn.Parameter | None
    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        variant: Variant = "s0",
        *,
        groups: int = 32,
        nonlinearity: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        unbiased_running_var: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_options(num_features, variant, groups, eps, momentum)
        self.num_features, self.variant, self.nonlinearity = num_features, variant, nonlinearity
        self.groups, self.eps, self.momentum = channel_groups(num_features, groups), eps, momentum
        self.unbiased_running_var, self.sync = unbiased_running_var, sync
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        gated = nonlinearity and variant in ("b0", "s0")
        self.register_parameter("v1", nn.Parameter(torch.empty(num_features)) if gated else None)
        keeps = nonlinearity and variant.startswith("b")
        self.register_buffer("running_var", torch.empty(num_features) if keeps else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put gain, shift, slope and statistic back to their start."""
        with torch.no_grad():
            for tensor, value in ((self.weight, 1.0), (self.bias, 0.0), (self.v1, 1.0), (self.running_var, 1.0)):
                if tensor is not None:
                    tensor.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate (N, C, *positions)."""
        self._check(x)
        if not self.nonlinearity or x.shape[0] == 0:
            shape = (-1, *[1] * (x.dim() - 2))
            return (x * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)
        learns = self.training and self.running_var is not None
        y, variance = normalize_and_activate(
            *(x, self.weight, self.bias, self.v1),
            variant=self.variant,
            groups=self.groups,
            eps=self.eps,
            batch_variance=None if learns else self.running_var,
            sync=self.sync,
        )
        if learns:
            assert variance is not None
            self._follow(variance.detach(), x)
        return y

    def extra_repr(self) -> str:
        """Show the variant and what it is made of."""
        shown = f"{self.num_features}, variant={self.variant!r}, eps={self.eps}"
        if not self.nonlinearity:
            return f"{self.num_features}, nonlinearity=False"
        if self.running_var is None:
            return f"{shown}, groups={self.groups}"
        return f"{shown}, momentum={self.momentum}{', sync=True' if self.sync else ''}"

    def _follow(self, variance: Tensor, x: Tensor) -> None:
        assert self.running_var is not None
        if self.unbiased_running_var:
            count = variance.new_tensor([x.numel() // self.num_features])
            if _processes(self.sync) > 1:
                torch.distributed.all_reduce(count)
            variance = variance * count / (count - 1)
        with torch.no_grad():
            self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)

    def _check(self, x: Tensor) -> None:
        name = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(f"{name} needs a floating-point x, got {x.dtype}")
        fits = x.dim() in self.ranks if self.ranks else x.dim() >= 2
        if not fits or x.shape[1] != self.num_features:
            layouts = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
            wanted = " or ".join(layouts[r] for r in self.ranks) or "(N, C, *positions)"
            raise ShapeError(f"{name}({self.num_features}) expects {wanted}, C = {self.num_features}, got {_shown(x)}")
        if 0 in x.shape[2:]:
            raise ShapeError(f"{name} expects at least one position in every dimension behind C, got {_shown(x)}")
        if self.training and self.nonlinearity:
            self._check_statistics(name, x)

    def _check_statistics(self, name: str, x: Tensor) -> None:
        positions = math.prod(x.shape[2:])
        if self.running_var is not None and x.shape[0] * positions * _processes(self.sync) < 2:
            raise ShapeError(
                f"{name} in variant {self.variant!r} needs more than one value a channel in training, got {_shown(x)}; "
                "the S variants do not look at the batch"
            )
        pooled = self.num_features // self.groups if self.variant in ("s0", "s1") else 1
        takes_variance = self.variant in ("b0", "s0", "s1")
        if takes_variance and positions * pooled == 1 and not torch.compiler.is_compiling():
            warnings.warn(
                f"{name} takes the variance of one number in x of shape {_shown(x)}: it is always zero; in the S "
                "variants fewer groups help",
                stacklevel=3,
            )


class EvoNorm1d(EvoNorm):
    """`EvoNorm` that takes (N, C) or (N, C, L) only."""

    ranks = (2, 3)


class EvoNorm2d(EvoNorm):
    """`EvoNorm` that takes (N, C, H, W) only."""

    ranks = (4,)


class EvoNorm3d(EvoNorm):
    """`EvoNorm` that takes (N, C, D, H, W) only."""

    ranks = (5,)


def normalize_and_activate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v1: Tensor | None = None,
    *,
    variant: Variant = "s0",
    groups: int = 32,
    eps: float = 1e-5,
    batch_variance: Tensor | None = None,
    sync: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute EvoNorm; return (y, the batch's variance (C,) where the variant uses it, else None).

    x (N, C, *positions) -> y of the same shape and dtype; float32 inside for half precision. For the backward pass
    only x and the per-channel tensors are kept, and the rest is computed again (in eager mode; compiled, the
    compiler chooses). Differentiable any number of times.

        B0: x / max(sqrt(batch + eps), v1 * x + sqrt(instance + eps))
        B1: x / max(sqrt(batch + eps), (x + 1) * sqrt(square + eps))
        B2: x / max(sqrt(batch + eps), sqrt(square + eps) - x)
        S0: x * sigmoid(v1 * x) / sqrt(group + eps)
        S1: x * sigmoid(x) / sqrt(group + eps)
        S2: x * sigmoid(x) / sqrt(group_square + eps)

    and then times weight plus bias; batch, instance, group: biased variances over batch and positions, positions,
    positions and a group's channels; square, group_square: mean squares over positions (and a group's channels).

    Args:
        weight, bias, v1: (C,); v1 of B0 and S0, None = 1.
        batch_variance: (C,), used instead of the batch's own (B variants in evaluation).
        sync: the batch is that of all processes.
    Raises:
        LaminaError: an unknown variant. ShapeError: groups below 1.
    """
    _check_variant(variant)
    if groups < 1:
        raise ShapeError(f"normalize_and_activate needs groups of at least 1, got {groups}")
    tensors = {"x": x, "weight": weight, "bias": bias, "v1": v1, "batch_variance": batch_variance}
    given: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    settings: dict[str, Any] = {"variant": variant, "groups": channel_groups(x.shape[1], groups), "eps": eps}
    synced = sync and variant.startswith("b") and batch_variance is None and _processes(sync) > 1
    # A collective that runs again in the backward pass would have to meet its partners there.
    plain = synced or torch.compiler.is_compiling() or not torch.is_grad_enabled()
    found = evaluate(**{**given, **settings}, sync=synced) if plain else evaluate_recomputed(given, settings)
    return found if isinstance(found, tuple) else (found, None)


def _processes(sync: bool) -> int:
    if not sync or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def _shown(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise LaminaError(f"EvoNorm: variant must be one of {', '.join(VARIANTS)}, got {variant!r}{nearest(str(variant), VARIANTS)}")  # fmt: skip  # noqa: E501


def _check_options(num_features: int, variant: str, groups: int, eps: float, momentum: float) -> None:
    _check_variant(variant)
    if num_features < 1 or groups < 1:
        raise ShapeError(f"EvoNorm needs num_features and groups of at least 1, got {num_features} and {groups}")
    if not 0 < eps < math.inf:
        raise LaminaError(f"EvoNorm: eps must be above 0 (an input of zeros would give 0 / 0), got {eps}")
    if not 0 <= momentum <= 1:
        raise LaminaError(f"EvoNorm: momentum must be within 0..1, got {momentum}")
