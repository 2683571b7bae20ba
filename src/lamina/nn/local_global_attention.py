"""Attention inside groups of tokens and, through a few latents of each group, between all of them: FIT as one mixer."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.attention import Attention
from lamina.nn.cross_attention import CrossAttention
from lamina.recipe import Node
from lamina.registry import Slot, register

TABLE_STD = 0.02
"""Of the latents' table."""


@register("mixer", source="Chen & Li 2023, arXiv 2305.12689, section 3")
class LocalGlobalAttention(nn.Module):
    """Attention inside groups of tokens, and a way round through latents to all other groups.

    In place of attention where sequences are long: T n + (T m / n)^2 pairs of tokens in place of T^2. x (B, T, width)
    -> same, any T; the last group may be short. Each group has m latents, which read it, see the latents of the other
    groups, and are read by its tokens; what is read is added to the local attention's output. Causal: tokens see
    earlier ones of their group, and read the latents of the group before, which have read all groups up to theirs.

    The way round starts at zero: a new layer is local attention, and in place of a softmax attention whose weights it
    takes over, with the same rotary options, it changes nothing for sequences of one group.

    Args:
        heads, kv_heads, head_width, bias, output_bias, rotary, rotary_base, rotary_fraction, dropout, linear: of the
            local attention, as of `Attention`. The way round has the same heads, all biases, and rotary positions by
            the group's number.
        group: n, tokens of a group. latents: m, of each group.
        causal: a token sees earlier ones only.
        context: the longest sequence allowed; None = any.
    Raises:
        ShapeError: sizes below 1 or that do not divide; at the call, x or the mask does not fit.
    Source: section 3, one block of one local and one global layer without MLPs. Deviation: all groups start from the
        same m latents and are told apart by rotary positions, so that there is no longest sequence.
    Example:
        >>> LocalGlobalAttention(16, heads=2, group=4, latents=2)(torch.randn(2, 11, 16)).shape
        torch.Size([2, 11, 16])
    """

    takes_over: ClassVar[str] = "local"
    """Which part gets the weights of an attention that this one replaces."""

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        *,
        group: int = 64,
        latents: int = 8,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        causal: bool = False,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        rotary_fraction: float = 1.0,
        context: int | None = None,
        dropout: float = 0.0,
        linear: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        if min(group, latents) < 1:
            raise ShapeError(f"LocalGlobalAttention: group and latents must be at least 1, got {group} and {latents}")
        self.local = Attention(
            width, heads, kv_heads=kv_heads, head_width=head_width, bias=bias, output_bias=output_bias, causal=causal,
            rotary=rotary, rotary_base=rotary_base, rotary_fraction=rotary_fraction, dropout=dropout, linear=linear,
        )  # fmt: skip
        self.group, self.latents, self.context, self.causal, self.rotary = group, latents, context, causal, rotary
        heads, head_width = self.local.heads, self.local.head_width
        # Groups are told apart by their numbers, which turn pairs of channels.
        turns = {"rotary": head_width % 2 == 0, "causal_block": latents if causal else None}
        self.table = nn.Parameter(torch.empty(latents, width))
        self.read_norm, self.read = nn.LayerNorm(width), CrossAttention(width, width, heads, head_width)
        self.among_norm = nn.LayerNorm(width)
        self.among = Attention(width, heads, head_width=head_width, bias=True, **turns)  # type: ignore[arg-type]
        self.write_norm, self.write = nn.LayerNorm(width), CrossAttention(width, width, heads, head_width)
        nn.init.trunc_normal_(self.table, std=TABLE_STD)
        nn.init.zeros_(self.write.out.weight)
        nn.init.zeros_(self.write.out.bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attend; attention_mask (B, T) bool or 0/1, True = a real token."""
        if x.dim() != 3 or not x.shape[1]:
            raise ShapeError(f"LocalGlobalAttention takes (batch, tokens, {self.local.width}), got {tuple(x.shape)}")
        length = x.shape[1]
        if self.context is not None and length > self.context:
            raise ShapeError(f"the sequence has {length} tokens, the context is {self.context}")
        if attention_mask is not None and attention_mask.shape != (len(x), length):
            raise ShapeError(f"attention_mask must be {(len(x), length)}, got {tuple(attention_mask.shape)}")
        size = min(self.group, length)
        groups, lacking, mask = math.ceil(length / size), -length % size, attention_mask
        if lacking and mask is None and not self.causal:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        # Behind all tokens: where these see earlier ones only, no mask is needed.
        x = F.pad(x, (0, 0, 0, lacking))
        mask = None if mask is None else F.pad(mask.to(torch.bool), (0, lacking))
        tokens = x.unflatten(1, (groups, size)).flatten(0, 1)  # (B t, n, C)
        seen = None if mask is None else mask.unflatten(1, (groups, size))  # (B, t, n)
        mixed = self.local(tokens, None if seen is None else seen.flatten(0, 1))
        mixed = mixed + self._from_others(tokens, groups, seen)
        return mixed.unflatten(0, (-1, groups)).flatten(1, 2)[:, :length]

    def extra_repr(self) -> str:
        """Show what the projections do not."""
        return f"group={self.group}, latents={self.latents}, causal={self.causal}"

    def _from_others(self, tokens: Tensor, groups: int, seen: Tensor | None) -> Tensor:
        """Return what the tokens (B t, n, C) read of other groups, through latents."""
        inside = None if seen is None else seen.flatten(0, 1)
        z = self.table.to(tokens.dtype).expand(len(tokens), -1, -1)
        z = z + self.read(self.read_norm(z), tokens, inside)  # (B t, m, C)
        z = z.unflatten(0, (-1, groups)).flatten(1, 2)  # (B, t m, C)
        real = None if seen is None else seen.any(-1).repeat_interleave(self.latents, dim=1)
        number = torch.arange(groups, device=z.device).repeat_interleave(self.latents)
        z = z + self.among(self.among_norm(z), real, number)
        z = self.write_norm(z).unflatten(1, (groups, self.latents))
        if self.causal:
            z = F.pad(z[:, :-1], (0, 0, 0, 0, 1, 0))
        return self.write(tokens, z.flatten(0, 1))
