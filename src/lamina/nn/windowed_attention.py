"""Attention in windows of a sequence, which may be shifted from layer to layer; and the merging of neighbours.

Source: Horton et al., Bytes Are All You Need (2023), arXiv 2306.00238, section 3.1; windows of images: Liu et al., Swin
Transformer (2021), arXiv 2103.14030.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._inputs import check_features
from lamina.nn.attention import Attention
from lamina.recipe import Node
from lamina.registry import Slot, register

SOURCE = "Horton et al. 2023, arXiv 2306.00238, section 3.1"


@register("mixer", source=SOURCE)
class WindowedAttention(nn.Module):
    """Multi-head attention inside windows: a token sees the tokens of its window, O(T * window) time and memory.

    x (B, T, width) -> same, any T. Windows begin at token 0, or `shift` tokens later: with both kinds in turn, what is
    known spreads over the borders. Where a window does not begin at 0, the tokens before it are a window of their own.

    Args:
        heads, kv_heads, head_width, bias, output_bias, rotary, linear: as of `Attention`.
        window: tokens of a window.
        shift: where the second window begins, 0..window - 1; 0 = windows from the first token.
        wrap: the window round the end sees the sequence's first tokens with its last, as the official code has it (a
            sequence that windows do not divide: beyond padding, which is not seen). The shift may then be anything.
    Raises:
        ShapeError: sizes below 1 or that do not divide, a shift that is not less than the window; at the call, x or the
            mask does not fit.
    Source: section 3.1 (shifted window attention). Deviation: the wrapped window is cut in two by padding at the front
        instead of a mask of pairs; what each token sees is the same.
    Example:
        >>> WindowedAttention(16, heads=2, window=8, shift=4)(torch.randn(2, 21, 16)).shape
        torch.Size([2, 21, 16])
    """

    takes_over: ClassVar[str] = "attention"
    """Which part gets the weights of an attention that this one replaces."""

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        *,
        window: int = 128,
        shift: int = 0,
        wrap: bool = False,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        output_bias: bool | None = None,
        rotary: bool = False,
        linear: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        self.attention = Attention(
            width, heads, kv_heads=kv_heads, head_width=head_width, bias=bias, output_bias=output_bias, rotary=rotary,
            kernel=WindowKernel(window, shift, wrap=wrap), linear=linear,
        )  # fmt: skip
        self.rotary = rotary

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attend; attention_mask (B, T) bool or 0/1, True = a real token."""
        return self.attention(x, attention_mask)


class WindowKernel(nn.Module):
    """Softmax attention inside windows, as a kernel of `Attention`: see `WindowedAttention`.

    q, k, v (B, H, T, D), mask of keys (B or 1, 1, 1, T) or None -> (B, H, T, D).

    Args:
        window, shift, wrap: as of `WindowedAttention`.
    Raises:
        ShapeError: sizes as there; at the call, a mask of pairs.
    """

    def __init__(self, window: int = 128, shift: int = 0, *, wrap: bool = False) -> None:
        super().__init__()
        if window < 1 or shift < 0:
            raise ShapeError(f"window must be at least 1 and shift at least 0, got {window} and {shift}")
        if shift >= window and not wrap:
            raise ShapeError(
                f"a shift of {shift} must be less than the window of {window}: windows would only be renumbered"
            )
        self.window, self.shift, self.wrap = window, shift, wrap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside the windows."""
        if mask is not None and mask.shape[1:3] != (1, 1):
            raise ShapeError(f"windows take a mask of keys (B, 1, 1, {k.shape[2]}), got {tuple(mask.shape)}")
        seen = None if mask is None else mask[:, 0, 0].to(torch.bool)
        return attend_in_windows(q, k, v, self.window, self.shift, seen, wrap=self.wrap)

    def extra_repr(self) -> str:
        """Show the windows."""
        return f"window={self.window}, shift={self.shift}, wrap={self.wrap}"


def attend_in_windows(
    q: Tensor, k: Tensor, v: Tensor, window: int, shift: int = 0, seen: Tensor | None = None, *, wrap: bool = False
) -> Tensor:
    """Softmax attention of each token to its window: (B, H, T, D) -> same; a window of padding alone sees it all.

    Args:
        window, shift, wrap: as of `WindowedAttention`.
        seen: (B or 1, T) bool, the real keys; None = all.
    """
    rows, length = len(q), q.shape[2]
    if not wrap and length <= (shift or window):
        window, shift = length, 0
    # The tokens before the shift are the end of a window that begins with padding.
    front = window - shift if shift and not wrap else 0
    count, roll = -(-(front + length) // window), shift if wrap else 0
    if seen is None and (front or count * window > length):
        seen = torch.ones(1, length, dtype=torch.bool, device=q.device)
    keys = None
    if seen is not None:
        keys = _cut(seen[..., None], front, count, window, roll)[:, None, None, :, 0]  # (windows, 1, 1, window)
        keys = keys | ~keys.any(-1, keepdim=True)
        keys = keys if len(seen) == rows else keys.repeat(rows, 1, 1, 1)
    q, k, v = (_cut(t.transpose(1, 2), front, count, window, roll).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2)
    out = out.unflatten(0, (rows, count)).flatten(1, 2)  # (B, front + T + back, H, D)
    out = out.roll(roll, 1) if roll else out
    out = out[:, front : front + length]
    if torch.compiler.is_compiling():
        # In memory of its own, or a graph would hold for lengths alone that windows divide (or do not).
        out = torch.empty_like(out, memory_format=torch.contiguous_format).copy_(out)
    return out.transpose(1, 2)


def _cut(x: Tensor, front: int, count: int, window: int, roll: int) -> Tensor:
    """Pad (B, T, ...), move `roll` tokens from its front to its end, and cut it: (B * count, window, ...)."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (front, count * window - front - x.shape[1]))
    x = x.roll(-roll, 1) if roll else x
    return x.unflatten(1, (count, window)).flatten(0, 1)


class TokenMerging1d(nn.Module):
    """Make one token of every two neighbours: x (B, T, width), mask (B, T) or None -> (B, ceil(T / 2), width) and mask.

    Masked tokens count as zeros, and so does what is lacking to an even number; a pair with a real token is real. One
    linear layer of both, without a bias, then a norm.

    Args:
        norm: the norm after the layer; None = layer norm.
    Raises:
        ShapeError: (at the call) x or the mask does not fit.
    Source: section 3.1 (token merging); Liu et al., Swin Transformer (2021), section 3.1, in one dimension. Deviation:
        the layer reads one token after the other, where the official weights read both numbers of a channel together.
    Example:
        >>> x, mask = TokenMerging1d(8)(torch.randn(2, 5, 8))
        >>> x.shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.width = width
        self.reduction: nn.Module = nn.Linear(2 * width, width, bias=False)
        self.norm: nn.Module = nn.LayerNorm(width) if norm is None else norm

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Merge."""
        check_features("TokenMerging1d", x, self.width)
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise ShapeError(f"the mask must be {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
            x = x.masked_fill(~mask[..., None], 0.0)
            mask = merged_mask(mask)
        return self.norm(self.reduction(_pairs(x).flatten(2))), mask


def merged_mask(mask: Tensor) -> Tensor:
    """Say which pairs of neighbours have a real token: (B, T) bool -> (B, ceil(T / 2))."""
    return _pairs(mask[..., None]).flatten(2).any(-1)


def _pairs(x: Tensor) -> Tensor:
    """Put neighbours together, with zeros to an even number: (B, T, C) -> (B, ceil(T / 2), 2, C)."""
    count = (x.shape[1] + 1) // 2
    return F.pad(x, (0, 0, 0, 2 * count - x.shape[1])).unflatten(1, (count, 2))
