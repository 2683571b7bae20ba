"""Save a model with everything it went through, and load it in a process that knows nothing of it.

A folder holds `architecture.json` (how the model was built, then each rewrite with its decision) and
`model.safetensors`. Nothing is ever unpickled, and of the names in a file (`module:name`) only those are called that
make modules. A Hugging Face model's folder is a Hugging Face folder as well.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamina import __version__, registry
from lamina.batches import bare
from lamina.errors import LaminaError
from lamina.recipe import build
from lamina.rewrite.rewriting import Record, history, replay

FORMAT = 1
ARCHITECTURE = "architecture.json"
WEIGHTS = "model.safetensors"


def save(model: nn.Module, folder: str | Path, *, base: Mapping[str, Any] | str | None = None) -> Path:
    """Save a model so that `load(folder)` gives it back, bit for bit; return the folder.

    Of a compiled or data-parallel model the one inside is saved. The folder appears whole or not at all: it is written
    aside and renamed. An earlier save there is replaced.

    Args:
        base: how to build the model before its rewrites: a model node, or `module:function`, the function annotated
            as returning a module. Not needed for models of `lamina.models` and of transformers, which know it.
    Raises:
        LaminaError: the model does not know how it was built and no `base` was given; or the folder holds
            something that is not a saved model.
    """
    target, model = Path(folder), bare(model)
    node = _node({"name": base} if isinstance(base, str) else dict(base)) if base is not None else base_node(model)
    _check_builders(node, absent=True)
    if target.exists() and not _is_saved(target):
        raise LaminaError(f"{target} exists and is not a saved model: refusing to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        if _is_hugging_face(model):
            model.save_pretrained(aside)  # type: ignore[operator]
        weights = aside / WEIGHTS
        _save_weights(model, weights)
        for extra in aside.glob("model*.safetensors*"):
            if extra != weights:
                extra.unlink()
        _write_architecture(aside / ARCHITECTURE, node, model, weights)
        _replace_folder(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def load(folder: str | Path, *, base: nn.Module | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Load a saved model in evaluation mode: build the original, replay its rewrites, fill in the weights.

    Also reads a plain Hugging Face folder (with safetensors), including published LLM-Drop checkpoints
    (`drop_attn_list` / `drop_mlp_list` in their config).

    Args:
        base: the model before its rewrites, for one saved with a `base` this process cannot build.
    Raises:
        LaminaError: nothing there, truncated, tampered with, or written by something else.
    """
    source = Path(folder)
    if not source.is_dir():
        raise LaminaError(f"no saved model at {source}: no such folder")
    if not (source / ARCHITECTURE).exists():
        return _load_hugging_face(source).to(device)
    architecture = _read_architecture(source / ARCHITECTURE)
    weights = source / WEIGHTS
    if not weights.is_file():
        raise LaminaError(f"{source} has no {WEIGHTS}")
    found = digest(weights)
    if found != architecture["sha256"]:
        raise LaminaError(f"{weights} is not the file that was saved: sha256 is {found}, not {architecture['sha256']}")
    if base is None:
        _check_builders(architecture["base"])
    # The weights drawn here are overwritten: the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        model = build(architecture["base"], "model") if base is None else base
        model = replay(model, architecture["rewrites"])
    fill(model, weights)
    _set_buffers(model, architecture["buffers"])
    return model.to(device).eval()


def base_node(model: nn.Module) -> dict[str, Any]:
    """Return the recipe node that builds the model as it was before any rewrite.

    Raises:
        LaminaError: the model does not know it.
    """
    node = getattr(model, "lamina_node", None)
    if node is not None:
        return _node(node)
    if _is_hugging_face(model):
        config = getattr(model, "lamina_config", None) or model.config.to_dict()  # type: ignore[operator,union-attr]
        return _node({"name": "hugging_face", "config": {**config, "architectures": [type(model).__name__]}})
    name = f"{type(model).__module__}:{type(model).__qualname__}"
    raise LaminaError(
        f"{name} does not know how it was built: pass base='module:function' (or a model node), which load() will call"
    )


def fill(model: nn.Module, weights: Path) -> None:
    """Copy a safetensors file into a model whose tensors have exactly its names and shapes.

    Raises:
        LaminaError: the file cannot be read, or names or shapes differ (the first ones are named).
    """
    try:
        with safe_open(str(weights), framework="pt") as stored:
            held = set(stored.keys())
            _make_room(model, {name: stored.get_slice(name).get_shape() for name in held})
            own = model.state_dict(keep_vars=True)
            names = _unique(own)
            missing, unknown = sorted(set(names) - held), sorted(held - set(own))
            if missing or unknown:
                raise LaminaError(
                    f"{weights} does not fit the model: missing {missing[:5]}, unknown {unknown[:5]} "
                    f"({len(missing)} and {len(unknown)} in all)"
                )
            with torch.no_grad():
                for name in names:
                    _copy(own[name], stored.get_tensor(name), name, weights)
    except SafetensorError as error:
        raise LaminaError(f"{weights} is not a readable safetensors file: {error}") from error


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_room(model: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Tell modules whose buffers grow while they are used (`prepare_to_load`) the shapes of theirs."""
    for path, module in model.named_modules():
        told = getattr(module, "prepare_to_load", None)
        if told is not None:
            told({name.removeprefix(f"{path}."): s for name, s in shapes.items() if name.startswith(f"{path}.")})


def _copy(own: Tensor, stored: Tensor, name: str, weights: Path) -> None:
    if own.shape != stored.shape:
        raise LaminaError(f"{name} is {tuple(stored.shape)} in {weights} and {tuple(own.shape)} in the model")
    if own.dtype != stored.dtype:
        own.data = own.data.to(stored.dtype)
    own.copy_(stored)


def _save_weights(model: nn.Module, path: Path) -> None:
    state = model.state_dict(keep_vars=True)
    if any(t.is_meta for t in state.values()):
        raise LaminaError("the model has weights on the meta device: there is nothing to save")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in _unique(state):
        tensor = state[name].detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        # The format takes no two tensors of one storage (`a.data = b.data` ties them without making them one).
        tensors[name] = tensor.clone() if place in storages else tensor
        storages.add(place)
    save_file(tensors, str(path), metadata={"format": "pt"})


def _unique(state: Mapping[str, Tensor]) -> list[str]:
    """Names of a state dict, the first of every tensor that several share (tied weights)."""
    seen: dict[int, str] = {}
    for name, tensor in state.items():
        seen.setdefault(id(tensor), name)
    return list(seen.values())


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(node)))
    except TypeError:
        for key, value in node.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise LaminaError(
                    f"the model was built with {key}={value!r}, which no file can hold: give a registered name "
                    "there, or pass base='module:function' to save()"
                ) from error
        raise
    return plain


def _check_builders(node: Any, *, absent: bool = False) -> None:
    """Refuse a node that names, as `module:name`, anything but what makes modules: a file must not run just any code.

    Args:
        absent: pass over what cannot be imported here.
    Raises:
        LaminaError: names it.
    """
    if isinstance(node, str) and _BUILDER.fullmatch(node):
        try:
            target = registry.find("model", node)
        except LaminaError:
            if absent:
                return
            raise
        if not _makes_modules(target):
            raise LaminaError(
                f"{node} is named in how the model was built, but says nowhere that it makes a module: it must be a "
                "class of nn.Module, or a function annotated to return one (-> nn.Module)"
            )
    inner = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        # A Hugging Face configuration is data: nothing in it is built by name.
        if key != "config":
            _check_builders(value, absent=absent)


_BUILDER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def _makes_modules(target: Any) -> bool:
    if not inspect.isclass(target):
        try:
            target = get_type_hints(target).get("return")
        except (TypeError, NameError):
            return False
    return inspect.isclass(target) and issubclass(target, nn.Module)


def _loose_buffers(model: nn.Module) -> dict[str, str]:
    """Types of the floating-point buffers that no state dict holds (rotary frequencies): `.to(dtype)` changes them."""
    held = model.state_dict(keep_vars=True)
    loose = {n: b for n, b in model.named_buffers() if n not in held and b.is_floating_point()}
    return {n: str(b.dtype).removeprefix("torch.") for n, b in loose.items()}


def _set_buffers(model: nn.Module, types: Mapping[str, str]) -> None:
    """Give buffers that were built, not filled in, the types they had."""
    for path, name in types.items():
        owner, _, last = path.rpartition(".")
        dtype = getattr(torch, name, None)
        module = dict(model.named_modules()).get(owner)
        if module is None or module._buffers.get(last) is None or not isinstance(dtype, torch.dtype):
            raise LaminaError(f"the model that was saved had a buffer {path} of type {name}; the one built has none")
        module._buffers[last] = module._buffers[last].to(dtype)


def _write_architecture(path: Path, node: dict[str, Any], model: nn.Module, weights: Path) -> None:
    content = {
        "format": FORMAT,
        "lamina": __version__,
        "base": node,
        "rewrites": [asdict(r) for r in history(model)],
        "buffers": _loose_buffers(model),
        "sha256": digest(weights),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_architecture(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
        if version != FORMAT:
            raise LaminaError(f"{path} has format {version}; this version of lamina reads format {FORMAT}")
        unknown = sorted({k for r in content["rewrites"] for k in r} - {f.name for f in fields(Record)})
        if unknown:
            raise LaminaError(f"{path} is not a description of a saved model: its rewrites have {', '.join(unknown)}")
        return {
            "base": TypeAdapter(dict[str, Any]).validate_python(content["base"]),
            "rewrites": TypeAdapter(list[Record]).validate_python(content["rewrites"]),
            "buffers": TypeAdapter(dict[str, str]).validate_python(content["buffers"]),
            "sha256": TypeAdapter(str).validate_python(content["sha256"]),
        }
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise LaminaError(f"{path} is not a description of a saved model: {place}: {first['msg']}") from error
    except KeyError as error:
        raise LaminaError(f"{path} is not a description of a saved model: it has no {error}") from error
    except (ValueError, TypeError) as error:
        raise LaminaError(f"{path} is not a description of a saved model: {error}") from error


def _replace_folder(aside: Path, target: Path) -> None:
    """Put the written folder in place; a crash in between leaves the old one beside it, under `.old`."""
    for file in aside.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if not target.exists():
        aside.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    aside.rename(target)
    shutil.rmtree(old)


def _is_saved(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or (folder / ARCHITECTURE).exists()


def _is_hugging_face(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


def _load_hugging_face(folder: Path) -> nn.Module:
    if not (folder / "config.json").exists():
        raise LaminaError(f"{folder} is not a saved model: it has neither {ARCHITECTURE} nor config.json")
    if not any(folder.glob("*.safetensors")):
        raise LaminaError(f"{folder} has no safetensors weights (pickled weights are never read)")
    try:
        config = TypeAdapter(dict[str, Any]).validate_json((folder / "config.json").read_bytes())
    except ValidationError as error:
        raise LaminaError(f"{folder / 'config.json'} is not a configuration: {error.errors()[0]['msg']}") from error
    try:
        if config.get("drop_attn_list") or config.get("drop_mlp_list"):
            from lamina.rewrite.drop import load_official

            return load_official(folder).eval()
        model: nn.Module = build({"name": "hugging_face", "path": str(folder)}, "model")
    except SafetensorError as error:
        raise LaminaError(f"{folder} has weights that are no readable safetensors file: {error}") from error
    return model.eval()
