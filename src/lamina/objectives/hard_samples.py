"""Hard samples: a pool of what a model got most wrong so far, from which every batch is enlarged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.errors import LaminaError, ShapeError

POOL = "pool_"
"""Of the names of the buffers that hold the pool, one an entry of the batch."""


class HardSamples(nn.Module):
    """Keeps the hardest rows of past batches and adds some of them to each new one; for any loss that is one a row.

    Each step hands in the share `ratio` of its rows with the largest errors. Until the pool is full they are appended,
    and batches stay as they are. Then `propose` adds as many rows, drawn from the pool without repetition, and
    `observe` writes the hardest of all rows of that step into the very slots that were drawn.

    The pool and the number of draws are buffers, so `state_dict()` resumes them exactly. Every process has a pool and
    draws of its own (the trainer keeps them apart in its checkpoints). Rows whose error is not finite are left out; of
    equal errors the first rows are taken.

    Args:
        capacity: rows in the pool.
        ratio: share of a batch's rows, above 0 and below 1; at least one row.
        names: entries of the batch to keep; None = every tensor with one row a sample. The added rows of what is not
            kept are -1.
        start: fraction of training, told by `set_progress`, from which rows are collected.
        max_error_quantile: rows with errors above this quantile of their batch count as outliers and are left out (a
            noisy teacher makes its own faults look hard); None = all.
        seed: of the draws, at least 0.
    Raises:
        LaminaError: a ratio or quantile not within 0..1, no room, (at the call) a pool smaller than one batch's share.
        ShapeError: (at the call) errors that are not one a row, rows of another shape than those in the pool.
    Source: as `HardRays`, of which this is the general form.
    Example:
        >>> hard = HardSamples(capacity=4, ratio=0.5)
        >>> for step in range(3):
        ...     batch = hard.propose({"inputs": torch.randn(4, 8)})
        ...     errors = batch["inputs"].square().mean(1)  # of any loss, one a row
        ...     hard.observe(batch, errors)
        >>> batch["inputs"].shape  # the pool was full after two steps
        torch.Size([6, 8])
    """

    per_process: ClassVar[bool] = True
    """Processes do not share this module's state: a checkpoint has it once a process."""
    filled: Tensor
    draws: Tensor

    def __init__(
        self,
        capacity: int,
        ratio: float = 0.1,
        *,
        names: Sequence[str] | None = None,
        start: float = 0.0,
        max_error_quantile: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < ratio < 1:
            raise LaminaError(f"ratio must be above 0 and below 1, got {ratio}")
        if capacity < 1 or seed < 0:
            raise LaminaError(f"capacity must be at least 1 and seed at least 0, got {capacity} and {seed}")
        if not 0 <= start <= 1:
            raise LaminaError(f"start must be a fraction of training, 0..1, got {start}")
        if max_error_quantile is not None and not 0 < max_error_quantile <= 1:
            raise LaminaError(f"max_error_quantile must be above 0 and at most 1, got {max_error_quantile}")
        self.capacity, self.ratio, self.start, self.seed = capacity, ratio, start, seed
        self.names = None if names is None else tuple(names)
        self.max_error_quantile, self.fraction = max_error_quantile, 0.0
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._drawn: Tensor | None = None

    @property
    def full(self) -> bool:
        """Say whether the pool is full, and batches are enlarged."""
        return int(self.filled) >= self.capacity

    @property
    def pool(self) -> dict[str, Tensor]:
        """The rows in the pool, by entry of the batch."""
        filled = int(self.filled)
        return {n.removeprefix(POOL): b[:filled] for n, b in self.named_buffers(recurse=False) if n.startswith(POOL)}

    def set_progress(self, fraction: float) -> None:
        """Learn how far training is."""
        self.fraction = fraction

    def propose(self, batch: Batch) -> dict[str, Any]:
        """Return the batch, with rows of the pool behind its own once that is full."""
        rows = self._rows(batch)
        count, self._drawn = self._share(rows), None
        if not self.full:
            return dict(batch)
        self._drawn = slots = self._draw(count).to(self.filled.device)
        return {k: torch.cat([v, self._added(k, v, slots)]) if _is_one_a_row(v, rows) else v for k, v in batch.items()}

    @torch.no_grad()
    def observe(self, batch: Batch, errors: Tensor) -> None:
        """Take the hardest rows of a batch that `propose` returned.

        Args:
            batch: as the loss was computed of it.
            errors: (N,), one a row; no gradient is kept.
        """
        rows, drawn = self._rows(batch), self._drawn
        self._drawn = None
        check_errors(errors, rows, type(self).__name__)
        if self.fraction < self.start:
            return
        count = self._share(rows) if drawn is None else len(drawn)
        chosen = hardest(errors, count, self.max_error_quantile)
        entries = {k: v[chosen] for k, v in batch.items() if _is_one_a_row(v, rows) and self._keeps(k)}
        if drawn is None:
            self._append(entries)
        else:
            self._write(drawn[: len(chosen)], entries)

    def extra_repr(self) -> str:
        """Say the options."""
        return f"capacity={self.capacity}, ratio={self.ratio}, filled={int(self.filled)}"

    def _keeps(self, name: str) -> bool:
        return self.names is None or name in self.names

    def _rows(self, batch: Batch) -> int:
        """Return the number of rows: the length of the first tensor that is kept."""
        for name, value in batch.items():
            if self._keeps(name) and isinstance(value, Tensor) and value.ndim:
                return len(value)
        raise LaminaError(f"{type(self).__name__} finds nothing to keep in the batch, which has {sorted(batch)}; it keeps {self.names or 'tensors'}")  # fmt: skip  # noqa: E501

    def _share(self, rows: int) -> int:
        """Return how many of so many rows are the hard ones."""
        count = max(1, math.floor(self.ratio * rows + 1e-9))
        if count > self.capacity:
            raise LaminaError(
                f"{type(self).__name__} has capacity {self.capacity}, less than the {count} that are "
                f"ratio={self.ratio} of {rows}: give it more room"
            )
        return count

    def _random(self) -> np.random.Generator:
        """Return the generator of the next draw: a function of the seed, the process and the draw's number."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        number = int(self.draws)
        self.draws += 1
        return np.random.default_rng((self.seed, rank, number))

    def _draw(self, count: int) -> Tensor:
        """Draw slots of the pool without repetition; all there are where it has fewer."""
        filled = int(self.filled)
        return torch.from_numpy(self._random().choice(filled, min(count, filled), replace=False, shuffle=False))

    def _added(self, name: str, like: Tensor, slots: Tensor) -> Tensor:
        held = self._buffers.get(POOL + name)
        if held is None:
            return like.new_full((len(slots), *like.shape[1:]), -1)
        return held[slots].to(like)

    def _append(self, entries: Mapping[str, Tensor]) -> None:
        """Put rows behind those in the pool, as many as find room; the hardest come first."""
        filled = int(self.filled)
        count = min(len(next(iter(entries.values()))), self.capacity - filled)
        slots = torch.arange(filled, filled + count, device=self.filled.device)
        self._write(slots, {k: v[:count] for k, v in entries.items()})
        self.filled += count

    def _write(self, slots: Tensor, entries: Mapping[str, Tensor]) -> None:
        for name, rows in entries.items():
            held = self._buffers.get(POOL + name)
            if held is None:
                held = rows.new_zeros(self.capacity, *rows.shape[1:])
                self.register_buffer(POOL + name, held)
            if held.shape[1:] != rows.shape[1:]:
                raise ShapeError(
                    f"{type(self).__name__} keeps rows of one shape: {name!r} was {tuple(held.shape[1:])} a row, and "
                    f"is {tuple(rows.shape[1:])} now"
                )
            held[slots] = rows.to(held)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make the buffers what the state has: which there are, and how large, depends on what was seen."""
        stored = dict(_own(state_dict, prefix))
        for name in [n for n in self._buffers if n.startswith(POOL) and n not in stored]:
            del self._buffers[name]
        for name, value in stored.items():
            own = self._buffers.get(name)
            if own is None or own.shape != value.shape:
                self.register_buffer(name, torch.empty_like(value, device=self.filled.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class HardRays(HardSamples):
    """The second level of active learning of fields: the rays whose colour is most wrong, by sum of |difference|.

    Keeps `origins` and `directions`; the added rows of whatever else a batch has are -1.

    Args:
        ratio: share of a step's rays, above 0 and below 1.
        capacity: rays in the pool, over all steps.
        start, max_error_quantile, seed: as `HardSamples`.
    Raises:
        LaminaError, ShapeError: as `HardSamples`.
    Source: Fang et al., Progressive Volume Distillation with Active Learning (2023), arXiv 2304.04012.
    """

    def __init__(
        self,
        ratio: float = 0.1,
        capacity: int = 614_400,
        *,
        start: float = 0.0,
        max_error_quantile: float | None = None,
        seed: int = 0,
    ) -> None:
        names = ("origins", "directions")
        super().__init__(capacity, ratio, names=names, start=start, max_error_quantile=max_error_quantile, seed=seed)


class HardPoints:
    """The third level of active learning of fields: the points that make a ray's colour, where the ray hits something.

    Args:
        keep: share of a ray's points, above 0 and at most 1; floor(keep n) + 1 of n.
        min_opacity: sum of weights below which a ray counts as background, 0..1.
    Raises:
        LaminaError: a number out of range. ShapeError: (at the call) no (R, n).
    Source: Fang et al., Progressive Volume Distillation with Active Learning (2023), arXiv 2304.04012.
    Example:
        >>> HardPoints(keep=0.4).select(torch.tensor([[0.1, 0.6, 0.2], [0.1, 0.2, 0.1]]))
        tensor([[False,  True,  True],
                [False, False, False]])
    """

    def __init__(self, keep: float = 0.3, min_opacity: float = 0.5) -> None:
        if not 0 < keep <= 1 or not 0 <= min_opacity <= 1:
            raise LaminaError(
                f"keep must be above 0 and at most 1 and min_opacity in 0..1, got {keep} and {min_opacity}"
            )
        self.keep, self.min_opacity = keep, min_opacity

    def select(self, weights: Tensor) -> Tensor:
        """Return which points count: weights (R, n) of a rendering -> bool (R, n)."""
        return heaviest_points(weights, self.keep, self.min_opacity)

    def select_either(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the points that count for the student or for the teacher: twice (R, n) -> bool (R, n).

        Raises:
            ShapeError: the two were asked at different points.
        """
        if student.shape != teacher.shape:
            raise ShapeError(
                f"hard points are compared one by one: student and teacher must be asked at the same ones, got weights "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        return self.select(student) | self.select(teacher)


@torch.no_grad()
def heaviest_points(weights: Tensor, keep: float, min_opacity: float) -> Tensor:
    """Mark the floor(keep n) + 1 largest weights of every ray whose weights sum to min_opacity or more.

    weights (R, n) -> bool (R, n). Of equal weights the nearest points are taken.
    """
    if weights.dim() != 2:
        raise ShapeError(f"weights are (rays, points), got {tuple(weights.shape)}")
    count = min(math.floor(keep * weights.shape[1] + 1e-9) + 1, weights.shape[1])
    least = weights.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = weights > least, weights == least
    room = count - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    return chosen & (weights.sum(1, keepdim=True) >= min_opacity)


def hardest(errors: Tensor, count: int, max_quantile: float | None = None) -> Tensor:
    """Return the places of the largest finite errors (N,), hardest first; of equal ones the first.

    Args:
        count: at most so many.
        max_quantile: errors above this quantile are left out.
    """
    errors = errors.detach().float()
    kept = errors.isfinite()
    if max_quantile is not None and bool(kept.any()):
        kept = kept & (errors <= errors[kept].quantile(max_quantile))
    order = errors.masked_fill(~kept, -math.inf).sort(descending=True, stable=True).indices[:count]
    return order[kept[order]]


def check_errors(errors: Tensor, rows: int, what: str) -> None:
    """Refuse errors that are not one a row.

    Raises:
        ShapeError: says how many there should be.
    """
    if errors.shape != (rows,):
        raise ShapeError(f"{what} needs one error a row, {rows} of them, got {tuple(errors.shape)}")


def _is_one_a_row(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def _own(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and "." not in name:
            yield name, value
