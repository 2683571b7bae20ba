"""Each row's number, for what is kept by row: cached teacher outputs, memories of embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from lamina.data._wrapped import Wrapped
from lamina.data.examples import Data, Examples
from lamina.recipe import Node, build
from lamina.registry import Slot, register


@register("data")
def indexed(data: Annotated[Node | Data, Slot("data")]) -> Data:
    """Another data set, with each row's number in the batch: `index` (B,) int64.

    Training rows are numbered from 0; those of the evaluation follow, so that no number is given twice.

    Args:
        data: or its recipe node.
    """
    given: Data = data if isinstance(data, Data) else build(data, "data")
    held = None if given.evaluation is None else Indexed(given.evaluation, len(given.train))
    return replace(given, train=Indexed(given.train), evaluation=held)


class Indexed(Wrapped):
    """Examples with `index` in every batch, counted from `start`."""

    def __init__(self, examples: Examples, start: int = 0) -> None:
        super().__init__(examples)
        self.start = start

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows with their numbers."""
        return {**self.examples.batch(indices), "index": indices.to(torch.int64) + self.start}
