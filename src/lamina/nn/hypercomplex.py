"""Linear layers and convolutions with 1/n of the weights: a learned algebra says how n blocks share their content.

The weight is H = sum_i A[i] (kron) F[i], with n matrices A[i] (n, n) and n blocks F[i]; complex and quaternion layers
are the ones whose A is fixed. Feature j = block * (features / n) + offset: a component is a contiguous slice.
Parameters and gradients shrink to 1/n; the arithmetic of the layer does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamina.errors import ShapeError
from lamina.nn._hypercomplex_convolution import Convolution, PlainConvolution, Sizes
from lamina.nn._hypercomplex_kron import kron_sum as kron_sum
from lamina.nn._hypercomplex_kron import multiply_blocks_first, multiply_low_rank
from lamina.nn._hypercomplex_kron import nearest_kron_sum as nearest_kron_sum
from lamina.nn._hypercomplex_weight import AlgebraOption, Init, KroneckerWeight
from lamina.registry import register

SOURCE = "Grassucci, Zhang, Comminiello, PHNNs (2022), arXiv 2110.04176"


@register("layer", source=f"{SOURCE}; Zhang et al. (2021), arXiv 2102.08597")
class PHMLinear(KroneckerWeight):
    """Linear layer with 1/n of the weights (parameterised hypercomplex multiplication), called like `nn.Linear`.

    x (..., in_features) -> (..., out_features). Parameters n^3 + in * out / n, and the bias. For a few rows the weight
    is not formed at all; else it is formed in float32, and kept in evaluation.

    Args:
        n: number of components; divides both sizes. 2 and 4 halve and quarter the weights.
        algebra: "learned"; "real", "complex", "quaternion" (n = 1, 2, 4) or (n, n, n) numbers: fixed, not trained.
        algebra_from: another hypercomplex layer of the same n, whose A this one shares.
        rank: the blocks are products of matrices of that rank; None = full.
        init: "variance": the weight starts with Xavier's variance 2 / (in + out), the algebra random; "algebra": the
            algebra near the complex or quaternion one; "official": Xavier's rule on A and F as they are stored, whose
            output is too large or small for many sizes.
    Raises:
        ShapeError: n does not divide a size (the message names the next that does), an algebra of another shape, a rank
            out of range; at the call, another width. RecipeError: an unknown algebra or init.
    Source: Zhang et al., Beyond Fully-Connected Layers with Quaternions (2021), arXiv 2102.08597, the PHM layer; low
        rank: Karimi Mahabadi et al., Compacter (2021), arXiv 2106.04647, the LPHM layer. Deviation: a random A is
        scaled so that every output block has the same variance.
    Example:
        >>> layer = PHMLinear(64, 32, n=4)
        >>> layer(torch.randn(2, 64)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 32]), 608)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int = 4,
        bias: bool = True,
        *,
        algebra: AlgebraOption = "learned",
        algebra_from: nn.Module | None = None,
        rank: int | None = None,
        init: Init = "variance",
    ) -> None:
        shape, spread = (out_features, in_features), math.sqrt(2 / max(in_features + out_features, 1))
        options: dict[str, Any] = {"algebra": algebra, "algebra_from": algebra_from, "init": init}
        super().__init__(shape, n, bias, spread=spread, rank=rank, **options)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to the last dimension."""
        self.check_dtype(x)
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"PHMLinear takes (..., {self.in_features}), got {tuple(x.shape)}")
        if self.rank is None and not self._few_rows(x):
            return functional.linear(x, self.formed(), self.bias)
        if self.rank is None:
            y = multiply_blocks_first(x, self.A, self.F)
        else:
            y = multiply_low_rank(x, self.A, self.left, self.right)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _few_rows(self, x: Tensor) -> bool:
        """Whether forming the weight (n * in * out operations, two copies) costs more than mixing n * out a row.

        An exported graph takes any number of rows, so it has to form the weight.
        """
        if torch.compiler.is_exporting():
            return False
        return x.numel() // self.in_features * 2 * self.n <= self.in_features

    def fold(self) -> nn.Linear:
        """Return the plain layer with the same outputs."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return self.fill(made)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_features}, {self.out_features}, {self.words()}"


@register("layer", "ph_conv1d", source=SOURCE)
class PHConv1d(PlainConvolution):
    """1-d convolution with 1/n of the weights: `PHConv2d` for x (batch, in_channels, length)."""

    torch_layer = nn.Conv1d
    convolve = functional.conv1d


@register("layer", "ph_conv2d", source=SOURCE)
class PHConv2d(PlainConvolution):
    """2-d convolution with 1/n of the weights, called like `nn.Conv2d` with `n` after the kernel size.

    x (batch, in_channels, height, width) -> (batch, out_channels, height', width'). Parameters n^3 + in * out * kernel
    / n, and the bias; operations and time are the dense layer's. The weight is formed in float32, and kept in
    evaluation.

    Args:
        n: number of components; divides both numbers of channels (3 for colours, 4 with a fourth channel added).
        groups: 1; there for `nn.Conv2d`'s sake.
        algebra, algebra_from, init: see `PHMLinear`; "variance" is He's rule here, 2 / (in_channels * kernel).
    Raises:
        ShapeError: n does not divide a number of channels, an algebra of another shape, a geometry torch refuses; at
            the call, other channels. RecipeError: groups, an unknown algebra or init.
    Source: Grassucci, Zhang, Comminiello, PHNNs (2022), arXiv 2110.04176, the PHC layer. Deviation: the bias is added
        (the official code has one that it does not use).
    Example:
        >>> layer = PHConv2d(8, 16, 3, n=4, padding=1)
        >>> layer(torch.randn(2, 8, 5, 5)).shape, layer.weight.shape, layer.F.numel()
        (torch.Size([2, 16, 5, 5]), torch.Size([16, 8, 3, 3]), 288)
    """

    torch_layer = nn.Conv2d
    convolve = functional.conv2d


@register("layer", "ph_conv3d", source=SOURCE)
class PHConv3d(PlainConvolution):
    """3-d convolution with 1/n of the weights: `PHConv2d` for x (batch, in_channels, depth, height, width)."""

    torch_layer = nn.Conv3d
    convolve = functional.conv3d


@register("layer", "ph_conv_transpose2d", source=SOURCE)
class PHConvTranspose2d(Convolution):
    """Transposed 2-d convolution with 1/n of the weights, called like `nn.ConvTranspose2d` with `n` as fourth.

    x (batch, in_channels, height, width) -> (batch, out_channels, height', width'). The weight is stored as torch
    stores it, (in, out, *kernel), so the first index of A runs over input blocks.

    Args, Raises: see `PHConv2d`; padding_mode can only be "zeros".
    Source: Grassucci, Zhang, Comminiello, PHNNs (2022), arXiv 2110.04176.
    """

    torch_layer = nn.ConvTranspose2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        n: int = 4,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: Literal["zeros"] = "zeros",
        *,
        algebra: AlgebraOption = "learned",
        algebra_from: nn.Module | None = None,
        init: Init = "variance",
    ) -> None:
        geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        geometry |= {"output_padding": output_padding, "padding_mode": padding_mode}
        options: dict[str, Any] = {"algebra": algebra, "algebra_from": algebra_from, "init": init}
        self.set_up((in_channels, out_channels, kernel_size), n, bias, geometry, **options)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve backwards; `output_size` (height, width) instead of the output_padding."""
        self.check(x)
        more = self.output_padding if output_size is None else self._more(x, output_size)
        weight, padding = self.formed(), self.padding
        return functional.conv_transpose2d(x, weight, self.bias, self.stride, padding, more, 1, self.dilation)  # type: ignore[arg-type]

    def _more(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        least = [
            (x.shape[i - 2] - 1) * self.stride[i]
            - 2 * int(self.padding[i])
            + self.dilation[i] * (self.kernel_size[i] - 1)
            + 1
            for i in range(2)
        ]
        more = tuple(wanted - size for wanted, size in zip(output_size[-2:], least, strict=True))
        if not all(0 <= m < max(s, d) for m, s, d in zip(more, self.stride, self.dilation, strict=True)):
            most = [size + s - 1 for size, s in zip(least, self.stride, strict=True)]
            raise ShapeError(f"PHConvTranspose2d: output_size must lie in {least}..{most}, got {list(output_size)}")
        return more
