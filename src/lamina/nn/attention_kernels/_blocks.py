"""Sequences in blocks, and the masks that kernels take; shapes: B batch, H heads, T tokens, D head width, n blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import ShapeError


def check_sequence(kernel: str, q: Tensor, k: Tensor) -> None:
    """Refuse another number of keys than queries: such a kernel knows which tokens are near by their positions.

    Raises:
        ShapeError: says so.
    """
    if q.shape[2] != k.shape[2]:
        raise ShapeError(
            f"the kernel {kernel!r} takes whole sequences, as many keys as queries (no key-value cache), got "
            f"{q.shape[2]} queries and {k.shape[2]} keys"
        )


def keys_seen(kernel: str, mask: Tensor | None, keys: int) -> Tensor | None:
    """Read the mask (B or 1, 1, 1, S) that kernels below T x S take; returns (B or 1, S), True = a real token.

    Raises:
        ShapeError: a mask of pairs, which such a kernel never looks at one by one.
    """
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1:] != (1, 1, keys):
        raise ShapeError(
            f"the kernel {kernel!r} takes a mask of keys, (batch, 1, 1, {keys}), got {tuple(mask.shape)}: "
            "it has no table of all pairs"
        )
    return mask[:, 0, 0].to(torch.bool)


def count(kernel: str, **numbers: int) -> None:
    """Refuse numbers below 1.

    Raises:
        ShapeError: names the first.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ShapeError(f"the kernel {kernel!r} needs {name} of at least 1, got {number}")


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def into_blocks(x: Tensor, size: int) -> Tensor:
    """Cut (B, H, T, D) into (B, H, n, size, D), the last block filled up with zeros."""
    blocks = -(-x.shape[2] // size)
    return F.pad(x, (0, 0, 0, blocks * size - x.shape[2])).unflatten(2, (blocks, size))


def mask_blocks(seen: Tensor | None, tokens: int, size: int, device: torch.device) -> Tensor:
    """Cut (B or 1, T) into (B or 1, n, size), False where there is no token; None = all tokens are real."""
    if seen is None:
        seen = torch.ones(1, tokens, dtype=torch.bool, device=device)
    blocks = -(-tokens // size)
    return F.pad(seen, (0, blocks * size - tokens)).unflatten(1, (blocks, size))


def with_neighbours(x: Tensor, dim: int, after: bool) -> Tensor:
    """Put each block's predecessor (and with `after` its successor) beside it, along the dimension after `dim`.

    (..., n, size, ...) -> (..., n, 2 or 3 * size, ...), n at `dim`; zeros (False) beyond the ends.
    """
    blocks = x.shape[dim]
    padding = [0, 0] * (x.dim() - dim - 1) + [1, int(after)]
    padded = F.pad(x, padding)
    return torch.cat([padded.narrow(dim, i, blocks) for i in range(2 + after)], dim=dim + 1)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Run fused attention in every block alone; q (B, H, n, b, D), k and v (B, H, n, s, D) -> (B, H, n * b, D).

    Args:
        seen: (B or 1, n, b or 1, s), every row with a True.
    """
    B, n = q.shape[0], q.shape[2]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    mask = seen.expand(B, *seen.shape[1:]).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B * n, H, b, D)
    return out.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)
