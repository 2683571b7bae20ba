"""Attention to a few learned mixtures of all keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import ShapeError
from lamina.nn.attention_kernels._blocks import count, keys_seen


class LinformerKernel(nn.Module):
    """Softmax attention to `rank` learned mixtures of the keys and of the values; O(T * rank).

    q (B, H, T, D), k, v (B, H, S, D), mask of keys (B or 1, 1, 1, S) -> (B, H, T, D). The mixtures belong to
    positions: a shorter sequence uses the first columns. Masked keys and values count as zeros in them.

    Args:
        context: the longest sequence.
        rank: number of mixtures; None = 128, or the context where that is shorter. The same in all heads.
    Raises:
        ShapeError: no context, a rank above it; at the call, a mask of pairs, a longer sequence.
    Source: Wang et al., Linformer (2020), arXiv 2006.04768, equation 7, projections shared by heads, not by layers.
    """

    def __init__(self, context: int | None = None, *, rank: int | None = None) -> None:
        super().__init__()
        if context is None or context < 1:
            raise ShapeError(f"the kernel 'linformer' has weights for a context of at least 1, got {context}")
        rank = min(128, context) if rank is None else rank
        count("linformer", rank=rank)
        if rank > context:
            raise ShapeError(f"the kernel 'linformer' mixes {context} keys into fewer: the rank {rank} is more")
        self.keys = Parameter(torch.empty(rank, context))
        self.values = Parameter(torch.empty(rank, context))
        for weight in (self.keys, self.values):
            nn.init.normal_(weight, std=context**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend to the mixtures."""
        tokens = k.shape[2]
        if tokens > self.keys.shape[1]:
            raise ShapeError(f"the kernel 'linformer' has weights for {self.keys.shape[1]} tokens, got {tokens}")
        seen = keys_seen("linformer", mask, tokens)
        if seen is not None:
            k, v = (t * seen[:, None, :, None] for t in (k, v))
        return F.scaled_dot_product_attention(q, self.keys[:, :tokens] @ k, self.values[:, :tokens] @ v)
