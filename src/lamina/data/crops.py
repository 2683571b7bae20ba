"""Random crops of images, resized and mirrored: drawn as boxes, so that a crop can be written down and cut again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from lamina.data._wrapped import Wrapped
from lamina.data.examples import Data, Examples
from lamina.errors import LaminaError, ShapeError, nearest
from lamina.recipe import Node, build
from lamina.registry import Slot, register

ATTEMPTS = 10
"""Draws of a size before a crop is the middle of the image, as in torchvision."""
LARGEST_SIDE = 2**14
"""Of an image, so that boxes are 16-bit numbers."""


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How crops are drawn."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a crop's area, as a share of the image's; above 0, to 1."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of its width over its height, drawn evenly in the logarithm."""
    flip: float = 0.5
    """Share of the crops that are mirrored, 0..1."""
    padding: int = 0
    """Pixels of zeros around the image that a crop may reach into, at least 0."""
    size: int | None = None
    """Side that crops are resized to, in pixels; None = the image's own sides."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Crops:
        """Build from a recipe's options.

        Raises:
            LaminaError: there is no such option.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise LaminaError(f"crops have no option {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, (list, tuple)) else v for n, v in options.items()}
        return cls(**given)

    def __post_init__(self) -> None:
        """Refuse ranges that are none."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise LaminaError(
                f"scale must be a range within 0..1 and ratio one above 0, got {self.scale}, {self.ratio}"
            )
        if not 0 <= self.flip <= 1 or self.padding < 0 or (self.size is not None and self.size < 1):
            raise LaminaError(f"flip must be in 0..1, padding >= 0, size >= 1, got {self.flip}, {self.padding}, {self.size}")  # fmt: skip  # noqa: E501

    def draw(
        self, rows: Sequence[int], sides: tuple[int, int], count: int = 1, key: str = "0"
    ) -> tuple[Tensor, Tensor]:
        """Draw `count` crops for each row: boxes (B, count, 4) int16, flips (B, count) bool.

        A box is top, left, height, width in pixels; with padding, top and left may be negative. What is drawn for a row
        depends on the key and its number alone.

        Args:
            sides: of the images, (height, width).
            key: of the draws: a seed, an epoch.
        Raises:
            ShapeError: a side of no pixel, or of more than 16,384.
        Source: Szegedy et al., Going deeper with convolutions (2015), section 6, as torchvision's RandomResizedCrop.
        """
        height, width = sides
        if not 0 < min(sides) <= max(sides) + 2 * self.padding <= LARGEST_SIDE:
            raise ShapeError(
                f"crops are drawn from images of 1 to {LARGEST_SIDE} pixels a side, got {height} x {width}"
            )
        drawn = torch.stack([torch.rand(count, 2 * ATTEMPTS + 3, generator=_generator(key, r)) for r in rows])
        area = height * width * _between(drawn[..., :ATTEMPTS], *self.scale)
        low, high = torch.tensor(self.ratio).log().tolist()
        ratio = _between(drawn[..., ATTEMPTS : 2 * ATTEMPTS], low, high).exp()
        wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
        # The first that fits; else the largest part of the image whose ratio is allowed.
        first = fits.int().argmax(-1, keepdim=True)
        middle = _middle(height, width, self.ratio)
        found = fits.any(-1)
        tall = torch.where(found, tall.gather(-1, first).squeeze(-1), float(middle[0]))
        wide = torch.where(found, wide.gather(-1, first).squeeze(-1), float(middle[1]))
        place, flips = drawn[..., -3:-1], drawn[..., -1] < self.flip
        room = torch.stack([height - tall, width - wide], -1) + 2 * self.padding
        corner = (place * (room + 1)).floor().minimum(room) - self.padding
        centred = (torch.stack([height - tall, width - wide], -1) / 2).floor()
        corner = torch.where(found.unsqueeze(-1), corner, centred)
        return torch.cat([corner, torch.stack([tall, wide], -1)], -1).to(torch.int16), flips


def crop(images: Tensor, boxes: Tensor, flips: Tensor, size: int | None = None) -> Tensor:
    """Cut a box out of each image, resize it, mirror it where asked: (B, C, H, W) -> (B, C, size, size).

    Bilinear with antialiasing, as `torch.nn.functional.interpolate(antialias=True)` of every crop for itself; here the
    whole batch at once, by a matrix for each side. A box of the size asked for is cut out to the bit.

    Args:
        boxes: (B, 4), as `Crops.draw` makes them; what lies outside the image is 0.
        flips: (B,) bool.
        size: None = H and W.
    Raises:
        ShapeError: no floating-point (B, C, H, W), or another number of boxes.
    Example:
        >>> image, box = torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([[0, 0, 2, 2]])
        >>> crop(image, box, torch.tensor([True]))[0, 0].tolist()
        [[1.0, 0.0], [3.0, 2.0]]
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ShapeError(f"crops are cut out of floating-point images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")  # fmt: skip  # noqa: E501
    if boxes.shape != (len(images), 4) or flips.shape != (len(images),):
        raise ShapeError(f"{len(images)} images need as many boxes (B, 4) and flips (B,), got {tuple(boxes.shape)}, {tuple(flips.shape)}")  # fmt: skip  # noqa: E501
    top, left, tall, wide = boxes.to(images.device).float().unbind(1)
    down = _resampling(top, tall, images.shape[2], size or images.shape[2])
    across = _resampling(left, wide, images.shape[3], size or images.shape[3])
    across = torch.where(flips.to(images.device)[:, None, None], across.flip(1), across)
    cut = down.unsqueeze(1) @ images.float() @ across.mT.unsqueeze(1)
    return cut.to(images.dtype)


@register("data", source="Szegedy et al., Going deeper with convolutions (2015), section 6")
def random_crops(
    data: Annotated[Node | Data, Slot("data")],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    padding: int = 0,
    size: int | None = None,
    entry: str = "pixel_values",
    seed: int = 0,
) -> Data:
    """Another data set, each training image a crop of itself, resized and mirrored at random, anew in every epoch.

    The defaults are the usual augmentation of ImageNet; `scale: [1, 1], ratio: [1, 1], padding: 2` moves images by up
    to two pixels. What is drawn depends on the seed, the epoch and the row. The evaluation is resized where a size is
    given, and otherwise as it was.

    Args:
        data: of images (B, C, H, W), or its recipe node.
        scale, ratio, flip, padding, size: see `Crops`.
        entry: of the batch.
        seed: of the draws.
    Raises:
        LaminaError: a range that is none; (at the batch) no such entry. ShapeError: (at the batch) no images.
    """
    given: Data = data if isinstance(data, Data) else build(data, "data")
    crops = Crops(scale=scale, ratio=ratio, flip=flip, padding=padding, size=size)
    held, sizes = given.evaluation, dict(given.sizes)
    if size is not None:
        held = None if held is None else Resized(held, size, entry)
        sizes["image"] = size
    return replace(given, train=RandomCrops(given.train, crops, entry, seed), evaluation=held, sizes=sizes)


class RandomCrops(Wrapped):
    """Examples whose images are cropped when a batch is fetched; args as in `random_crops`."""

    def __init__(self, examples: Examples, crops: Crops, entry: str = "pixel_values", seed: int = 0) -> None:
        super().__init__(examples)
        self.crops, self.entry, self.seed, self.epoch = crops, entry, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from here on; a loader says it."""
        self.epoch = epoch
        if (tell := getattr(self.examples, "set_epoch", None)) is not None:
            tell(epoch)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows, the entry cropped."""
        found = self.examples.batch(indices)
        images = images_of(found, self.entry, "random_crops")
        boxes, flips = self.crops.draw(indices.tolist(), sides_of(images), key=f"{self.seed}:{self.epoch}")
        return {**found, self.entry: crop(images, boxes[:, 0], flips[:, 0], self.crops.size)}


class Resized(Wrapped):
    """Examples whose images are resized, whole, to a square of `size` pixels."""

    def __init__(self, examples: Examples, size: int, entry: str = "pixel_values") -> None:
        super().__init__(examples)
        self.size, self.entry = size, entry

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows, the entry resized."""
        found = self.examples.batch(indices)
        images = images_of(found, self.entry, "random_crops")
        whole = torch.tensor([0, 0, *sides_of(images)]).expand(len(images), 4)
        return {**found, self.entry: crop(images, whole, torch.zeros(len(images), dtype=torch.bool), self.size)}


def images_of(batch: dict[str, Tensor], entry: str, what: str) -> Tensor:
    """Return the images of a batch.

    Raises:
        LaminaError: there is no such entry. ShapeError: it is not (B, C, H, W).
    """
    if entry not in batch:
        raise LaminaError(f"{what} finds no {entry!r} in the batch, which has {sorted(batch)}")
    if batch[entry].dim() != 4:
        raise ShapeError(f"{what} takes images (B, C, H, W), got {tuple(batch[entry].shape)}")
    return batch[entry]


def sides_of(images: Tensor) -> tuple[int, int]:
    """Return the height and the width of images (B, C, H, W)."""
    return images.shape[2], images.shape[3]


def _generator(key: str, row: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{key}:{row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * share


def _middle(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Return height and width of the largest part of the image whose ratio is in the range."""
    own = width / height
    if own < ratio[0]:
        return max(min(round(width / ratio[0]), height), 1), width
    if own > ratio[1]:
        return height, max(min(round(height * ratio[1]), width), 1)
    return height, width


def _resampling(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Return the matrices (B, target, source) that resize `length` cells from `start` on to `target` cells."""
    scale = (length / target)[:, None, None]
    first, last = min(int(start.min()), 0), max(int((start + length).max()), source)
    cells = torch.arange(first, last, device=start.device, dtype=torch.float32)
    centres = start[:, None, None] + (torch.arange(target, device=start.device)[:, None] + 0.5) * scale - 0.5
    weights = (1 - (cells - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((cells >= start[:, None, None]) & (cells < (start + length)[:, None, None]))
    # Cells outside the image weigh as well: they are zeros, as in a padded image.
    return (weights / weights.sum(-1, keepdim=True))[..., -first : source - first]
