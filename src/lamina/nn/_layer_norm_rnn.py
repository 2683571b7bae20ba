"""The time loop of the layer-normalised simple RNN as one operator, its gradient written by hand.

Letters: N = rows of all steps, B = batch, H = hidden. See `_layer_norm_lstm` for why the loop is one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamina.nn._time_steps import multiply, no_second_derivative, previous, resume, step_sizes, weight_gradient

_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_INPUT, _AFFINE = [True, False, False], [False, True, True]


@torch.library.custom_op("lamina::layer_norm_rnn", mutates_args=())
def rnn_loop(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    norm_input: bool,
    relu: bool,
    batch_sizes: Tensor | None,
    reverse: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run h = f(norm(x + weight @ h) + bias) over x (N, H), or h = f(x + norm(weight @ h) + bias).

    Args:
        hidden: initial state (B, H).
        gain, shift: (H), of the norm; None = no norm.
        norm_input: x goes through the norm too.
        relu: f is relu, else tanh.
    Returns:
        hidden states (N, H); then what the gradient needs: sums before the norm (N, H), their mean, 1/std (N, 1).
    """
    with torch.autocast(x.device.type, enabled=False):
        return _run(x.contiguous(), hidden, weight, gain, shift, bias, norm_input, relu, batch_sizes, reverse, eps)


def _run(
    x: Tensor,
    h0: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    norm_input: bool,
    relu: bool,
    batch_sizes: Tensor | None,
    reverse: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes, H = step_sizes(x, h0.shape[0], batch_sizes), h0.shape[1]
    hidden, sums = torch.empty_like(x), torch.empty_like(x)
    mean, scale = (x.new_empty(x.shape[0], 1) for _ in range(2))
    steps = list(zip(*(v.split(sizes) for v in (x, hidden, sums, mean, scale)), strict=True))
    weight_t = weight.t()
    h = h0
    for x_t, h_t, a, mean_t, scale_t in reversed(steps) if reverse else steps:
        if batch_sizes is not None:
            h = resume(h, h0, h_t.shape[0])
        multiply(h, weight_t, a)
        if norm_input:
            a += x_t
        if gain is None:
            h = h_t.copy_(a)
        else:
            normed, m, k = torch.native_layer_norm(a, [H], gain, shift, eps)
            h = h_t.copy_(normed)
            mean_t.copy_(m)
            scale_t.copy_(k)
        if not norm_input:
            h += x_t
        if bias is not None:
            h += bias
        h.relu_() if relu else h.tanh_()
    return hidden, sums, mean, scale


@rnn_loop.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moments = x.new_empty(x.shape[0], 1), x.new_empty(x.shape[0], 1)
    return x.new_empty(x.shape), x.new_empty(x.shape), *moments


@torch.library.custom_op("lamina::layer_norm_rnn_backward", mutates_args=())
def rnn_loop_backward(
    grad_hidden: Tensor,
    h0: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    norm_input: bool,
    relu: bool,
    batch_sizes: Tensor | None,
    reverse: bool,
    hidden: Tensor,
    sums: Tensor,
    mean: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, the initial state, the weight, gain and shift (empty if None) and the bias."""
    sizes, H = step_sizes(hidden, h0.shape[0], batch_sizes), h0.shape[1]
    # Each step turns its slope into the gradient behind the norm, in place.
    outer = (hidden > 0).to(hidden.dtype) if relu else 1 - hidden.square()
    inner = torch.empty_like(outer)
    named = (grad_hidden, outer, inner, sums, mean, scale)
    steps = list(zip(*(v.split(sizes) for v in named), strict=True))
    dh_all = torch.zeros_like(h0)
    for g_h, d, da, a, m, k in steps if reverse else reversed(steps):
        # Rows beyond a step's count have no gradient yet, or (reversed) hold that of their initial state.
        dh = dh_all if g_h.shape[0] == dh_all.shape[0] else dh_all[: g_h.shape[0]]
        d *= torch.add(g_h, dh)
        da.copy_(d if gain is None else _norm_backward(d, a, [H], m, k, gain, shift, _INPUT)[0])
        multiply(da, weight, dh)
    grad_gain, grad_shift = hidden.new_empty(0), hidden.new_empty(0)
    if gain is not None:
        grad_gain, grad_shift = _norm_backward(outer, sums, [H], mean, scale, gain, shift, _AFFINE)[1:]
    grad_weight = weight_gradient(inner, previous(hidden, h0, batch_sizes, reverse), weight)
    grad_bias = outer.sum(0)
    return inner if norm_input else outer, dh_all, grad_weight, grad_gain, grad_shift, grad_bias


@rnn_loop_backward.register_fake
def _(grad_hidden: Tensor, h0: Tensor, weight: Tensor, gain: Tensor | None, *rest: Any) -> Any:
    of_norm = [h0.new_empty(0) if gain is None else torch.empty_like(gain) for _ in range(2)]
    bias = h0.new_empty(h0.shape[1])
    return grad_hidden.new_empty(grad_hidden.shape), torch.empty_like(h0), torch.empty_like(weight), *of_norm, bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h0, weight, gain, shift, bias, ctx.norm_input, ctx.relu, batch_sizes, ctx.reverse, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(h0, weight, gain, shift, batch_sizes, *output)


def _backward(ctx: Any, grad_hidden: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    h0, weight, gain, shift, batch_sizes, *kept = ctx.saved_tensors
    grads = rnn_loop_backward(
        grad_hidden, h0, weight, gain, shift, ctx.norm_input, ctx.relu, batch_sizes, ctx.reverse, *kept
    )
    of_norm = (None, None) if gain is None else grads[3:5]
    return *grads[:3], *of_norm, grads[5] if ctx.has_bias else None, None, None, None, None, None


rnn_loop.register_autograd(_backward, setup_context=_keep)
rnn_loop_backward.register_autograd(no_second_derivative)
