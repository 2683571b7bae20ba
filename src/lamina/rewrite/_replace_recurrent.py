"""Conversions of torch's recurrent nets to their layer-normalised twins: weights copied, gates re-ordered.

Gains start at 1 and shifts at 0 (of the GRU's candidate: torch's second bias, which stands at the same place).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import ShapeError
from lamina.lineage import Lineage
from lamina.nn import LayerNormGRU, LayerNormLSTM, LayerNormRNN
from lamina.rewrite.conversion import conversion

Net = TypeVar("Net", LayerNormLSTM, LayerNormGRU, LayerNormRNN)

TORCH_TO_OURS = {"LSTM": (0, 1, 3, 2), "GRU": (0, 1, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
"""Where each of our gates stands in torch's weights: torch's LSTM is i, f, g, o and ours i, f, o, g."""


@conversion("lstm", "layer_norm_lstm")
def lstm_to_layer_norm(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build a `LayerNormLSTM` from an `nn.LSTM`.

    Raises:
        ShapeError: the LSTM projects its hidden state (`proj_size`).
    """
    assert isinstance(old, nn.LSTM)
    if old.proj_size:
        raise ShapeError(f"an LSTM with proj_size={old.proj_size} has no layer-normalised twin: it must be 0")
    return _fill(LayerNormLSTM(**_arguments(old), **options), old, lineage)


@conversion("gru", "layer_norm_gru")
def gru_to_layer_norm(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build a `LayerNormGRU` from an `nn.GRU`."""
    assert isinstance(old, nn.GRU)
    made = _fill(LayerNormGRU(**_arguments(old), **options), old, lineage)
    if old.bias:
        _move_inner_bias(made, old, lineage)
    return made


@conversion("rnn", "layer_norm_rnn")
def rnn_to_layer_norm(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build a `LayerNormRNN` from an `nn.RNN`."""
    assert isinstance(old, nn.RNN)
    made = LayerNormRNN(**{**_arguments(old), "nonlinearity": old.nonlinearity, **options})
    return _fill(made, old, lineage)


def _arguments(old: nn.RNNBase) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    return {n: getattr(old, n) for n in names} | {"dtype": _named(old, "weight_ih", 0).dtype}


def _fill(made: Net, old: nn.RNNBase, lineage: Lineage) -> Net:
    order = TORCH_TO_OURS[old.mode]
    for k, cell in enumerate(made.cells):
        for name in ("weight_ih", "weight_hh"):
            source = _named(old, name, k)
            _copy(cast(Parameter, getattr(cell, name)), source.detach(), source, order, lineage)
        if old.bias:
            first, second = _named(old, "bias_ih", k), _named(old, "bias_hh", k)
            summed = first.detach() + second.detach()
            if old.mode == "GRU":
                # The candidate's second bias is multiplied by the reset gate: see `_move_inner_bias`.
                edge = 2 * old.hidden_size
                summed = torch.cat([summed[:edge], first.detach()[edge:]])
            # Both of torch's biases have the same gradients, so the state of one is the state of the sum.
            _copy(cast(Parameter, cell.bias), summed, first, order, lineage)
    return made


def _move_inner_bias(made: LayerNormGRU, old: nn.GRU, lineage: Lineage) -> None:
    H = old.hidden_size
    for k, cell in enumerate(made.cells):
        shift, source = cast(Parameter, cell.shift_hh), _named(old, "bias_hh", k)
        with torch.no_grad():
            shift[2 * H :].copy_(source[2 * H :])
        lineage.derive(shift, source, index=[-1] * (2 * H) + list(range(2 * H, 3 * H)))


def _copy(new: Parameter, values: Tensor, source: Parameter, order: Sequence[int], lineage: Lineage) -> None:
    blocks, size = values.chunk(len(order)), values.shape[0] // len(order)
    with torch.no_grad():
        new.copy_(torch.cat([blocks[k] for k in order]))
    new.requires_grad_(source.requires_grad)
    lineage.derive(new, source, index=[row for k in order for row in range(k * size, (k + 1) * size)])


def _named(old: nn.RNNBase, name: str, index: int) -> Parameter:
    layer, suffix = (index // 2, "_reverse" * (index % 2)) if old.bidirectional else (index, "")
    return cast(Parameter, getattr(old, f"{name}_l{layer}{suffix}"))
