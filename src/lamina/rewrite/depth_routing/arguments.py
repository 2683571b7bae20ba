"""What a block is called with beside the stream, cut down to the tokens that enter: masks, positions, rotary arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import AnatomyError, LaminaError
from lamina.nn.token_router import gather
from lamina.rewrite.depth_routing.cache import EMPTY

MASKS = ("attention_mask", "causal_mask", "src_key_padding_mask", "key_padding_mask")
PADDING = frozenset({"src_key_padding_mask", "key_padding_mask"})
"""Masks that say True where a key is *not* to be seen."""
POSITIONS = frozenset({"position_ids", "positions", "cache_position"})
ARRAYS = frozenset({"position_embeddings", "rotary_pos_emb", "freqs_cis"})
WHOLE = frozenset({"encoder_hidden_states", "encoder_attention_mask", "past_key_values", "past_key_value", "cache"})
"""Arguments that have no entry for each token of the stream."""


def real_tokens(given: Mapping[str, Any], x: Tensor) -> Tensor | None:
    """Return which of the tokens x (B, T, C) are real, (B, T) bool; None where no mask says."""
    for name in MASKS:
        mask = _tensor(given.get(name))
        if mask is None:
            continue
        seen = mask if mask.dtype == torch.bool or mask.dim() == 2 else mask == 0
        seen = ~seen.bool() if name in PADDING else seen.bool()
        if seen.dim() == 4:
            # A key that no query sees is padding.
            seen = seen.any(dim=2).any(dim=1)
        return seen[:, -x.shape[1] :].expand(len(x), -1) if seen.shape[0] in (1, len(x)) else None
    return None


def taken(
    given: Mapping[str, Any], index: Tensor, shape: tuple[int, int] | torch.Size, *, ranks: Tensor | None = None
) -> dict[str, Any]:
    """Cut every argument that has an entry a token down to the tokens at index (B, k).

    Args:
        shape: (B, T) of the stream.
        ranks: (B, k), from which tokens the positions are taken; None = from index.
    Raises:
        AnatomyError: an argument of unknown meaning that has as many entries as there are tokens.
    """
    if shape[1] == 1:
        # The only one: nothing is cut.
        return dict(given)
    return {name: _taken(name, value, index, shape, index if ranks is None else ranks) for name, value in given.items()}


def rows_of(given: Mapping[str, Any], rows: Tensor, count: int) -> dict[str, Any]:
    """Take rows of the arguments that have one for each of the batch's `count`."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == count:
            return value[rows]
        if isinstance(value, dict):
            return {k: cut(v) for k, v in value.items()}
        return tuple(cut(v) for v in value) if isinstance(value, tuple) else value

    return {name: cut(value) for name, value in given.items()}


class Masks:
    """The masks that one block can be given; how they look is read from its class, or from the one it was given.

    "pairs": (B, 1, queries, keys), bool or added to the scores (transformers). "keys": (B, keys), True = seen (ours).
    "padding": (B, keys), True = not seen (torch).
    """

    names = frozenset(MASKS)

    def __init__(self, block: nn.Module, parameters: tuple[str, ...]) -> None:
        self.block = block
        self.name = next((n for n in MASKS if n in parameters), "attention_mask")

    def can(self, given: Mapping[str, Any]) -> bool:
        """Whether a mask can hide tokens from this block."""
        return self._form() is not None or self.given(given) is not None

    def without(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments without masks."""
        return {k: v for k, v in given.items() if k not in self.names}

    def hide(
        self, given: Mapping[str, Any], some: Mapping[str, Any], valid: Tensor, causal: bool, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the arguments `some` under a mask that hides every token but the valid ones (B, k) from the others."""
        name = self.given(given) or self.name
        mask, count = _tensor(some.get(name)), valid.shape[1]
        if mask is None:
            return {**some, name: self._made(valid, count, causal, dtype)}
        if mask.dim() == 2:
            seen = (mask.bool() | ~valid) if name in PADDING else (mask.bool() & valid)
            return {**some, name: seen}
        keys = valid[:, None, None, :] | torch.eye(count, dtype=torch.bool, device=valid.device)
        hidden = mask & keys if mask.dtype == torch.bool else mask.masked_fill(~keys, torch.finfo(mask.dtype).min)
        return {**some, name: hidden}

    def over_slots(
        self, given: Mapping[str, Any], earlier: Tensor | None, valid: Tensor | None, shape: torch.Size, x: Tensor
    ) -> dict[str, Any]:
        """Return the mask of (B, n) new tokens over a layer's earlier slots (B, L) and themselves, as an argument.

        Slots are in the order of their tokens, so a causal mask over slots is one over tokens.
        """
        past = 0 if earlier is None else earlier.shape[1]
        before = None if earlier is None else earlier != EMPTY
        full = (before is None or bool(before.all())) and valid is None
        form, name = self._form(), self.given(given) or self.name
        if form is None:
            raise LaminaError(f"{type(self.block).__name__} was given a cache and takes no mask over its slots")
        if full and (form == "keys" or (not self._adds() and (past == 0 or shape[1] == 1))):
            # All slots are real: what the block does by itself without a mask.
            return {name: None}
        now = torch.ones(shape, dtype=torch.bool, device=x.device) if valid is None else valid
        seen = now if before is None else torch.cat((before, now), dim=1)
        return {name: seen if form == "keys" else self._made(seen, shape[1], True, x.dtype)}

    def _made(self, seen: Tensor, queries: int, causal: bool, dtype: torch.dtype) -> Tensor:
        """Make a mask of the block's form; seen (B, keys), of which the queries are the last."""
        form = self._form()
        if form != "pairs":
            return ~seen if form == "padding" else seen
        if queries == 1:
            mask = F.pad(seen[:, None, None, :-1], (0, 1), value=True)
        else:
            keys = seen.shape[1]
            row = torch.arange(keys - queries, keys, device=seen.device)[:, None]
            column = torch.arange(keys, device=seen.device)
            mask = seen[:, None, None, :].expand(-1, 1, queries, -1)
            mask = (mask & (column <= row) if causal else mask) | (column == row)
        if not self._adds():
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=seen.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _form(self) -> Literal["pairs", "keys", "padding"] | None:
        takes = getattr(self.block, "takes", None)
        if callable(takes):
            return "keys" if takes("attention_mask") else None
        if isinstance(self.block, nn.TransformerEncoderLayer):
            return "padding"
        return "pairs" if self._implementation() in ("sdpa", "eager") and self.name == "attention_mask" else None

    def _adds(self) -> bool:
        return self._implementation() == "eager"

    def _implementation(self) -> str | None:
        """Which attention function a transformers model uses; it can be changed at any time."""
        for module in self.block.modules():
            found = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if isinstance(found, str):
                return found
        return None

    def given(self, given: Mapping[str, Any]) -> str | None:
        """Return the name of the mask that a call brings, or None."""
        return next((n for n in MASKS if _tensor(given.get(n)) is not None), None)


def _taken(name: str, value: Any, index: Tensor, shape: tuple[int, int] | torch.Size, ranks: Tensor) -> Any:
    rows, tokens = shape
    if name in WHOLE or value is None:
        return value
    if name in MASKS:
        if isinstance(value, dict):
            return {k: _mask(v, index, tokens) for k, v in value.items()}
        return _mask(value, index, tokens)
    if name in POSITIONS and isinstance(value, Tensor):
        wide = value.expand(rows, -1) if value.dim() < 3 else value
        if wide.shape != (rows, tokens):
            raise AnatomyError(f"depth routing cannot take tokens out of {name} {tuple(value.shape)}")
        return wide.gather(1, ranks)
    if name in ARRAYS and isinstance(value, (tuple, list, Tensor)):
        arrays = (value,) if isinstance(value, Tensor) else tuple(value)
        if any(a.dim() != 3 or a.shape[1] != tokens for a in arrays):
            found = ", ".join(str(tuple(a.shape)) for a in arrays)
            raise AnatomyError(f"depth routing takes {name} of (batch, tokens, channels), got {found}")
        cut = tuple(gather(a.expand(rows, -1, -1), ranks) for a in arrays)
        return cut[0] if isinstance(value, Tensor) else type(value)(cut)
    tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, (tuple, list)) else []
    if any(isinstance(t, Tensor) and tokens > 1 and tokens in t.shape for t in tensors):
        raise AnatomyError(
            f"the block is called with {name}, which may have an entry for each of {tokens} tokens, and depth routing "
            "does not know how to take some of them"
        )
    return value


def _mask(mask: Any, index: Tensor, tokens: int) -> Any:
    """Cut a mask down in queries and keys."""
    if not isinstance(mask, Tensor):
        return mask
    rows = len(index)
    if mask.dim() == 2 and mask.shape == (rows, tokens):
        return mask.gather(1, index)
    if mask.dim() != 4 or mask.shape[-1] != tokens or mask.shape[2] not in (1, tokens):
        raise AnatomyError(
            f"depth routing takes masks (batch, {tokens}) or (batch, heads or 1, {tokens}, {tokens}), got "
            f"{tuple(mask.shape)}"
        )
    mask = mask.expand(rows, -1, -1, -1)
    heads = mask.shape[1]
    if mask.shape[2] == tokens:
        mask = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, tokens))
    return mask.gather(3, index[:, None, None, :].expand(-1, heads, mask.shape[2], -1))


def _tensor(value: Any) -> Tensor | None:
    """Return a mask; of several by kind of layer, the first."""
    if isinstance(value, dict):
        value = next((v for v in value.values() if isinstance(v, Tensor)), None)
    return value if isinstance(value, Tensor) else None
