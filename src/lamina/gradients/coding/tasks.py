"""What a worker computes: the summed gradient of one chunk of a job's rows, the same on whichever worker does it."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from lamina.batches import Batch
from lamina.errors import LaminaError

COUNT = "lamina.count"
"""Name under which the number of what a loss is a mean over travels with the gradients, and is decoded like them."""

_ONE = threading.RLock()
"""The random state is the process's: workers that are threads take turns."""

Objective = Callable[[nn.Module, Batch], Mapping[str, Any]]
"""Returns at least `loss`, a mean, and `count`, over how many."""


def check_sums(model: nn.Module) -> None:
    """Refuse a model whose gradient is not the sum of its chunks' gradients.

    Raises:
        LaminaError: a batch norm in training mode: its statistics join the rows of a chunk.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise LaminaError(
                f"gradient coding adds gradients of chunks, but {name or 'the model'} ({type(module).__name__}) takes "
                "its statistics from the rows of each: freeze it (eval()), or use a layer norm"
            )


@contextmanager
def seeded(seed: int, job: int, chunk: int, device: torch.device | None = None) -> Iterator[None]:
    """Let random layers draw what they draw for this chunk of this job on every worker; the state comes back after."""
    digest = hashlib.blake2b(f"{seed}:{job}:{chunk}".encode(), digest_size=8).digest()
    devices = [device] if device is not None and device.type == "cuda" else []
    with _ONE, torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest, "big") >> 1)
        yield


def row_ranges(rows: int, sizes: Sequence[float]) -> list[slice]:
    """Cut rows 0..rows-1 into neighbouring ranges whose shares are `sizes`, each up to a row: all rows, none twice.

    Example:
        >>> [(r.start, r.stop) for r in row_ranges(10, [0.25, 0.25, 0.5])]
        [(0, 2), (2, 5), (5, 10)]
    """
    ends = [round(rows * share) for share in itertools.accumulate(sizes)]
    ends[-1] = rows
    return [slice(a, b) for a, b in itertools.pairwise([0, *ends])]


def chunk_of(batch: Batch, rows: slice) -> dict[str, Any]:
    """Return some rows of a batch; entries that are not one a row go along whole."""
    count = rows_of(batch)
    return {k: v[rows] if isinstance(v, Tensor) and v.ndim and v.shape[0] == count else v for k, v in batch.items()}


def rows_of(batch: Batch) -> int:
    """Return the number of rows: the length of the first tensor."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)


def trained(model: nn.Module) -> dict[str, Parameter]:
    """Return the parameters that are trained, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def chunk_gradient(
    model: nn.Module, objective: Objective, batch: Batch, *, seed: int, job: int, chunk: int
) -> dict[str, Tensor]:
    """Return the gradient of (mean loss * count) over one chunk, and `COUNT`; an empty chunk gives zeros.

    Args:
        batch: the rows of the chunk alone.
    Raises:
        LaminaError: the loss reaches no parameter.
    """
    parameters = trained(model)
    first = next(iter(parameters.values()))
    if not rows_of(batch):
        return {n: torch.zeros_like(p) for n, p in parameters.items()} | {COUNT: first.new_zeros(())}
    with seeded(seed, job, chunk, first.device), torch.enable_grad():
        losses = objective(model, batch)
        count = losses["count"].detach().to(first)
        found = torch.autograd.grad(losses["loss"] * count, list(parameters.values()), allow_unused=True)
    if all(g is None for g in found):
        raise LaminaError("no parameter has a gradient: the loss depends on none that is trained")
    zeros = (torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True))
    return dict(zip(parameters, zeros, strict=True)) | {COUNT: count}


def to_vector(gradient: Mapping[str, Tensor]) -> Tensor:
    """Concatenate a gradient into one vector: float64 where any part is, else float32."""
    exact = any(g.dtype == torch.float64 for g in gradient.values())
    kind = torch.float64 if exact else torch.float32
    return torch.cat([g.detach().reshape(-1).to(kind) for g in gradient.values()])


def set_mean(parameters: Mapping[str, Parameter], vector: Tensor) -> None:
    """Set `.grad` to a decoded sum, divided by its count: what `to_vector` made, in the order of `parameters`."""
    count = vector[sum(p.numel() for p in parameters.values())]
    if not count > 0:
        raise LaminaError("the job counted nothing: every target is padding, or there is no row")
    at = 0
    for parameter in parameters.values():
        part = vector[at : at + parameter.numel()] / count
        parameter.grad = part.view_as(parameter).to(parameter)
        at += parameter.numel()
