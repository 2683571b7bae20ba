"""Module-tree surgery: read, replace and shorten by dotted path."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from lamina.errors import AnatomyError, nearest

_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
_PER_LAYER = ("layer_types", "mlp_layer_types", "block_types", "layers_block_type")


def get(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path; the empty path is the model itself.

    Raises:
        AnatomyError: no such path; the message names the nearest ones.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        raise AnatomyError(f"{type(model).__name__} has no module {path!r}{nearest(path, known)}") from None


def swap(model: nn.Module, path: str, new: nn.Module, *, all: bool = False) -> nn.Module:
    """Put `new` where `path` is, in place; return what was there.

    Args:
        all: a module that stands at several paths is replaced at each of them.
    Raises:
        AnatomyError: no such path, the model itself, or a shared module without `all`.
    """
    old = get(model, path)
    if not path:
        raise AnatomyError(f"cannot swap {type(model).__name__} itself: the path is empty")
    places = _places(model, old)
    if len(places) > 1 and not all:
        named = ", ".join(repr(f"{p}.{n}".lstrip(".")) for p, _, n in places)
        raise AnatomyError(f"the module at {path!r} is shared by {named}; pass all=True to replace it everywhere")
    for _, parent, name in places:
        # Containers keep their children in the same table as any module, so an index is a name there.
        parent.register_module(name, new)
    return old


def keep_blocks(model: nn.Module, trunk_path: str, indices: Sequence[int]) -> nn.ModuleList | nn.Sequential:
    """Keep the children of a ModuleList or Sequential at `indices`, in that order; return the new container.

    Where the model has a Hugging Face config whose depth is the container's length, the depth and the per-layer
    lists follow. `layer_idx` is left as it is.

    Raises:
        AnatomyError: no container there, no index, an index out of range or named twice.
    """
    old = get(model, trunk_path)
    if not isinstance(old, (nn.ModuleList, nn.Sequential)) or not trunk_path:
        raise AnatomyError(f"{trunk_path!r} is a {type(old).__name__}, expected a ModuleList or Sequential of blocks")
    count = len(old)
    if not indices or len(set(indices)) < len(indices) or not all(0 <= i < count for i in indices):
        raise AnatomyError(f"{trunk_path!r} has blocks 0..{count - 1}; cannot keep {list(indices)}")
    children = list(old._modules.items())
    numbered = all(name.isdigit() for name, _ in children)
    # A copy, for a subclass may bring a forward or attributes of its own.
    new = copy.copy(old)
    new._modules = {str(at) if numbered else children[i][0]: children[i][1] for at, i in enumerate(indices)}
    swap(model, trunk_path, new)
    _trim_config(model, trunk_path, count, indices)
    return new


def attention_cores(model: nn.Module, block: str) -> list[nn.Module]:
    """List the submodules of the block at that path that number their cache slot (an integer `layer_idx`)."""
    return [m for m in get(model, block).modules() if isinstance(getattr(m, "layer_idx", None), int)]


def nearest_config(model: nn.Module, path: str) -> Any:
    """Return the Hugging Face config of the innermost module above `path` that has one, or None."""
    found = _configs(model, path)
    return found[-1][0] if found else None


def _places(model: nn.Module, module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [
        (path, parent, name)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is module
    ]


def _trim_config(model: nn.Module, trunk_path: str, count: int, indices: Sequence[int]) -> None:
    """Shorten the configs above the trunk; where one speaks of encoder and decoder, only the trunk's half."""
    for config, below in _configs(model, trunk_path):
        names = [n for n in _DEPTHS if getattr(config, n, None) == count]
        half = next((s for s in below.split(".") if s in ("encoder", "decoder")), None)
        if getattr(config, "is_encoder_decoder", False) and half is not None:
            names = [n for n in names if ("decoder" in n) == (half == "decoder")]
        if not names:
            continue
        for name in _PER_LAYER:
            listed = getattr(config, name, None)
            if isinstance(listed, list) and len(listed) == count:
                setattr(config, name, [listed[i] for i in indices])
        for name in names:
            setattr(config, name, len(indices))


def _configs(model: nn.Module, trunk_path: str) -> list[tuple[Any, str]]:
    """List each config above the trunk once, with the rest of the path below the outermost module that holds it."""
    steps = trunk_path.split(".")
    found: dict[int, tuple[Any, str]] = {}
    for length in range(len(steps)):
        config = getattr(get(model, ".".join(steps[:length])), "config", None)
        # Only Hugging Face configs: another library's may be frozen, or mean something else.
        if hasattr(config, "model_type"):
            found.setdefault(id(config), (config, ".".join(steps[length:])))
    return list(found.values())
