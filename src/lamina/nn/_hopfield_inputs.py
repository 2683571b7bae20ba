"""What `Hopfield` is called with: three sets of patterns of one or several tensors, and masks of every kind joined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import ShapeError
from lamina.nn.attention import visible


def three_patterns(x: Tensor | tuple[Tensor, ...], sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return stored, state and projection patterns of what the layer was called with, checked against their widths."""
    given = (x, x, x) if isinstance(x, Tensor) else (*x, x[0]) if len(x) == 2 else tuple(x)
    if len(given) != 3:
        raise ShapeError(f"Hopfield takes one tensor, (stored, state) or (stored, state, projection), got {len(x)}")
    for name, t, size in zip(("stored", "state", "projection"), given, sizes, strict=True):
        if t.dim() != 3 or t.shape[-1] != size or not t.shape[1] or not t.is_floating_point():
            got = f"{tuple(t.shape)} of {t.dtype}"
            raise ShapeError(f"Hopfield takes {name} patterns (batch, at least 1, {size}) of floats, got {got}")
    stored, state, projection = given
    if stored.shape[1] != projection.shape[1]:
        raise ShapeError(
            f"{stored.shape[1]} patterns are stored, but {projection.shape[1]} projected: one each is needed"
        )
    # By shape, not by len(): a batch of any size must stay one graph for torch.export.
    batches = [t.shape[0] for t in given]
    whole = next((b for b in batches if b != 1), 1)
    if any(b != 1 and b != whole for b in batches):
        raise ShapeError(f"stored, state and projection patterns differ in batch: {batches}")
    return stored, state, projection


def keys_seen(attention_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """Bring both ways of marking padding to one: (B, N) bool, True = a real pattern."""
    if attention_mask is not None and key_padding_mask is not None:
        raise ValueError("give attention_mask (True = real) or key_padding_mask (True = ignore), not both")
    if attention_mask is not None:
        return attention_mask.to(torch.bool)
    if key_padding_mask is None:
        return None
    # torch's encoder hands its layers the float form: 0 and -inf.
    return ~key_padding_mask if key_padding_mask.dtype is torch.bool else key_padding_mask >= 0


def association_of(
    sizes: tuple[int, int, int, int],
    seen: Tensor | None,
    extra: int,
    causal: bool,
    association_mask: Tensor | None,
    like: Tensor,
) -> Tensor | None:
    """Join all masks to torch's, (B or 1, heads or 1, S or 1, N + extra); None = everything is seen.

    Args:
        sizes: B, heads, S, N.
        seen: (B, N), True = a real pattern.
        extra: rows appended to the patterns, which every state sees.
        association_mask: (S, N) or (B * heads, S, N); bool True = forbidden, or a float that is added.
        like: a tensor of the dtype and on the device of the scores.
    Raises:
        ShapeError: a mask of another shape.
    """
    batch, heads, states, patterns = sizes
    if seen is not None and seen.shape != (batch, patterns):
        raise ShapeError(f"a mask of padding must be {(batch, patterns)}, got {tuple(seen.shape)}")
    mask = visible(states, patterns, causal, seen, device=like.device)
    if association_mask is not None:
        wanted = (states, patterns), (batch * heads, states, patterns)
        if association_mask.shape not in wanted:
            raise ShapeError(
                f"association_mask must be {wanted[0]} or {wanted[1]}, got {tuple(association_mask.shape)}"
            )
        given = association_mask.reshape(-1, heads if association_mask.dim() == 3 else 1, states, patterns)
        if given.dtype is torch.bool:
            mask = ~given if mask is None else mask & ~given
        else:
            given = given.to(like.dtype)
            mask = given if mask is None else given.masked_fill(~mask, float("-inf"))
    if mask is None or not extra:
        return mask
    return F.pad(mask, (0, extra), value=True) if mask.dtype is torch.bool else F.pad(mask, (0, extra))
