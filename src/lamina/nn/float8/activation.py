"""Activations, and the gated network, that keep what they need in float8."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.errors import LaminaError, ShapeError, nearest
from lamina.float8 import Format
from lamina.nn._inputs import check_features
from lamina.nn.float8.linear import Float8Linear
from lamina.nn.float8.rounding import Formats, per_group, restore
from lamina.nn.torch_layers import draw
from lamina.registry import register

SOURCE = "Xi et al., COAT (2025), arXiv 2410.19313"

Function = Literal["silu", "gelu", "gelu_tanh"]
FUNCTIONS = ("silu", "gelu", "gelu_tanh")


@register("layer", source=SOURCE)
class Float8Activation(nn.Module):
    """SiLU or GELU that keeps its input for the backward pass in a byte a number, one scale for every 16.

    x of any shape -> same. In training it is computed from the rounded input; in evaluation it is the plain one.

    Args:
        function: `silu`, `gelu`, or `gelu_tanh` (GELU's usual approximation).
        group: numbers with one scale; 0: one scale for the tensor.
        forward: `e4m3` or `e5m2`.
    Raises:
        LaminaError: no such function or format. ShapeError: x is not floating point.
    Source: arXiv 2410.19313, section 5.
    Example:
        >>> Float8Activation("gelu")(torch.zeros(2, 3))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """

    def __init__(self, function: Function = "silu", *, group: int = 16, forward: Format = "e4m3") -> None:
        super().__init__()
        self.function, self.formats = check_function(function), Formats(forward, group=group)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        if not x.is_floating_point():
            raise ShapeError(f"Float8Activation takes floating-point numbers, got {x.dtype}")
        if not self.training or not x.numel() or not x.dim():
            return activate(x, self.function)
        codes, scale = per_group(x.detach(), self.formats.forward, self.formats.group)
        out: Tensor = _Activation.apply(x, codes, scale, self.function, self.formats.group)
        return out

    def extra_repr(self) -> str:
        """Say which."""
        return f"{self.function}, group={self.formats.group}, forward={self.formats.forward}"


@register("layer", "float8_gated_mlp", source=SOURCE)
class Float8GatedMLP(nn.Module):
    """Gated feed-forward network down(act(gate x) * up x) that trains on, and keeps, float8 numbers.

    x (..., width) -> (..., width). Kept: x and the product in front of `down` with one scale each, and gate, up and
    act(gate) with one scale for every 16. In evaluation it is the plain network.

    Args:
        hidden: channels of gate and up; None = 8/3 width, rounded to a multiple of 8.
        function: `silu`, `gelu` or `gelu_tanh`.
        dropout: of the output, in training.
        group: numbers with one scale; 0: one scale for the tensor.
        forward, backward: formats, see `Float8Linear`.
    Raises:
        ShapeError: a size is not positive, or x is not (..., width) of floating point. LaminaError: no such function.
    Source: arXiv 2410.19313, section 5 and figure 4; the network: Shazeer (2020), arXiv 2002.05202, equation 6.
    Example:
        >>> Float8GatedMLP(16)(torch.randn(2, 3, 16)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        function: Function = "silu",
        dropout: float = 0.0,
        bias: bool = False,
        group: int = 16,
        forward: Format = "e4m3",
        backward: Format = "e5m2",
    ) -> None:
        super().__init__()
        hidden = max(8, round(width / 3) * 8) if hidden is None else hidden
        if width < 1 or hidden < 1:
            raise ShapeError(f"Float8GatedMLP: sizes must be positive: {width=}, {hidden=}")
        formats = Formats(forward, backward, group)
        layers = {
            name: Float8Linear(*sizes, bias, forward=forward, backward=backward)
            for name, sizes in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width)))
        }
        self._take(layers, ("gate", "up", "down"), function, formats, nn.Dropout(dropout), "dropout")

    @classmethod
    def around(
        cls,
        layers: dict[str, nn.Linear],
        names: tuple[str, str, str],
        function: Function,
        formats: Formats,
        dropout: nn.Module | None = None,
        dropout_name: str = "dropout",
    ) -> Float8GatedMLP:
        """Return a network with the very parameters of three linear layers, under their names.

        Args:
            names: of gate, up and down among the layers.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        own = {name: Float8Linear.of(layer, formats) for name, layer in layers.items()}
        made._take(own, names, function, formats, dropout, dropout_name)
        return made

    def _take(
        self,
        layers: dict[str, Float8Linear],
        names: tuple[str, str, str],
        function: Function,
        formats: Formats,
        dropout: nn.Module | None,
        dropout_name: str,
    ) -> None:
        self.function, self.formats, self.names = check_function(function), formats, names
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.dropout_name = dropout_name
        if dropout is not None:
            self.add_module(dropout_name, dropout)

    def layers(self) -> tuple[Float8Linear, Float8Linear, Float8Linear]:
        """Return gate, up and down."""
        gate, up, down = (self._modules[name] for name in self.names)
        return gate, up, down  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every position."""
        gate, up, down = self.layers()
        check_features("Float8GatedMLP", x, gate.in_features)
        a, b = gate(x), up(x)
        y = down(self._product(a, b) if self.training and x.numel() else activate(a, self.function) * b)
        dropout = self._modules.get(self.dropout_name)
        return y if dropout is None else dropout(y)

    def initialise(self, std: float, out_std: float) -> None:
        """Draw the weights anew: normal with `std`, the output layer with `out_std`; biases zero."""
        for layer, deviation in zip(self.layers(), (std, std, out_std), strict=True):
            draw(layer, deviation)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        options = self.formats.forward, self.formats.group
        rounded = *per_group(a.detach(), *options), *per_group(b.detach(), *options)
        active = per_group(activate(restore(*rounded[:2], self.formats.group), self.function), *options)
        out: Tensor = _Product.apply(a, b, *rounded, *active, self.function, self.formats.group)
        return out


def activate(x: Tensor, function: Function) -> Tensor:
    """Apply the function."""
    return F.silu(x) if function == "silu" else F.gelu(x, approximate=_approximation(function))


def activation_gradient(gradient: Tensor, x: Tensor, function: Function) -> Tensor:
    """Multiply a gradient by the function's derivative at x."""
    if function == "silu":
        return torch.ops.aten.silu_backward(gradient, x)
    return torch.ops.aten.gelu_backward(gradient, x, approximate=_approximation(function))


def check_function(function: str) -> Function:
    """Refuse a function that is none of the three."""
    if function not in FUNCTIONS:
        raise LaminaError(
            f"function must be one of {', '.join(map(repr, FUNCTIONS))}, got {function!r}"
            f"{nearest(str(function), FUNCTIONS)}"
        )
    return function  # type: ignore[return-value]


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, function: Function, group: int) -> Tensor:
        ctx.function, ctx.group, ctx.like = function, group, x.dtype
        ctx.save_for_backward(codes, scale)
        return activate(restore(codes, scale, group), function).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        x = restore(codes, scale, ctx.group)
        return activation_gradient(gradient.float(), x, ctx.function).to(ctx.like), None, None, None, None


class _Product(torch.autograd.Function):
    """act(a) * b from their codes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        *codes, ctx.function, ctx.group = rest
        ctx.like = a.dtype
        ctx.save_for_backward(*codes)
        return (restore(codes[4], codes[5], ctx.group) * restore(codes[2], codes[3], ctx.group)).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes = ctx.saved_tensors
        a, b, active = (restore(codes[i], codes[i + 1], ctx.group) for i in (0, 2, 4))
        g = gradient.float()
        a_gradient = activation_gradient(g * b, a, ctx.function).to(ctx.like)
        return a_gradient, (g * active).to(ctx.like), *(8 * [None])


def _approximation(function: Function) -> str:
    return "tanh" if function == "gelu_tanh" else "none"
