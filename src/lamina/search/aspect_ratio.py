"""The aspect ratio of a transformer as a search space: the same heads in few layers or in many.

Source: Brown et al., Wide Attention Is The Way Forward For Transformers? (2022), arXiv 2210.00640.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from lamina.errors import RecipeError, nearest, require
from lamina.models import aspect_ratios
from lamina.recipe import Choice, Recipe, check, open_choice
from lamina.registry import find


def with_aspect_ratios(recipe: Recipe) -> Recipe:
    """Return the recipe with its model's depth and heads left open: every (depth, heads) of the same product.

    The width of a head stays what it is, and so do width, feed-forward network and all else. Works for models that
    take depth, heads and the width of a head apart: `transformer`, `wide_transformer`, `vision_transformer`, others
    with these options, and Hugging Face configs with `head_dim` (Llama, Mistral, Qwen, ...). Grouped heads keep their
    group: ratios where it does not divide the heads are left out.

    Raises:
        RecipeError: the model ties the heads to its width, or its depth or heads are open already.
    Example:
        >>> from lamina.recipe import load
        >>> model = {"name": "transformer", "depth": 2, "heads": 2, "width": 8}
        >>> recipe = load({"model": model, "data": "text", "objective": "next_token", "train": {"steps": 1}})
        >>> [(m["depth"], m["heads"], m["head_width"]) for m in with_aspect_ratios(recipe).model.candidates()]
        [(4, 1, 4), (2, 2, 4), (1, 4, 4)]
    """
    node = check(recipe).model
    if isinstance(node, Choice):
        raise RecipeError("model: --aspect-ratios opens the model's depth and heads, but the model is a choice itself")
    options = inspect.signature(find("model", node["name"])).parameters
    if node["name"] == "hugging_face":
        nodes = _of_config(node)
    elif "total_heads" in options and "depth" in options:
        _closed(node, ("total_heads",))
        nodes = [{**node, "depth": depth} for depth, _ in aspect_ratios(node["total_heads"])]
    elif {"depth", "heads", "width"} <= set(options):
        nodes = _of_sizes(node, options)
    else:
        raise RecipeError(f"model: {node['name']!r} has no depth and heads, so it has no aspect ratio")
    return dataclasses.replace(recipe, model=Choice("oneof", nodes))


def _of_sizes(node: Mapping[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    _closed(node, ("depth", "heads", "width", "head_width", "kv_heads", "mixer"))
    depth, heads = node["depth"], node["heads"]
    mixer = node.get("mixer", "attention")
    mixer = {"name": mixer} if isinstance(mixer, str) else dict(mixer)
    for name in ("heads", "kv_heads"):
        if mixer.get(name) is not None:
            raise RecipeError(f"model.mixer.{name}: --aspect-ratios changes the {name} of the model: give them there")
    size = node.get("head_width") or mixer.get("head_width") or node["width"] // heads
    if "head_width" in options:
        apart: dict[str, Any] = {"head_width": size}
    elif "head_width" in inspect.signature(find("mixer", mixer["name"])).parameters:
        apart = {"mixer": {**mixer, "head_width": size}}
    else:
        raise RecipeError(f"model: the mixer {mixer['name']!r} ties the width of a head to the number of heads")
    found = []
    for d, h in aspect_ratios(depth * heads):
        groups = _groups(h, heads, node.get("kv_heads"))
        if groups is not False:
            found.append({**node, **apart, "depth": d, "heads": h, **({} if groups is None else {"kv_heads": groups})})
    return found


def _of_config(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Open the depth and heads of a Hugging Face configuration."""
    config = node.get("config")
    if not isinstance(config, Mapping):
        raise RecipeError("model: a model loaded from a folder has its aspect ratio already: give a config")
    _closed(config, tuple(config))
    kinds, kind = require("transformers", "hf").CONFIG_MAPPING, str(config.get("model_type"))
    if kind not in kinds:
        raise RecipeError(f"model.config: no model_type is called {kind!r}{nearest(kind, kinds)}")
    made = kinds[kind](**{k: v for k, v in config.items() if k != "model_type"})
    known = inspect.signature(type(made)).parameters
    if "head_dim" not in known or not hasattr(made, "num_hidden_layers"):
        raise RecipeError(f"model: {type(made).__name__} has no head_dim: it ties the heads to the width")
    depth, heads = made.num_hidden_layers, made.num_attention_heads
    size = made.head_dim or made.hidden_size // heads
    kv_heads = made.num_key_value_heads if "num_key_value_heads" in known else None
    found = []
    for d, h in aspect_ratios(depth * heads):
        groups = _groups(h, heads, kv_heads)
        if groups is not False:
            sizes = {"num_hidden_layers": d, "num_attention_heads": h, "head_dim": size}
            sizes |= {} if groups is None else {"num_key_value_heads": groups}
            found.append({**node, "config": {**config, **sizes}})
    return found


def _groups(heads: int, before: int, kv_heads: int | None) -> int | bool | None:
    """Return the key and value heads of so many heads; None = as many; False = their group does not divide them."""
    if kv_heads is None:
        return None
    group = before // kv_heads
    return heads // group if heads % group == 0 else False


def _closed(node: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if open_choice(node.get(name)) is not None:
            raise RecipeError(f"model.{name}: --aspect-ratios sets depth and heads for one value of it, and it is open")
