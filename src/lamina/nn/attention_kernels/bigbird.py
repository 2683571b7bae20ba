"""Attention to neighbouring, global and random blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.attention_kernels._blocks import (
    attend_in_blocks,
    check_sequence,
    count,
    into_blocks,
    keys_seen,
    mask_blocks,
)


class BigBirdKernel(nn.Module):
    """Blocks see their neighbours, the first blocks and a few random ones; O(T * (3 + globals + random) * block).

    q, k, v (B, H, T, D), mask of keys (B or 1, 1, 1, T) -> (B, H, T, D). The first blocks see everything. The random
    blocks are drawn once a layer among those of the longest sequence; those beyond a shorter one are left out.

    Args:
        context: the longest sequence.
        block: tokens a block.
        random_blocks: random blocks that each block sees, beside its neighbours and the global ones.
        global_blocks: how many blocks at the front are global.
        seed: of the draw; None = drawn too, so that every layer has blocks of its own.
    Raises:
        ShapeError: a number out of range, no context; at the call, a mask of pairs, a longer sequence.
    Source: Zaheer et al., Big Bird (2020), arXiv 2007.14062, section 2 and appendix D (blocks), ITC form. Deviation:
        the global blocks are the first ones, where the official code takes the first and the last.
    """

    random: Tensor

    def __init__(
        self,
        context: int | None = None,
        *,
        block: int = 16,
        random_blocks: int = 3,
        global_blocks: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        count("bigbird", block=block)
        if context is None or context < 1:
            raise ShapeError(f"the kernel 'bigbird' draws its random blocks for a context of at least 1, got {context}")
        if random_blocks < 0 or global_blocks < 0:
            raise ShapeError(f"numbers of blocks must not be negative: {random_blocks=}, {global_blocks=}")
        self.block, self.global_blocks = block, global_blocks
        chosen = draw_blocks(-(-context // block), random_blocks, global_blocks, seed)
        self.register_buffer("random", chosen.to(torch.get_default_device()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend block to blocks."""
        check_sequence("bigbird", q, k)
        tokens, size = q.shape[2], self.block
        seen = keys_seen("bigbird", mask, tokens)
        front = min(self.global_blocks * size, tokens)
        everywhere = F.scaled_dot_product_attention(q[:, :, :front], k, v, attn_mask=mask) if front else q[:, :, :0]
        if front == tokens:
            return everywhere
        table, there = self.blocks_seen(-(-tokens // size))
        real = mask_blocks(seen, tokens, size, q.device)  # (B or 1, n, size)
        visible = (real[:, table] & there[..., None]).flatten(2)[:, :, None]  # (B or 1, n, 1, K * size)
        # A block of padding that sees no real token sees all: a row without a key has no softmax.
        visible = visible | ~visible.any(-1, keepdim=True)
        keys, values = (into_blocks(t, size)[:, :, table].flatten(3, 4) for t in (k, v))
        out = attend_in_blocks(into_blocks(q, size), keys, values, visible)
        return torch.cat((everywhere, out[:, :, front:tokens]), dim=2)

    def blocks_seen(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Return which blocks each of the first `blocks` sees, (n, K), and which of these entries count.

        Raises:
            ShapeError: more blocks than the context has.
        """
        if blocks > len(self.random):
            raise ShapeError(f"the kernel 'bigbird' was drawn for {len(self.random)} blocks, the sequence has {blocks}")
        device = self.random.device
        own = torch.arange(blocks, device=device)[:, None]
        front = torch.arange(min(self.global_blocks, blocks), device=device).expand(blocks, -1)
        near = own + torch.arange(-1, 2, device=device)
        random = self.random[:blocks]
        there = torch.cat(
            (
                torch.ones_like(front, dtype=torch.bool),
                (near >= front.shape[1]) & (near < blocks),
                (random >= 0) & (random < blocks),
            ),
            dim=1,
        )
        return torch.cat((front, near, random), dim=1).clamp(0, blocks - 1), there


def draw_blocks(blocks: int, count: int, global_blocks: int, seed: int | None) -> Tensor:
    """Draw different blocks for each block, none of them global or a neighbour; (blocks, count), -1 = no more left."""
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    generator = torch.Generator().manual_seed(seed)
    table = torch.full((blocks, count), -1, device="cpu")
    for i in range(blocks):
        far = [j for j in range(global_blocks, blocks) if abs(i - j) > 1]
        order = torch.randperm(len(far), generator=generator, device="cpu")[:count]
        table[i, : len(order)] = torch.tensor(far, dtype=torch.long, device="cpu")[order]
    return table
