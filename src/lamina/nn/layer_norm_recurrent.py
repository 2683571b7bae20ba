"""LSTM, GRU and simple RNN with layer normalisation at every step: twins of torch's, in arguments and returns.

The input's part of all steps is one GEMM with one fused norm; only U h and its norm are in the loop, which is one
operator with a gradient by hand. The cells are in `_layer_norm_cells`, the loops in `_layer_norm_{lstm,gru,rnn}`.
Source: Ba, Kiros, Hinton, Layer Normalization (2016), arXiv 1607.06450.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lamina.errors import ShapeError
from lamina.nn._layer_norm_cells import SOURCE, Cell, Device, Rows, check_floating, check_states
from lamina.nn._layer_norm_cells import LayerNormGRUCell as LayerNormGRUCell
from lamina.nn._layer_norm_cells import LayerNormLSTMCell as LayerNormLSTMCell
from lamina.nn._layer_norm_cells import LayerNormRNNCell as LayerNormRNNCell
from lamina.nn._time_steps import last
from lamina.registry import register

Sequences = Tensor | PackedSequence
"""(T, B, input_size), (B, T, input_size) with batch_first, (T, input_size) of one sequence, or packed."""


class Recurrent(nn.Module):
    """Stacked layers of a cell in one or two directions, called as torch's recurrent nets are."""

    cell_class: ClassVar[type[Cell]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **cell: Any,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ShapeError(f"{type(self).__name__} needs num_layers >= 1, got {num_layers}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{type(self).__name__} needs dropout in 0..1, got {dropout}")
        if dropout > 0 and num_layers == 1:
            warnings.warn("dropout acts between layers: with num_layers=1 it does nothing", stacklevel=3)
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        count = 2 if bidirectional else 1
        widths = [input_size] * count + [count * hidden_size] * (count * (num_layers - 1))
        self.cells = nn.ModuleList(self.cell_class(width, hidden_size, bias, **cell) for width in widths)

    def reset_parameters(self) -> None:
        """Draw every cell's parameters anew."""
        for cell in self.cells:
            cast(Cell, cell).reset_parameters()

    def flatten_parameters(self) -> None:
        """Do nothing: torch's nets lay weights out for cuDNN here, and models that hold one call it."""

    def _run(self, input: Sequences, state: Rows | None) -> tuple[Sequences, Rows]:
        if isinstance(input, PackedSequence):
            return self._run_packed(input, state)
        self._check(input)
        batched = input.dim() == 3
        steps = input if batched else input[:, None]
        if self.batch_first and batched:
            steps = steps.transpose(0, 1)
        length, batch = steps.shape[:2]
        state = self._state(steps, batch, state, batched)
        rows, final = self._layers(steps.reshape(length * batch, -1), state, None)
        output = rows.view(length, batch, rows.shape[1])
        if not batched:
            return output[:, 0], tuple(s[:, 0] for s in final)
        return output.transpose(0, 1) if self.batch_first else output, final

    def _run_packed(self, input: PackedSequence, state: Rows | None) -> tuple[PackedSequence, Rows]:
        check_floating(self, input.data)
        if input.data.dim() != 2 or input.data.shape[1] != self.input_size:
            raise ShapeError(
                f"{type(self).__name__} expects packed rows (N, {self.input_size}), got {tuple(input.data.shape)}"
            )
        state = self._state(input.data, int(input.batch_sizes[0]), state)
        if input.sorted_indices is not None:
            state = tuple(s.index_select(1, input.sorted_indices) for s in state)
        rows, final = self._layers(input.data, state, input.batch_sizes)
        if input.unsorted_indices is not None:
            final = tuple(s.index_select(1, input.unsorted_indices) for s in final)
        return PackedSequence(rows, input.batch_sizes, input.sorted_indices, input.unsorted_indices), final

    def _layers(self, rows: Tensor, state: Rows, batch_sizes: Tensor | None) -> tuple[Tensor, Rows]:
        final: list[Rows] = []
        count, batch = 2 if self.bidirectional else 1, state[0].shape[1]
        for layer in range(self.num_layers):
            if layer and self.dropout:
                rows = F.dropout(rows, self.dropout, self.training)
            outputs = []
            for direction in range(count):
                index = layer * count + direction
                cell, start = cast(Cell, self.cells[index]), tuple(s[index] for s in state)
                states = cell.run(rows, start, batch_sizes, reverse=direction == 1)
                outputs.append(states[0])
                final.append(tuple(last(s, batch, batch_sizes, direction == 1) for s in states))
            rows = outputs[0] if count == 1 else torch.cat(outputs, 1)
        return rows, tuple(torch.stack(s) for s in zip(*final, strict=True))

    def _state(self, like: Tensor, batch: int, state: Rows | None, batched: bool = True) -> Rows:
        cells, count = len(self.cells), self.cell_class.states
        if state is None:
            return (like.new_zeros(cells, batch, self.hidden_size),) * count
        check_states(self, state, count, (cells, batch, self.hidden_size) if batched else (cells, self.hidden_size))
        return state if batched else tuple(s[:, None] for s in state)

    def _check(self, input: Tensor) -> None:
        check_floating(self, input)
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ShapeError(
                f"{type(self).__name__} expects 2 or 3 dimensions, the last of {self.input_size}, "
                f"got {tuple(input.shape)}"
            )
        if input.numel() == 0:
            raise ShapeError(f"{type(self).__name__} needs at least one step and one sequence: {tuple(input.shape)}")

    def extra_repr(self) -> str:
        """Say the sizes and the layout."""
        notes = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        flags = [n for n in ("batch_first", "bidirectional") if getattr(self, n)]
        return ", ".join([notes, *(f"{n}=True" for n in flags)])


@register("layer", source=SOURCE)
class LayerNormLSTM(Recurrent):
    """LSTM with layer normalisation at every step: `torch.nn.LSTM`'s arguments, returns, packing and dropout.

    For recurrent nets that should start faster and keep their gradients over long sequences, at any batch size.
    input (T, B, input_size) -> output (T, B, D * H), (h_n, c_n) (layers * D, B, H) each, D = 2 if bidirectional.
    cuDNN's and oneDNN's kernels cannot be used: forward and backward take about 2x `torch.nn.LSTM` on a CPU.

    Args:
        proj_size: not supported, must be 0.
        variant, eps, norm_input, official_bias: see `LayerNormLSTMCell`.
    Raises:
        ShapeError: sizes below 1, proj_size, input or states of other shapes. TypeError: integer input.
        NotImplementedError: a second derivative is asked for.
    Source: equations 20-22 of the supplement, arXiv 1607.06450.
    Example:
        >>> output, (h, c) = LayerNormLSTM(3, 4, batch_first=True)(torch.randn(2, 5, 3))
        >>> output.shape, h.shape
        (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """

    cell_class = LayerNormLSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        variant: Literal["full", "cell"] = "full",
        eps: float = 1e-5,
        norm_input: bool = True,
        official_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size:
            raise ShapeError(f"LayerNormLSTM cannot project its hidden state: proj_size must be 0, got {proj_size}")
        options: dict[str, Any] = {
            "variant": variant,
            "eps": eps,
            "norm_input": norm_input,
            "official_bias": official_bias,
        }
        layout = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(*layout, **options, device=device, dtype=dtype)

    def forward(
        self, input: Sequences, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Sequences, tuple[Tensor, Tensor]]:
        """Return output and (h_n, c_n), laid out as torch.nn.LSTM does."""
        output, (h, c) = self._run(input, hx)
        return output, (h, c)


class _OneState(Recurrent):
    def forward(self, input: Sequences, hx: Tensor | None = None) -> tuple[Sequences, Tensor]:
        """Return output and h_n, laid out as torch's net does."""
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h


@register("layer", source=SOURCE)
class LayerNormGRU(_OneState):
    """GRU with layer normalisation at every step: `torch.nn.GRU`'s arguments, returns, packing and dropout.

    input (T, B, input_size) -> output (T, B, D * H), h_n (layers * D, B, H); see `LayerNormGRUCell` for the options.

    Raises:
        ShapeError: sizes below 1, input or states of other shapes. TypeError: integer input.
    Source: arXiv 1607.06450, github.com/ryankiros/layer-norm.
    """

    cell_class = LayerNormGRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        eps: float = 1e-5,
        norm_input: bool = True,
        official_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        options: dict[str, Any] = {"eps": eps, "norm_input": norm_input, "official_bias": official_bias}
        super().__init__(*layout, **options, device=device, dtype=dtype)


@register("layer", source=SOURCE)
class LayerNormRNN(_OneState):
    """Simple RNN with layer normalisation at every step: `torch.nn.RNN`'s arguments, returns, packing and dropout.

    input (T, B, input_size) -> output (T, B, D * H), h_n (layers * D, B, H); see `LayerNormRNNCell` for the options.
    Its gradient still vanishes over hundreds of steps: take the LSTM there.

    Raises:
        ShapeError: sizes below 1, input or states of other shapes. TypeError: integer input.
    Source: section 3.1, arXiv 1607.06450.
    """

    cell_class = LayerNormRNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        eps: float = 1e-5,
        norm_input: bool = True,
        official_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        options: dict[str, Any] = {"eps": eps, "norm_input": norm_input, "official_bias": official_bias}
        super().__init__(*layout, **options, nonlinearity=nonlinearity, device=device, dtype=dtype)
