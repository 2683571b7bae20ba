"""The slow net: a kernel as a function of position, computed by a small multiplicative network of sines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn._kept_float32 import KeptFloat32, wide
from lamina.nn._precision import without_autocast
from lamina.registry import register

SOURCE = "Zhang, HyperZ.Z.W Operator (2024), arXiv 2401.17948"
INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
Size = int | Sequence[int]


@register("layer", "coordinate_kernel", source=f"{SOURCE}; Romero et al., CCNN (2022), arXiv 2206.03398 (MAGNet)")
class CoordinateKernel(KeptFloat32):
    """Values of a kernel at the points of a grid, as a function of their coordinates alone: an implicit kernel.

    For any layer that wants a large kernel with few weights, or one kernel at several resolutions. () -> (1,
    out_channels, *size); with a context (B, context, *size) -> (B, out_channels, *size). float32 inside (sines of
    large arguments), also under autocast; its weights stay float32 where a model is made bfloat16 or half: a frequency
    rounded to 8 bits is another kernel.

    A product of sines and mixed features, layer by layer: z = sin(g_0 p), then z = sin(g_i p) * (M_i z) + a bias of
    each position, i = 1..layers; a linear layer makes the channels. With a context, z is renormalised and multiplied
    by a linear layer of it after each product.

    Args:
        dim: of the grid, 1..3; coordinates run from -1 to 1, both ends included, rows first.
        size: points along each dimension; at the call any other may be asked for: the same function on another grid,
            the bias of the positions interpolated.
        hidden: features inside. layers: products.
        omega0: how fast the kernel varies, > 0: the sines begin with up to about 2 omega0 * 6 turns over the grid.
            With the paper's 10 a kernel is as good as white between its points: take 0.1 to 1 for kernels that are to
            be asked for at other sizes.
        context: channels of the injected context; 0 = none.
    Raises:
        LaminaError: omega0 that is not a finite number above 0.
        ShapeError: sizes below 1, dim outside 1..3; at the call, no context where there must be one, or one of another
            shape.
    Source: section 3, and the card of the released definitions; omega0 is not in them.
    Example:
        >>> kernel = CoordinateKernel(2, 8, out_channels=16)
        >>> kernel().shape, kernel(size=16).shape
        (torch.Size([1, 16, 8, 8]), torch.Size([1, 16, 16, 16]))
    """

    def __init__(
        self,
        dim: int,
        size: Size,
        out_channels: int,
        hidden: int = 64,
        layers: int = 2,
        omega0: float = 10.0,
        context: int = 0,
    ) -> None:
        super().__init__()
        if dim not in INTERPOLATION:
            raise ShapeError(f"CoordinateKernel: dim must be 1, 2 or 3, got {dim}")
        self.size = size_of(size, dim)
        if min(out_channels, hidden, layers) < 1 or context < 0:
            given = f"out_channels={out_channels}, hidden={hidden}, layers={layers}, context={context}"
            raise ShapeError(f"CoordinateKernel: out_channels, hidden and layers must be at least 1, got {given}")
        if not (math.isfinite(omega0) and omega0 > 0):
            raise LaminaError(f"CoordinateKernel: omega0 must be a finite number above 0, got {omega0}")
        self.dim, self.out_channels, self.hidden, self.layers = dim, out_channels, hidden, layers
        self.omega0, self.context = float(omega0), context
        self.waves = nn.Linear(dim, (layers + 1) * hidden)
        self.mixes = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.contexts = nn.ModuleList(nn.Linear(context, hidden) for _ in range(layers if context else 0))
        self.position_bias = nn.Parameter(torch.zeros(self.size))
        self.out = nn.Linear(hidden, out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw everything anew: frequencies from gamma distributions, the later layers' lower."""
        nn.init.kaiming_normal_(self.waves.weight)
        nn.init.zeros_(self.waves.bias)
        if not self.waves.weight.is_meta:
            for i, part in enumerate(self.waves.weight.chunk(self.layers + 1)):
                scale = torch._standard_gamma(torch.full_like(part, 6 / (i + 1)))
                part.mul_(2 * math.pi * self.omega0 * scale)
        for linear in (*self.mixes, *self.contexts):
            _draw_linear(linear, bias=1.0)
        _draw_linear(self.out, bias=0.0)
        self.out.weight.mul_(math.prod(self.size) ** -0.5)
        nn.init.zeros_(self.position_bias)

    def forward(self, context: Tensor | None = None, size: Size | None = None) -> Tensor:
        """Return the kernel at the points of its own grid, or of another; (1 or B, out_channels, *size)."""
        grid = self.size if size is None else size_of(size, self.dim)
        u = self._checked(context, grid)
        with without_autocast(self.out.weight.device):
            features = self.features(u, grid)
            weight, bias = wide(self.out.weight), wide(self.out.bias)
            # The weight first: the result lies channel by channel, as convolutions and products of maps read it.
            kernel = weight @ features.mT + bias[:, None]
        return kernel.unflatten(-1, grid)

    def features(self, context: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """Return what the last linear layer reads: (1 or B, positions, hidden)."""
        bias = wide(resized_positions(self.position_bias, size)).reshape(-1, 1)
        points = coordinate_grid(size, bias.device, bias.dtype)
        waves = torch.sin(_linear(points, self.waves))[None].chunk(self.layers + 1, dim=-1)
        z = waves[0]
        for i, mix in enumerate(self.mixes):
            z = torch.addcmul(bias, waves[i + 1], _linear(z, mix))
            if context is not None:
                z = renormalize(z) * _linear(context, self.contexts[i])
        return z

    def _checked(self, context: Tensor | None, size: tuple[int, ...]) -> Tensor | None:
        if not self.context:
            if context is not None:
                raise ShapeError("this CoordinateKernel was built without a context (context=0), and was given one")
            return None
        shape = (self.context, *size)
        if context is None or tuple(context.shape[1:]) != shape or not context.is_floating_point():
            given = None if context is None else f"{context.dtype} {tuple(context.shape)}"
            raise ShapeError(f"CoordinateKernel takes a floating-point context (batch, *{shape}), got {given}")
        return wide(context).flatten(2).mT

    def extra_repr(self) -> str:
        """Show the sizes."""
        words = f"{self.dim}, size={self.size}, out_channels={self.out_channels}, omega0={self.omega0:g}"
        return f"{words}, context={self.context}" if self.context else words


def renormalize(z: Tensor, alpha: float = 1.0, beta: float = 0.1) -> Tensor:
    """Return alpha * z + beta * z / ||z||, with a gradient through the second term only.

    z (..., positions, hidden) -> same; the norm is that of each hidden channel over all positions, at least 1e-12.
    """
    return alpha * z.detach() + beta * F.normalize(z, dim=-2, eps=1e-12)


def coordinate_grid(size: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the points of a grid over [-1, 1] in each dimension, ends included: (positions, dim), rows first.

    A dimension with one point has it in the middle.
    """
    axes = [torch.linspace(-1 if n > 1 else 0, 1, n, device=device, dtype=dtype) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def resized_positions(values: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate numbers at the points of one grid over [-1, 1] linearly to those of another; the ends stay ends."""
    if tuple(values.shape) == tuple(size):
        return values
    mode = INTERPOLATION[values.dim()]
    return F.interpolate(values[None, None], tuple(size), mode=mode, align_corners=True)[0, 0]


def size_of(size: Size, dim: int) -> tuple[int, ...]:
    """Return the points along each of `dim` dimensions.

    Raises:
        ShapeError: another number of dimensions, or sizes below 1.
    """
    found = (size,) * dim if isinstance(size, int) else tuple(size)
    if len(found) != dim or min(found) < 1:
        raise ShapeError(f"a grid of {dim} dimensions has {dim} sizes of at least 1, got {size}")
    return found


def _linear(x: Tensor, layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return F.linear(x, wide(layer.weight), wide(layer.bias))


def _draw_linear(layer: nn.Module, bias: float) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.constant_(layer.bias, bias)
