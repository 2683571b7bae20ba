"""The time loop of the layer-normalised LSTM as one operator, its gradient written by hand.

One operator for the whole sequence keeps Python and autograd out of the loop: a step is one GEMM and about ten
small operations, the weight's gradient is one GEMM over all steps, and torch.compile sees a single node.

Letters: N = rows of all steps, B = batch, H = hidden. Gate order i, f, o, g (input, forget, output, candidate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamina.nn._time_steps import (
    multiply,
    no_second_derivative,
    previous,
    resume,
    step_sizes,
    weight_gradient,
)

_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_INPUT, _AFFINE = [True, False, False], [False, True, True]


@torch.library.custom_op("lamina::layer_norm_lstm", mutates_args=())
def lstm_loop(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    cell_gain: Tensor | None,
    cell_shift: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run an LSTM over x (N, 4H), the input's part of the gates with every shift in it.

    Args:
        hidden, cell: initial states (B, H).
        weight: recurrent (4H, H).
        gain: (4H), of the norm of `weight @ h`; None = no norm there.
        cell_gain, cell_shift: (H), of the norm of the read-out; None = no norm there.
    Returns:
        hidden states (N, H), cell states (N, H); then what the gradient needs: gates (N, 4H) after their
        non-linearity, recurrent part (N, 4H) before its norm with mean and 1/std (N, 1), tanh of the read-out
        (N, H), mean and 1/std (N, 1) of its norm.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _run(x.contiguous(), hidden, cell, weight, gain, cell_gain, cell_shift, batch_sizes, reverse, eps)


def _run(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    cell_gain: Tensor | None,
    cell_shift: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes, H = step_sizes(x, h0.shape[0], batch_sizes), h0.shape[1]
    gates, recurrent = torch.empty_like(x), torch.empty_like(x)
    hidden, cell, read = (x.new_empty(x.shape[0], H) for _ in range(3))
    mean, scale, cell_mean, cell_scale = (x.new_empty(x.shape[0], 1) for _ in range(4))
    # All views are made here, once: a slice costs as much as a small operation.
    by_step = zip(
        *(v.split(sizes) for v in (x, gates, gates[:, : 3 * H], recurrent, hidden, cell, read)),
        *(gates[:, k * H : (k + 1) * H].split(sizes) for k in range(4)),
        *(v.split(sizes) for v in (mean, scale, cell_mean, cell_scale)),
        strict=True,
    )
    steps = list(by_step)
    weight_t = weight.t()
    h, c = h0, c0
    for x_t, z, sigmoids, u, h_t, c_t, r_t, i, f, o, g, m_u, s_u, m_c, s_c in reversed(steps) if reverse else steps:
        if batch_sizes is not None:
            h, c = resume(h, h0, z.shape[0]), resume(c, c0, z.shape[0])
        multiply(h, weight_t, u)
        if gain is None:
            torch.add(u, x_t, out=z)
        else:
            normed, mean_t, scale_t = torch.native_layer_norm(u, [4 * H], gain, None, eps)
            torch.add(normed, x_t, out=z)
            m_u.copy_(mean_t)
            s_u.copy_(scale_t)
        sigmoids.sigmoid_()
        g.tanh_()
        c = torch.mul(f, c, out=c_t).addcmul_(i, g)
        if cell_gain is None:
            torch.tanh(c, out=r_t)
        else:
            normed, mean_t, scale_t = torch.native_layer_norm(c, [H], cell_gain, cell_shift, eps)
            torch.tanh(normed, out=r_t)
            m_c.copy_(mean_t)
            s_c.copy_(scale_t)
        h = torch.mul(o, r_t, out=h_t)
    return hidden, cell, gates, recurrent, mean, scale, read, cell_mean, cell_scale


@lstm_loop.register_fake
def _(x: Tensor, hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows, width = x.shape[0], hidden.shape[1]
    states = [x.new_empty(rows, width) for _ in range(3)]
    moments = [x.new_empty(rows, 1) for _ in range(4)]
    gates, recurrent = x.new_empty(rows, 4 * width), x.new_empty(rows, 4 * width)
    return states[0], states[1], gates, recurrent, moments[0], moments[1], states[2], moments[2], moments[3]


@torch.library.custom_op("lamina::layer_norm_lstm_backward", mutates_args=())
def lstm_loop_backward(
    grad_hidden: Tensor,
    grad_cell: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    cell_gain: Tensor | None,
    cell_shift: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    hidden: Tensor,
    cell: Tensor,
    gates: Tensor,
    recurrent: Tensor,
    mean: Tensor,
    scale: Tensor,
    read: Tensor,
    cell_mean: Tensor,
    cell_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, the initial states, the weight, and the three norm parameters (empty if None)."""
    sizes, (rows, H) = step_sizes(hidden, h0.shape[0], batch_sizes), hidden.shape
    slopes, slope_out, slope_read = _slopes(gates, previous(cell, c0, batch_sizes, reverse), read)
    # Each step turns its slopes into the gradient of its gate sums, in place.
    grad_gates, grad_recurrent = slopes.view(rows, 4 * H), torch.empty_like(gates)
    grad_read = torch.empty_like(read)
    named: tuple[Tensor, ...] = (
        grad_hidden,
        slopes,
        slope_out,
        slope_read,
        gates[:, H : 2 * H],
        recurrent,
        cell,
        mean,
        scale,
    )
    named += (cell_mean, cell_scale, grad_gates, grad_gates[:, 2 * H : 3 * H])
    named += (grad_recurrent, grad_read, hidden if grad_cell is None else grad_cell)
    steps = list(zip(*(v.split(sizes) for v in named), strict=True))
    dh_all, dc_all = torch.zeros_like(h0), torch.zeros_like(c0)
    for step in steps if reverse else reversed(steps):
        g_h, slope, s_o, s_r, f, u, c, m_u, k_u, m_c, k_c, dz, dz_o, du, dr, g_c = step
        # Rows beyond a step's count have no gradient yet, or (reversed) hold that of their initial state.
        whole = g_h.shape[0] == dh_all.shape[0]
        dh, dc = (dh_all, dc_all) if whole else (dh_all[: g_h.shape[0]], dc_all[: g_h.shape[0]])
        g = torch.add(g_h, dh)
        torch.mul(g, s_r, out=dr)
        if cell_gain is not None:
            dc += _norm_backward(dr, c, [H], m_c, k_c, cell_gain, cell_shift, _INPUT)[0]
        else:
            dc += dr
        if grad_cell is not None:
            dc += g_c
        slope *= dc.unsqueeze(1)
        torch.mul(g, s_o, out=dz_o)
        dc *= f
        if gain is not None:
            du.copy_(_norm_backward(dz, u, [4 * H], m_u, k_u, gain, None, _INPUT)[0])
        else:
            du.copy_(dz)
        multiply(du, weight, dh)
    grad_weight = weight_gradient(grad_recurrent, previous(hidden, h0, batch_sizes, reverse), weight)
    none = hidden.new_empty(0)
    grad_gain, grad_cell_gain, grad_cell_shift = none, none.clone(), none.clone()
    if gain is not None:
        mask = [False, True, False]
        grad_gain = _norm_backward(grad_gates, recurrent, [4 * H], mean, scale, gain, None, mask)[1]
    if cell_gain is not None:
        grads = _norm_backward(grad_read, cell, [H], cell_mean, cell_scale, cell_gain, cell_shift, _AFFINE)
        grad_cell_gain, grad_cell_shift = grads[1:]
    return grad_gates, dh_all, dc_all, grad_weight, grad_gain, grad_cell_gain, grad_cell_shift


def _slopes(gates: Tensor, cell_before: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return d(gate sums)/d(cell) (N, 4, H) with 0 for the output gate, that of the output gate, of the read-out."""
    rows, H = read.shape
    i, f, o, g = gates.chunk(4, dim=1)
    # Written in place: touching fresh memory costs more than the arithmetic.
    slopes = gates.new_empty(rows, 4, H)
    torch.sub(i, i.square(), out=slopes[:, 0]).mul_(g)
    torch.sub(f, f.square(), out=slopes[:, 1]).mul_(cell_before)
    slopes[:, 2] = 0
    torch.addcmul(i, i, g.square(), value=-1, out=slopes[:, 3])
    return slopes, torch.addcmul(o, o, o, value=-1).mul_(read), torch.addcmul(o, o, read.square(), value=-1)


@lstm_loop_backward.register_fake
def _(grad_hidden: Tensor, grad_cell: Tensor | None, h0: Tensor, c0: Tensor, weight: Tensor, *rest: Any) -> Any:
    gain, cell_gain, gates = rest[0], rest[1], rest[7]
    none = h0.new_empty(0)
    of_gain = none if gain is None else torch.empty_like(gain)
    of_cell = [none.clone() if cell_gain is None else torch.empty_like(cell_gain) for _ in range(2)]
    return (
        torch.empty_like(gates),
        torch.empty_like(h0),
        torch.empty_like(c0),
        torch.empty_like(weight),
        of_gain,
        *of_cell,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h0, c0, weight, gain, cell_gain, cell_shift, batch_sizes, ctx.reverse, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h0, c0, weight, gain, cell_gain, cell_shift, batch_sizes, *output)


def _backward(ctx: Any, grad_hidden: Tensor | None, grad_cell: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    h0, c0, weight, gain, cell_gain, cell_shift, batch_sizes, *kept = ctx.saved_tensors
    if grad_hidden is None:
        grad_hidden = torch.zeros_like(kept[0])
    grads = lstm_loop_backward(
        grad_hidden, grad_cell, h0, c0, weight, gain, cell_gain, cell_shift, batch_sizes, ctx.reverse, *kept
    )
    of_gain = None if gain is None else grads[4]
    of_cell = (None, None) if cell_gain is None else grads[5:]
    return *grads[:4], of_gain, *of_cell, None, None, None


lstm_loop.register_autograd(_backward, setup_context=_keep)
lstm_loop_backward.register_autograd(no_second_derivative)
