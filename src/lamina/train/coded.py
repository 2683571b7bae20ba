"""A training step under gradient coding: several chunks of the global batch a process, sums in place of means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lamina.batches import Batch, to_device
from lamina.data import Loader
from lamina.data.examples import Examples
from lamina.errors import PlanError
from lamina.gradients.coding.tasks import COUNT, check_sums, seeded, trained
from lamina.parallel.data_parallel import Placed
from lamina.train.distributed import World
from lamina.train.options import Precision
from lamina.train.precision import autocast
from lamina.train.step import Losses, own_parameters, split


class ChunkLoader:
    """Hands out chunks of the global batches: chunk c of C has the rows that process c of C would get.

    Its position is a `Loader`'s, and so is its state.

    Args:
        chunks: into how many a global batch is cut, in equal parts up to a row.
    """

    def __init__(self, examples: Examples, batch: int, *, seed: int, chunks: int) -> None:
        self._make = lambda chunk: Loader(examples, batch, seed=seed, rank=chunk, world=chunks)
        self._loaders = {0: self._make(0)}
        self._state = self._loaders[0].state_dict()

    def take(self, chunks: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return these chunks of the next global batch; it is passed over where there are none."""
        found = []
        after = self._state
        for chunk in chunks or (0,):
            if chunk not in self._loaders:
                self._loaders[chunk] = self._make(chunk)
            loader = self._loaders[chunk]
            loader.load_state_dict(self._state)
            found.append(next(loader))
            after = loader.state_dict()
        self._state = after
        return found if chunks else []

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the same for every process."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of `state`.

        Raises:
            LaminaError: it is of another order or another data set.
        """
        self._loaders[0].load_state_dict(state)
        self._state = self._loaders[0].state_dict()


def is_coded(reducer: Any, world: World) -> bool:
    """Say whether a reducer hands out tasks of its own and takes their sums; alone, every reducer takes gradients."""
    return world.size > 1 and getattr(reducer, "delay", None) is not None


def coded_gradients(
    placed: Placed,
    objective: Any,
    loader: ChunkLoader,
    step: int,
    *,
    world: World,
    parts: int = 1,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor, Losses, Batch]:
    """Compute this process's tasks of a step, and set `.grad` to the decoded mean over the whole batch.

    No process waits for a straggler: counts travel with the gradients, not by a collective.

    Args:
        parts: micro-batches a chunk.
    Returns:
        (sum of loss * count, sum of count) of this process's chunks, the last losses, and the last chunk.
    Raises:
        PlanError: fp16, whose overflows a code would spread.
        LaminaError: the model has batch norms that are trained, or a worker's message cannot be used.
    """
    if precision == "fp16":
        raise PlanError("gradient coding adds gradients that must be finite, and fp16 overflows now and then: use bf16")
    assert placed.handle is not None
    reducer, group = placed.handle.reducer, placed.handle.group
    check_sums(placed.bare)
    tasks = reducer.tasks(step, world.rank, world.size)
    chunks = reducer.chunks(world.size)  # type: ignore[attr-defined]
    parameters = trained(placed.bare) | {f"objective.{i}": p for i, p in enumerate(own_parameters(objective))}
    terms, counts, slices = [], [], []
    losses: Losses = {}
    batch: Batch = {}
    for task, batch in zip(tasks, loader.take([t % chunks for t in tasks]), strict=True):
        counted: list[Tensor] = []
        job, chunk = divmod(task, chunks)
        with seeded(reducer.seed, job, chunk, world.device):  # type: ignore[attr-defined]
            for part in split(to_device(batch, world.device), parts):
                with autocast(precision, world.device):
                    losses = objective(placed.module, part)
                counted.append(losses["count"].detach().double())
                terms.append(losses["loss"].detach().double() * counted[-1])
                (losses["loss"] * losses["count"].detach()).backward()
        counts.append(torch.stack(counted).sum())
        slices.append(_taken(parameters))
    stacked = {
        n: torch.stack([s[n] for s in slices]) if slices else p.new_zeros(0, *p.shape) for n, p in parameters.items()
    }
    first = next(iter(parameters.values()))
    stacked[COUNT] = torch.stack(counts).to(first) if counts else first.new_zeros(0)
    reduced = reducer.reduce(stacked, group)
    count = reduced.pop(COUNT)
    for name, parameter in parameters.items():
        parameter.grad = (reduced[name] / count.to(reduced[name])).view_as(parameter)
    nothing = torch.zeros((), dtype=torch.float64, device=world.device)
    return sum(terms, nothing), sum(counts, nothing), losses, batch


def _taken(parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Take the gradients out of `.grad`, zeros where there is none."""
    found = {}
    for name, parameter in parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found
