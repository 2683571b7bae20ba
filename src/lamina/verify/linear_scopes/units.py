"""Scopes of pointwise units and of normalisations: what x0 decided, applied to the probe.

A unit is piecewise linear (the slope that x0 chose, clipped constants go to the bias), or smooth: then the gain is the
secant phi(x0) / x0 through the origin or, by choice, the tangent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamina.verify.linear_scopes.call import Call, NoRuleError, Scope

PIECEWISE = frozenset(
    "relu6 leaky_relu prelu rrelu hardtanh threshold hardsigmoid hardshrink softshrink clamp clip clamp_min clamp_max "
    "abs absolute __abs__ nan_to_num".split()
)
"""Pointwise and piecewise linear: the slope is the one PyTorch's backward has at x0, also on a kink."""

SMOOTH = frozenset(
    "sigmoid tanh silu gelu softplus mish elu celu selu hardswish softsign tanhshrink logsigmoid logit exp exp2 expm1 "
    "log log2 log10 log1p sqrt rsqrt square pow float_power __pow__ __rpow__ sin cos tan asin acos atan arctan sinh "
    "cosh asinh acosh atanh erf erfc special_expit special_erf sinc".split()
)
"""Pointwise and smooth."""


def relu(call: Call) -> Tensor:
    """Pass what x0 passed."""
    return call.affine(call.leaves[0] > 0)


def piecewise(call: Call) -> Tensor:
    """Take the slope at x0, and the rest of the value as a constant."""
    x, y = _pointwise(call)
    gain = slope(call, x)
    return call.affine(gain, y - gain * x)


def smooth(call: Call) -> Tensor:
    """Take the secant through the origin (near it: the tangent there), or everywhere the tangent at x0."""
    if call.settings.rule == "tangent":
        return piecewise(call)
    x, y = _pointwise(call)
    near = x.abs() < call.settings.eps
    if not bool(near.any()):
        return call.affine(y / x)
    flat = slope(call, torch.zeros_like(x))
    flat = torch.where(flat.isfinite(), flat, 0)
    gain = torch.where(near, flat, y / torch.where(near, 1, x))
    return call.affine(gain, torch.where(near, y - gain * x, 0))


def slope(call: Call, at: Tensor) -> Tensor:
    """Return the derivative of a pointwise unit, by PyTorch's own rule on kinks."""
    with torch.enable_grad():
        x = at.detach().requires_grad_()
        (found,) = torch.autograd.grad(call.unit(x).sum(), x)
    return found


def _pointwise(call: Call) -> tuple[Tensor, Tensor]:
    x = call.leaves[0]
    if set(call.probes) != {0} or x.shape != call.result.shape:
        raise NoRuleError("another argument than the first depends on the input")
    return x, call.result.to(x.dtype)


def glu(call: Call) -> Tensor:
    """Gate by part 0's sigmoid."""
    dim = call.at(1, "dim", -1)
    gate = call.leaves[0].chunk(2, dim)[1].sigmoid()
    return call.over(lambda x: x.chunk(2, dim)[0] * gate, call.probes[0])


def log_softmax(call: Call) -> Tensor:
    """Subtract part 0's normaliser."""
    return call.probes[0] + (call.result - call.leaves[0])


def normalize(call: Call) -> Tensor:
    """Divide by part 0's length."""
    power, dim, eps = call.at(1, "p", 2.0), call.at(2, "dim", 1), call.at(3, "eps", 1e-12)
    return call.affine(1 / call.leaves[0].norm(power, dim, keepdim=True).clamp_min(eps))


def layer_norm(call: Call) -> Tensor:
    """Use part 0's mean and variance."""
    dims = _last(call.at(1, "normalized_shape"))
    return _normed(call, dims, call.at(2, "weight"), call.at(3, "bias"), call.at(4, "eps", 1e-5))


def rms_norm(call: Call) -> Tensor:
    """Use part 0's mean square."""
    x, eps = _wide(call.leaves[0]), call.at(3, "eps")
    eps = torch.finfo(call.leaves[0].dtype).eps if eps is None else eps
    gain = torch.rsqrt(x.square().mean(_last(call.at(1, "normalized_shape")), keepdim=True) + eps)
    weight = call.at(2, "weight")
    return call.affine((gain if weight is None else gain * weight.detach()).to(call.leaves[0].dtype))


def group_norm(call: Call) -> Tensor:
    """Use part 0's mean and variance of each group."""
    x, groups = _wide(call.leaves[0]), call.at(1, "num_groups")
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    rest = [1] * (x.dim() - 2)
    mean, variance = (
        s.repeat_interleave(x.shape[1] // groups, 1).unflatten(1, (-1, *rest))
        for s in (grouped.mean(2), grouped.var(2, correction=0))
    )
    weight, bias = (_channels(call.at(i, n), x.dim()) for i, n in ((2, "weight"), (3, "bias")))
    return _scaled(call, mean, variance, weight, bias, call.at(4, "eps", 1e-5))


def batch_norm(call: Call) -> Any:
    """Use the running statistics; without them part 0's."""
    weight, bias, statistics, eps = _batch_options(call)
    if not statistics:
        return call.linear()
    x = call.leaves[0]
    dims = [0, *range(2, x.dim())]
    return _normed(call, dims, _channels(weight, x.dim()), _channels(bias, x.dim()), eps)


def instance_norm(call: Call) -> Any:
    """Use part 0's mean and variance of each channel; running statistics where the layer has them."""
    weight, bias, statistics, eps = _batch_options(call, statistics=True)
    if not statistics:
        return call.linear()
    x = call.leaves[0]
    return _normed(call, list(range(2, x.dim())), _channels(weight, x.dim()), _channels(bias, x.dim()), eps)


def _batch_options(call: Call, statistics: bool = False) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """Return weight, bias, whether part 0's own statistics are used, and eps: torch's order is not functional's."""
    if call.function in (torch.batch_norm, torch.instance_norm):
        weight, bias = call.args[1], call.args[2]
    else:
        weight, bias = call.at(3, "weight"), call.at(4, "bias")
    name = "use_input_stats" if statistics else "training"
    return weight, bias, bool(call.at(5, name, statistics)), call.at(7, "eps", 1e-5)


def _normed(call: Call, dims: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = _wide(call.leaves[0])
    return _scaled(call, x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True), weight, bias, eps)


def _scaled(
    call: Call, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if set(call.probes) != {0}:
        raise NoRuleError("its weights depend on the input")
    dtype = call.leaves[0].dtype
    gain = torch.rsqrt(variance + eps)
    if call.settings.watch:
        call.gains.append(gain)
    part1 = (call.probes[0] - mean.to(dtype)) * gain.to(dtype)
    part1 = part1 if weight is None else part1 * weight.detach()
    return part1 if bias is None else part1 + bias.detach()


def _wide(x: Tensor) -> Tensor:
    """Statistics of half precision are taken in float32, as the kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _last(shape: Any) -> list[int]:
    return list(range(-len(shape), 0))


def _channels(weight: Tensor | None, dims: int) -> Tensor | None:
    return None if weight is None else weight.detach().reshape(-1, *[1] * (dims - 2))


SCOPES: dict[str, Scope] = {
    **dict.fromkeys(PIECEWISE, piecewise),
    **dict.fromkeys(SMOOTH, smooth),
    "relu": relu,
    "glu": glu,
    "log_softmax": log_softmax,
    "normalize": normalize,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
}

STRAIGHT = PIECEWISE | SMOOTH | {"relu"}
"""Pointwise units: their output is the gate of a product of equals."""
