"""Every image four times, turned by quarters, for what learns from telling them apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from lamina.data._wrapped import Wrapped
from lamina.data.examples import Data, Examples
from lamina.errors import LaminaError, ShapeError
from lamina.recipe import Node, build
from lamina.registry import Slot, register


@register("data", source="Gidaris et al., Unsupervised representation learning by predicting image rotations (2018)")
def rotated(data: Annotated[Node | Data, Slot("data")], *, entry: str = "pixel_values") -> Data:
    """Another data set, each training image followed by itself turned by 90, 180 and 270 degrees.

    A batch of B rows becomes one of 4 B; `rotation` (4 B,) counts the quarters, 0 for the image itself. Turned images
    have the label -100: they count for nothing where labels are asked for. The evaluation stays as it is.

    Args:
        data: of square images (B, C, H, H), or its recipe node.
        entry: of the batch.
    Raises:
        LaminaError: (at the batch) no such entry.
        ShapeError: (at the batch) it is not of square images.
    """
    given: Data = data if isinstance(data, Data) else build(data, "data")
    return replace(given, train=Rotated(given.train, entry))


class Rotated(Wrapped):
    """Examples of which a batch holds every row four times; args as in `rotated`."""

    def __init__(self, examples: Examples, entry: str = "pixel_values") -> None:
        super().__init__(examples)
        self.entry = entry

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows in groups of four."""
        found = self.examples.batch(indices)
        images = found.get(self.entry)
        if images is None:
            raise LaminaError(f"rotated finds no {self.entry!r} in the batch, which has {sorted(found)}")
        if images.dim() != 4 or images.shape[2] != images.shape[3]:
            raise ShapeError(f"rotated turns square images (B, C, H, H), got {tuple(images.shape)}")
        batch = {name: values.repeat_interleave(4, 0) for name, values in found.items()}
        turns = [images.rot90(k, (2, 3)) for k in range(4)]
        batch[self.entry] = torch.stack(turns, 1).flatten(0, 1)
        batch["rotation"] = torch.arange(4).repeat(len(images))
        if "labels" in batch:
            batch["labels"] = batch["labels"].masked_fill(batch["rotation"] != 0, -100)
        return batch
