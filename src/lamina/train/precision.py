"""Number formats of the forward pass, the scaling of fp16 losses, and the check that losses are numbers."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lamina.errors import LaminaError
from lamina.train.options import Precision

_log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(LaminaError):
    """Training cannot go on: the loss is no number, the disk is full, another process ended."""


@contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run the model and its objective in this precision.

    Raises:
        TrainingError: the processor has no kernel for a layer in it (torch's LSTM in bf16 needs AVX-512 on a CPU).
    """
    if precision == "fp32":
        yield
        return
    try:
        with torch.autocast(device.type, dtype=DTYPES[precision]):
            yield
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        raise TrainingError(
            f"this processor cannot run a layer of the model in {precision} ({reason}): set precision to fp32"
        ) from error


def tell_if_slow(precision: Precision, device: torch.device) -> None:
    """Log, once, that a processor without instructions for a precision computes it slower than float32."""
    if precision == "fp32" or device.type != "cpu":
        return
    ratio = slowdown(DTYPES[precision])
    if ratio > 2:
        _log.warning(
            "%s is %.0f times slower than fp32 on this processor, which has no instructions for it: set precision to "
            "fp32",
            precision,
            ratio,
        )


@functools.cache
def slowdown(dtype: torch.dtype, size: int = 256, repeats: int = 3) -> float:
    """Measure a linear layer's product on the CPU: time in `dtype` over time in float32, the best of a few of each."""
    times = {}
    for kind in (torch.float32, dtype):
        a = torch.ones(size, size, dtype=kind)
        times[kind] = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            a @ a.T
            times[kind] = min(times[kind], time.perf_counter() - start)
    return times[dtype] / times[torch.float32]


def loss_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler that keeps fp16 gradients from underflowing; it does nothing in other precisions.

    Called once where training begins, so a precision that is slow here is told here.
    """
    tell_if_slow(precision, device)
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def check_finite(losses: Sequence[float], first_step: int, checkpoint: str | None) -> None:
    """Refuse to go on from a loss that is NaN or infinite.

    Args:
        losses: of consecutive steps.
        first_step: number of the first of them (steps count from 1).
        checkpoint: name of the last good checkpoint, None where there is none.
    Raises:
        TrainingError: names the step and the checkpoint.
    """
    for step, loss in enumerate(losses, first_step):
        if not math.isfinite(loss):
            raise TrainingError(no_number(f"the loss of step {step}", str(loss), checkpoint))


def no_number(what: str, value: str, checkpoint: str | None) -> str:
    """Word what is no number, where to go back to, and what may help."""
    back = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return f"{what} is {value}; {back}. Lower the learning rate, set clip, or use bf16 or fp32"


def first_bad(model: nn.Module) -> str | None:
    """Name the first parameter that is not finite (of a sharded one: in this process's shard)."""
    found = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    if not found or torch.stack([p.isfinite().all() for p in found.values()]).all():
        return None
    return next(n for n, p in found.items() if not p.isfinite().all())
