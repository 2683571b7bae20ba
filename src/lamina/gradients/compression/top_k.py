"""Gradients as their largest entries, the rest kept for later steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.compression.compressor import Compressor, Option
from lamina.gradients.reducer import Group
from lamina.registry import register

CHUNK = 1 << 18
"""Elements looked at at a time on a CPU, so that they stay in its cache."""

SAMPLE = 1 << 15
"""Elements from which a threshold is guessed."""


@register(
    "reducer", "topk", source="Stich et al., Sparsified SGD with Memory (NeurIPS 2018), arXiv 1809.07599, algorithm 1"
)
class TopK(Compressor):
    """Mean of the workers' largest entries: ceil(density * n) of each layer, with their places.

    What a worker did not send it adds to its next gradient, so that nothing is lost, only late. Workers gather each
    other's values and int32 places: a worker receives those of all the others, so that traffic grows with their number.

    Args:
        density: share of a layer's entries that is sent, above 0 and at most 1.
        error_feedback: keep the rest for the next step; without it the rest is lost.
        start_step: steps before it are plain all-reduce.
        nonfinite: `raise`, or `pass_on` under fp16; see `Compressor`.
    Raises:
        LaminaError: a density out of its range; from `reduce`, a worker that is faulty or gone.
    Example:
        >>> TopK(density=0.01).size((128, 64), 0.01)
        656
    """

    knob = "density"

    def __init__(
        self,
        density: float = 0.01,
        *,
        error_feedback: bool = True,
        start_step: int = 0,
        nonfinite: Literal["raise", "pass_on"] = "raise",
    ) -> None:
        super().__init__(density, error_feedback=error_feedback, start_step=start_step, nonfinite=nonfinite)

    def check_option(self, option: Option) -> Option:
        """Refuse densities outside 0..1."""
        if isinstance(option, bool) or not 0 < option <= 1:
            raise LaminaError(f"density must be above 0 and at most 1, got {option!r}")
        return float(option)

    def options(self, shape: Sequence[int]) -> list[Option]:
        """List densities from a tenth of the default to ten times it, ten a decade."""
        found = [self.option * 10 ** (i / 10) for i in range(-10, 11)]
        return [d for d in found if d <= 1]

    def compressed_size(self, shape: Sequence[int], option: Option, itemsize: int) -> int:
        """Return the bytes of the values and of their int32 places."""
        return _count(math.prod(shape), option) * (itemsize + 4)

    def compression_errors(self, gradient: Tensor, options: Sequence[Option]) -> Tensor:
        """Return the norm of what stays behind, for every density from one sort."""
        squares = gradient.reshape(-1).double().square().sort().values.cumsum(0)
        left = [gradient.numel() - _count(gradient.numel(), option) for option in options]
        return torch.stack([squares[n - 1] if n else squares.new_zeros(()) for n in left]).sqrt()

    def exchange(self, layers: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Gather everyone's largest entries and average them."""
        places, values = [], []
        for name, gradient in layers.items():
            corrected = self.corrected(name, gradient)
            place = largest(corrected.view(-1), _count(gradient.numel(), self.option_of(name)))
            value = corrected.view(-1)[place].to(gradient.dtype)
            places.append(place.to(torch.int32))
            values.append(value)
            corrected.view(-1)[place] -= value.to(corrected.dtype)
            self.keep(name, corrected)
        counts = [len(p) for p in places]
        message = torch.cat([torch.cat(values).view(torch.uint8), torch.cat(places).view(torch.uint8)])
        everyone = self.traffic.gather(message, group)
        middle = everyone.shape[1] - 4 * sum(counts)
        all_values = everyone[:, :middle].contiguous().view(values[0].dtype).split(counts, 1)
        all_places = everyone[:, middle:].contiguous().view(torch.int32).split(counts, 1)
        result = {}
        for (name, gradient), value, place in zip(layers.items(), all_values, all_places, strict=True):
            result[name] = scatter_mean(value, place, gradient.numel()).to(gradient.dtype).view(gradient.shape)
        return result


def scatter_mean(values: Tensor, places: Tensor, length: int) -> Tensor:
    """Return the mean of sparse vectors, (workers, k) values at (workers, k) places -> (length,) in float32 or float64.

    Worker by worker: a worker names no place twice, so the sum has one order, on every device.
    """
    total = torch.zeros(length, dtype=torch.promote_types(values.dtype, torch.float32), device=values.device)
    for value, place in zip(values, places, strict=True):
        total.index_add_(0, place, value.to(total.dtype))
    return total.div_(len(values))


def largest(flat: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest magnitudes, in no order: exact, and far quicker than a full top-k.

    A threshold guessed from a sample leaves a few more candidates than asked; the top-k is among those. Where the
    guess leaves too few, everything is a candidate.
    """
    if flat.numel() <= 4 * SAMPLE or count * 3 > flat.numel():
        return _full(flat, count)
    stride = flat.numel() // SAMPLE
    sample = flat[: stride * SAMPLE : stride].abs()
    share = count / flat.numel()
    # Three standard deviations more than asked, so that too few are rare.
    asked = math.ceil(SAMPLE * share + 3 * math.sqrt(SAMPLE * share) + 3)
    threshold = sample.kthvalue(SAMPLE - min(asked, SAMPLE) + 1).values
    candidates = _above(flat, threshold)
    if len(candidates) < count:
        return _full(flat, count)
    # By index_select, which is quicker than indexing by several times.
    chosen = flat.index_select(0, candidates).abs_().topk(count, sorted=False).indices
    return candidates.index_select(0, chosen)


def _above(flat: Tensor, threshold: Tensor) -> Tensor:
    """Return the places whose magnitude is at least the threshold."""
    if flat.device.type != "cpu":
        return (flat.abs() >= threshold).nonzero().view(-1)
    # numpy compares and lists several times as fast as torch does on a CPU.
    least, found = threshold.item(), []
    room = torch.empty(CHUNK, dtype=torch.promote_types(flat.dtype, torch.float32))
    for i, part in enumerate(flat.split(CHUNK)):
        magnitude = torch.abs(part, out=room[: len(part)])
        found.append(np.flatnonzero(magnitude.numpy() >= least) + i * CHUNK)
    return torch.from_numpy(np.concatenate(found))


def _full(flat: Tensor, count: int) -> Tensor:
    return flat.abs().topk(count, sorted=False).indices


def _count(numbers: int, density: Option) -> int:
    # A density such as 0.07 times 100 must not become 8 by rounding.
    return max(1, math.ceil(round(density * numbers, 9)))
