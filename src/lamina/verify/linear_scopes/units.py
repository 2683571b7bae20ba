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
    "sigmoid tanh silu gelu softplus mish elu celu selu hardswish softsign tanhshrink logsigmoid log_sigmoid "
    "logit exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square pow float_power __pow__ __rpow__ sin cos tan "
    "asin acos atan arctan sinh cosh asinh acosh atanh erf erfc special_expit special_erf sinc".split()
)
"""Pointwise and smooth."""


def relu(call: Call) -> Tensor:
    """Pass what x0 passed."""
    call.watched(call.leaves[0] > 0)
    # One pass over memory where a product with the mask takes six times as long.
    part1: Tensor = torch.ops.aten.threshold_backward(call.probes[0], call.kept(0), 0)
    return part1


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
    size = x.abs()
    if not x.numel() or bool(size.min() >= call.settings.eps):
        return call.affine(y / x)
    near = size < call.settings.eps
    # Few are near 0: what is right there is put into their places, at any size cheaper than a choice everywhere.
    gain, flat = y / x, _slope_at(call, x, near)
    gain[near] = torch.where(flat.isfinite(), flat, 0)
    rest = y[near] - gain[near] * x[near]
    if bool(rest.abs().max() <= call.settings.eps**2):
        return call.affine(gain)
    constant = torch.zeros_like(x)
    constant[near] = rest
    return call.affine(gain, constant)


def _slope_at(call: Call, x: Tensor, chosen: Tensor) -> Tensor:
    """Return the derivative at the chosen places; at all where another argument has a value a place."""
    if any(isinstance(leaf, Tensor) for leaf in call.leaves[1:]):
        return slope(call, x)[chosen]
    return slope(call, x[chosen])


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
    shape, eps = call.at(1, "normalized_shape"), call.at(4, "eps", 1e-5)
    _, mean, gain = torch.native_layer_norm(_wide(call.leaves[0]), shape, None, None, eps)
    return _scaled(call, mean, gain, call.at(2, "weight"), call.at(3, "bias"))


def rms_norm(call: Call) -> Tensor:
    """Use part 0's mean square."""
    x, eps = _wide(call.leaves[0]), call.at(3, "eps")
    eps = torch.finfo(call.leaves[0].dtype).eps if eps is None else eps
    gain = torch.rsqrt(x.square().mean(_last(call.at(1, "normalized_shape")), keepdim=True) + eps)
    return _scaled(call, None, gain, call.at(2, "weight"), None)


def group_norm(call: Call) -> Tensor:
    """Use part 0's mean and variance of each group."""
    return _grouped(call, call.at(1, "num_groups"), call.at(2, "weight"), call.at(3, "bias"), call.at(4, "eps", 1e-5))


def batch_norm(call: Call) -> Any:
    """Use the running statistics; without them part 0's."""
    weight, bias, statistics, eps = _batch_options(call)
    if not statistics:
        return call.linear()
    x = _wide(call.leaves[0])
    variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0, keepdim=True)
    return _scaled(call, mean, torch.rsqrt(variance + eps), _channels(weight, x), _channels(bias, x))


def instance_norm(call: Call) -> Any:
    """Use part 0's mean and variance of each channel; running statistics where the layer has them."""
    weight, bias, statistics, eps = _batch_options(call, statistics=True)
    if not statistics:
        return call.linear()
    return _grouped(call, call.leaves[0].shape[1], weight, bias, eps)


def _batch_options(call: Call, statistics: bool = False) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """Return weight, bias, whether part 0's own statistics are used, and eps: torch's order is not functional's."""
    if call.function in (torch.batch_norm, torch.instance_norm):
        weight, bias = call.args[1], call.args[2]
    else:
        weight, bias = call.at(3, "weight"), call.at(4, "bias")
    name = "use_input_stats" if statistics else "training"
    return weight, bias, bool(call.at(5, name, statistics)), call.at(7, "eps", 1e-5)


def _grouped(call: Call, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = _wide(call.leaves[0]).contiguous()
    rows, channels, cells = len(x), x.shape[1], x[0, 0].numel()
    _, mean, gain = torch.native_group_norm(x, None, None, rows, channels, cells, groups, eps)
    mean, gain = (
        s.repeat_interleave(channels // groups, 1).reshape(rows, channels, *[1] * (x.dim() - 2)) for s in (mean, gain)
    )
    return _scaled(call, mean, gain, _channels(weight, x), _channels(bias, x))


def _scaled(call: Call, mean: Tensor | None, gain: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return (part1 - mean) * gain * weight + bias."""
    if set(call.probes) != {0}:
        raise NoRuleError("its weights depend on the input")
    dtype = call.leaves[0].dtype
    call.watched(gain)
    gain = gain if weight is None else gain * weight.detach()
    constant = None if mean is None else -mean * gain
    if bias is not None:
        constant = bias.detach() if constant is None else constant + bias.detach()
    part1 = call.probes[0]
    return part1 * gain.to(dtype) if constant is None else torch.addcmul(constant.to(dtype), part1, gain.to(dtype))


def _wide(x: Tensor) -> Tensor:
    """Statistics of half precision are taken in float32, as the kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _last(shape: Any) -> list[int]:
    return list(range(-len(shape), 0))


def _channels(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.detach().reshape(-1, *[1] * (x.dim() - 2))


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
