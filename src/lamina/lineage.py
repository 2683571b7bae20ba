"""How a new parameter was made from old ones, so that the optimizer's state can follow a rewrite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from lamina.errors import ShapeError


@dataclass(frozen=True)
class Origin:
    """One old parameter a new one came from; `index[i]` is the old row of new row i, -1 = not from here."""

    old: Parameter
    index: Tensor | None


class Lineage:
    """Record of which new parameters were derived from which old ones during one rewrite.

    A parameter object that is still in the model after the rewrite needs no entry: its state is kept.
    A new parameter without an entry starts fresh, and the trainer reports it.
    """

    def __init__(self) -> None:
        self._origins: dict[int, tuple[Parameter, list[Origin]]] = {}

    def derive(self, new: Parameter, old: Parameter, index: Tensor | list[int] | None = None) -> None:
        """Say that `new` was made from rows (dimension 0) of `old`.

        Call it again with another `old` for a parameter stacked out of several. State tensors of the
        optimizer follow by the same rows; rows at -1 start at zero.

        Args:
            index: the old row of each new row, -1 = fresh; None = all rows, in order.
        Raises:
            ShapeError: the index does not fit, or the trailing shapes differ.
        """
        rows = None if index is None else torch.as_tensor(index, dtype=torch.long, device="cpu")
        if rows is None:
            if new.shape != old.shape:
                raise ShapeError(
                    f"derive without an index needs equal shapes, got new {tuple(new.shape)} and old {tuple(old.shape)}"
                )
        elif rows.shape != new.shape[:1] or new.shape[1:] != old.shape[1:]:
            raise ShapeError(
                f"derive got an index of {tuple(rows.shape)} rows for new {tuple(new.shape)} and old {tuple(old.shape)}"
            )
        elif rows.numel() and (int(rows.max()) >= old.shape[0] or int(rows.min()) < -1):
            raise ShapeError(f"derive got rows outside -1..{old.shape[0] - 1} of old {tuple(old.shape)}")
        self._origins.setdefault(id(new), (new, []))[1].append(Origin(old, rows))

    def origins(self, new: Parameter) -> list[Origin]:
        """List what `new` was derived from, in the order it was said; empty = fresh (or simply kept)."""
        return self._origins.get(id(new), (new, []))[1]

    def carry(self, new: Parameter, states: dict[Parameter, Tensor]) -> Tensor | None:
        """Build the state tensor of `new` (shaped like it) from the old parameters' state tensors.

        Returns None where no origin of `new` has a state.
        """
        result: Tensor | None = None
        for origin in self.origins(new):
            state = states.get(origin.old)
            if state is None:
                continue
            if result is None:
                result = state.new_zeros(new.shape)
            if origin.index is None:
                result.copy_(state)
                continue
            index = origin.index.to(state.device)
            kept = index >= 0
            result[kept] = state[index[kept]]
        return result

    def __iter__(self) -> Iterator[tuple[Parameter, list[Origin]]]:
        return iter(self._origins.values())

    def __len__(self) -> int:
        return len(self._origins)
