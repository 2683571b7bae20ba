"""Token mixing by MLPs: along the columns and the rows of a map with channels in rafts (RaftMLP), or over all of it.

A grid mixer is built as `mixer(width=C, grid=(H, W))` and maps (B, C, H, W) to the same shape. Both read the channels
of a position side by side: maps in the memory format `channels_last` go in and out without a copy.
Source: Tatsunami, Taki, RaftMLP (2021), arXiv 2108.04384; Tolstikhin et al., MLP-Mixer (2021), arXiv 2105.01601.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.registry import register

Axis = Literal["vertical", "horizontal", "both"]
ORDERS: dict[Axis, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "vertical": ((3, 1), (0, 2, 4)),
    "horizontal": ((3, 2), (0, 1, 4)),
    "both": ((3, 1, 2), (0, 4)),
}
"""Which dimensions of (B, H, W, R, C / R) an MLP reads together, in this order, and which are the rows of its batch."""


@register("mixer", source="Tatsunami & Taki 2021, arXiv 2108.04384, section 3.2")
class RaftTokenMixing(nn.Module):
    """Mix tokens by an MLP along every column and then one along every row, each over a few channels together.

    In place of attention or a convolution where every token must reach every other at a cost of N^1.5, not N^2.
    Channel c belongs with c + C/R, c + 2 C/R, ...: these R channels of one column (one row) are one input of the MLP,
    R * H (R * W) numbers long, and all such inputs share its weights. x (B, C, H, W) -> same, H and W fixed.

    Args:
        width: C; a multiple of rafts.
        grid: (H, W); for other sizes see `ResizeTokenMixing`.
        rafts: R, how many channels an MLP sees together; 1 = each channel alone.
        expansion: hidden numbers of an MLP for each of its inputs.
        dropout: after each linear layer of the MLPs, in training; 0..1 (1 excluded).
        drop_path: share of images that skip an MLP, in training; 0..1 (1 excluded).
        residual: x + MLP(norm(x)) twice, as in the paper; False = the same less x, for a trunk that adds x itself
            (MetaFormer, a vision transformer).
    Raises:
        ShapeError: rafts do not divide width, sizes below 1, rates out of range; at the call, another size.
    Source: section 3.2, and okojoalg/raft-mlp. Deviation: the norms before the MLPs number their gains and shifts in
        the order of the channels, not raft by raft (a permutation, see `lamina.models.load_raft_mlp`).
    Example:
        >>> RaftTokenMixing(8, (4, 5))(torch.randn(2, 8, 4, 5)).shape
        torch.Size([2, 8, 4, 5])
    """

    layout: ClassVar[str] = "grid"

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        rafts: int = 2,
        expansion: int = 2,
        dropout: float = 0.0,
        *,
        drop_path: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(width=width, rows=grid[0], columns=grid[1], rafts=rafts, expansion=expansion)
        if width % rafts:
            raise ShapeError(f"rafts must divide width, got rafts={rafts} and width={width}")
        self.width, self.grid, self.rafts, self.residual = width, (int(grid[0]), int(grid[1])), rafts, residual
        rates = (dropout, drop_path)
        self.vertical = TokenBranch(width, "vertical", rafts * grid[0], expansion, *rates)
        self.horizontal = TokenBranch(width, "horizontal", rafts * grid[1], expansion, *rates)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, C, H, W)."""
        _check_map("RaftTokenMixing", x, self.width, self.grid)
        tokens = in_rafts(x, self.rafts)
        first = self.vertical(tokens)
        between = tokens + first
        second = self.horizontal(between)
        return out_of_rafts((between if self.residual else first) + second)

    @staticmethod
    def instead_of_attention(offered: Mapping[str, Any]) -> dict[str, Any]:
        """Say what `Replace("attention", ...)` builds: the block around an attention adds x itself."""
        return {"residual": False}

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.width}, grid={self.grid}, rafts={self.rafts}, residual={self.residual}"


@register("mixer", source="Tolstikhin et al. 2021, arXiv 2105.01601, equation 1")
class MixerTokenMixing(nn.Module):
    """Mix all tokens by one MLP that every channel shares: MLP-Mixer's. x (B, C, H, W) -> same, H and W fixed.

    Args:
        width: C.
        grid: (H, W); for other sizes see `ResizeTokenMixing`.
        expansion: hidden numbers of the MLP for each token.
        dropout: after each linear layer of the MLP, in training; 0..1 (1 excluded).
        drop_path: share of images that skip the MLP, in training; 0..1 (1 excluded).
        residual: x + MLP(norm(x)); False = without x, for a trunk that adds x itself.
    Raises:
        ShapeError: sizes below 1, rates out of range; at the call, another size.
    Source: equation 1; expansion 2 as in RaftMLP's comparison (the Mixer paper fixes 384 hidden numbers).
    Example:
        >>> MixerTokenMixing(8, (4, 5))(torch.randn(2, 8, 4, 5)).shape
        torch.Size([2, 8, 4, 5])
    """

    layout: ClassVar[str] = "grid"

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        expansion: int = 2,
        dropout: float = 0.0,
        *,
        drop_path: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(width=width, rows=grid[0], columns=grid[1], expansion=expansion)
        self.width, self.grid, self.residual = width, (int(grid[0]), int(grid[1])), residual
        self.both = TokenBranch(width, "both", grid[0] * grid[1], expansion, dropout, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of (B, C, H, W)."""
        _check_map("MixerTokenMixing", x, self.width, self.grid)
        tokens = in_rafts(x, 1)
        mixed = self.both(tokens)
        return out_of_rafts(tokens + mixed if self.residual else mixed)

    @staticmethod
    def instead_of_attention(offered: Mapping[str, Any]) -> dict[str, Any]:
        """Say what `Replace("attention", ...)` builds: the block around an attention adds x itself."""
        return {"residual": False}

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.width}, grid={self.grid}, residual={self.residual}"


class TokenBranch(nn.Module):
    """MLP(norm(x)) along one axis of a map, or over all of it: (B, H, W, R, C / R) -> same, to be added to x."""

    def __init__(self, width: int, axis: Axis, features: int, expansion: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ShapeError(f"drop_path must be at least 0 and below 1, got {drop_path}")
        self.axis, self.drop_path = axis, drop_path
        self.norm = nn.LayerNorm(width)
        self.mlp = TokenMLP(features, expansion * features, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of each position, mix the positions."""
        normed = self.norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])
        mixed = from_columns(self.mlp(to_columns(normed, self.axis)), self.axis, x.shape)
        if not self.training or not self.drop_path:
            return mixed
        return mixed * F.dropout(mixed.new_ones(mixed.shape[0], 1, 1, 1, 1), self.drop_path)


class TokenMLP(nn.Module):
    """Two linear layers with a GELU between them, over the first dimension: (features, ...) -> same.

    The first dimension, because the tokens come to stand there by moving whole runs of channels: one product of
    matrices a layer, and no transposition number by number.
    """

    def __init__(self, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ShapeError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.up, self.down, self.dropout = ColumnLinear(features, hidden), ColumnLinear(hidden, features), dropout

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every column of (features, n)."""
        hidden = F.dropout(F.gelu(self.up(x)), self.dropout, self.training)
        return F.dropout(self.down(hidden), self.dropout, self.training)


class ColumnLinear(nn.Module):
    """`nn.Linear` (weight, bias and how they start) for columns: (in_features, n) -> (out_features, n)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from +-1 / sqrt(in_features), as torch does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return weight @ x + bias."""
        return torch.addmm(self.bias[:, None], self.weight, x)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


def in_rafts(x: Tensor, rafts: int) -> Tensor:
    """Turn a map (B, C, H, W) into (B, H, W, R, C / R), the channels of a position side by side."""
    return x.movedim(1, -1).contiguous().unflatten(-1, (rafts, x.shape[1] // rafts))


def out_of_rafts(x: Tensor) -> Tensor:
    """Turn (B, H, W, R, C / R) back into (B, C, H, W)."""
    return x.flatten(-2).movedim(-1, 1)


def to_columns(x: Tensor, axis: Axis) -> Tensor:
    """Turn (B, H, W, R, C / R) into a matrix with a column for every input of an MLP.

    vertical: (R * H, B * W * C / R); horizontal: (R * W, B * H * C / R); both: (R * H * W, B * C / R). Raft before
    place: row `raft * H + h` holds cell h of that raft.
    """
    together, apart = ORDERS[axis]
    return x.permute(*together, *apart).flatten(len(together)).flatten(0, -2)


def from_columns(columns: Tensor, axis: Axis, shape: torch.Size) -> Tensor:
    """Undo `to_columns`: a view (B, H, W, R, C / R) of the matrix."""
    order = [i for dims in ORDERS[axis] for i in dims]
    return columns.view([shape[i] for i in order]).permute([order.index(i) for i in range(len(order))])


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ShapeError(f"{name} must be at least 1, got {size}")


def _check_map(name: str, x: Tensor, width: int, grid: tuple[int, int]) -> None:
    if x.dim() != 4 or x.shape[1] != width or not x.is_floating_point():
        raise ShapeError(f"{name} takes floating-point maps (B, {width}, H, W), got {x.dtype} {tuple(x.shape)}")
    if tuple(x.shape[2:]) != grid:
        raise ShapeError(
            f"{name} was built for a grid of {grid}, got {tuple(x.shape[2:])}: wrap it in ResizeTokenMixing for "
            "other sizes"
        )
