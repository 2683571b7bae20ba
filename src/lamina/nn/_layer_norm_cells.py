"""The three layer-normalised recurrent cells: parameters, and a run of many steps through the loop operators.

Letters: N = rows of all steps (see `_time_steps`), B = batch, H = hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import ShapeError
from lamina.nn._layer_norm_gru import gru_loop
from lamina.nn._layer_norm_lstm import lstm_loop
from lamina.nn._layer_norm_rnn import rnn_loop
from lamina.registry import register

SOURCE = "Ba, Kiros, Hinton, Layer Normalization (2016), arXiv 1607.06450"
Device = torch.device | str | None
Rows = tuple[Tensor, ...]
"""Hidden states (N, H); of the LSTM the cell states, too."""


class Cell(nn.Module):
    """What the three cells share: weights, gains, shifts, and how one step is made of a run."""

    gates: ClassVar[int]
    """How many H-wide blocks the weights have."""
    states: ClassVar[int] = 1
    """How many state tensors there are: (h,) or (h, c)."""
    bias: Parameter | None
    gain_ih: Parameter | None
    shift_ih: Parameter | None
    gain_hh: Parameter
    shift_hh: Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        eps: float = 1e-5,
        norm_input: bool = True,
        official_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ShapeError(f"{type(self).__name__} needs sizes of at least 1, got {input_size} and {hidden_size}")
        if not eps > 0:
            raise ValueError(f"{type(self).__name__} needs eps > 0, got {eps}")
        self.input_size, self.hidden_size, self.eps = input_size, hidden_size, eps
        self.norm_input, self.official_bias = norm_input, official_bias
        width = self.gates * hidden_size
        place = {"device": device, "dtype": dtype}
        self.weight_ih = Parameter(torch.empty(width, input_size, **place))  # type: ignore[arg-type]
        self.weight_hh = Parameter(torch.empty(width, hidden_size, **place))  # type: ignore[arg-type]
        self._vectors: list[str] = []
        for name, size in self._sizes(width, bias).items():
            value = None if size is None else Parameter(torch.empty(size, **place))  # type: ignore[arg-type]
            self.register_parameter(name, value)
            self._vectors.append(name)
        self.reset_parameters()

    def _sizes(self, width: int, bias: bool) -> dict[str, int | None]:
        of_input = width if self.norm_input else None
        return {
            "bias": width if bias else None,
            "gain_ih": of_input,
            "shift_ih": of_input,
            "gain_hh": width,
            "shift_hh": width,
        }

    def reset_parameters(self) -> None:
        """Start as the authors' code does: orthogonal square blocks, else normal of 0.01; gains 1, the rest 0."""
        with torch.no_grad():
            for name, weight in (("ih", self.weight_ih), ("hh", self.weight_hh)):
                if name == "ih" and self.input_size != self.hidden_size:
                    nn.init.normal_(weight, std=0.01)
                    continue
                for block in weight.chunk(self.gates):
                    # The decomposition behind it does not exist in half precision.
                    block.copy_(nn.init.orthogonal_(wide(block).clone()))
            for name in self._vectors:
                value = getattr(self, name)
                if value is not None:
                    value.fill_(1.0 if name.startswith("gain") else 0.0)

    def run(self, rows: Tensor, state: Rows, batch_sizes: Tensor | None = None, reverse: bool = False) -> Rows:
        """Run over the rows (N, input_size) of all steps from the initial state; return the states of every row."""
        raise NotImplementedError

    def _step(self, input: Tensor, state: Rows | None) -> Rows:
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ShapeError(
                f"{type(self).__name__} expects (batch, {self.input_size}) or ({self.input_size},), "
                f"got {tuple(input.shape)}"
            )
        rows = input if input.dim() == 2 else input[None]
        check_floating(self, rows)
        if not len(rows):
            raise ShapeError(f"{type(self).__name__} needs at least one row, got {tuple(input.shape)}")
        if state is None:
            state = (rows.new_zeros(len(rows), self.hidden_size),) * self.states
        else:
            check_states(self, state, self.states, (*input.shape[:-1], self.hidden_size))
            state = tuple(s if s.dim() == 2 else s[None] for s in state)
        return tuple(s if input.dim() == 2 else s[0] for s in self.run(rows, state))

    def _project(self, rows: Tensor) -> Tensor:
        """Multiply the input of all steps by its weight, in one GEMM; float32 or wider."""
        inner = self.bias if self.official_bias or not self.norm_input else None
        return wide(F.linear(rows, self.weight_ih, inner))

    def _recurrent_weight(self) -> Tensor:
        kind = self.weight_hh.device.type
        if (
            torch.amp.is_autocast_available(kind)
            and torch.is_autocast_enabled(kind)
            and self.weight_hh.dtype == torch.float32
        ):
            return self.weight_hh.to(torch.get_autocast_dtype(kind))
        return self.weight_hh

    def extra_repr(self) -> str:
        """Say the sizes and what differs from the default."""
        notes = [f"{self.input_size}, {self.hidden_size}", f"eps={self.eps}"]
        notes += [f"{n}={getattr(self, n)}" for n in ("norm_input", "official_bias")]
        return ", ".join(notes)


@register("layer", source=SOURCE)
class LayerNormLSTMCell(Cell):
    """One step of an LSTM with layer normalisation inside; the drop-in twin of `torch.nn.LSTMCell`.

    z = LN(W x; g1, b1) + LN(U h; g2, b2) + bias, gates i, f, o, g; c' = f c + i g; h' = o tanh(LN(c'; g3, b3)).
    Each norm of z is over all 4H units, the carried c is never normalised. x (B, input_size), (h, c) (B, H) each
    -> (h', c'); without the B also. float32 inside for half precision.

    Args:
        variant: `full`, or `cell` (only the read-out of c is normalised, as in the authors' Torch7 file).
        norm_input: normalise W x. Of a single number the norm leaves little more than the sign; try both there.
        official_bias: add the bias before the norm of W x as well, as the authors' Theano code does.
    Raises:
        ShapeError: a size below 1; x or a state of another shape. TypeError: x is not floating point.
    Source: equations 20-22 of the supplement, arXiv 1607.06450; gate order of github.com/ryankiros/layer-norm.
    Example:
        >>> h, c = LayerNormLSTMCell(3, 4)(torch.randn(2, 3))
        >>> h.shape
        torch.Size([2, 4])
    """

    gates, states = 4, 2
    gain_cell: Parameter
    shift_cell: Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        eps: float = 1e-5,
        variant: Literal["full", "cell"] = "full",
        norm_input: bool = True,
        official_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if variant not in ("full", "cell"):
            raise ValueError(f"variant must be 'full' or 'cell', got {variant!r}")
        self.variant = variant
        super().__init__(
            input_size, hidden_size, bias, eps, norm_input and variant == "full", official_bias, device, dtype
        )

    def _sizes(self, width: int, bias: bool) -> dict[str, int | None]:
        sizes = super()._sizes(width, bias)
        if self.variant == "cell":
            sizes |= {"gain_hh": None, "shift_hh": None}
        return sizes | {"gain_cell": self.hidden_size, "shift_cell": self.hidden_size}

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return (h', c')."""
        h, c = self._step(input, hx)
        return h, c

    def run(self, rows: Tensor, state: Rows, batch_sizes: Tensor | None = None, reverse: bool = False) -> Rows:
        """Run all steps; see `Cell.run`."""
        x, full = self._project(rows), self.variant == "full"
        gain = wide(self.gain_hh) if full else None
        # Everything added to z outside a norm goes into one shift, added once for all steps.
        shift = wide(self.shift_hh) if full else None
        if self.bias is not None and self.norm_input:
            shift = wide(self.bias) if shift is None else shift + wide(self.bias)
        if self.gain_ih is not None and self.shift_ih is not None:
            shift = wide(self.shift_ih) if shift is None else shift + wide(self.shift_ih)
            x = F.layer_norm(x, x.shape[1:], wide(self.gain_ih), shift, self.eps)
        elif shift is not None:
            x = x + shift
        h, c = (wide(s).to(x.dtype) for s in state)
        of_cell = wide(self.gain_cell), wide(self.shift_cell)
        result = lstm_loop(x, h, c, self._recurrent_weight(), gain, *of_cell, batch_sizes, reverse, self.eps)
        return result[0].to(rows.dtype), result[1].to(rows.dtype)


@register("layer", source=SOURCE)
class LayerNormGRUCell(Cell):
    """One step of a GRU with layer normalisation inside; the drop-in twin of `torch.nn.GRUCell`.

    r, u = sigmoid(LN(W x; 2H) + LN(U h; 2H)); n = tanh(LN(Wn x; H) + r * LN(Un h; H)); h' = u h + (1 - u) n: four
    gains and shifts, kept in two vectors of 3H. x (B, input_size), h (B, H) -> h'. float32 inside for half precision.

    Args:
        norm_input: normalise W x.
        official_bias: add the bias before the norm of W x, as the authors' Theano code does; else after it.
    Raises:
        ShapeError: a size below 1; x or the state of another shape. TypeError: x is not floating point.
    Source: arXiv 1607.06450, gates as in github.com/ryankiros/layer-norm (`u` keeps the old state, as torch's z).
    """

    gates = 3

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h'."""
        return self._step(input, None if hx is None else (hx,))[0]

    def run(self, rows: Tensor, state: Rows, batch_sizes: Tensor | None = None, reverse: bool = False) -> Rows:
        """Run all steps; see `Cell.run`."""
        x, edge = self._project(rows), 2 * self.hidden_size
        of_hidden = wide(self.shift_hh)
        # The candidate's recurrent shift stands inside the reset gate, so it cannot join the others.
        shift = F.pad(of_hidden[:edge], (0, self.hidden_size))
        if self.norm_input and self.bias is not None and not self.official_bias:
            shift = shift + wide(self.bias)
        if self.gain_ih is None or self.shift_ih is None:
            x = x + shift
        else:
            gain, shift = wide(self.gain_ih), shift + wide(self.shift_ih)
            of_gates = F.layer_norm(x[:, :edge], (edge,), gain[:edge], shift[:edge], self.eps)
            of_new = F.layer_norm(x[:, edge:], (self.hidden_size,), gain[edge:], shift[edge:], self.eps)
            x = torch.cat([of_gates, of_new], 1)
        gain, shift = wide(self.gain_hh), of_hidden[edge:]
        h = wide(state[0]).to(x.dtype)
        result = gru_loop(x, h, self._recurrent_weight(), gain, shift, batch_sizes, reverse, self.eps)
        return (result[0].to(rows.dtype),)


@register("layer", source=SOURCE)
class LayerNormRNNCell(Cell):
    """One step of a simple RNN with layer normalisation; the drop-in twin of `torch.nn.RNNCell`.

    h' = f(LN(W x + U h; g, b) + bias). x (B, input_size), h (B, H) -> h'. float32 inside for half precision.

    Args:
        norm_input: False: h' = f(W x + LN(U h; g, b) + bias).
        official_bias: add the bias before the norm instead of after it.
        nonlinearity: `tanh` or `relu`.
    Raises:
        ShapeError: a size below 1; x or the state of another shape. TypeError: x is not floating point.
    Source: section 3.1, equation 4, arXiv 1607.06450.
    """

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        eps: float = 1e-5,
        norm_input: bool = True,
        official_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, eps, norm_input, official_bias, device, dtype)

    def _sizes(self, width: int, bias: bool) -> dict[str, int | None]:
        return super()._sizes(width, bias) | {"gain_ih": None, "shift_ih": None}

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h'."""
        return self._step(input, None if hx is None else (hx,))[0]

    def run(self, rows: Tensor, state: Rows, batch_sizes: Tensor | None = None, reverse: bool = False) -> Rows:
        """Run all steps; see `Cell.run`."""
        x = self._project(rows)
        inner = self.official_bias or not self.norm_input
        bias = None if self.bias is None or inner else wide(self.bias)
        gain, shift, h = wide(self.gain_hh), wide(self.shift_hh), wide(state[0]).to(x.dtype)
        relu = self.nonlinearity == "relu"
        result = rnn_loop(
            x, h, self._recurrent_weight(), gain, shift, bias, self.norm_input, relu, batch_sizes, reverse, self.eps
        )
        return (result[0].to(rows.dtype),)


def wide(x: Tensor) -> Tensor:
    """Return half precision as float32: statistics and states are never half."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_states(module: nn.Module, states: Sequence[Tensor], count: int, expected: tuple[int, ...]) -> None:
    """Refuse initial states of another number or shape.

    Raises:
        ShapeError: says both.
    """
    found = [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in states]
    if found != [expected] * count:
        wanted = "one initial state" if count == 1 else "(h, c), two initial states"
        got = ", ".join(map(str, found)) or "none"
        raise ShapeError(f"{type(module).__name__} expects {wanted} {expected}, got {got}")


def check_floating(module: nn.Module, x: Tensor) -> None:
    """Refuse an integer input.

    Raises:
        TypeError: x is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"{type(module).__name__} needs a floating-point input, got {x.dtype}")
