"""How the states of many discrete variables lie in one vector: runs of variables with equally many states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError


@dataclass(frozen=True)
class Run:
    """Variables of one kind: (outer, states, inner) entries of the vector, a variable for each outer and inner."""

    outer: int
    states: int
    inner: int = 1

    @property
    def count(self) -> int:
        """How many variables."""
        return self.outer * self.inner

    @property
    def width(self) -> int:
        """How many entries of the vector."""
        return self.outer * self.states * self.inner


@dataclass(frozen=True)
class StateBlocks:
    """The runs one after the other. A vector is (B, dim), a value for each variable (B, count)."""

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ShapeError("a coupling needs at least one variable")
        for run in self.runs:
            if run.states < 2 or run.count < 1:
                raise ShapeError(f"a variable needs at least 2 states, got {run.states} states for {run.count}")

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> StateBlocks:
        """Lay out variables with these numbers of states; equal ones beside each other make one run."""
        runs: list[Run] = []
        for size in sizes:
            if runs and runs[-1].states == size:
                runs[-1] = Run(runs[-1].outer + 1, size)
            else:
                runs.append(Run(1, int(size)))
        return cls(tuple(runs))

    @property
    def dim(self) -> int:
        """Entries of a vector."""
        return sum(r.width for r in self.runs)

    @property
    def count(self) -> int:
        """Variables."""
        return sum(r.count for r in self.runs)

    def split(self, vector: Tensor) -> list[Tensor]:
        """View (B, dim) as one (B, outer, states, inner) a run."""
        pieces = vector.split([r.width for r in self.runs], dim=1)
        return [p.unflatten(1, (r.outer, r.states, r.inner)) for p, r in zip(pieces, self.runs, strict=True)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Undo `split`."""
        return torch.cat([p.flatten(1) for p in pieces], dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """Repeat a value of each variable, (B, count), over its states: (B, dim)."""
        pieces = values.split([r.count for r in self.runs], dim=1)
        return self.join(
            [
                p.unflatten(1, (r.outer, 1, r.inner)).expand(-1, -1, r.states, -1)
                for p, r in zip(pieces, self.runs, strict=True)
            ]
        )

    def uniform(self, rows: int, like: Tensor) -> Tensor:
        """Return the vector (rows, dim) in which every state of a variable is equally likely."""
        values = [torch.full((rows, r.width), 1.0 / r.states, dtype=like.dtype, device=like.device) for r in self.runs]
        return torch.cat(values, dim=1)

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax over the states of each variable; (B, dim) -> same."""
        return self.join([p.softmax(2) for p in self.split(scores)])

    def check(self, vector: Tensor, name: str) -> None:
        """Refuse a vector of another width.

        Raises:
            ShapeError: says which width was expected.
        """
        if vector.dim() != 2 or vector.shape[1] != self.dim:
            raise ShapeError(f"{name} must be (batch, {self.dim}), an entry a state, got {tuple(vector.shape)}")

    def check_clamps(self, observed: Tensor, mask: Tensor) -> None:
        """Refuse observations that are not one state of each variable that `mask` (B, count) marks.

        Raises:
            LaminaError: some are not.
        """
        marked = self.spread(mask)
        held = torch.where(marked, observed, 0.0)
        sums = [p.sum(2).flatten(1) for p in self.split(held)]
        binary = ((held == 0) | (held == 1)).all()
        if not bool(binary) or not torch.equal(torch.cat(sums, dim=1), mask.to(held.dtype)):
            raise LaminaError("observed variables must be one-hot: a 1 at the state that was seen, 0 at all others")
