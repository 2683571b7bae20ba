"""What an autoregressive FIT keeps between two tokens: keys and values of a group, and of the latents of all.

Source: the causality of Chen, Li, FIT (2023), arXiv 2305.12689, section 4.2; the official code does not sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lamina.models.fit.interleaved import FITBlock, InterleavedLayers
from lamina.nn.attention import KeyValueCache


@dataclass
class GroupCache:
    """State of a batch of sequences being generated.

    A group at hand keeps its local layers' keys and values, and its tokens where latents will read them. When it is
    full, its latents run through all blocks once, over the keys and values of the earlier groups' latents.
    """

    length: int = 0
    """Tokens seen."""
    groups: int = 0
    """Groups finished."""
    local: KeyValueCache = field(default_factory=KeyValueCache)
    latent: KeyValueCache = field(default_factory=KeyValueCache)
    read: dict[int, Tensor] = field(default_factory=dict)
    """Block -> the last finished group's latents (B, m, D), which the group at hand reads; zeros before the first."""
    tokens: dict[int, list[Tensor]] = field(default_factory=dict)
    """Block -> the group's tokens behind its local layers, a part for each call."""

    @property
    def in_group(self) -> int:
        """Tokens of the group at hand."""
        return self.local.length

    def advance(self, trunk: InterleavedLayers, x: Tensor, size: int) -> Tensor:
        """Run tokens (B, L, C) of one group through the trunk; close the group when it has its size."""
        blocks: list[FITBlock] = list(trunk.blocks)  # type: ignore[arg-type]
        for i, block in enumerate(blocks):
            for layer in block.local:
                x = layer(x, cache=self.local)
            if block.write is not None:
                self.tokens.setdefault(i, []).append(x)
                if i not in self.read:
                    self.read[i] = torch.zeros_like(trunk.start(len(x), 1)[:, 0])
                x = block.write(x, self.read[i])
        # A trunk without local attention left fills no slot, and counts all the same.
        self.local.advance(x.shape[1])
        self.length += x.shape[1]
        if self.in_group == size:
            self._close(trunk, blocks)
        return x

    def _close(self, trunk: InterleavedLayers, blocks: list[FITBlock]) -> None:
        """Have the latents of the finished group read it, in every block that writes to tokens."""
        z = trunk.start(len(next(iter(self.tokens.values()))[0]), 1, self.groups)[:, 0]
        for i, block in enumerate(blocks):
            if block.read is None:
                continue
            z = block.read(z, torch.cat(self.tokens[i], dim=1))
            for layer in block.latent:
                z = layer(z, cache=self.latent)
            self.read[i] = z
        self.latent.advance(z.shape[1])
        self.groups += 1
        self.local, self.tokens = KeyValueCache(), {}
