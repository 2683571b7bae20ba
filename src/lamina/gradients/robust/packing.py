"""Gradients of one dtype as one vector that splits evenly over the workers, and what in it belongs together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Packed:
    """A vector of several gradients, in the mapping's order, padded with zeros to a multiple of `workers`."""

    def __init__(self, gradients: Mapping[str, tuple[int, Tensor]], workers: int) -> None:
        self.shapes = {name: gradient.shape for name, (_, gradient) in gradients.items()}
        self.ends: list[tuple[int, int]] = []
        """(layer, end) of each run of gradients of one layer."""
        end = 0
        for layer, gradient in gradients.values():
            end += gradient.numel()
            if self.ends and self.ends[-1][0] == layer:
                self.ends.pop()
            self.ends.append((layer, end))
        self.width = -(-end // workers)
        first = next(iter(gradients.values()))[1]
        flat = first.new_empty(self.width * workers)
        torch.cat([gradient.reshape(-1) for _, gradient in gradients.values()], out=flat[:end])
        flat[end:] = 0
        self._flat: Tensor | None = flat

    def take(self) -> Tensor:
        """Return the vector, and keep it no longer."""
        assert self._flat is not None
        flat, self._flat = self._flat, None
        return flat

    def pieces(self, rank: int) -> list[tuple[int, slice]]:
        """List the runs inside a worker's slice: (layer, columns of the slice)."""
        low, found, start = rank * self.width, [], 0
        for layer, end in self.ends:
            a, b = max(start, low), min(end, low + self.width)
            if a < b:
                found.append((layer, slice(a - low, b - low)))
            start = end
        return found

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a vector, by name, in the gradients' shapes."""
        result, at = {}, 0
        for name, shape in self.shapes.items():
            result[name] = flat[at : at + shape.numel()].view(shape)
            at += shape.numel()
        return result


def all_finite(gradient: Tensor) -> bool:
    """Say whether there is no NaN and no infinity."""
    if not gradient.numel():
        return True
    low, high = gradient.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
