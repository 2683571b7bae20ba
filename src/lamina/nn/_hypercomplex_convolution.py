"""What the hypercomplex convolutions share: the geometry, read off torch's own layer, and its checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from lamina.errors import RecipeError, ShapeError
from lamina.nn._hypercomplex_weight import AlgebraOption, Init, KroneckerWeight

Sizes = int | Sequence[int]
Padding = int | Sequence[int] | Literal["same", "valid"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Convolution(KroneckerWeight):
    """What the convolutions share; `torch_layer` is the twin whose arguments these are."""

    torch_layer: ClassVar[Any]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | Literal["same", "valid"]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    padding_mode: str

    def set_up(
        self, sizes: tuple[int, int, Sizes], n: int, bias: bool, geometry: dict[str, Any], **options: Any
    ) -> None:
        """Check the geometry and build the weight; see `KroneckerWeight` for the options."""
        if geometry["groups"] != 1:
            what = f"{type(self).__name__}: groups must be 1, got {geometry['groups']}"
            raise RecipeError(f"{what}: the algebra already says which blocks of channels meet")
        # Built for its checks and for the geometry spelled out; it has no memory.
        try:
            twin = self.torch_layer(*sizes, bias=bias, device="meta", **geometry)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ShapeError(f"{type(self).__name__}: {error}") from error
        # He's variance of the weight, for the rectifier that usually follows.
        spread = math.sqrt(2 / (twin.in_channels * math.prod(twin.kernel_size)))
        out_dim = int(twin.transposed)
        super().__init__(tuple(twin.weight.shape), n, bias, spread=spread, out_dim=out_dim, **options)
        self.in_channels, self.out_channels, self.groups = twin.in_channels, twin.out_channels, 1
        for field in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "output_padding"):
            setattr(self, field, getattr(twin, field))

    def fold(self) -> nn.Module:
        """Return the plain convolution with the same outputs."""
        fields = ["stride", "padding", "dilation", "padding_mode"] + ["output_padding"] * self.out_dim
        geometry = {name: getattr(self, name) for name in fields}
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        made: nn.Module = self.torch_layer(*sizes, bias=self.bias is not None, device="meta", **geometry)
        return self.fill(made)

    def extra_repr(self) -> str:
        """Show the sizes and what of the geometry is not the default."""
        words = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {self.words()}"
        plain = {"stride": (1,), "padding": (0,), "dilation": (1,), "padding_mode": ("zeros",), "output_padding": (0,)}
        for name, usual in plain.items():
            value = getattr(self, name)
            if (value,) != usual and set(value) != set(usual):
                words += f", {name}={value}"
        return words

    def check(self, x: Tensor) -> None:
        """Refuse another dtype, number of channels or of dimensions."""
        self.check_dtype(x)
        dims = len(self.kernel_size)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            sizes = ("length", "height, width", "depth, height, width")[dims - 1]
            raise ShapeError(f"{type(self).__name__} takes (batch, {self.in_channels}, {sizes}), got {tuple(x.shape)}")


class PlainConvolution(Convolution):
    """The convolutions that are not transposed; `convolve` is torch's function."""

    convolve: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        n: int = 4,
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        algebra: AlgebraOption = "learned",
        algebra_from: nn.Module | None = None,
        init: Init = "variance",
    ) -> None:
        geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        geometry["padding_mode"] = padding_mode
        options: dict[str, Any] = {"algebra": algebra, "algebra_from": algebra_from, "init": init}
        self.set_up((in_channels, out_channels, kernel_size), n, bias, geometry, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (batch, in_channels, *size), or one example without the batch."""
        self.check(x)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._border(), self.padding_mode), 0
        return type(self).convolve(x, self.formed(), self.bias, self.stride, padding, self.dilation)

    def _border(self) -> list[int]:
        """Cells added before and after each dimension, the last first."""
        border: list[int] = []
        for i in reversed(range(len(self.kernel_size))):
            if isinstance(self.padding, str):
                total = self.dilation[i] * (self.kernel_size[i] - 1) if self.padding == "same" else 0
                border += [total // 2, total - total // 2]
            else:
                border += [self.padding[i]] * 2
        return border
