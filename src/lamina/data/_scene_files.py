"""Photographs with their cameras, from one .npz file or from a folder in the format of NeRF-Synthetic."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.data._arrays import npz
from lamina.data._files import existing
from lamina.data.examples import check_split, split_rows
from lamina.errors import LaminaError, require


@dataclass(frozen=True)
class Photographs:
    """Images of one scene and the cameras that took them."""

    images: Tensor
    """(N, H, W, 3) float32, 0..1, on white."""
    cameras: Tensor
    """(N, 4, 4) float32, camera to world; a camera looks along its -z, y up."""
    focal: float
    """In pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[1], self.images.shape[2]


def read_photographs(source: Path, scale: float, split: float, seed: int) -> tuple[Photographs, Photographs]:
    """Return the photographs to learn from and those kept aside.

    Raises:
        LaminaError: nothing there, or not what it should hold.
    """
    check_split(split)
    path = existing(source, "the scene (there is also 'spheres')")
    if path.is_dir():
        train = _from_folder(path, "train", scale)
        if (path / "transforms_test.json").exists():
            return train, _from_folder(path, "test", scale)
    else:
        images, cameras, focal = npz(path, ["images", "c2w", "focal"])
        train = _photographs(images, cameras, float(focal), scale, str(path))
    rows, held = split_rows(len(train.images), split, seed)
    if not len(held):
        raise LaminaError(f"a split of {split} keeps none of the {len(train.images)} images of {str(path)!r} aside")
    return tuple(Photographs(train.images[r], train.cameras[r], train.focal) for r in (rows, held))  # type: ignore[return-value]


def _from_folder(folder: Path, part: str, scale: float) -> Photographs:
    path = existing(folder / f"transforms_{part}.json", "the cameras")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        angle, frames = float(content["camera_angle_x"]), content["frames"]
        cameras = np.asarray([frame["transform_matrix"] for frame in frames], dtype=np.float32)
        names = [str(frame["file_path"]) for frame in frames]
    except (ValueError, KeyError, TypeError) as error:
        raise LaminaError(f"{str(path)!r} does not describe cameras: {type(error).__name__}: {error}") from error
    images = np.stack([_image(folder / (name if Path(name).suffix else f"{name}.png")) for name in names])
    return _photographs(images, cameras, 0.5 * images.shape[2] / math.tan(0.5 * angle), scale, str(path))


def _image(path: Path) -> Any:
    pil = require("PIL.Image", "images")
    try:
        with pil.open(existing(path, "the image")) as image:
            return np.asarray(image.convert("RGBA"))
    except OSError as error:
        raise LaminaError(f"{str(path)!r} cannot be read as an image: {error}") from error


def _photographs(images: Any, cameras: Any, focal: float, scale: float, place: str) -> Photographs:
    good = images.ndim == 4 and images.shape[3] in (3, 4) and images.dtype == np.uint8
    if not good or cameras.shape != (len(images), 4, 4) or not focal > 0 or not np.isfinite(cameras).all():
        raise LaminaError(
            f"{place!r} must hold images (N, H, W, 3 or 4) uint8, cameras (N, 4, 4) and a focal length above 0, got "
            f"{images.dtype} {images.shape}, {cameras.shape} and {focal}"
        )
    found = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    if found.shape[3] == 4:
        found = found[..., :3] * found[..., 3:] + 1 - found[..., 3:]
    poses = torch.from_numpy(np.ascontiguousarray(cameras)).float()
    poses[:, :3, 3] *= scale
    return Photographs(found, poses, focal)
