"""What a picture measures, part by part: a stand-in for anatomy where there are only pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from lamina.data._standardize import mean_and_deviation
from lamina.data.examples import Data, Examples
from lamina.errors import LaminaError, ShapeError
from lamina.recipe import Node, build
from lamina.registry import Slot, register

TAKEN = 2048
"""Training rows from which mean and deviation are taken, the first ones."""


@register("data", source="Hu, Visual pattern recognition by moment invariants (1962)")
def with_moments(data: Annotated[Node | Data, Slot("data")], grid: int = 2, *, entry: str = "pixel_values") -> Data:
    """Another data set of images, with `moments` (B, grid * grid, 3) beside: see `image_moments`.

    Each measure of each part is standardised over the training rows (the first 2,048), evaluation by the same numbers;
    one that is the same in all of them is only centred.

    Args:
        data: with images (B, C, H, W), or its recipe node.
        grid: parts a side.
        entry: which of the batch.
    Raises:
        LaminaError: no part; (at the batch) no such entry.
    """
    if grid < 1:
        raise LaminaError(f"grid must be at least 1, got {grid}")
    given: Data = data if isinstance(data, Data) else build(data, "data")
    found = _measured(given.train.batch(torch.arange(min(TAKEN, len(given.train)))), grid, entry)
    mean, deviation = (v.to(found.dtype) for v in mean_and_deviation(found))
    parts = [p and Measured(p, grid, entry, mean, deviation) for p in (given.train, given.evaluation)]
    assert parts[0] is not None
    return replace(given, train=parts[0], evaluation=parts[1])


class Measured:
    """Examples whose moments are taken when a batch is fetched."""

    def __init__(self, examples: Examples, grid: int, entry: str, mean: Tensor, deviation: Tensor) -> None:
        self.examples, self.grid, self.entry = examples, grid, entry
        self.mean, self.deviation = mean, deviation

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows, and `moments`."""
        found = self.examples.batch(indices)
        return {**found, "moments": (_measured(found, self.grid, self.entry) - self.mean) / self.deviation}


def image_moments(images: Tensor, grid: int = 2) -> Tensor:
    """Return brightness and centre of mass of each part of an image: (B, C, H, W) -> (B, grid * grid, 3).

    Parts lie in rows, from the top left. Measures: the mean brightness over channels, and how far below and right of
    the part's middle its centre of mass is, from -1 to 1, weighed by brightness above the image's darkest pixel (0
    where all is dark).

    Raises:
        ShapeError: no (B, C, H, W), or fewer pixels a side than parts.
    """
    if images.dim() != 4 or min(images.shape[2:]) < grid:
        raise ShapeError(
            f"image_moments takes (B, C, H, W) of at least {grid} pixels a side, got {tuple(images.shape)}"
        )
    grey = images.float().mean(1)
    above = grey - grey.amin((1, 2), keepdim=True)
    found = []
    for rows, bright in zip(above.tensor_split(grid, 1), grey.tensor_split(grid, 1), strict=True):
        for part, shown in zip(rows.tensor_split(grid, 2), bright.tensor_split(grid, 2), strict=True):
            mass = part.sum((1, 2)).clamp(min=1e-6)
            down, right = (_line(n, part.device) for n in part.shape[1:])
            centre = (part.sum(2) @ down / mass, part.sum(1) @ right / mass)
            found.append(torch.stack([shown.mean((1, 2)), *centre], dim=1))
    return torch.stack(found, dim=1)


def _line(length: int, device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, length, device=device) if length > 1 else torch.zeros(1, device=device)


def _measured(batch: dict[str, Tensor], grid: int, entry: str) -> Tensor:
    if entry not in batch:
        raise LaminaError(f"with_moments finds no {entry!r} in the batch, which has {sorted(batch)}")
    return image_moments(batch[entry], grid)
