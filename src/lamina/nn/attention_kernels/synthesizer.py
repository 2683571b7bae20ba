"""Attention whose weights do not compare queries with keys."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import ShapeError
from lamina.nn.attention_kernels._blocks import check_sequence, count


class SynthesizerKernel(nn.Module):
    """Softmax weights that a small network makes of the query alone, or that are learned as they are; O(T^2).

    q, v (B, H, T, D), any mask that fits (B, 1, T, T) -> (B, H, T, D). Keys are not read: `reads` says what is, and
    `attention` makes no other projection.

    Args:
        context: the longest sequence; a shorter one uses the first columns.
        heads, head_width: sizes of what is attended.
        logits: "dense" (of the query: W2 relu(W1 q + b1) + b2, one network a head) or "random" (a learned table).
        causal: see earlier tokens only.
    Raises:
        ShapeError: no context, a number below 1; at the call, a longer sequence, or another number of values.
    Source: Tay et al., Synthesizer (2020), arXiv 2005.00743, sections 3.2 (dense) and 3.3 (random). Deviation: the
        dense network reads the query projection, not the layer's input.
    """

    def __init__(
        self,
        context: int | None = None,
        *,
        heads: int,
        head_width: int,
        logits: Literal["dense", "random"] = "dense",
        causal: bool = False,
    ) -> None:
        super().__init__()
        count("synthesizer", heads=heads, head_width=head_width)
        if context is None or context < 1:
            raise ShapeError(f"the kernel 'synthesizer' has weights for a context of at least 1, got {context}")
        if logits not in ("dense", "random"):
            raise ShapeError(f"logits must be 'dense' or 'random', got {logits!r}")
        self.context, self.causal = context, causal
        self.reads: Collection[str] = ("query", "value") if logits == "dense" else ("value",)
        if logits == "dense":
            self.first = Parameter(torch.empty(heads, head_width, head_width))
            self.first_bias = Parameter(torch.zeros(heads, 1, head_width))
            self.second = Parameter(torch.empty(heads, head_width, context))
            self.second_bias = Parameter(torch.zeros(heads, 1, context))
            for weight in (self.first, self.second):
                nn.init.normal_(weight, std=head_width**-0.5)
        else:
            self.table = Parameter(torch.empty(heads, context, context))
            nn.init.normal_(self.table)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weigh the values."""
        check_sequence("synthesizer", q, v)
        tokens = v.shape[2]
        if tokens > self.context:
            raise ShapeError(f"the kernel 'synthesizer' has weights for {self.context} tokens, got {tokens}")
        if "query" in self.reads:
            scores = torch.relu(q @ self.first + self.first_bias) @ self.second[..., :tokens]
            scores = scores + self.second_bias[..., :tokens]
        else:
            scores = self.table[:, :tokens, :tokens][None]
        if self.causal:
            row = torch.arange(tokens, device=v.device)
            earlier = (row <= row[:, None])[None, None]
            mask = earlier if mask is None else (earlier & mask.bool()) | (row == row[:, None])
        if mask is not None:
            mask = mask.bool()
            # A row of padding alone sees all of it: a row without a key has no softmax.
            scores = scores.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), -math.inf)
        return scores.softmax(-1).to(v.dtype) @ v
