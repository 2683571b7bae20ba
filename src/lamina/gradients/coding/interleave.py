"""Several models trained in turns, so that a gradient that comes a few rounds late holds none of them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lamina.batches import Batch
from lamina.errors import LaminaError
from lamina.gradients.coding.coded_reducer import CodedReducer
from lamina.gradients.coding.tasks import (
    Objective,
    check_sums,
    chunk_gradient,
    chunk_of,
    row_ranges,
    rows_of,
    set_mean,
    to_vector,
    trained,
)
from lamina.gradients.reducer import Group, size

Jobs = Batch | Callable[[int], Batch]
"""The rows of every job, or of a job by its number (alike on every worker)."""


def interleave(
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    objective: Objective,
    data: Jobs,
    reducer: CodedReducer,
    steps: int,
    group: Group = None,
) -> None:
    """Train models in turns on every worker of a group: job t is a step of model t modulo their number.

    Every worker calls this alike; the models may differ from each other. Rank 0's first values win.

    To go on after a kill, give models, optimizers and reducer their states back and call it again alike.

    Args:
        models: at least delay + 1 of them; they end alike on every worker.
        optimizers: one a model.
        objective: returns `loss` (a mean) and `count`; a job's loss is the mean over all its rows.
        data: all rows of a job; each worker computes its chunks of them.
        reducer: a coded one.
        steps: jobs in all, over all models.
    Raises:
        LaminaError: too few models, a batch with fewer rows than chunks, a batch norm in training mode, a worker that
            is missing or sends what cannot be used.
    """
    world = size(group)
    rank = torch.distributed.get_rank(group) if world > 1 else 0
    delay = reducer.delay if world > 1 else 0
    check(models, optimizers, delay, steps)
    reducer.jobs = steps
    parameters = [trained(m) for m in models]
    widest = max(sum(p.numel() for p in own.values()) for own in parameters) + 1
    if world > 1:
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                torch.distributed.broadcast(tensor.detach(), group=group, group_src=0)
    sizes = reducer.sizes(world)
    for round in range(reducer.round(world), steps + delay):
        rows: list[Tensor] = []
        for task in reducer.tasks(round, rank, world):
            job, chunk = divmod(task, len(sizes))
            vector = task_vector(models[job % len(models)], objective, data, job, chunk, sizes, reducer.seed)
            rows.append(nn.functional.pad(vector, (0, widest - len(vector))))
        like = next(iter(parameters[0].values()))
        stacked = torch.stack(rows) if rows else like.new_zeros(0, widest)
        reduced = reducer.reduce({"gradient": stacked}, group)
        if reduced:
            done = (round - delay) % len(models)
            set_mean(parameters[done], reduced["gradient"].reshape(-1))
            optimizers[done].step()
    reducer.close()


def check(models: Sequence[nn.Module], optimizers: Sequence[Optimizer], delay: int, steps: int) -> None:
    """Refuse what cannot be trained in turns.

    Raises:
        LaminaError: says what is missing.
    """
    if len(models) != len(optimizers):
        raise LaminaError(f"{len(models)} models take as many optimizers, got {len(optimizers)}")
    if len(models) < delay + 1:
        raise LaminaError(
            f"a gradient that is decoded {delay} rounds later takes {delay + 1} models in turns, got {len(models)}: "
            f"each would wait {delay} rounds for its own; train more models, or take gradient_coding, without delay"
        )
    if steps < 1:
        raise LaminaError(f"steps must be at least 1, got {steps}")
    for model in models:
        check_sums(model)
        if not trained(model):
            raise LaminaError(f"{type(model).__name__} has no parameter that is trained")


def task_vector(
    model: nn.Module, objective: Objective, data: Jobs, job: int, chunk: int, sizes: Sequence[float], seed: int
) -> Tensor:
    """Return the summed gradient of one chunk of a job as a vector, its count at the end.

    Raises:
        LaminaError: the job has fewer rows than chunks.
    """
    batch = data(job) if callable(data) else data
    count = rows_of(batch)
    if count < len(sizes):
        raise LaminaError(f"a job of {count} rows cannot be cut into {len(sizes)} chunks: it takes a row each")
    part = chunk_of(batch, row_ranges(count, sizes)[chunk])
    return to_vector(chunk_gradient(model, objective, part, seed=seed, job=job, chunk=chunk))
