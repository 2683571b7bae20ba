"""Several views of each row, cropped and cut out at random, for objectives that compare rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from lamina.data.examples import Data, Examples
from lamina.errors import LaminaError, ShapeError, nearest
from lamina.recipe import Node, build
from lamina.registry import Slot, register

Augmentation = Literal["crop", "cutout"]


@register("data", source="Chen et al., SimCLR (2020), arXiv 2002.05709; DeVries and Taylor (2017), arXiv 1708.04552")
def augmented_views(
    data: Annotated[Node | Data, Slot("data")],
    count: int = 2,
    *,
    augment: Sequence[Augmentation] = ("crop", "cutout"),
    entry: str = "pixel_values",
    seed: int = 0,
) -> Data:
    """Another data set, each image or volume of a batch seen in several ways; evaluation too, where views are several.

    The entry becomes (B, count, C, ...), for models that take views (`each_view` lets any encoder). What is drawn
    depends on the seed, the epoch and the row: resuming, or another number of processes, gives the very same views, and
    every evaluation compares the same ones.

    Args:
        data: with images (B, C, H, W) or volumes (B, C, D, H, W), or its recipe node.
        count: views of each row; 1 = training rows augmented, without a dimension for views, and evaluation as it was.
        augment: in this order: "crop", see `shifted_crop`, and "cutout", see `cutout`; none = equal views.
        entry: which of the batch.
        seed: of the draws.
    Raises:
        LaminaError: no view, or an unknown augmentation; (at the batch) no such entry.
    """
    given: Data = data if isinstance(data, Data) else build(data, "data")
    train, evaluation = in_views(given.train, given.evaluation, count, augment, entry, seed)
    return replace(given, train=train, evaluation=evaluation)


def in_views(
    train: Examples, evaluation: Examples | None, count: int, augment: Sequence[str], entry: str, seed: int
) -> tuple[Examples, Examples | None]:
    """Show training in `count` views, and evaluation where they are several: what compares views needs them there."""
    check_views(count, augment)
    if count == 1 and not augment:
        return train, evaluation
    held = Views(evaluation, count, augment, entry, seed) if evaluation is not None and count > 1 else evaluation
    return Views(train, count, augment, entry, seed), held


class Views:
    """Examples that are seen in several ways when a batch is fetched; args as in `augmented_views`."""

    def __init__(self, examples: Examples, count: int, augment: Sequence[str], entry: str, seed: int) -> None:
        check_views(count, augment)
        self.examples, self.count, self.augment, self.entry, self.seed = examples, count, tuple(augment), entry, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.examples)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from here on; a loader says it."""
        self.epoch = epoch
        if (tell := getattr(self.examples, "set_epoch", None)) is not None:
            tell(epoch)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows, the entry in `count` views."""
        found = self.examples.batch(indices)
        if self.entry not in found:
            raise LaminaError(f"augmented_views finds no {self.entry!r} in the batch, which has {sorted(found)}")
        seen = []
        for row, x in zip(indices.tolist(), found[self.entry].split(1), strict=True):
            digest = hashlib.blake2b(f"{self.seed}:{self.epoch}:{row}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            seen.append(views_of(x, self.count, self.augment, generator))
        return {**found, self.entry: torch.cat(seen)}


def views_of(
    x: Tensor, count: int, augment: Sequence[str] = ("crop", "cutout"), generator: torch.Generator | None = None
) -> Tensor:
    """Return `count` views of every row, each drawn for itself: (B, C, ...) -> (B, count, C, ...); as x for 1."""
    check_views(count, augment)
    seen = x.repeat_interleave(count, 0)
    for name in augment:
        seen = AUGMENTATIONS[name](seen, generator=generator)
    return seen if count == 1 else seen.unflatten(0, (len(x), count))


def shifted_crop(x: Tensor, share: float = 0.125, generator: torch.Generator | None = None) -> Tensor:
    """Pad with zeros and crop to the size again, at a place of each row's own: (B, C, ...) -> same.

    Args:
        share: of each side, by which a row is moved at most, 0..1.
        generator: of the moves; None = torch's own.
    """
    _check_rows(x, "shifted_crop", share)
    for axis in range(2, x.dim()):
        side = x.shape[axis]
        reach = round(side * share)
        move = torch.randint(-reach, reach + 1, (len(x), 1), generator=generator).to(x.device)
        places = torch.arange(side, device=x.device) + move
        inside = (places >= 0) & (places < side)
        shape = [len(x), *(1,) * (axis - 1), side, *(1,) * (x.dim() - axis - 1)]
        index = places.clamp(0, side - 1).reshape(shape).expand(x.shape)
        x = x.gather(axis, index) * inside.reshape(shape)
    return x


def cutout(
    x: Tensor, share: float = 0.25, probability: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Set a box at a random place to zero, in some of the rows: (B, C, ...) -> same.

    Args:
        share: side of the box, of the image's, 0..1; 32 of 121 voxels in the official code.
        probability: that a row has one, 0..1.
        generator: of the places; None = torch's own.
    """
    _check_rows(x, "cutout", share)
    if not 0 <= probability <= 1:
        raise LaminaError(f"the probability of cutout must be in 0..1, got {probability}")
    kept = torch.rand(len(x), generator=generator).to(x.device) < probability
    box = kept.reshape(-1, *(1,) * (x.dim() - 1))
    for axis in range(2, x.dim()):
        side = x.shape[axis]
        wide = max(round(side * share), 1)
        start = torch.randint(side - wide + 1, (len(x), 1), generator=generator).to(x.device)
        places = torch.arange(side, device=x.device) - start
        inside = (places >= 0) & (places < wide)
        box = box & inside.reshape(len(x), *(1,) * (axis - 1), side, *(1,) * (x.dim() - axis - 1))
    return x.masked_fill(box, 0.0)


AUGMENTATIONS: dict[str, Any] = {"crop": shifted_crop, "cutout": cutout}


def check_views(count: int, augment: Sequence[str]) -> None:
    """Refuse a number of views below 1, and augmentations that there are not."""
    if count < 1:
        raise LaminaError(f"views must be at least 1, got {count}")
    for name in augment:
        if name not in AUGMENTATIONS:
            known = ", ".join(AUGMENTATIONS)
            raise LaminaError(f"no augmentation is called {name!r}{nearest(name, AUGMENTATIONS)}; known: {known}")


def _check_rows(x: Tensor, what: str, share: float) -> None:
    if x.dim() < 3 or not x.is_floating_point():
        raise ShapeError(f"{what} takes floating-point (B, C, ...) with sides, got {x.dtype} {tuple(x.shape)}")
    if not 0 <= share <= 1:
        raise LaminaError(f"the share of {what} must be in 0..1, got {share}")
