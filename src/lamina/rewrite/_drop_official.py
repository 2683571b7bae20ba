"""Reading published LLM-Drop checkpoints: `drop_attn_list` and `drop_mlp_list` in a Hugging Face config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lamina.errors import LaminaError, nearest, require
from lamina.rewrite._drop_apply import DropDecision
from lamina.rewrite.rewriting import apply_decision, pass_class

KEYS = ("drop_attn_list", "drop_mlp_list")


def import_official(config: Any) -> DropDecision:
    """Read the decision of a published LLM-Drop checkpoint from its config (a mapping, or a transformers config).

    The lists hold block indices, or one truth value a block.

    Raises:
        LaminaError: the config has neither list, or they hold something else.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    if not any(key in values for key in KEYS):
        raise LaminaError(f"the config has neither {KEYS[0]} nor {KEYS[1]}: not an LLM-Drop checkpoint")
    attention, mlp = (_indices(key, values.get(key)) for key in KEYS)
    return DropDecision(attention=attention, mlp=mlp)


def load_official(folder: str | Path) -> nn.Module:
    """Load a checkpoint folder whose config has drop lists: build the whole architecture, drop, keep its weights.

    No code from the folder runs and only safetensors are read. Weights keep the type they are stored in.

    Raises:
        LaminaError: no lists, an architecture transformers does not have, or weights missing for what stays.
        MissingExtra: transformers is not installed.
    """
    transformers = require("transformers", "hf")
    source = Path(folder)
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    decision = import_official(stored)
    names = stored.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise LaminaError(f"transformers has no architecture {names[0] if names else None!r}, named by {source}")
    whole = {k: v for k, v in stored.items() if k not in (*KEYS, "auto_map")}
    if whole.get("model_type") not in transformers.CONFIG_MAPPING:
        # The authors' own type names stand for classes of their fork.
        whole["model_type"] = cls.config_class.model_type
    config = cls.config_class.from_dict(whole)
    model, report = cls.from_pretrained(
        str(source),
        config=config,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        dtype=whole.get("dtype") or whole.get("torch_dtype") or "auto",
    )
    model = apply_decision(model, pass_class("drop_sublayers").__new__(pass_class("drop_sublayers")), decision)
    _check_weights(model, set(report["missing_keys"]), set(report["unexpected_keys"]), source)
    return model.eval()


def _check_weights(model: nn.Module, missing: set[str], unknown: set[str], source: Path) -> None:
    needed = sorted(missing & set(model.state_dict()))
    if needed or unknown:
        raise LaminaError(
            f"the weights in {source} do not fit what its config leaves: missing {needed[:5]}, unknown "
            f"{sorted(unknown)[:5]} ({len(needed)} and {len(unknown)} in all)"
            + (nearest(needed[0], unknown) if needed else "")
        )


def _indices(key: str, listed: Any) -> tuple[int, ...]:
    if listed is None:
        return ()
    if isinstance(listed, (list, tuple)) and all(isinstance(i, int) for i in listed):
        if listed and all(isinstance(i, bool) for i in listed):
            return tuple(i for i, gone in enumerate(listed) if gone)
        return tuple(sorted(int(i) for i in listed))
    raise LaminaError(f"{key} should be a list of block indices, got {listed!r}")
