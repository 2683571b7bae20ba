"""What a FIT is made of: its layer string, local and global layers, the reads between them, how weights start.

Source: Chen, Li, FIT: Far-reaching Interleaved Transformers (2023), arXiv 2305.12689, and google-research/pix2seq.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models._metaformer_block import DropPath
from lamina.models.transformer import TransformerBlock, normed, sinusoids
from lamina.nn.attention import Attention, visible
from lamina.nn.cross_attention import CrossAttention
from lamina.nn.feed_forward import FeedForward

SOURCE = "Chen & Li 2023, arXiv 2305.12689"
EPS = 1e-6
"""Of every norm."""
TABLE_STD = 0.02
"""Of the tables: positions, latents, token embeddings; normal, cut off at two deviations."""
FURTHEST = 1000.0
"""Coordinate of the last position in the sine tables; the first is 0."""

Positions = Literal["learned", "sincos", "sincos2d"]


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """Read a layer string into (local, global) counts a block: "(2)4(2)" -> [(2, 4), (2, 0)].

    Raises:
        RecipeError: not of that form, no global layers in a block before the last, or no layers at all.
    """
    text = f"{layers}0" if layers.endswith(")") else layers
    if not re.fullmatch(r"(\(\d+\)\d+)+", text):
        raise RecipeError(f"layers is written (local)global(local)global..., such as '(2)4(2)', got {layers!r}")
    counts = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)\)(\d+)", text)]
    if any(b == 0 for _, b in counts[:-1]):
        raise RecipeError(f"layers={layers!r} has no global layers between two runs of local ones: join these")
    if not sum(a + b for a, b in counts):
        raise RecipeError(f"layers={layers!r} has no layers")
    return counts


class FITLayer(TransformerBlock):
    """Pre-norm transformer layer with drop-path; (N, T, width) -> same. Exact GELU, biases everywhere.

    Args:
        causal_block: tokens see their block of this size and earlier ones: 1 = causal; None = all tokens.
        dropout: after the GELU. drop_path: of both branches.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: int, dropout: float, drop_path: float, causal_block: int | None = None
    ) -> None:
        block = {"causal": True} if causal_block == 1 else {"causal_block": causal_block}
        mixer = Attention(width, heads, bias=True, **block)
        super().__init__(norm_of(width), mixer, norm_of(width), feed_forward(width, mlp_ratio, dropout))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Run both branches; `context` is offered to the mixer."""
        given = {k: v for k, v in context.items() if v is not None and self.takes(k)}
        mask = context.get("attention_mask")
        x = x + self.drop_path(self.mixer(normed(self.norm1, x, mask), **given))
        return x + self.drop_path(self.feed_forward(normed(self.norm2, x, mask)))


class ResidualMLP(nn.Module):
    """x + MLP(norm(x)), the second half of a layer alone; (..., width) -> same."""

    def __init__(self, width: int, mlp_ratio: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm, self.feed_forward = norm_of(width), feed_forward(width, mlp_ratio, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Apply it to every position; the mask (...), True = a real token, is for a norm that counts tokens."""
        return x + self.drop_path(self.feed_forward(normed(self.norm, x, attention_mask)))


class OwnLayer(nn.Module):
    """A layer of the user's: called as layer(x), or layer(x, mask) where tokens must not see all others.

    The mask (T, T) is added to the scores: 0 = may look, -inf = may not, as torch's own layers and
    `scaled_dot_product_attention` take it.
    """

    def __init__(self, layer: nn.Module, causal_block: int | None) -> None:
        super().__init__()
        self.layer, self.causal_block = layer, causal_block

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the layer.

        Raises:
            LaminaError: some tokens are padding, which the layer cannot be told.
        """
        if attention_mask is not None:
            raise LaminaError("a token_layer or latent_layer of your own is not told of padding: give whole groups")
        if self.causal_block is None:
            return self.layer(x)
        mask = visible(x.shape[1], x.shape[1], self.causal_block, device=x.device)
        added = x.new_zeros(x.shape[1], x.shape[1])
        return self.layer(x, added if mask is None else added.masked_fill(~mask[0, 0], -torch.inf))


class CrossRead(nn.Module):
    """x + attention(norm(x), context_norm(context)), and where asked for x + MLP(norm(x)) after it.

    x (N, T, width), context (N, S, context_width) -> as x. Head width: of the narrower side, in as many heads as the
    side with fewer.
    """

    def __init__(
        self, width: int, context_width: int, heads: int, *, context_norm: bool = True, mlp: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm = norm_of(width)
        self.context_norm: nn.Module = norm_of(context_width) if context_norm else nn.Identity()
        self.attention = CrossAttention(width, context_width, heads)
        self.mlp = mlp

    def forward(
        self, x: Tensor, context: Tensor, context_mask: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Read; context_mask (N, S) and mask (N, T) of x, True = a real token."""
        read = normed(self.context_norm, context, context_mask)
        x = x + self.attention(normed(self.norm, x, mask), read, context_mask)
        return x if self.mlp is None else self.mlp(x, mask)


class TokenStem(nn.Module):
    """norm(linear(x)) + position, and side tokens in front of each group: (B, t, n, in_features) -> (B, t, k + n, C).

    Args:
        tokens: n; all groups share the table of positions.
        side_features: of the side tokens; 0 = there are none.
    """

    def __init__(self, in_features: int, width: int, tokens: int, positions: Positions, side_features: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(in_features, width), norm_of(width)
        self.positions = PositionTable(tokens, width, positions)
        self.side_features = side_features
        self.side = nn.Linear(side_features, width) if side_features else None
        self.side_norm = norm_of(width) if side_features else None

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Embed; y (B, t, k, side_features); mask (B, t, k + n), the side tokens' first, True = a real token.

        Raises:
            ShapeError: side tokens of another shape, or where there are none to be.
        """
        seen = None if mask is None else mask[:, :, -x.shape[2] :]
        tokens = self.positions(normed(self.norm, self.project(x), seen))
        if self.side is None or self.side_norm is None or y is None:
            if y is not None or self.side is not None:
                raise ShapeError(f"side tokens y: side_features is {self.side_features}, got {_shape(y)}")
            return tokens
        if y.dim() != 4 or y.shape[:2] != x.shape[:2] or y.shape[-1] != self.side_features:
            wanted = (*x.shape[:2], "k", self.side_features)
            raise ShapeError(f"side tokens y must be {wanted} floating-point numbers, got {_shape(y)}")
        seen = None if mask is None else mask[:, :, : y.shape[2]]
        return torch.cat((normed(self.side_norm, self.side(y), seen), tokens), dim=2)


class PositionTable(nn.Module):
    """Add a row of a table to each token of (..., n, width); learned, or sines that stay as they are."""

    def __init__(self, tokens: int, width: int, kind: Positions) -> None:
        super().__init__()
        if kind not in ("learned", "sincos", "sincos2d"):
            raise RecipeError(f"positions must be 'learned', 'sincos' or 'sincos2d', got {kind!r}")
        if kind == "learned":
            self.table: Tensor = nn.Parameter(torch.empty(tokens, width))
        else:
            self.register_buffer("table", sine_table(tokens, width, grid=kind == "sincos2d"))

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Add the rows from `first` on."""
        return x + self.table[first : first + x.shape[-2]]


def sine_table(tokens: int, width: int, *, grid: bool = False) -> Tensor:
    """Positions as sines and cosines, (tokens, width): the first half sines, the second cosines.

    Args:
        grid: the tokens are a square, row by row: the first half of the channels tells the row, the second the column.
    Raises:
        ShapeError: width does not divide by 2 (grid: 4), or the tokens are no square.
    """
    if width % 2:
        raise ShapeError(f"sines and cosines need an even width, got {width}")
    if not grid:
        return sinusoids(torch.linspace(0.0, FURTHEST, tokens), width)
    side = math.isqrt(tokens)
    if side * side != tokens or width % 4:
        raise ShapeError(f"positions on a square need n a square and a width of 4 k, got {tokens} and {width}")
    line = sinusoids(torch.linspace(0.0, FURTHEST, side), width // 2)
    return torch.cat((line.repeat_interleave(side, 0), line.repeat(side, 1)), dim=1)


def norm_of(width: int) -> nn.LayerNorm:
    """Make a layer norm as all of them are."""
    return nn.LayerNorm(width, eps=EPS)


def feed_forward(width: int, mlp_ratio: int, dropout: float) -> FeedForward:
    """Make the MLP of a layer: dropout after the GELU alone."""
    if not 0.0 <= dropout < 1.0:
        raise RecipeError(f"dropout must be at least 0 and below 1, got {dropout}")

    def activation() -> nn.Module:
        return nn.Sequential(nn.GELU(), nn.Dropout(dropout)) if dropout else nn.GELU()

    return FeedForward(width, mlp_ratio * width, activation=activation)


def initialise(module: nn.Module) -> None:
    """Draw all weights as the official code does; what is the user's own keeps how it started.

    Dense layers Glorot-uniform, biases zero, tables normal. Of attention Keras takes the fans from the kernel's three
    dimensions, (in, heads, width) and (heads, width, out), so that it starts several times smaller.
    """
    if isinstance(module, OwnLayer):
        return
    if isinstance(module, (Attention, CrossAttention)):
        h, k = module.heads, module.head_width
        for layer in (module.query, module.key, module.value):
            _uniform(layer, layer.in_features * (h + k))
        _uniform(module.out, h * (k + module.out.out_features))
        return
    if type(module) is nn.Linear:
        _uniform(module, module.in_features + module.out_features)
    elif isinstance(module, nn.Embedding):
        draw_table(module.weight)
    elif isinstance(module, PositionTable) and isinstance(module.table, nn.Parameter):
        draw_table(module.table)
    for child in module.children():
        initialise(child)


def draw_table(table: Tensor) -> None:
    """Draw a table of vectors."""
    nn.init.trunc_normal_(table, std=TABLE_STD, a=-2 * TABLE_STD, b=2 * TABLE_STD)


def _uniform(layer: nn.Linear, fans: int) -> None:
    limit = math.sqrt(6.0 / fans)
    nn.init.uniform_(layer.weight, -limit, limit)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _shape(y: Tensor | None) -> Any:
    return None if y is None else tuple(y.shape)
