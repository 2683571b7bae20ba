"""Any model of the transformers library, from a local folder or from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lamina.errors import LaminaError, RecipeError, nearest, require
from lamina.registry import register

Task = Literal[
    "auto",
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
    "image_classification",
    "base",
]

AUTO_CLASSES: dict[str, str] = {
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "causal_lm": "AutoModelForCausalLM",
    "image_classification": "AutoModelForImageClassification",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "base": "AutoModel",
}
"""Task -> class of transformers, in the order in which "auto" tries them where a config names no architecture."""

OLD_OPTIONS = frozenset({"num_labels", "rope_theta", "rope_scaling", "torch_dtype", "attn_implementation"})
"""Taken by every config, though no signature names them."""


@register("model", source="transformers")
def hugging_face(path: str | None = None, config: Mapping[str, Any] | None = None, *, task: Task = "auto") -> nn.Module:
    """Load a transformers model from a folder, or make a randomly initialised one from a configuration.

    Nothing is downloaded and no code or pickle from the folder is run: weights are read from safetensors. Weights are
    float32, whatever the folder stores. As transformers does it, a loaded model is in evaluation mode.

    Args:
        path: folder with config.json and *.safetensors.
        config: `model_type` and the options of that type's config, e.g. {model_type: llama, hidden_size: 64}.
        task: which head; "auto" takes the architecture that the config names, else the first of `AUTO_CLASSES` that
            knows the model type.
    Raises:
        RecipeError: neither or both of path and config, an unknown task, model type or option.
        LaminaError: no such folder, or no safetensors in it. MissingExtra: transformers is not installed.
    """
    if (path is None) == (config is None):
        raise RecipeError(f"hugging_face takes either path or config, got {'neither' if path is None else 'both'}")
    if task != "auto" and task not in AUTO_CLASSES:
        raise RecipeError(f"no task is called {task!r}{nearest(task, AUTO_CLASSES)}; tasks: {', '.join(AUTO_CLASSES)}")
    transformers = require("transformers", "hf")
    if config is not None:
        settings = _make_config(transformers, config)
        cls = _model_class(transformers, settings, task)
        # The Auto classes have from_config; a named architecture is simply called.
        model = cls.from_config(settings) if hasattr(cls, "from_config") else cls(settings)
    else:
        folder = _check_folder(Path(str(path)))
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        cls = _model_class(transformers, settings, task)
        model = cls.from_pretrained(str(folder), config=settings, local_files_only=True, use_safetensors=True).float()
    model.lamina_node = _node(model, task)
    return model


def _make_config(transformers: Any, options: Mapping[str, Any]) -> Any:
    rest = dict(options)
    model_type = rest.pop("model_type", None)
    if model_type is None:
        raise RecipeError("the config of a hugging_face model needs a model_type, e.g. {model_type: llama}")
    known_types = list(transformers.CONFIG_MAPPING.keys())
    if model_type not in known_types:
        raise RecipeError(f"transformers has no model_type {model_type!r}{nearest(str(model_type), known_types)}")
    cls = transformers.CONFIG_MAPPING[model_type]
    known = _options_of(transformers, cls)
    # transformers keeps an unknown option as an attribute that nothing reads. A config that it wrote itself (it then
    # states the version) may hold such leftovers; one written by hand may not.
    for name in rest if "transformers_version" not in rest else ():
        if name not in known:
            raise RecipeError(f"{cls.__name__} has no option {name!r}{nearest(name, known)}")
    try:
        return cls(**rest)
    except Exception as error:
        # Configs check themselves, each with errors of its own, of three libraries.
        reason = " ".join(str(error).split())
        raise RecipeError(f"{cls.__name__} refuses its options: {reason}") from error


def _options_of(transformers: Any, cls: type) -> set[str]:
    names = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}  # type: ignore[misc]
    names |= set(transformers.PretrainedConfig().to_dict()) | set(getattr(cls, "attribute_map", {}))
    return names | OLD_OPTIONS


def _model_class(transformers: Any, config: Any, task: str) -> Any:
    if task != "auto":
        chosen = getattr(transformers, AUTO_CLASSES[task])
        if type(config) not in chosen._model_mapping:
            raise RecipeError(f"{config.model_type} has no head for the task {task!r}")
        return chosen
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
        raise LaminaError(f"transformers has no architecture {name!r}; pass task=... to choose a head")
    for name in AUTO_CLASSES.values():
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto
    raise LaminaError(f"transformers has no model for {type(config).__name__}")


def _node(model: Any, task: str) -> dict[str, Any]:
    """Name the model by its config and not its folder: what is saved from it loads where the folder is not."""
    config = model.config.to_diff_dict() | {"model_type": model.config.model_type}
    if task == "auto":
        config["architectures"] = [type(model).__name__]
    return {"name": "hugging_face", "config": config, "task": task}


def _check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise LaminaError(f"no folder {str(folder)!r}: hugging_face reads local folders and downloads nothing")
    if not (folder / "config.json").is_file():
        raise LaminaError(f"the folder {str(folder)!r} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise LaminaError(f"the folder {str(folder)!r} has no *.safetensors file; other weight formats are not read")
    return folder
