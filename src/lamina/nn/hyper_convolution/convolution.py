"""Convolution with kernels computed from coordinates; depthwise convolution by products or by FFT."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.nn._kept_float32 import wide
from lamina.nn._precision import without_autocast
from lamina.nn.hyper_convolution.coordinate_kernel import CoordinateKernel, Size, size_of
from lamina.registry import register

Path = Literal["auto", "direct", "fft"]
PATHS = ("auto", "direct", "fft")
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


@register("layer", "coordinate_conv2d", source="Romero et al., CKConv (2022), arXiv 2102.02611; arXiv 2206.03398")
class CoordinateConv2d(nn.Module):
    """2-d convolution whose kernel is a function of the place in it, called like `nn.Conv2d`.

    For large kernels with few weights, and for one kernel at several resolutions. x (B, in_channels, H, W) ->
    (B, out_channels, H', W'). Depthwise kernels go by FFT where that is faster (`prefers_fft`).

    Args:
        hidden, layers, omega0: of the slow net, see `CoordinateKernel`; weights are hidden * out_channels * in_channels
            / groups, whatever the kernel_size, so fewer than `nn.Conv2d` has where kernels have more than `hidden`
            points.
        path: "direct" or "fft" instead of the faster one; fft needs depthwise convolution that keeps height and width
            (maps without a batch, and an even kernel_size at the call, go directly).
    Raises:
        ShapeError: a geometry torch refuses; at the call, other channels. RecipeError: an unknown path, or fft where
            it cannot be.
    Source: CKConv; the slow net is arXiv 2401.17948's.
    Example:
        >>> layer = CoordinateConv2d(8, 8, 31, padding="same", groups=8)
        >>> layer(torch.randn(1, 8, 32, 32)).shape, layer.weight.shape
        (torch.Size([1, 8, 32, 32]), torch.Size([8, 1, 31, 31]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | Literal["same", "valid"] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        hidden: int = 64,
        layers: int = 2,
        omega0: float = 10.0,
        path: Path = "auto",
    ) -> None:
        super().__init__()
        if path not in PATHS:
            raise RecipeError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        # Built for its checks and for the geometry spelled out; it has no memory.
        try:
            twin = nn.Conv2d(*sizes, device="meta")
        except (ValueError, TypeError, RuntimeError) as error:
            raise ShapeError(f"CoordinateConv2d: {error}") from error
        self.geometry: dict[str, Any] = {name: getattr(twin, name) for name in (*GEOMETRY, "kernel_size")}
        self.in_channels, self.out_channels, self.path = in_channels, out_channels, path
        if path == "fft" and not self._keeps_maps():
            raise RecipeError(
                "path='fft' is for depthwise convolution (groups = in_channels = out_channels) of odd kernel_size "
                "with stride 1, dilation 1 and zeros around that keep height and width"
            )
        share = in_channels // groups
        self.kernel = CoordinateKernel(2, self.geometry["kernel_size"], out_channels * share, hidden, layers, omega0)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        with torch.no_grad():
            # He's variance over all that is summed: the slow net's own is over the positions alone.
            self.kernel.out.weight.mul_(math.sqrt(2 / share))

    @property
    def weight(self) -> Tensor:
        """The kernel now: (out_channels, in_channels / groups, rows, columns)."""
        return self.weight_of(self.geometry["kernel_size"])

    def weight_of(self, size: Size) -> Tensor:
        """Return the same kernel on another grid, scaled so that it sums up to about the same."""
        grid, own = size_of(size, 2), self.geometry["kernel_size"]
        kernel = self.kernel(size=grid)[0].unflatten(0, (self.out_channels, -1))
        return kernel if grid == own else kernel * (math.prod(own) / math.prod(grid))

    def forward(self, x: Tensor, kernel_size: int | tuple[int, int] | None = None) -> Tensor:
        """Convolve; with another kernel_size (for x at another resolution) the padding follows, so maps stay aligned.

        Raises:
            ShapeError: other channels, or a kernel_size that cannot have the same middle.
        """
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels or not x.is_floating_point():
            what = f"takes floating-point maps (B, {self.in_channels}, H, W), got {x.dtype} {tuple(x.shape)}"
            raise ShapeError(f"CoordinateConv2d {what}")
        grid = self.geometry["kernel_size"] if kernel_size is None else size_of(kernel_size, 2)
        weight = self.weight_of(grid)
        bias = self.bias
        if x.dim() == 4 and self._keeps_maps() and grid[0] % 2 and grid[1] % 2:
            y = depthwise_convolution(x, weight[:, 0], self.path)
            return y if bias is None else y + bias.to(y.dtype)[:, None, None]
        stride, dilation, groups = (self.geometry[name] for name in ("stride", "dilation", "groups"))
        padding, mode = self._padding(grid), self.geometry["padding_mode"]
        if mode != "zeros":
            x, padding = F.pad(x, _both_sides(padding, grid, dilation), mode), 0
        weight = weight.to(x.dtype)
        return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups)

    def load_weight(self, weight: Tensor) -> float:
        """Come as near to a kernel (out, in / groups, rows, columns) as the last layer of the slow net can, in place.

        Exact where hidden + 1 is at least rows * columns. Returns the relative error, NaN on the meta device.

        Raises:
            ShapeError: a kernel of another shape.
        """
        expected = (self.out_channels, self.in_channels // self.geometry["groups"], *self.geometry["kernel_size"])
        if tuple(weight.shape) != expected:
            raise ShapeError(f"this CoordinateConv2d has a kernel {expected}, got {tuple(weight.shape)}")
        if weight.is_meta or self.kernel.out.weight.is_meta:
            return float("nan")
        with torch.no_grad():
            features = self.kernel.features(None, self.kernel.size)[0].double()
            known = torch.cat((features, torch.ones_like(features[:, :1])), dim=1)
            wanted = weight.double().flatten(2).flatten(0, 1)
            found = (torch.linalg.pinv(known) @ wanted.mT).mT
            self.kernel.out.weight.copy_(found[:, :-1])
            self.kernel.out.bias.copy_(found[:, -1])
            return float((known @ found.mT - wanted.mT).norm() / wanted.norm().clamp(min=1e-30))

    def as_conv2d(self) -> nn.Conv2d:
        """Return the plain convolution with the same outputs: the way back, and the one to deploy."""
        sizes = (self.in_channels, self.out_channels, self.geometry["kernel_size"])
        given = {name: self.geometry[name] for name in GEOMETRY}
        made = nn.Conv2d(*sizes, bias=self.bias is not None, **given)
        made = made.to(self.kernel.out.weight if self.bias is None else self.bias)
        with torch.no_grad():
            made.weight.copy_(self.weight)
            if self.bias is not None and made.bias is not None:
                made.bias.copy_(self.bias)
        return made.train(self.training)

    def _keeps_maps(self) -> bool:
        g = self.geometry
        plain = g["stride"] == (1, 1) and g["dilation"] == (1, 1) and g["padding_mode"] == "zeros"
        odd = all(k % 2 for k in g["kernel_size"])
        around = g["padding"] == "same" or g["padding"] == tuple(k // 2 for k in g["kernel_size"])
        return g["groups"] == self.in_channels == self.out_channels and plain and odd and around

    def _padding(self, grid: tuple[int, ...]) -> Any:
        padding = self.geometry["padding"]
        if isinstance(padding, str):
            return padding
        sides = zip(self.geometry["dilation"], grid, self.geometry["kernel_size"], strict=True)
        more = [d * (n - k) for d, n, k in sides]
        found = tuple(p + m // 2 for p, m in zip(padding, more, strict=True))
        if any(m % 2 for m in more) or min(found) < 0:
            raise ShapeError(f"a kernel of {grid} has not the middle of one of {self.geometry['kernel_size']}")
        return found

    def extra_repr(self) -> str:
        """Show the sizes and what of the geometry is not the default."""
        plain: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        words = f"{self.in_channels}, {self.out_channels}, kernel_size={self.geometry['kernel_size']}"
        return words + "".join(f", {n}={self.geometry[n]}" for n, usual in plain.items() if self.geometry[n] != usual)


def depthwise_convolution(x: Tensor, kernel: Tensor, path: Path = "auto") -> Tensor:
    """Convolve every channel with a kernel of its own, zeros around, so that the maps keep their size.

    x (B, C, *size), kernel (C, *odd sizes), or (B, C, *odd sizes): a kernel for every image; 1 to 3 dimensions ->
    (B, C, *size). As torch's convolutions, the kernel is not flipped.

    Args:
        path: "direct", "fft" (in float32 or better), or "auto", the faster by `prefers_fft`.
    Raises:
        ShapeError: even kernel sizes, or shapes that do not fit. RecipeError: an unknown path.
    """
    dims = x.dim() - 2
    if dims not in CONVOLVE or kernel.shape[:-dims] not in (x.shape[1:2], x.shape[:2]):
        raise ShapeError(f"maps of {tuple(x.shape)} do not fit depthwise kernels of {tuple(kernel.shape)}")
    sizes = kernel.shape[-dims:]
    if any(k % 2 == 0 for k in sizes):
        raise ShapeError(f"kernel sizes must be odd, so that a kernel has a middle, got {tuple(sizes)}")
    if path not in PATHS:
        raise RecipeError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    learns = torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad)
    if path == "fft" or (path == "auto" and prefers_fft(x.shape[2:], sizes, x.device.type, learns=learns)):
        return _by_fft(x, kernel)
    return _directly(x, kernel)


def prefers_fft(size: Size, kernel_size: Size, device: str = "cpu", *, learns: bool = False) -> bool:
    """Whether depthwise convolution is faster by FFT for maps and kernels of these sizes.

    On CPU torch has a fast way up to 9 points a side, whose backward pass loses to the FFT from maps of 32 on; above 9
    the FFT is 2 to 20 times as fast, whatever the map. On other devices nothing was measured: there the FFT is taken
    where the products are more than four times its n log n.
    """
    sizes = (size,) if isinstance(size, int) else tuple(size)
    kernels = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    if device == "cpu":
        return max(kernels) > 9 or (learns and min(kernels) == 9 and min(sizes) >= 32)
    padded = math.prod(fast_length(n + k // 2) for n, k in zip(sizes, kernels, strict=True))
    return math.prod(sizes) * math.prod(kernels) > 4 * padded * math.log2(padded)


def fast_length(n: int) -> int:
    """Return the least number from n on that has no prime factors but 2, 3 and 5."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _directly(x: Tensor, kernel: Tensor) -> Tensor:
    dims = x.dim() - 2
    padding = [k // 2 for k in kernel.shape[-dims:]]
    if kernel.dim() == dims + 1:
        return CONVOLVE[dims](x, _like(kernel, x)[:, None], None, 1, padding, 1, x.shape[1])
    # An image is one of one batch: its channels are groups of a single call.
    images = x.reshape(1, -1, *x.shape[2:])
    found = CONVOLVE[dims](images, _like(kernel, x).flatten(0, 1)[:, None], None, 1, padding, 1, images.shape[1])
    return found.view(x.shape)


def _like(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype)


def _by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    dims = x.dim() - 2
    sizes, halves = x.shape[2:], [k // 2 for k in kernel.shape[-dims:]]
    # The zeros in front serve the end as well, for the transform is of a circle; what of a kernel is longer than that
    # meets no cell of the map.
    lengths = [fast_length(n + half) for n, half in zip(sizes, halves, strict=True)]
    over = tuple(range(-dims, 0))
    with without_autocast(x.device):
        shifted = F.pad(wide(x), [p for half in reversed(halves) for p in (half, 0)])
        spectrum = torch.fft.rfftn(shifted, lengths, over) * torch.fft.rfftn(wide(kernel), lengths, over).conj()
        found = torch.fft.irfftn(spectrum, lengths, over)
    for place, n in enumerate(sizes):
        found = found.narrow(place + 2, 0, n)
    return found.to(x.dtype)


def _both_sides(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Spell a padding out as torch.nn.functional.pad reads it: the last dimension first, both its sides."""
    if padding == "valid":
        return [0] * 2 * len(kernel)
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [p for total in reversed(whole) for p in (total // 2, total - total // 2)]
    return [p for side in reversed(padding) for p in (side, side)]
