"""A truncated model as a folder that sentence-transformers loads, with the same embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lamina.batches import bare
from lamina.errors import LaminaError
from lamina.rewrite._embedding_output import EmbeddingOutput

POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
"""Our names to theirs."""

MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def export_sentence_transformers(model: nn.Module, folder: str | Path, tokenizer: Any) -> Path:
    """Write a truncated Hugging Face model as a folder for `SentenceTransformer(folder)`; return the folder.

    A plain Hugging Face folder of the blocks that are left, and `modules.json`: the transformer, its pooling, the cut
    to the first numbers, the norm. The cut is a linear layer of zeros and ones, and `truncate_dim` is set as well: by
    `truncate_dim` alone vectors are cut after they were brought to length one, and are shorter then.

    Args:
        model: what `Truncate` made of a transformers model.
        tokenizer: its tokenizer, of transformers; goes along.
    Raises:
        LaminaError: no transformers model, one that was not truncated to an embedding, or a folder that is not empty.
    """
    model, target = bare(model), Path(folder)
    ending = next((m for m in model.children() if isinstance(m, EmbeddingOutput)), None)
    body = getattr(model, "base_model", None)
    if ending is None or not hasattr(body, "save_pretrained"):
        raise LaminaError(
            f"{type(model).__name__} is no transformers model that ends in an embedding: "
            "rewrite(model, Truncate(layers, width)) makes it one"
        )
    if not isinstance(ending.pool, str):
        raise LaminaError("sentence-transformers has no pooling by a function of yours")
    if target.exists() and any(target.iterdir()):
        raise LaminaError(f"{target} is not empty: refusing to write among what is there")
    body.save_pretrained(target)  # type: ignore[union-attr]
    tokenizer.save_pretrained(target)
    full = ending.exits.width
    kept = ending.width or full
    stages: list[tuple[str, str]] = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if kept < full:
        stages.append(("2_Dense", "Dense"))
    if ending.normalize:
        stages.append((f"{len(stages)}_Normalize", "Normalize"))
    for path, _ in stages:
        (target / path).mkdir(exist_ok=True)
    modes = {f"pooling_mode_{mode}": mode == POOLINGS[ending.pool] for mode in MODES}
    _write(target / "1_Pooling" / "config.json", {"word_embedding_dimension": full, **modes})
    if kept < full:
        _write_cut(target / "2_Dense", full, kept)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(stages)
    ]
    _write(target / "modules.json", modules)
    longest = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 512)))
    _write(target / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    _write(target / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "truncate_dim": kept})
    return target


def _write_cut(folder: Path, full: int, kept: int) -> None:
    """Write the first rows of the identity as their linear layer."""
    save_file({"linear.weight": torch.eye(kept, full)}, str(folder / "model.safetensors"))
    options = {"in_features": full, "out_features": kept, "bias": False}
    _write(folder / "config.json", {**options, "activation_function": "torch.nn.modules.linear.Identity"})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
