"""Batches without end, in an order that depends on the seed alone, from an exactly known position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lamina.data.examples import Examples
from lamina.errors import LaminaError


class Loader:
    """Infinite iterator over the batches of a data set; its position is part of a checkpoint.

    Each epoch has its own permutation, drawn from (seed, epoch) alone. A global batch is the next `batch` rows of
    it, and process `rank` of `world` takes rows rank, rank + world, ... of that batch: any number of processes sees
    the same global batches in the same order, and resuming costs one permutation, never a replay.

    Args:
        examples: the rows. Where they have `arrange(order, batch)`, they may order an epoch's permutation anew (rows of
            like lengths into one batch); where they have `set_epoch(epoch)`, they are told it before each batch.
        batch: global batch size, over all processes.
        seed: of the order.
        shuffle: False = rows in their own order, every epoch.
        rank: this process, 0..world-1.
        world: number of processes.
        drop_last: True leaves out the rows of an epoch that do not fill a batch (others, next epoch).
    Raises:
        LaminaError: the batch is larger than the set, smaller than `world`, or the last batch is too short for `world`.
    Example:
        >>> from lamina.data.examples import Columns
        >>> loader = Loader(Columns({"inputs": torch.arange(5)}), 2, shuffle=False)
        >>> [next(loader)["inputs"].tolist() for _ in range(3)]
        [[0, 1], [2, 3], [0, 1]]
    """

    def __init__(
        self,
        examples: Examples,
        batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
    ) -> None:
        _check(len(examples), batch, rank, world, drop_last)
        self.examples = examples
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0
        """Rows of the epoch already handed out, over all processes."""
        self._order: tuple[int, Tensor] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Return how many global batches one epoch has."""
        whole, rest = divmod(len(self.examples), self.batch)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """Return this process's rows of the next global batch."""
        length = len(self.examples)
        if self.position + (self.batch if self.drop_last else 1) > length:
            self.epoch, self.position = self.epoch + 1, 0
        end = min(self.position + self.batch, length)
        rows = self._rows(self.position, end)[self.rank :: self.world]
        self.position = end
        if (tell := getattr(self.examples, "set_epoch", None)) is not None:
            tell(self.epoch)
        return self.examples.batch(rows)

    def once(self) -> Iterator[dict[str, Tensor]]:
        """Go through all rows once, in their own order, last short batch included; see `one_pass`."""
        return one_pass(self.examples, self.batch, rank=self.rank, world=self.world)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the same for every process, whatever their number."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "length": len(self.examples),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of `state`.

        Raises:
            LaminaError: it is of another order (seed, shuffle) or of a data set of another length.
        """
        for key, own in self.state_dict().items():
            if key not in state:
                raise LaminaError(f"the loader's state has no {key!r}, only {sorted(state)}")
            if key in ("seed", "shuffle", "length") and state[key] != own:
                raise LaminaError(f"the loader's state is of {key} {state[key]}, this loader has {key} {own}")
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= len(self.examples):
            raise LaminaError(f"the loader cannot go to row {position} of epoch {epoch}: {len(self.examples)} rows")
        self.epoch, self.position = epoch, position

    def _rows(self, start: int, end: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(start, end)
        if self._order is None or self._order[0] != self.epoch:
            order = permutation(len(self.examples), self.seed, self.epoch)
            arrange = getattr(self.examples, "arrange", None)
            self._order = self.epoch, order if arrange is None else arrange(order, self.batch)
        return self._order[1][start:end].long()


def one_pass(examples: Examples, batch: int, *, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
    """Go through all rows once, in order, no row twice: what evaluation uses.

    Every global batch is shared out as in `Loader`; where the last one has fewer rows than there are processes,
    those without a row end one batch earlier. `batch` may exceed the number of rows.
    """
    _check(len(examples), batch, rank, world, None)
    starts = range(0, len(examples), batch)
    rows = (torch.arange(s + rank, min(s + batch, len(examples)), world) for s in starts if s + rank < len(examples))
    return (examples.batch(r) for r in rows)


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """Return the order (length,) of one epoch; int32 where that is enough, to halve the memory."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(length, generator=generator, dtype=torch.int32 if length < 2**31 else torch.int64)


def _check(length: int, batch: int, rank: int, world: int, drop_last: bool | None) -> None:
    if not 0 <= rank < world:
        raise LaminaError(f"rank must be in 0..world-1, got rank {rank} of world {world}")
    if batch < world:
        raise LaminaError(f"a global batch of {batch} cannot be shared by {world} processes: each needs a row")
    if drop_last is None:
        return
    if drop_last and batch > length:
        raise LaminaError(f"the batch is {batch}, but the data set has {length} rows")
    short = length % batch or min(batch, length)
    if not drop_last and short < world:
        raise LaminaError(
            f"the last batch of {length} rows has {short}, too few for {world} processes: "
            f"use drop_last=True, or once() for a single pass"
        )
