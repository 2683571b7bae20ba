"""The position-wise part of a transformer block: the plain two-layer network and the gated one."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._inputs import check_features
from lamina.nn.torch_layers import draw
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("layer", source="Vaswani et al. 2017, section 3.3")
class FeedForward(nn.Module):
    """Two linear layers with an activation between them, applied to every position alike.

    x (..., width) -> (..., width).

    Args:
        hidden: channels between the layers; None = 4 * width.
        activation: layer between them; called without arguments.
        linear: both layers, built as linear(in, out, bias=).
        dropout: after the activation and after the second layer, in training.
    Raises:
        ShapeError: a size is not positive, or x is not (..., width) of floating point.
    Source: Vaswani et al., Attention Is All You Need (2017), arXiv 1706.03762, equation 2.
    Example:
        >>> import torch
        >>> FeedForward(8, 32)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        activation: Annotated[Node, Slot("layer")] = "gelu",
        linear: Annotated[Node, Slot("layer")] = "linear",
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.width, hidden = width, _hidden(width, hidden, 4 * width)
        make = factory("layer", linear)
        self.up = make(width, hidden, bias=bias)
        self.activation: nn.Module = factory("layer", activation)()
        self.down = make(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every position."""
        check_features("FeedForward", x, self.width)
        return self.dropout(self.down(self.dropout(self.activation(self.up(x)))))

    def initialise(self, std: float, out_std: float) -> None:
        """Draw the weights anew: normal with `std`, the second layer with `out_std`; biases zero."""
        draw(self.up, std)
        draw(self.down, out_std)


@register("layer", "swiglu", source="Shazeer 2020")
class SwiGLU(nn.Module):
    """Gated feed-forward network: down(silu(gate x) * up x), no biases by default.

    x (..., width) -> (..., width).

    Args:
        hidden: channels of gate and up; None = 8/3 width, rounded to a multiple of 8: as many parameters as the plain
            network with 4 * width.
        dropout: of the output, in training.
        linear: the three layers, built as linear(in, out, bias=).
    Raises:
        ShapeError: a size is not positive, or x is not (..., width) of floating point.
    Source: N. Shazeer, GLU Variants Improve Transformer (2020), arXiv 2002.05202, equation 6.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        linear: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        self.width, hidden = width, _hidden(width, hidden, max(8, round(width / 3) * 8))
        make = factory("layer", linear)
        self.gate, self.up = make(width, hidden, bias=bias), make(width, hidden, bias=bias)
        self.down = make(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every position."""
        check_features("SwiGLU", x, self.width)
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))

    def initialise(self, std: float, out_std: float) -> None:
        """Draw the weights anew: normal with `std`, the output layer with `out_std`; biases zero."""
        draw(self.gate, std)
        draw(self.up, std)
        draw(self.down, out_std)


def _hidden(width: int, hidden: int | None, default: int) -> int:
    hidden = default if hidden is None else hidden
    if width < 1 or hidden < 1:
        raise ShapeError(f"sizes must be positive: {width=}, {hidden=}")
    return hidden
