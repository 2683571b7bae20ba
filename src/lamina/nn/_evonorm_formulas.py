"""The six formulas of EvoNorm, and the autograd function that keeps their input alone and computes them again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Found = Tensor | tuple[Tensor, Tensor]


def channel_groups(channels: int, groups: int) -> int:
    """Return the largest number of groups, at most `groups`, that divides the channels."""
    return next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0)


def evaluate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v1: Tensor | None = None,
    batch_variance: Tensor | None = None,
    *,
    variant: str,
    groups: int,
    eps: float,
    sync: bool = False,
) -> Found:
    """Compute one variant: y, and with it the batch's variance (C,) where that was computed here."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # A batch of vectors is a batch of maps with one position.
    wide = wide.unsqueeze(-1) if x.dim() == 2 else wide
    shape = (-1, *[1] * (wide.dim() - 2))
    slope = None if v1 is None else v1.view(shape)
    measured = variant.startswith("b") and batch_variance is None
    if variant.startswith("b"):
        batch_variance = variance_of_batch(wide, sync) if batch_variance is None else batch_variance
        unit = wide / _batch_divisor(wide, slope, batch_variance.view(shape), variant, eps)
    else:
        gate = torch.sigmoid(wide if slope is None else slope * wide)
        unit = wide * gate * torch.rsqrt(_of_groups(wide, groups, square=variant == "s2") + eps)
    y = (unit * weight.view(shape) + bias.view(shape)).to(x.dtype).reshape(x.shape)
    if measured:
        assert batch_variance is not None
        return y, batch_variance
    return y


def evaluate_recomputed(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Found:
    """Compute what `evaluate` does; between forward and backward nothing but the tensors it was given is kept."""
    formula = functools.partial(_by_name, tuple(tensors), dict(settings))
    found: Found = _Recomputed.apply(formula, *tensors.values())
    return found


def variance_of_batch(x: Tensor, sync: bool = False) -> Tensor:
    """Return the biased variance of every channel over batch and positions, of all processes if `sync`; (C,)."""
    dims = (0, *range(2, x.dim()))
    if not sync:
        return torch.var(x, dims, correction=0)
    variance, mean = torch.var_mean(x, dims, correction=0)
    # Processes may hold batches of unequal size; no mean square is subtracted from another.
    count = x.new_tensor([x.numel() // x.shape[1]])
    sums = _Sum.apply(torch.cat([count, count * mean]))
    total = sums[:1]
    shared: Tensor = _Sum.apply(count * (variance + (mean - sums[1:] / total).square())) / total
    return shared


def _batch_divisor(x: Tensor, v1: Tensor | None, batch: Tensor, variant: str, eps: float) -> Tensor:
    positions = tuple(range(2, x.dim()))
    if variant == "b0":
        instance = torch.sqrt(torch.var(x, positions, correction=0, keepdim=True) + eps)
        other = (x if v1 is None else v1 * x) + instance
    else:
        root = torch.sqrt(x.square().mean(positions, keepdim=True) + eps)
        other = (x + 1) * root if variant == "b1" else root - x
    return torch.maximum(torch.sqrt(batch + eps), other)


def _of_groups(x: Tensor, groups: int, *, square: bool) -> Tensor:
    """Variance or mean square of each example's groups, once for every channel: (N, C, 1, ...).

    By channel first: in either memory layout that is a reduction compilers vectorise, and no square is subtracted.
    """
    dims = tuple(range(2, x.dim()))
    if square:
        found = x.square().mean(dims, keepdim=True).unflatten(1, (groups, -1)).mean(2, keepdim=True)
    else:
        by_channel = torch.var_mean(x, dims, correction=0, keepdim=True)
        variance, mean = (t.unflatten(1, (groups, -1)) for t in by_channel)
        found = (variance + (mean - mean.mean(2, keepdim=True)).square()).mean(2, keepdim=True)
    return found.expand(-1, -1, x.shape[1] // groups, *[-1] * (x.dim() - 2)).flatten(1, 2)


def _by_name(names: tuple[str, ...], settings: dict[str, Any], *tensors: Tensor) -> Found:
    given: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return evaluate(**given, **settings)


class _Recomputed(torch.autograd.Function):
    """A function of tensors whose backward pass runs it once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(formula: Callable[..., Found], *tensors: Tensor) -> Any:
        return formula(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.formula = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pull = torch.func.vjp(ctx.formula, *ctx.saved_tensors)[1]
        return None, *pull(gradients if len(gradients) > 1 else gradients[0])


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Sum.apply(gradients[0])
