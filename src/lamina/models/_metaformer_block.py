"""The MetaFormer block and the small layers in and around it.

Source: Yu et al., MetaFormer Is Actually What You Need for Vision (2022), arXiv 2111.11418.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.nn.layout import SequenceAsGrid, layout_of
from lamina.nn.torch_layers import draw
from lamina.recipe import Node, factory

NORM = "channel_layer_norm"
"""The paper's modified layer norm: statistics over channels and positions of one image."""


class DropPath(nn.Module):
    """Leave a residual branch out for whole rows of the batch, in training; the rest is scaled up to the same mean.

    Args:
        rate: share of rows, 0..1 (1 excluded).
    Source: Huang et al., Deep Networks with Stochastic Depth (2016), arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise RecipeError(f"drop_path must be at least 0 and below 1, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Zero whole rows of (B, ...)."""
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(x.shape[:1], device=x.device) >= self.rate
        return x * (kept.to(x.dtype) / (1.0 - self.rate)).view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate}"


class LayerScale(nn.Module):
    """Multiply each channel of (B, C, H, W) by a learned factor that starts small."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, C, H, W)."""
        return x * self.scale[:, None, None]


class ChannelFeedForward(nn.Module):
    """Two 1x1 convolutions with a GELU between: the same network at every position. (B, C, H, W) -> same.

    Both are built as conv(in, out, 1).
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, conv: Node = "conv2d") -> None:
        super().__init__()
        make = factory("layer", conv)
        self.up = make(width, hidden, 1)
        self.activation = nn.GELU()
        self.down = make(hidden, width, 1)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.up, self.down):
            if type(layer) is nn.Conv2d:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            else:
                draw(layer, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Apply at every position."""
        return self.dropout(self.down(self.dropout(self.activation(self.up(x)))))


class PositionEmbedding(nn.Module):
    """Add a learned map, zero at the start, to (B, C, H, W) of one size."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, width, *grid))

    def forward(self, x: Tensor) -> Tensor:
        """Add to (B, C, H, W)."""
        if x.shape[1:] != self.embedding.shape[1:]:
            raise ShapeError(
                f"the position embedding is for {tuple(self.embedding.shape[2:])} cells, the image has "
                f"{tuple(x.shape[2:])}; call resize_positions(image) for another size"
            )
        return x + self.embedding

    def resize(self, grid: tuple[int, int]) -> None:
        """Interpolate the map bicubically to another size (a new Parameter)."""
        resized = F.interpolate(self.embedding.detach(), grid, mode="bicubic", align_corners=False)
        self.embedding = nn.Parameter(resized)


class MetaFormerBlock(nn.Module):
    """x + s1 * mixer(norm1 x), then x + s2 * feed_forward(norm2 x); (B, C, H, W) -> same.

    Args:
        mixer: a grid mixer already built; a sequence mixer runs on the cells row by row.
        mlp_ratio: hidden channels of the feed-forward per channel.
        norm: built as norm(width).
        layer_scale: where the learned factors s start; None = no factors.
        drop_path: share of rows that skip each branch, in training.
        conv: the two 1x1 convolutions of the feed-forward, built as conv(in, out, 1).
        mlp: False leaves the second branch out; residual: False leaves out both additions (ablations).
    Source: equations 2 and 3.
    """

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        norm: Node = NORM,
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        mlp: bool = True,
        residual: bool = True,
        conv: Node = "conv2d",
    ) -> None:
        super().__init__()
        make_norm = factory("norm", norm)
        self.residual = residual
        self.norm1: nn.Module = make_norm(width)
        self.mixer = mixer if layout_of(mixer) == "grid" else SequenceAsGrid(mixer)
        self.scale1 = _scale(width, layer_scale)
        self.norm2: nn.Module | None = make_norm(width) if mlp else None
        self.feed_forward = ChannelFeedForward(width, int(mlp_ratio * width), dropout, conv) if mlp else None
        self.scale2 = _scale(width, layer_scale) if mlp else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Run both branches."""
        mixed = self.scale1(self.mixer(self.norm1(x)))
        x = x + self.drop_path(mixed) if self.residual else mixed
        if self.feed_forward is None or self.norm2 is None or self.scale2 is None:
            return x
        fed = self.scale2(self.feed_forward(self.norm2(x)))
        return x + self.drop_path(fed) if self.residual else fed


def _scale(width: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(width, start)
