"""Tell a model's configuration that a stack of blocks has another length now."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lamina.anatomy import get

_DEPTH = re.compile(r"(n|num)_(hidden_|encoder_|decoder_)?layers?|(en|de)coder_layers")
_LISTS = ("layer_types", "mlp_layer_types", "block_types", "layers_block_type")


def set_depth(model: nn.Module, trunk: str, before: int, sources: Sequence[int]) -> None:
    """Write the depth into the Hugging Face configs above the trunk, where theirs is `before`; others stay untouched.

    `anatomy.keep_blocks` does this for a stack that loses blocks; here it may also grow.

    Args:
        sources: for each block that there is now, the old one whose entry in `layer_types` and the like it takes.
    """
    for config, below in _configs(model, trunk):
        names = [n for n in config.to_dict() if _DEPTH.fullmatch(n) and getattr(config, n, None) == before]
        half = next((s for s in below.split(".") if s in ("encoder", "decoder")), None)
        if getattr(config, "is_encoder_decoder", False) and half is not None:
            names = [n for n in names if ("decoder" in n) == (half == "decoder")]
        for name in _LISTS if names else ():
            listed = getattr(config, name, None)
            if isinstance(listed, list) and len(listed) == before:
                setattr(config, name, [listed[i] for i in sources])
        for name in names:
            setattr(config, name, len(sources))


def _configs(model: nn.Module, trunk: str) -> list[tuple[Any, str]]:
    """List each config above the trunk once, with the path below the outermost module that holds it."""
    steps = trunk.split(".")
    found: dict[int, tuple[Any, str]] = {}
    for length in range(len(steps)):
        config = getattr(get(model, ".".join(steps[:length])), "config", None)
        # Only Hugging Face's: another library's config may be frozen, or mean something else.
        if hasattr(config, "model_type") and hasattr(config, "to_dict"):
            found.setdefault(id(config), (config, ".".join(steps[length:])))
    return list(found.values())
