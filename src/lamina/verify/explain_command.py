"""`lamina explain`: the model and the input are told in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.data.images import ENDINGS, decode
from lamina.errors import LaminaError, ShapeError
from lamina.io import load
from lamina.recipe import build
from lamina.recipe._yaml import read as read_yaml
from lamina.verify.explain import explain


def run(
    model: str,
    example: str,
    folder: Path,
    *,
    svd: int = 0,
    size: int | None = None,
    mean: float = 0.5,
    std: float = 0.5,
    **options: Any,
) -> Path:
    """Write the page and say where it is; `options` as of `explain`, the others as of `read`."""
    found, batch = read(model, example, size=size, mean=mean, std=std)
    if svd:
        found = found.double()
        batch = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    page = explain(found, batch, folder, svd=svd, title=f"{type(found).__name__}, {example}", **options)
    print(page)
    return page


def read(model: str, example: str, *, size: int | None, mean: float, std: float) -> tuple[nn.Module, Batch]:
    """Return the model in evaluation mode and a batch of one.

    Args:
        model: folder of a saved model; else a model's node, or `module:function`.
        example: image file, .npy, or a data set's node, of which a name may be followed by the row: `digits:7`.
        size: images are scaled and cropped to this square.
        mean: subtracted from pixels of 0..1, unless the folder says how its model wants them.
        std: divided by.
    Raises:
        LaminaError: neither a file nor a name that is known; no such row.
    """
    path = Path(example)
    if path.suffix.lower() in (*ENDINGS, ".npy"):
        if not path.is_file():
            raise LaminaError(f"no input at {path}: no such file")
        found = _model(model, {})
        return found, _file(found, path, _folder(model), size, mean, std)
    batch, sizes = _row(example)
    found = _model(model, sizes)
    return found, _embedded(found, batch)


def _folder(model: str) -> Path | None:
    return Path(model) if Path(model).is_dir() else None


def _model(model: str, sizes: Mapping[str, Any]) -> nn.Module:
    folder = _folder(model)
    if folder is not None:
        return load(folder)
    torch.manual_seed(0)
    built: nn.Module = build(read_yaml(model, "MODEL")[0], "model", **sizes)
    return built.eval()


def _row(example: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return one row of a data set, of its evaluation part where it has one, and the set's sizes."""
    name, _, number = example.rpartition(":")
    node, row = (name, int(number)) if name and number.isdigit() else (example, 0)
    data = build(read_yaml(node, "INPUT")[0], "data")
    part = data.evaluation or data.train
    if row >= len(part):
        raise LaminaError(f"{data.name} has {len(part)} examples, there is no number {row}")
    return part.batch(torch.tensor([row])), data.sizes


def _embedded(model: nn.Module, batch: dict[str, Any]) -> Batch:
    """Start at the embeddings of a language model that takes them."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if "input_ids" not in batch or not isinstance(table, nn.Module):
        return batch
    with torch.no_grad():
        return {"inputs_embeds": table(batch.pop("input_ids")), **batch}


def _file(model: nn.Module, path: Path, folder: Path | None, size: int | None, mean: float, std: float) -> Batch:
    dims = next((len(m.kernel_size) for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), 0)
    if path.suffix == ".npy":
        x = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        return {"inputs": _with_batch(x, dims + 2 if dims else None)}
    preferred = folder / "preprocessor_config.json" if folder is not None else None
    if preferred is not None and preferred.is_file():
        return {"inputs": _preferred(path, json.loads(preferred.read_text(encoding="utf-8")), size)}
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    pixels = _pixels(path, 1 if channels == 1 else 3, size)
    return {"inputs": (pixels - mean) / std}


def _with_batch(x: Tensor, dims: int | None) -> Tensor:
    if dims is None:
        return x if x.dim() > 1 and len(x) == 1 else x[None]
    if x.dim() > dims or x.dim() < dims - 2:
        raise ShapeError(f"the model takes inputs of {dims} dimensions, the array has shape {tuple(x.shape)}")
    return x.reshape(*[1] * (dims - x.dim()), *x.shape)


def _pixels(path: Path, channels: int, size: int | None) -> Tensor:
    """Read an image as (1, C, H, W) from 0 to 1."""
    array = torch.from_numpy(np.array(next(iter(decode([(str(path), path.read_bytes())], channels, size)))))
    return (array[None] if array.dim() == 2 else array.permute(2, 0, 1))[None].float() / 255


def _preferred(path: Path, said: Mapping[str, Any], size: int | None) -> Tensor:
    """Scale and normalise as the model's own folder says."""
    wanted = said.get("crop_size") or said.get("size") or {}
    side = wanted.get("height", wanted.get("shortest_edge")) if isinstance(wanted, Mapping) else wanted
    x = _pixels(path, 3, size or side)
    if said.get("do_normalize", True):
        mean, std = (torch.tensor(said.get(k, [0.5] * 3)).view(1, -1, 1, 1) for k in ("image_mean", "image_std"))
        x = (x - mean) / std
    return x
