"""Digits as sets, for tests: a query (the mean patch) and 16 patches of 2 x 2 pixels with where they stand."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from lamina.data import Columns, Data
from lamina.recipe import Node, build, factory
from lamina.registry import Slot


def patches_of_digits(batch: int = 16) -> Data:
    """Return scikit-learn's digits with `query` (6,) and `keys` (16, 6)."""
    digits = build({"name": "digits", "batch": batch}, "data")

    def told(rows: object, count: int) -> Columns:
        found = rows.batch(torch.arange(count))  # type: ignore[attr-defined]
        pixels = found["pixel_values"].unfold(2, 2, 2).unfold(3, 2, 2).reshape(count, 16, 4) / 2
        places = torch.cartesian_prod(torch.linspace(-0.7, 0.7, 4), torch.linspace(-0.7, 0.7, 4))
        keys = torch.cat([pixels, places.expand(count, -1, -1)], -1)
        return Columns({"query": keys.mean(1), "keys": keys, "labels": found["labels"]})

    return Data(told(digits.train, 160), told(digits.evaluation, 32), batch, {"classes": 10}, "patches_of_digits")


class SetClassifier(nn.Module):
    """A trunk on every item (linear, norm), then what the head makes of the query and the set."""

    def __init__(
        self,
        width: int = 16,
        classes: int = 10,
        linear: Annotated[Node, Slot("layer")] = "linear",
        norm: Annotated[Node, Slot("norm")] = "layer_norm",
        head: Annotated[Node, Slot("layer")] = "random_feature_attention",
    ) -> None:
        super().__init__()
        self.items = nn.Sequential(nn.Linear(6, width), nn.ReLU(), factory("layer", linear)(width, width))
        self.norm = factory("norm", norm)(width)
        self.head = factory("layer", head)(width, out_features=classes)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits (B, classes)."""
        both = self.norm(self.items(torch.cat([query[:, None], keys], 1)))
        return self.head(both[:, 0], both[:, 1:], mask)
