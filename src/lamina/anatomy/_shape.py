"""Read sizes out of attention and feed-forward modules: the weights first, then attributes, then the config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lamina.anatomy._tree import attentions, is_attention, projections

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_KV_HEADS = ("num_key_value_heads", "kv_heads", "n_kv_heads", "num_kv_heads")
_HEAD_WIDTH = ("head_dim", "head_width", "attention_head_size", "key_value_proj_dim", "head_size", "d_kv", "dim_head")
FEED_FORWARD = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "feed_forward")
_CONTEXT = ("max_position_embeddings", "n_positions", "context", "n_ctx", "max_seq_len", "block_size")
_QUERY = re.compile(r"^(to_|w)?q(uery)?(_|$)|^q(uery)?_", re.IGNORECASE)
_KEY = re.compile(r"^(to_|w)?k(ey)?(_|$)|^k(ey)?_", re.IGNORECASE)


def config_of(model: nn.Module) -> Any:
    """Return the config of the language part of a Hugging Face model, or None."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def first_number(sources: Iterable[Any], names: tuple[str, ...]) -> int | None:
    """Return the first integer any source has under one of the names."""
    for source in sources:
        for name in names:
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def head_sizes(attention: nn.Module, width: int | None, config: Any) -> tuple[int | None, int | None, int | None]:
    """Return (heads, key-value heads, width of a head) of the attention at or below this module."""
    core = attention if is_attention(attention) else next((m for _, m in attentions(attention)), attention)
    if isinstance(core, nn.MultiheadAttention):
        return core.num_heads, core.num_heads, core.head_dim
    query, key = _out_widths(core)
    one = first_number([core], _HEAD_WIDTH)
    heads = first_number([core], _HEADS)
    if heads is None and one is None:
        heads, one = first_number([config], _HEADS), first_number([config], _HEAD_WIDTH)
    total = query if query is not None else width
    if one is None and heads and total:
        one = total // heads
    if one is None:
        return heads, heads, None
    heads = query // one if query is not None else heads
    kv_heads = first_number([core], _KV_HEADS)
    return heads, kv_heads if kv_heads is not None else key // one if key is not None else heads, one


def context_of(model: nn.Module, config: Any) -> int | None:
    """Return the longest input the model says it takes, or None."""
    return first_number([config, model], _CONTEXT)


def vocabulary_of(model: nn.Module, tables: list[nn.Embedding], head_out: int | None) -> int | None:
    """Return the rows of the token table: the one the model names, the one the head matches, or the first."""
    named = getattr(model, "get_input_embeddings", None)
    try:
        table = named() if callable(named) else None
    except NotImplementedError:
        table = None
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    if isinstance(table, nn.Module):
        # A vision model names its patch projection here.
        return None
    rows = [t.num_embeddings for t in tables]
    return head_out if head_out in rows else rows[0] if rows else None


def _out_widths(core: nn.Module) -> tuple[int | None, int | None]:
    """Output widths of the query and of the key projection (of the last of two, where one is cut in low rank)."""
    sizes = projections(core)
    if len(sizes) == 2:
        (_, fused), (mixed, _) = sizes.values()
        return mixed, (fused - mixed) // 2
    query = next((out for name, (_, out) in reversed(sizes.items()) if _QUERY.search(name)), None)
    key = next((out for name, (_, out) in reversed(sizes.items()) if _KEY.search(name)), None)
    return query, key
