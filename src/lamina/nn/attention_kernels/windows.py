"""Attention to what is near: a window, a window with global tokens, a window with a stride. Exact in what they see."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.nn.attention_kernels._blocks import (
    attend_in_blocks,
    check_sequence,
    count,
    into_blocks,
    keys_seen,
    mask_blocks,
    with_neighbours,
)


class LocalKernel(nn.Module):
    """Softmax attention to the tokens at most `window` away; O(T * window) time and memory.

    q, k, v (B, H, T, D), mask of keys (B or 1, 1, 1, T) -> (B, H, T, D). A token always sees itself.

    Args:
        window: how far a token sees to either side (causal: back only).
        causal: see earlier tokens only.
    Raises:
        ShapeError: a window below 1; at the call, a mask of pairs, or more keys than queries.
    Source: Luong et al. (2015), arXiv 1508.04025; as the local baseline of Tay et al., Long Range Arena (2020), arXiv
        2011.04006. Deviation: a sliding window, where the latter cuts the sequence into blocks that do not overlap.
    """

    def __init__(self, window: int = 64, *, causal: bool = False) -> None:
        super().__init__()
        count("local", window=window)
        self.window, self.causal = window, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within the window."""
        check_sequence("local", q, k)
        return in_window(q, k, v, self.window, keys_seen("local", mask, k.shape[2]), causal=self.causal)


class LongformerKernel(nn.Module):
    """A window, and a few tokens at the front that see all and are seen by all; O(T * (window + globals)).

    q, k, v (B, H, T, D), mask of keys (B or 1, 1, 1, T) -> (B, H, T, D).

    Args:
        window: how far the other tokens see to either side.
        global_tokens: how many tokens at the front are global (a class token).
    Raises:
        ShapeError: a number below 1; at the call, a mask of pairs, or more keys than queries.
    Source: Beltagy, Peters, Cohan, Longformer (2020), arXiv 2004.05150, section 3.1. Deviation: the global tokens use
        the same projections as the others, because a kernel has none.
    """

    def __init__(self, window: int = 64, global_tokens: int = 1) -> None:
        super().__init__()
        count("longformer", window=window, global_tokens=global_tokens)
        self.window, self.global_tokens = window, global_tokens

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within the window and to the global tokens, and from these to all."""
        check_sequence("longformer", q, k)
        seen = keys_seen("longformer", mask, k.shape[2])
        front = min(self.global_tokens, q.shape[2])
        everywhere = F.scaled_dot_product_attention(q[:, :, :front], k, v, attn_mask=mask)
        if front == q.shape[2]:
            return everywhere
        return torch.cat((everywhere, in_window(q, k, v, self.window, seen, front=front)[:, :, front:]), dim=2)


class StridedSparseKernel(nn.Module):
    """A window of `stride` tokens, and every stride-th token of the rest; O(T * (stride + T / stride)), so O(T^1.5).

    q, k, v (B, H, T, D), mask of keys (B or 1, 1, 1, T) -> (B, H, T, D). Token i sees j where |i - j| <= stride or
    i - j is a multiple of stride (causal: of those the earlier ones).

    Args:
        stride: the window's reach and the step beyond it; None = the square root of context (8 without one).
        context: the longest sequence, for the stride.
        causal: see earlier tokens only.
    Raises:
        ShapeError: a stride below 1; at the call, a mask of pairs, or more keys than queries.
    Source: Child et al., Generating Long Sequences with Sparse Transformers (2019), arXiv 1904.10509, section 4.3,
        strided attention, both patterns in one head (their third way to combine them).
    """

    def __init__(self, stride: int | None = None, *, context: int | None = None, causal: bool = False) -> None:
        super().__init__()
        self.stride = math.isqrt(context or 64) if stride is None else stride
        count("strided_sparse", stride=self.stride)
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend to the window and the column of each token, under one softmax."""
        check_sequence("strided_sparse", q, k)
        tokens, size, after = q.shape[2], self.stride, not self.causal
        seen = mask_blocks(keys_seen("strided_sparse", mask, tokens), tokens, size, q.device)
        q, k, v = (into_blocks(t, size) for t in (q / math.sqrt(q.shape[-1]), k, v))  # (B, H, n, l, D)
        near_k, near_v = (with_neighbours(t, 2, after) for t in (k, v))
        near = band(size, size, after, q.device) & with_neighbours(seen, 1, after)[:, :, None] | itself(
            size, q.device, after
        )
        window = torch.einsum("bhnid,bhnjd->bhnij", q, near_k).masked_fill(~near[:, None], -math.inf)
        column = torch.einsum("bhnid,bhmid->bhnim", q, k).masked_fill(~self._far(seen)[:, None], -math.inf)
        weights = torch.cat((window, column), dim=-1).softmax(dim=-1).to(v.dtype)
        close, apart = weights.split((near_k.shape[3], k.shape[2]), dim=-1)
        out = torch.einsum("bhnij,bhnjd->bhnid", close, near_v) + torch.einsum("bhnim,bhmid->bhnid", apart, v)
        return out.flatten(2, 3)[:, :, :tokens]

    def _far(self, seen: Tensor) -> Tensor:
        """Say which block's token of the same place is seen beyond the window; (B or 1, n, size, n)."""
        block = torch.arange(seen.shape[1], device=seen.device)
        back = block[:, None] - block
        apart = back > 1 if self.causal else back.abs() > 1
        return apart[None, :, None] & seen.transpose(1, 2)[:, None]


def in_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, seen: Tensor | None, *, causal: bool = False, front: int = 0
) -> Tensor:
    """Attend to the keys at most `window` away, and to the first `front` keys; (B, H, T, D) -> same.

    Args:
        seen: (B or 1, T), the real keys; None = all.
    """
    tokens = q.shape[2]
    size, after = min(window, tokens), not causal
    real = mask_blocks(seen, tokens, size, q.device)
    if front:
        # They are seen by all, once: not in the window too.
        far = torch.arange(real.shape[1] * size, device=q.device).view(1, -1, size) >= front
    keys, values = (with_neighbours(into_blocks(t, size), 2, after) for t in (k, v))
    near = with_neighbours(real & far if front else real, 1, after)[:, :, None]
    mask = band(size, window, after, q.device) & near | itself(size, q.device, after)
    if front:
        keys, values = (
            torch.cat((t, g[:, :, None, :front].expand(-1, -1, t.shape[2], -1, -1)), dim=3)
            for t, g in ((keys, k), (values, v))
        )
        always = real.flatten(1)[:, None, None, :front].expand(-1, *mask.shape[1:3], -1)
        mask = torch.cat((mask.expand(len(always), -1, -1, -1), always), dim=-1)
    return attend_in_blocks(into_blocks(q, size), keys, values, mask)[:, :, :tokens]


def band(size: int, window: int, after: bool, device: torch.device) -> Tensor:
    """Say which keys of a block and its neighbours are at most `window` away; (size, 2 or 3 * size)."""
    ahead = _ahead(size, device, after)
    return (ahead >= -window) & (ahead <= (window if after else 0))


def itself(size: int, device: torch.device, after: bool) -> Tensor:
    """Say which key is the query itself, which it always sees: a row without a key has no softmax."""
    return _ahead(size, device, after) == 0


def _ahead(size: int, device: torch.device, after: bool) -> Tensor:
    key = torch.arange(-size, size + size * after, device=device)
    return key - torch.arange(size, device=device)[:, None]
