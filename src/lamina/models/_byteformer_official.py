"""The names and layouts of apple/corenet's ByteFormer, turned into ours."""

from __future__ import annotations

from torch import Tensor

_LAYERS = {
    "pre_norm_mha.0": "norm1",
    "pre_norm_mha.1.out_proj": "mixer.attention.out",
    "pre_norm_ffn.0": "norm2",
    "pre_norm_ffn.1": "feed_forward.up",
    "pre_norm_ffn.4": "feed_forward.down",
}
_ENDS = {"post_transformer_norm": "final_norm", "classifier": "head"}
_TABLES = {
    "embeddings.weight": "tokens.embedding.table.weight",
    "token_reduction_net.weight": "tokens.reduction.conv.weight",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the official model's tensors under our names; queries, keys and values apart, pairs token by token."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        where, _, last = name.rpartition(".")
        if name in _TABLES:
            found[_TABLES[name]] = tensor
        elif where in _ENDS:
            found[f"{_ENDS[where]}.{last}"] = tensor
        elif name.startswith("pos_embed."):
            found["position_embedding"] = tensor.flatten(0, -2)
        elif name.startswith("downsamplers.downsample_"):
            index, part = where.removeprefix("downsamplers.downsample_").split(".", 1)
            pairs = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1) if part == "reduction" else tensor
            found[f"blocks.{index}.merge.{part}.{last}"] = pairs
        elif name.startswith("transformer."):
            _, index, part = where.split(".", 2)
            if part == "pre_norm_mha.1.qkv_proj":
                named = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
                found |= {f"blocks.{index}.mixer.attention.{n}.{last}": t for n, t in named}
            else:
                found[f"blocks.{index}.{_LAYERS.get(part, part)}.{last}"] = tensor
        else:
            found[name] = tensor
    return found
