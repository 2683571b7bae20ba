"""The time loop of the layer-normalised GRU as one operator, its gradient written by hand.

Letters: N = rows of all steps, B = batch, H = hidden. Gate order r, u, n (reset, update, candidate); u keeps the old
state. See `_layer_norm_lstm` for why the loop is one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamina.nn._time_steps import multiply, no_second_derivative, previous, resume, step_sizes, weight_gradient

_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_INPUT, _GAIN, _AFFINE = [True, False, False], [False, True, False], [False, True, True]


@torch.library.custom_op("lamina::layer_norm_gru", mutates_args=())
def gru_loop(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a GRU over x (N, 3H), the input's part of the gates with the gates' shifts in it.

    Args:
        hidden: initial state (B, H).
        weight: recurrent (3H, H).
        gain: (3H), of the two norms of `weight @ h` (over r and u together, and over n); None = no norm there.
        shift: (H), added to the candidate's recurrent part before the reset gate multiplies it.
    Returns:
        hidden states (N, H); then what the gradient needs: gates (N, 4H) = r, u, n and the candidate's recurrent
        part after its norm; recurrent part (N, 3H) before the norms; mean and 1/std (2, N, 1) of the two.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _run(x.contiguous(), hidden, weight, gain, shift, batch_sizes, reverse, eps)


def _run(
    x: Tensor,
    h0: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes, H = step_sizes(x, h0.shape[0], batch_sizes), h0.shape[1]
    hidden, gates = x.new_empty(x.shape[0], H), x.new_empty(x.shape[0], 4 * H)
    recurrent = torch.empty_like(x)
    mean, scale = (x.new_empty(2, x.shape[0], 1) for _ in range(2))
    named: tuple[Tensor, ...] = (
        hidden,
        recurrent,
        recurrent[:, : 2 * H],
        recurrent[:, 2 * H :],
        x[:, : 2 * H],
        x[:, 2 * H :],
    )
    named += (gates[:, : 2 * H], *gates.chunk(4, dim=1), mean[0], scale[0], mean[1], scale[1])
    steps = list(zip(*(v.split(sizes) for v in named), strict=True))
    weight_t = weight.t()
    h = h0
    for step in reversed(steps) if reverse else steps:
        h_t, u_all, u_gates, u_new, x_gates, x_new, gates_t, r, u, n, inner, m_g, k_g, m_n, k_n = step
        if batch_sizes is not None:
            h = resume(h, h0, h_t.shape[0])
        multiply(h, weight_t, u_all)
        if gain is None:
            torch.add(u_gates, x_gates, out=gates_t)
            torch.add(u_new, shift, out=inner)
        else:
            normed, mean_t, scale_t = torch.native_layer_norm(u_gates, [2 * H], gain[: 2 * H], None, eps)
            torch.add(normed, x_gates, out=gates_t)
            m_g.copy_(mean_t)
            k_g.copy_(scale_t)
            normed, mean_t, scale_t = torch.native_layer_norm(u_new, [H], gain[2 * H :], shift, eps)
            inner.copy_(normed)
            m_n.copy_(mean_t)
            k_n.copy_(scale_t)
        gates_t.sigmoid_()
        torch.addcmul(x_new, inner, r, out=n).tanh_()
        h = torch.lerp(n, h, u, out=h_t)
    return hidden, gates, recurrent, mean, scale


@gru_loop.register_fake
def _(x: Tensor, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape[0], hidden.shape[1]
    moments = x.new_empty(2, rows, 1), x.new_empty(2, rows, 1)
    return x.new_empty(rows, width), x.new_empty(rows, 4 * width), x.new_empty(rows, 3 * width), *moments


@torch.library.custom_op("lamina::layer_norm_gru_backward", mutates_args=())
def gru_loop_backward(
    grad_hidden: Tensor,
    h0: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    hidden: Tensor,
    gates: Tensor,
    recurrent: Tensor,
    mean: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, the initial state, the weight, the gain (empty if None) and the shift."""
    sizes, (rows, H) = step_sizes(hidden, h0.shape[0], batch_sizes), hidden.shape
    before = previous(hidden, h0, batch_sizes, reverse)
    # Each step turns its slopes into the gradients of r, u, n and of the candidate's recurrent part, in place.
    slopes = _slopes(gates, before)
    flat = slopes.view(rows, 4 * H)
    grad_recurrent = torch.empty_like(recurrent)
    du_gates, du_new = grad_recurrent[:, : 2 * H], grad_recurrent[:, 2 * H :]
    named: tuple[Tensor, ...] = (
        grad_hidden,
        slopes,
        flat[:, : 2 * H],
        flat[:, 3 * H :],
        gates[:, H : 2 * H],
        grad_recurrent,
    )
    named += (du_gates, du_new, recurrent[:, : 2 * H], recurrent[:, 2 * H :])
    named += (mean[0], scale[0], mean[1], scale[1])
    steps = list(zip(*(v.split(sizes) for v in named), strict=True))
    dh_all = torch.zeros_like(h0)
    product = torch.empty_like(h0)
    for step in steps if reverse else reversed(steps):
        g_h, slope, d_gates, d_new, u, du, du_g, du_n, u_g, u_n, m_g, k_g, m_n, k_n = step
        count = g_h.shape[0]
        # Rows beyond a step's count have no gradient yet, or (reversed) hold that of their initial state.
        dh, part = (dh_all, product) if count == dh_all.shape[0] else (dh_all[:count], product[:count])
        dh += g_h
        slope *= dh.unsqueeze(1)
        if gain is None:
            du_g.copy_(d_gates)
            du_n.copy_(d_new)
        else:
            du_g.copy_(_norm_backward(d_gates, u_g, [2 * H], m_g, k_g, gain[: 2 * H], None, _INPUT)[0])
            du_n.copy_(_norm_backward(d_new, u_n, [H], m_n, k_n, gain[2 * H :], shift, _INPUT)[0])
        dh *= u
        dh += multiply(du, weight, part)
    grad_gain, grad_shift = hidden.new_empty(0), flat[:, 3 * H :].sum(0)
    if gain is not None:
        d, u = flat[:, : 2 * H], recurrent[:, : 2 * H]
        of_gates = _norm_backward(d, u, [2 * H], mean[0], scale[0], gain[: 2 * H], None, _GAIN)[1]
        d, u = flat[:, 3 * H :], recurrent[:, 2 * H :]
        of_new = _norm_backward(d, u, [H], mean[1], scale[1], gain[2 * H :], shift, _AFFINE)
        grad_gain = torch.cat([of_gates, of_new[1]])
    grad_weight = weight_gradient(grad_recurrent, before, weight)
    return flat[:, : 3 * H].contiguous(), dh_all, grad_weight, grad_gain, grad_shift


def _slopes(gates: Tensor, before: Tensor) -> Tensor:
    """Return d(hidden)/d(sum) (N, 4, H) of r, u, n and of the candidate's recurrent part."""
    rows, H = before.shape
    r, u, n, inner = gates.chunk(4, dim=1)
    slopes = gates.new_empty(rows, 4, H)
    torch.addcmul(torch.ones_like(n), n, n, value=-1, out=slopes[:, 2]).mul_(1 - u)
    torch.mul(slopes[:, 2], r, out=slopes[:, 3])
    torch.mul(slopes[:, 3], 1 - r, out=slopes[:, 0]).mul_(inner)
    torch.sub(u, u.square(), out=slopes[:, 1]).mul_(before - n)
    return slopes


@gru_loop_backward.register_fake
def _(grad_hidden: Tensor, h0: Tensor, weight: Tensor, gain: Tensor | None, shift: Tensor, *rest: Any) -> Any:
    recurrent = rest[4]
    of_gain = h0.new_empty(0) if gain is None else torch.empty_like(gain)
    return torch.empty_like(recurrent), torch.empty_like(h0), torch.empty_like(weight), of_gain, torch.empty_like(shift)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h0, weight, gain, shift, batch_sizes, ctx.reverse, _ = inputs
    ctx.save_for_backward(h0, weight, gain, shift, batch_sizes, *output)


def _backward(ctx: Any, grad_hidden: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    h0, weight, gain, shift, batch_sizes, *kept = ctx.saved_tensors
    grads = gru_loop_backward(grad_hidden, h0, weight, gain, shift, batch_sizes, ctx.reverse, *kept)
    return *grads[:3], None if gain is None else grads[3], grads[4], None, None, None


gru_loop.register_autograd(_backward, setup_context=_keep)
gru_loop_backward.register_autograd(no_second_derivative)
