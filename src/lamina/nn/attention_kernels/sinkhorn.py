"""Attention of blocks to themselves and to the block that a learned sorting puts beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import ShapeError
from lamina.nn.attention_kernels._blocks import (
    at_least_float32,
    check_sequence,
    count,
    into_blocks,
    keys_seen,
    mask_blocks,
)


class SinkhornKernel(nn.Module):
    """A block sees itself and one sorted block; O(T * block + (T / block)^2).

    q, k, v (B, H, T, D), mask of keys (B or 1, 1, 1, T) -> (B, H, T, D). The blocks' sums of keys are scored against
    positions by learned vectors, and Sinkhorn's normalisation makes of the scores a doubly stochastic matrix: a soft
    permutation, by which keys and values are sorted. A masked token weighs nothing in what it is sorted into.

    Args:
        context: the longest sequence.
        heads, head_width: sizes of what is attended.
        block: tokens a block.
        iterations: of Sinkhorn's normalisation.
        temperature: of the scores; towards 0 the permutation becomes hard.
    Raises:
        ShapeError: no context, a number out of range; at the call, a mask of pairs, a longer sequence.
    Source: Tay et al., Sparse Sinkhorn Attention (2020), arXiv 2002.11296, sections 3.1-3.3. Deviations: the sorting
        reads keys, not the layer's input (a kernel has none), is one matrix a head, and draws no Gumbel noise.
    """

    def __init__(
        self,
        context: int | None = None,
        *,
        heads: int,
        head_width: int,
        block: int = 16,
        iterations: int = 8,
        temperature: float = 0.75,
    ) -> None:
        super().__init__()
        count("sinkhorn", heads=heads, head_width=head_width, block=block, iterations=iterations)
        if context is None or context < 1:
            raise ShapeError(f"the kernel 'sinkhorn' sorts the blocks of a context of at least 1, got {context}")
        if not temperature > 0:
            raise ShapeError(f"the kernel 'sinkhorn' needs a temperature above 0, got {temperature}")
        self.block, self.iterations, self.temperature = block, iterations, temperature
        self.places = Parameter(torch.empty(heads, head_width, -(-context // block)))
        nn.init.normal_(self.places, std=head_width**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sort keys and values, and attend."""
        check_sequence("sinkhorn", q, k)
        tokens, size = q.shape[2], self.block
        real = mask_blocks(keys_seen("sinkhorn", mask, tokens), tokens, size, q.device)  # (B or 1, n, size)
        if real.shape[1] > self.places.shape[2]:
            raise ShapeError(
                f"the kernel 'sinkhorn' sorts {self.places.shape[2]} blocks, the sequence has {real.shape[1]}"
            )
        q, k, v = (into_blocks(t, size) for t in (q, k, v))
        k, v = (t * real[:, None, :, :, None] for t in (k, v))
        order = self.sorting(k, real.any(-1))
        sorted_k, sorted_v = (torch.einsum("bhnm,bhmsd->bhnsd", order.to(t.dtype), t) for t in (k, v))
        # How much of a sorted key is real: its weight under the softmax.
        share = torch.einsum("bhnm,bms->bhns", order, real.to(order.dtype).expand(len(order), -1, -1))
        own = torch.where(real, 0.0, -math.inf)[:, None, :, None]
        eye = torch.eye(size, dtype=torch.bool, device=q.device)
        own = own.masked_fill(eye, 0.0).expand(len(order), order.shape[1], -1, -1, -1)
        beside = share.clamp(min=1e-30).log()[:, :, :, None].expand(-1, -1, -1, size, -1)
        scores = torch.einsum("bhnid,bhnjd->bhnij", q / math.sqrt(q.shape[-1]), torch.cat((k, sorted_k), dim=3))
        weights = (scores + torch.cat((own, beside), dim=-1)).softmax(-1).to(v.dtype)
        return (weights @ torch.cat((v, sorted_v), dim=3)).flatten(2, 3)[:, :, :tokens]

    def sorting(self, k: Tensor, real: Tensor) -> Tensor:
        """Return the soft permutation (B, H, n, n) of blocks of keys k (B, H, n, size, D), in float32 or better.

        Args:
            real: (B or 1, n), blocks with a real token; the others stay where they are.
        """
        blocks = k.shape[2]
        sums = at_least_float32(k).sum(3)
        scores = torch.einsum("bhmd,hdn->bhnm", sums, self.places[..., :blocks].to(sums.dtype)) / self.temperature
        pairs = real[:, :, None] & real[:, None]
        eye = torch.eye(blocks, dtype=torch.bool, device=k.device)
        # Far below any score, yet finite: gradients of -inf are no numbers.
        scores = scores.masked_fill(~(pairs | eye)[:, None], -1e9).masked_fill((eye & ~pairs)[:, None], 0.0)
        for _ in range(self.iterations):
            scores = scores - scores.logsumexp(-1, keepdim=True)
            scores = scores - scores.logsumexp(-2, keepdim=True)
        return scores.exp()
