"""What a trained model costs to run: time of a forward pass, and memory at its worst moment."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamina.batches import Batch, call, to_device
from lamina.data import Data


def rows_of(data: Data, count: int) -> Batch:
    """Return the first rows of the evaluation set (of the training set, where there is none)."""
    examples = data.train if data.evaluation is None else data.evaluation
    return examples.batch(torch.arange(min(count, len(examples))))


@torch.no_grad()
def latency(model: nn.Module, batch: Batch, *, rounds: int = 15, seconds: float = 1.0) -> float:
    """Return the median seconds of a forward pass, after three that do not count.

    Args:
        rounds: passes at most; fewer (but three) where they take longer than `seconds` together.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = to_device(batch, device)
    for _ in range(3):
        call(model, batch)
    times: list[float] = []
    while len(times) < 3 or (len(times) < rounds and sum(times) < seconds):
        _wait(device)
        start = time.perf_counter()
        call(model, batch)
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def peak_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes of weights and live tensors at the worst moment of a forward pass; the same on every machine.

    Counted are the tensors that operations return; what a fused operation needs inside while it runs is not.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = to_device(batch, device)
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    weights = sum(t.numel() * t.element_size() for t in held)
    with _Live() as live:
        live.known = {
            t.untyped_storage()._cdata for t in (*held, *(v for v in batch.values() if isinstance(v, Tensor)))
        }
        call(model, batch)
    return weights + live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, whenever an operation has returned some."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.known:
                    self.alive[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
