"""Attention whose time grows linearly with the tokens, for vision models: a ReLU kernel and a depthwise convolution.

Source: Guo, Chen, Tang, Wang, SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
Re-parameterized Batch Normalization (ICML 2024), arXiv 2405.11582.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import ShapeError
from lamina.nn._precision import without_autocast
from lamina.registry import register


@register("mixer", source="Guo et al., SLAB (2024), arXiv 2405.11582, simplified linear attention")
class SimplifiedLinearAttention(nn.Module):
    """Linear attention with a ReLU kernel, and a depthwise convolution of the values on the image's grid.

    For vision models of many tokens, in place of softmax attention. x (B, prefix + rows * columns, width) -> same.
    Every token looks at every token (never causal, no mask). Tokens before the grid (a class token) attend like all
    others, but the convolution and the position code leave them out.

    Args:
        heads: must divide width.
        grid: (rows, columns) of the image's tokens; None = the square of `context` - `prefix` tokens.
        kernel_size: side of the convolution, odd; its weights are shared by all heads.
        qkv_bias: give query, key and value a bias; the output projection always has one.
        eps: added to the normaliser, so that a query without a positive entry gives zeros.
        context: number of tokens, where there is no grid.
        prefix: tokens before the grid.
    Raises:
        ShapeError: sizes that do not fit: no grid and no square, heads that do not divide the width, an even
            kernel_size; at the call, another number of tokens.
    Source: the definition of SLA, and the official code's position code and kernel size, arXiv 2405.11582. In float32
        or better with autocast off, as there. Deviation: prefix tokens; the paper drops the class token.
    Example:
        >>> SimplifiedLinearAttention(32, 4, (3, 4))(torch.randn(2, 12, 32)).shape
        torch.Size([2, 12, 32])
    """

    layout: ClassVar[str] = "sequence"

    def __init__(
        self,
        width: int,
        heads: int,
        grid: tuple[int, int] | None = None,
        kernel_size: int = 5,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        *,
        context: int | None = None,
        prefix: int = 0,
    ) -> None:
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ShapeError(f"width {width} does not divide by {heads} heads")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ShapeError(f"kernel_size must be odd and positive, so that a cell has a centre, got {kernel_size}")
        if not eps > 0:
            raise ShapeError(f"eps must be positive: without it a query without a positive entry gives NaN, got {eps}")
        self.width, self.heads, self.head_width, self.eps, self.prefix = width, heads, width // heads, eps, prefix
        self.grid = _grid(grid, context, prefix)
        self.query = nn.Linear(width, width, bias=qkv_bias)
        self.key = nn.Linear(width, width, bias=qkv_bias)
        self.value = nn.Linear(width, width, bias=qkv_bias)
        self.position = Parameter(torch.zeros(1, math.prod(self.grid), width))
        self.convolution = nn.Conv2d(
            self.head_width, self.head_width, kernel_size, padding=kernel_size // 2, groups=self.head_width
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        tokens = self.prefix + math.prod(self.grid)
        if x.dim() != 3 or x.shape[1:] != (tokens, self.width) or not x.is_floating_point():
            raise ShapeError(
                f"SimplifiedLinearAttention of a grid of {self.grid} and {self.prefix} tokens before it takes "
                f"floating-point (batch, {tokens}, {self.width}), got {x.dtype} {tuple(x.shape)}"
            )
        position = F.pad(self.position, (0, 0, self.prefix, 0)) if self.prefix else self.position
        q, k, v = F.relu(self.query(x)), F.relu(self.key(x) + position), self.value(x)
        dtype = v.dtype
        with without_autocast(x.device):
            q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
            mixed = self._attend(q, k, v) + self._convolve(v)
        return self.out(mixed.to(dtype))

    def extra_repr(self) -> str:
        """Show what the children do not."""
        return f"heads={self.heads}, grid={self.grid}, prefix={self.prefix}"

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (t.unflatten(2, (self.heads, self.head_width)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        mixed = linear_attention(*heads, eps=self.eps)  # (B * heads, N, D)
        return mixed.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def _convolve(self, v: Tensor) -> Tensor:
        """Convolve the values on the grid, (B, N, C) -> same; the memory is channels-last as it stands."""
        cells = v[:, self.prefix :].unflatten(1, self.grid).movedim(3, 1)
        weight = self.convolution.weight.to(v.dtype).repeat(self.heads, 1, 1, 1)
        bias = None if self.convolution.bias is None else self.convolution.bias.to(v.dtype).repeat(self.heads)
        padding = self.convolution.padding
        made = F.conv2d(cells, weight, bias, padding=padding, groups=self.width)
        mixed = made.movedim(1, 3).flatten(1, 2)
        return F.pad(mixed, (0, 0, self.prefix, 0)) if self.prefix else mixed


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Attend with the kernel q . k, for q and k that are not negative.

    out[i] = sum_j (q[i] . k[j]) v[j] / (sum_j q[i] . k[j] + eps), the products taken in the cheaper order: keys with
    values first, O(N D^2), where there are more tokens than channels; else queries with keys, O(N^2 D).

    Args:
        q, k, v: (batch, N, D).
    """
    norm = torch.bmm(q, k.sum(1)[:, :, None]) + eps  # (batch, N, 1)
    if q.shape[1] > q.shape[2]:
        return torch.bmm(q, torch.bmm(k.transpose(1, 2), v)) / norm
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)), v) / norm


def _grid(grid: tuple[int, int] | None, context: int | None, prefix: int) -> tuple[int, int]:
    if prefix < 0:
        raise ShapeError(f"prefix must not be negative, got {prefix}")
    if grid is not None:
        rows, columns = grid
        if rows < 1 or columns < 1:
            raise ShapeError(f"grid must be (rows, columns), both at least 1, got {tuple(grid)}")
        return int(rows), int(columns)
    if context is None:
        raise ShapeError("give the grid of the image's tokens: grid=(rows, columns)")
    side = math.isqrt(max(context - prefix, 0))
    if side < 1 or side * side != context - prefix:
        raise ShapeError(f"{context - prefix} tokens are no square: give grid=(rows, columns)")
    return side, side
