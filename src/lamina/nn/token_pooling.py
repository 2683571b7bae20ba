"""From tokens to one vector: pool, cut to the first dimensions, bring to length one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError, nearest
from lamina.nn._kept_float32 import wide
from lamina.nn._precision import without_autocast

Pooling = Literal["mean", "cls", "last"] | Callable[[Tensor, Tensor | None], Tensor]
"""How tokens become one vector: a name, or a function of x (B, T, C) and the mask (B, T) or None."""

POOLINGS = ("mean", "cls", "last")


class TokenPooling(nn.Module):
    """Pool tokens, cut the vector to its first `width` numbers, and bring it to length one: x (B, T, C) -> (B, width).

    In this order: a cut vector of length one is no longer of length one. In float32 at least, under autocast too. A row
    whose mask is all 0 (an empty text) gives zeros.

    Args:
        width: how many of the C numbers stay; None = all.
        pool: the mean of the real tokens, the first token, the last real one, or a function of x and the mask.
        normalize: to length one (eps 1e-12).
    Raises:
        LaminaError: an unknown pooling, or a width below 1.
        ShapeError: at the call, x that is no (B, T, C), a mask that does not fit, or a width above C.
    Example:
        >>> TokenPooling(8)(torch.randn(2, 5, 32), torch.ones(2, 5)).shape
        torch.Size([2, 8])
    """

    def __init__(self, width: int | None = None, pool: Pooling = "mean", *, normalize: bool = True) -> None:
        super().__init__()
        check_pooling(pool)
        if width is not None and width < 1:
            raise LaminaError(f"width is how many numbers of an embedding stay, at least 1, got {width}")
        self.width, self.pool, self.normalize = width, pool, normalize

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors.

        Args:
            attention_mask: (B, T) bool or 0/1; True = a real token. Where x has tokens in front that the mask does not
                speak of (a class token), these are real.
        """
        return cut_embedding(pool_tokens(x, attention_mask, self.pool), self.width, normalize=self.normalize)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"width={self.width}, pool={self.pool!r}, normalize={self.normalize}"


def pool_tokens(x: Tensor, mask: Tensor | None = None, pool: Pooling = "mean") -> Tensor:
    """Make one vector of the tokens of each row, in float32 at least: (B, T, C) -> (B, C); see `TokenPooling`."""
    if x.dim() != 3:
        raise ShapeError(f"pooling takes tokens (batch, tokens, channels), got {tuple(x.shape)}")
    mask = None if mask is None else _fitting(mask, x)
    exact = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(pool, str):
        return wide(pool(x, mask))
    if pool == "cls":
        first = wide(x[:, 0])
        return first if mask is None else first * mask.any(1, keepdim=True)
    if mask is None:
        return wide(x[:, -1]) if pool == "last" else x.mean(1, dtype=exact)
    if pool == "last":
        place = torch.arange(x.shape[1], device=x.device)
        index = (mask * place).amax(1)
        return wide(x[torch.arange(len(x), device=x.device), index]) * mask.any(1, keepdim=True)
    # A product and a sum rather than one of matrices, which autocast would round.
    summed = (x * mask[..., None].to(x.dtype)).sum(1, dtype=exact)
    return summed / mask.sum(1, keepdim=True).clamp(min=1)


def cut_embedding(pooled: Tensor, width: int | None = None, *, normalize: bool = True) -> Tensor:
    """Keep the first `width` numbers of pooled vectors (..., C), then bring them to length one."""
    if width is not None and not 1 <= width <= pooled.shape[-1]:
        raise ShapeError(f"an embedding of {pooled.shape[-1]} numbers cannot be cut to {width}")
    with without_autocast(pooled.device):
        cut = wide(pooled[..., :width])
        return F.normalize(cut, dim=-1, eps=1e-12) if normalize else cut


def check_pooling(pool: object) -> None:
    """Refuse what is no pooling.

    Raises:
        LaminaError: names the nearest.
    """
    if not callable(pool) and pool not in POOLINGS:
        raise LaminaError(f"pool must be one of {', '.join(POOLINGS)}, or a function, got {pool!r}{nearest(str(pool), POOLINGS)}")  # fmt: skip  # noqa: E501


def _fitting(mask: Tensor, x: Tensor) -> Tensor:
    missing = x.shape[1] - mask.shape[-1]
    if mask.dim() != 2 or len(mask) != len(x) or missing < 0:
        raise ShapeError(f"tokens {tuple(x.shape)} need a mask (batch, tokens), got {tuple(mask.shape)}")
    return F.pad(mask.bool(), (missing, 0), value=True) if missing else mask.bool()
