"""Labelled images from arrays, idx files or a folder with one sub-folder a class."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.data._arrays import Array, idx, is_idx, npy, npz
from lamina.data._files import cached, existing
from lamina.data.examples import Data, Examples, split_rows
from lamina.errors import LaminaError, ShapeError, require
from lamina.recipe import Node, build
from lamina.registry import Slot, register

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@register("data")
def images(
    source: str | Path,
    batch: int = 64,
    *,
    labels: str | Path | None = None,
    pixels: str = "images",
    channels_last: bool = True,
    channels: Literal[1, 3] = 3,
    size: int | None = None,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    split: float = 0.1,
    seed: int = 0,
) -> Data:
    """Labelled images: `pixel_values` (B, C, H, W) float32 and `labels` (B,) int64.

    The pixels stay bytes, in memory or memory-mapped (.npy, plain idx, folders), and are converted batch by batch.

    Args:
        source: .npz, .npy or idx file (.gz too) of (N, H, W) or (N, H, W, C), or a folder with a sub-folder a class.
        batch: global batch size.
        labels: name of the array in the .npz (default `labels`), else the .npy or idx file with the labels (N,).
        pixels: name of the pixel array in a .npz.
        channels_last: False for arrays of (N, C, H, W).
        channels: of a folder's images: 1 = grey, 3 = colour; arrays have their own.
        size: a folder's images are scaled and cropped to this square; None = they are all of one size.
        mean: subtracted after bytes are scaled to 0..1 (one, or one a channel); float pixels are not scaled.
        std: divided by.
        split: evaluation's share of the rows, drawn with `seed`.
        seed: of the draw.
    Raises:
        LaminaError: a file is missing, damaged or pickled, or labels are not whole numbers from 0.
        ShapeError: pixels and labels do not fit each other.
    """
    path = existing(source, "the image source")
    if path.is_dir():
        values, targets = _folder(path, channels, size)
    else:
        values, targets = _arrays(path, pixels, labels)
    whole = Images(values, targets, channels_last=channels_last, mean=mean, std=std)
    train, held = split_rows(len(whole), split, seed)
    return Data(whole.select(train), whole.select(held) if split else None, batch, whole.sizes, "images")


class Images:
    """Images with a class each; a batch is normalised when it is fetched.

    Args:
        pixels: (N, H, W), (N, H, W, C), or (N, C, H, W) with `channels_last=False`; bytes, or floats.
        labels: (N,) whole numbers from 0.
        rows: the rows that belong to this part; None = all.
    """

    def __init__(
        self,
        pixels: Array,
        labels: Array,
        *,
        channels_last: bool = True,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        rows: Tensor | None = None,
    ) -> None:
        if pixels.ndim not in (3, 4) or labels.shape != pixels.shape[:1]:
            raise ShapeError(f"images are (N, H, W) or (N, H, W, C) with N labels, got {pixels.shape} {labels.shape}")
        if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
            raise LaminaError(f"pixels must be bytes (uint8) or floats, got {pixels.dtype}")
        self.pixels = pixels
        self.labels = whole_labels(labels)
        self.channels_last = channels_last
        self.rows = torch.arange(len(pixels)) if rows is None else rows
        self.mean = _per_channel(mean, self.sizes["channels"], "mean")
        self.std = _per_channel(std, self.sizes["channels"], "std")
        if not bool((self.std > 0).all()):
            raise LaminaError(f"std must be above 0, got {self.std.flatten().tolist()}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> dict[str, Any]:
        """Return `classes`, `channels` and `image` (the side, or (height, width))."""
        shape = self.pixels.shape[1:]
        channels = 1 if len(shape) == 2 else shape[-1] if self.channels_last else shape[0]
        height, width = shape[:2] if len(shape) == 2 or self.channels_last else shape[1:]
        side = height if height == width else (height, width)
        return {"classes": int(self.labels.max()) + 1, "channels": channels, "image": side}

    def select(self, rows: Tensor) -> Images:
        """Return the part with these of its rows; the pixels are shared."""
        part = object.__new__(Images)
        part.__dict__.update(self.__dict__)
        part.rows = self.rows[rows]
        return part

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return `pixel_values` (B, C, H, W) float32 and `labels` (B,)."""
        rows = self.rows[indices]
        # A copy in the machine's byte order: idx files hold big-endian numbers.
        values = torch.from_numpy(self.pixels[rows.numpy()].astype(self.pixels.dtype.newbyteorder("="), order="C"))
        if values.dim() == 3:
            values = values.unsqueeze(1)
        elif self.channels_last:
            values = values.permute(0, 3, 1, 2)
        scaled = values.float() / 255 if values.dtype == torch.uint8 else values.float()
        return {"pixel_values": ((scaled - self.mean) / self.std).contiguous(), "labels": self.labels[rows]}


@register(
    "data", source="Simard, Steinkraus, Platt, Best practices for convolutional neural networks (2003), section 2"
)
def elastically_deformed(
    data: Annotated[Node | Data, Slot("data")], alpha: float = 20.0, sigma: float = 4.0, *, seed: int = 0
) -> Data:
    """Another data set of images, each training batch deformed anew by `elastic_deformation`; evaluation is as it was.

    The displacements are drawn from the seed and the rows of the batch: another batch is deformed in other ways, and
    resuming gives the very same images.

    Args:
        data: with `pixel_values` (B, C, H, W), or its recipe node.
        alpha, sigma: see `elastic_deformation`; the defaults are for images of 28 x 28.
        seed: of the displacements.
    Raises:
        LaminaError: a negative alpha, a sigma that is not above 0. ShapeError: (at the batch) no images.
    """
    _check_elastic(alpha, sigma)
    given: Data = data if isinstance(data, Data) else build(data, "data")
    return replace(given, train=Deformed(given.train, alpha, sigma, seed))


class Deformed:
    """Examples whose images are deformed when a batch is fetched; args as in `elastically_deformed`."""

    def __init__(self, examples: Examples, alpha: float, sigma: float, seed: int) -> None:
        self.examples, self.alpha, self.sigma, self.seed = examples, alpha, sigma, seed

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows, their `pixel_values` deformed."""
        found = self.examples.batch(indices)
        if "pixel_values" not in found:
            raise ShapeError(f"elastic deformation needs images, 'pixel_values', in the batch, it has {sorted(found)}")
        rows = indices.numpy().astype("<i8").tobytes()
        digest = hashlib.blake2b(f"{self.seed}:".encode() + rows, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return {**found, "pixel_values": elastic_deformation(found["pixel_values"], self.alpha, self.sigma, generator)}


def elastic_deformation(
    images: Tensor, alpha: float = 20.0, sigma: float = 4.0, generator: torch.Generator | None = None
) -> Tensor:
    """Move the pixels of each image by a smooth random field of its own: (B, C, H, W) -> same.

    Displacements are uniform in -1..1, blurred by a Gaussian cut at four deviations (zeros outside the image), times
    alpha; pixels between pixels are interpolated linearly, and what comes from outside the image is 0. The whole batch
    at once.

    Args:
        alpha: factor of the displacements, pixels; at least 0.
        sigma: standard deviation of the blur, pixels; above 0.
        generator: of the displacements; None = torch's own.
    Raises:
        LaminaError: alpha or sigma out of range. ShapeError: no floating-point (B, C, H, W).
    Source: Simard, Steinkraus, Platt (2003), section 2; as scipy's gaussian_filter and map_coordinates, order 1.
    Example:
        >>> elastic_deformation(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """
    _check_elastic(alpha, sigma)
    if images.dim() != 4 or not images.is_floating_point():
        raise ShapeError(f"images must be floating-point (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    count, _, height, width = images.shape
    here = images.device if generator is None else generator.device
    field = torch.rand(count, 2, height, width, generator=generator, device=here).to(images.device).mul_(2).sub_(1)
    down, across = _blur(height, sigma).to(field), _blur(width, sigma).to(field)
    # In units of the image, x before y, as grid_sample wants it: the centres of n cells are at (2 i + 1) / n - 1.
    cells = field.new_tensor([width, height])[:, None, None]
    centres = torch.meshgrid(_centres(width), _centres(height), indexing="xy")
    field = (down @ field @ across).mul_(2 * alpha / cells).add_(torch.stack(centres).to(field))
    found = F.grid_sample(images.float(), field.permute(0, 2, 3, 1), align_corners=False)
    inside = (field.abs() <= 1 - 1 / cells + 1e-6).all(1, keepdim=True)
    return (found * inside).to(images.dtype)


def _centres(length: int) -> Tensor:
    return (2 * torch.arange(length, dtype=torch.float32) + 1) / length - 1


@functools.cache
def _blur(length: int, sigma: float) -> Tensor:
    """The matrix (length, length), symmetric, that blurs a line of cells with zeros beyond its ends."""
    reach = int(4.0 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = (-0.5 * (offsets / sigma).square()).exp()
    weights = weights / weights.sum()
    apart = torch.arange(length)[:, None] - torch.arange(length)
    return torch.where(apart.abs() <= reach, weights[(apart.clamp(-reach, reach) + reach)], 0.0)


def _check_elastic(alpha: float, sigma: float) -> None:
    if not alpha >= 0 or not sigma > 0:
        raise LaminaError(f"alpha must be at least 0 and sigma above 0, got {alpha} and {sigma}")


def whole_labels(labels: Array) -> Tensor:
    """Return class numbers (N,) as int64.

    Raises:
        LaminaError: there is none, or they are not whole numbers from 0.
    """
    if not labels.size:
        raise LaminaError("the data set has no row")
    if labels.dtype.kind not in "iuf" or labels.min() < 0 or (labels != np.floor(labels)).any():
        raise LaminaError(f"labels must be whole numbers from 0, got {labels.dtype} such as {labels[:5].tolist()}")
    return torch.from_numpy(labels.astype(np.int64))


def decode(files: Iterable[tuple[str, bytes]], channels: int = 3, size: int | None = None) -> Iterable[Array]:
    """Decode (name, file content) pairs into byte arrays (H, W) or (H, W, 3), all of one size.

    Raises:
        LaminaError: a file is no image, or its size differs from the first's and `size` is None.
    """
    if size is not None and size < 1:
        raise LaminaError(f"size must be at least 1, got {size}")
    pillow = require("PIL.Image", "images")
    fit = require("PIL.ImageOps", "images").fit
    first: tuple[str, tuple[int, ...]] | None = None
    for name, content in files:
        try:
            picture = _eight_bits(pillow.open(io.BytesIO(content)), name).convert("L" if channels == 1 else "RGB")
        except (OSError, SyntaxError) as error:
            raise LaminaError(f"{name!r} cannot be read as an image: {error}") from error
        array = np.asarray(picture if size is None else fit(picture, (size, size)))
        first = first or (name, array.shape)
        if array.shape != first[1]:
            raise LaminaError(f"{name!r} is {array.shape} but {first[0]!r} is {first[1]}: give one size, as size=64")
        yield array


def _eight_bits(picture: Any, name: str) -> Any:
    """Bring grey images of 16 bits to 8: Pillow's own conversion would cut everything above 255 off."""
    if picture.mode in ("I", "F"):
        raise LaminaError(f"{name!r} has pixels of 32 bits without a known range: store it with 8 or 16 bits")
    if not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture).astype(np.uint16)
    return require("PIL.Image", "images").fromarray((values >> 8).astype(np.uint8))


def decoded(files: Sequence[tuple[str, bytes]], channels: int = 3, size: int | None = None) -> Array:
    """Decode image files once into a memory-mapped array of the cache folder, named by their content."""
    key = hashlib.blake2b(f"{channels} {size}".encode(), digest_size=16)
    for _, content in files:
        key.update(hashlib.blake2b(content, digest_size=16).digest())

    def write(file: IO[bytes]) -> None:
        np.save(file, np.stack(list(decode(files, channels, size))), allow_pickle=False)

    return npy(cached(f"images/{key.hexdigest()}.npy", write))


def _arrays(path: Path, pixels: str, labels: str | Path | None) -> tuple[Array, Array]:
    if path.suffix == ".npz":
        values, targets = npz(path, [pixels, str(labels or "labels")])
        return values, targets
    if labels is None:
        raise LaminaError(f"{path.name!r} holds pixels only: give the file of the labels, as labels=...")
    return _one(path), _one(existing(labels, "the label file"))


def _one(path: Path) -> Array:
    if path.suffix == ".npy":
        return npy(path)
    if is_idx(path):
        return idx(path)
    raise LaminaError(f"images are read from .npz, .npy, idx files or a folder, not from {path.name!r}")


def _folder(path: Path, channels: int, size: int | None) -> tuple[Array, Array]:
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [
        (i, file)
        for i, name in enumerate(classes)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    ]
    empty = set(range(len(classes))) - {i for i, _ in found}
    if not classes or empty:
        what = f"the class {classes[min(empty)]!r} of it has none" if empty else "it has no sub-folder"
        raise LaminaError(f"{str(path)!r} must have one sub-folder of images a class; {what}")
    values = decoded([(str(file), file.read_bytes()) for _, file in found], channels, size)
    return values, np.array([i for i, _ in found])


def _per_channel(value: float | Sequence[float], channels: int, what: str) -> Tensor:
    values = torch.as_tensor(value, dtype=torch.float32).reshape(-1)
    if len(values) not in (1, channels):
        raise ShapeError(
            f"{what} has {len(values)} values for {channels} channels (channels_last=False swaps the axes)"
        )
    return values.reshape(1, -1, 1, 1)
