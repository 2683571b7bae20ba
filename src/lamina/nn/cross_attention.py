"""Attention of one sequence to another, of another width."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._inputs import check_features
from lamina.nn.attention import Kernel, visible
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("layer", source="Vaswani et al. 2017, section 3.2.3")
class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to another one: the first asks, the second has keys and values.

    For decoders that read an encoder, latents that read tokens, an image that reads a text. x (B, T, query_width),
    context (B, S, key_width) -> (B, T, query_width). No norms and no residual: they belong to the block around it.

    Args:
        query_width: channels of x and of the answer. key_width: of the context; None = query_width.
        heads: None = one per 64 channels of the narrower width, at least one.
        head_width: channels of one head; None = the narrower width // heads.
        bias: give the four projections a bias.
        kernel: maps (q, k, v, mask) to the heads' outputs, see `lamina.nn.attention.Kernel`; None = softmax, fused.
        linear: the four projections, built as linear(in, out, bias=).
    Raises:
        ShapeError: sizes below 1, heads that do not divide the width; at the call, inputs or a mask that do not fit.
    Source: Vaswani et al., Attention Is All You Need (2017), arXiv 1706.03762, section 3.2.3; heads of the narrower
        width: Chen, Li, FIT (2023), arXiv 2305.12689, section 3.1.
    Example:
        >>> import torch
        >>> CrossAttention(16, 24, heads=4)(torch.randn(2, 5, 16), torch.randn(2, 7, 24)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        query_width: int,
        key_width: int | None = None,
        heads: int | None = None,
        head_width: int | None = None,
        *,
        bias: bool = True,
        kernel: Kernel | None = None,
        linear: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        key_width = query_width if key_width is None else key_width
        narrow = min(query_width, key_width)
        heads = max(narrow // 64, 1) if heads is None else heads
        if min(narrow, heads) < 1 or (head_width is not None and head_width < 1):
            raise ShapeError(f"sizes must be positive: {query_width=}, {key_width=}, {heads=}, {head_width=}")
        if head_width is None and narrow % heads:
            raise ShapeError(f"width {narrow} does not divide by {heads} heads; change one, or give head_width")
        self.query_width, self.key_width, self.heads = query_width, key_width, heads
        self.head_width = head_width or narrow // heads
        self.kernel = kernel
        make, inner = factory("layer", linear), heads * self.head_width
        self.query, self.out = make(query_width, inner, bias=bias), make(inner, query_width, bias=bias)
        self.key, self.value = make(key_width, inner, bias=bias), make(key_width, inner, bias=bias)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Read the context; context_mask (B, S) bool or 0/1, True = a real token. A row without any reads nothing."""
        check_features("CrossAttention", x, self.query_width)
        check_features("CrossAttention (its context)", context, self.key_width)
        if x.dim() != 3 or context.dim() != 3 or len(x) != len(context):
            raise ShapeError(
                "CrossAttention takes x (B, T, query_width) and context (B, S, key_width) of one batch, got "
                f"{tuple(x.shape)} and {tuple(context.shape)}"
            )
        if context_mask is not None and context_mask.shape != context.shape[:2]:
            raise ShapeError(f"context_mask must be {tuple(context.shape[:2])}, got {tuple(context_mask.shape)}")
        q, k, v = self._split(self.query(x)), self._split(self.key(context)), self._split(self.value(context))
        mask = visible(q.shape[2], k.shape[2], None, context_mask)
        attend = F.scaled_dot_product_attention if self.kernel is None else self.kernel
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """Show what the projections do not."""
        return f"heads={self.heads}, head_width={self.head_width}"

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)  # (B, H, T, D)
