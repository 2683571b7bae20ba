"""An output projection that is the token embedding, and stays it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class TiedHead(nn.Module):
    """For models with an `embedding` and a `head`: `tie_weights()` makes their weights one, and moves keep them so."""

    embedding: nn.Module
    head: nn.Module

    def tie_weights(self) -> None:
        """Make the output projection the token embedding (again, after loading replaced either)."""
        self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch gives each module its own new parameter when the device type changes, as to_empty() after meta does.
        tied = getattr(self.head, "weight", None) is getattr(self.embedding, "weight", self)
        super()._apply(fn, recurse)
        if tied:
            self.tie_weights()
        return self
