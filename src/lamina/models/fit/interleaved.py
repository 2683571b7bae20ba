"""The trunk of every FIT: blocks of local layers, a read of the tokens, global layers, and a read back.

Source: Chen, Li, FIT: Far-reaching Interleaved Transformers (2023), arXiv 2305.12689, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from lamina.errors import ShapeError
from lamina.models.fit.grouping import shift_latents
from lamina.models.fit.layers import CrossRead, FITLayer, OwnLayer, ResidualMLP, draw_table, parse_layers
from lamina.recipe import Node, factory


@dataclass(frozen=True, kw_only=True)
class FITShape:
    """Sizes and options of a trunk, as the models' arguments of the same names."""

    layers: str
    tokens_per_group: int
    groups: int
    latents_per_group: int
    token_width: int
    latent_width: int
    token_heads: int
    latent_heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    drop_path: float = 0.0
    token_layer: Node | None = None
    latent_layer: Node | None = None
    causal_tokens: bool = False
    causal_latents: bool = False
    condition: bool = False
    """The latents read a condition before their global layers."""
    cross_mlp: bool = False
    """An MLP stands behind every cross-attention."""
    context_norm: bool = True
    local_attention: bool = True
    checkpoint: bool = False

    def __post_init__(self) -> None:
        names = "tokens_per_group groups latents_per_group token_width latent_width token_heads latent_heads mlp_ratio"
        for name in names.split():
            if getattr(self, name) < 1:
                raise ShapeError(f"FIT: {name} must be at least 1, got {getattr(self, name)}")
        for side in ("token", "latent"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if width % heads:
                raise ShapeError(f"FIT: {side}_width {width} does not divide by {heads} {side}_heads")
        narrow = min(self.token_width, self.latent_width)
        if narrow % self.cross_heads:
            raise ShapeError(
                f"FIT: the cross-attentions' {self.cross_heads} heads (the fewer of token_heads and latent_heads) do "
                f"not divide the narrower width {narrow}"
            )

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Local and global layers of each block."""
        return parse_layers(self.layers)

    @property
    def cross_heads(self) -> int:
        """Heads of the cross-attentions between tokens and latents."""
        return min(self.token_heads, self.latent_heads)

    @property
    def ends_global(self) -> bool:
        """Whether the last block ends with global layers: the latents are then the features."""
        return self.counts[-1][1] > 0


class FITBlock(nn.Module):
    """Local layers; then, where there are global ones, tokens -> latents -> global layers -> tokens.

    tokens (B, t, k + n, C), latents (B, t, m, D) -> both.

    Args:
        last: nothing is written back to the tokens.
    """

    def __init__(self, shape: FITShape, local: int, latent: int, *, last: bool) -> None:
        super().__init__()
        token, wide, heads = shape.token_width, shape.latent_width, shape.cross_heads
        self.shifted = shape.causal_tokens
        self.local = nn.ModuleList(local_layers(shape, local))
        self.read = cross_read(shape, wide, token, heads) if latent else None
        self.condition = cross_read(shape, wide, wide, shape.latent_heads) if latent and shape.condition else None
        self.latent = nn.ModuleList(latent_layers(shape, latent))
        self.write = cross_read(shape, token, wide, heads) if latent and not last else None

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        token_mask: Tensor | None = None,
        latent_mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            token_mask: (B * t, k + n), True = a real token. latent_mask: (B, t * m), True = of a group that has some.
            condition: (B, s, D).
        """
        groups = tokens.shape[1]
        of_groups = None if latent_mask is None else latent_mask.reshape(-1, latents.shape[2])  # (B t, m)
        x = tokens.flatten(0, 1)  # (B t, k + n, C)
        for layer in self.local:
            x = layer(x, attention_mask=token_mask)
        if self.read is not None:
            z = self.read(latents.flatten(0, 1), x, token_mask, of_groups)
            z = z.unflatten(0, (-1, groups)).flatten(1, 2)  # (B, t m, D)
            if self.condition is not None and condition is not None:
                z = self.condition(z, condition, None, latent_mask)
            for layer in self.latent:
                z = layer(z, attention_mask=latent_mask)
            latents = z.unflatten(1, (groups, -1))
        if self.write is not None:
            seen = shift_latents(latents) if self.shifted else latents
            # Causal tokens, whose groups read those before, come without a mask.
            x = self.write(x, seen.flatten(0, 1), of_groups, token_mask)
        return x.unflatten(0, (-1, groups)), latents


class InterleavedLayers(nn.Module):
    """All blocks, and the table that the latents start from; tokens (B, t, k + n, C) -> tokens, latents (B, t, m, D).

    t may be smaller than the table's number of groups: the first ones are taken.

    Raises:
        ShapeError: sizes do not fit. RecipeError: the layer string does not.
    """

    def __init__(self, shape: FITShape) -> None:
        super().__init__()
        self.checkpoint, self.latents_per_group = shape.checkpoint, shape.latents_per_group
        self.table = nn.Parameter(torch.empty(shape.groups * shape.latents_per_group, shape.latent_width))
        draw_table(self.table)
        counts = shape.counts
        blocks = (FITBlock(shape, a, b, last=i == len(counts) - 1) for i, (a, b) in enumerate(counts))
        self.blocks = nn.ModuleList(blocks)

    def start(self, batch: int, groups: int, first: int = 0) -> Tensor:
        """Return the latents of some groups before anything was read: (B, groups, m, D)."""
        m = self.latents_per_group
        rows = self.table[first * m : (first + groups) * m]
        return rows.unflatten(0, (groups, m)).expand(batch, -1, -1, -1)

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor | None = None,
        token_mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all blocks.

        Args:
            latents: where they start; None = `start`.
            token_mask: (B, t, k + n), True = a real token; the latents of a group without any are read by no other.
        """
        latents = self.start(*tokens.shape[:2]) if latents is None else latents
        latent_mask = None
        if token_mask is not None:
            latent_mask = token_mask.any(-1).repeat_interleave(self.latents_per_group, dim=1)
            token_mask = token_mask.flatten(0, 1)
        for block in self.blocks:
            run: Callable[..., tuple[Tensor, Tensor]] = block
            if self.checkpoint and torch.is_grad_enabled():
                tokens, latents = recompute(
                    run, tokens, latents, token_mask, latent_mask, condition, use_reentrant=False
                )
            else:
                tokens, latents = run(tokens, latents, token_mask, latent_mask, condition)
        return tokens, latents


def local_layers(shape: FITShape, count: int) -> Iterable[nn.Module]:
    """Build the layers inside groups."""
    block = 1 if shape.causal_tokens else None
    if shape.token_layer is not None:
        return _own_layers(shape.token_layer, shape.token_width, count, block)
    rates = (shape.mlp_ratio, shape.dropout, shape.drop_path)
    if not shape.local_attention:
        return (ResidualMLP(shape.token_width, *rates) for _ in range(count))
    return (FITLayer(shape.token_width, shape.token_heads, *rates, block) for _ in range(count))


def latent_layers(shape: FITShape, count: int) -> Iterable[nn.Module]:
    """Build the layers over the latents of all groups."""
    block = shape.latents_per_group if shape.causal_latents else None
    if shape.latent_layer is not None:
        return _own_layers(shape.latent_layer, shape.latent_width, count, block)
    rates = (shape.mlp_ratio, shape.dropout, shape.drop_path)
    return (FITLayer(shape.latent_width, shape.latent_heads, *rates, block) for _ in range(count))


def cross_read(shape: FITShape, width: int, context_width: int, heads: int) -> CrossRead:
    """Build a read of one stream by another."""
    mlp = ResidualMLP(width, shape.mlp_ratio, 0.0, 0.0) if shape.cross_mlp else None
    return CrossRead(width, context_width, heads, context_norm=shape.context_norm, mlp=mlp)


def _own_layers(node: Node, width: int, count: int, causal_block: int | None) -> Iterable[OwnLayer]:
    make = factory("layer", node)
    return (OwnLayer(make(width), causal_block) for _ in range(count))
