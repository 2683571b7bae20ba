"""Learning-rate schedules: plain functions from the fraction of training (0..1) to a multiplier of the base rate.

In a loop of `steps` steps, step i = 0, 1, ... uses the fraction (i + 1) / steps or i / steps; with the second, a
schedule with warm-up makes an idle first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lamina.errors import LaminaError
from lamina.registry import register


@register("schedule")
def constant(fraction: float) -> float:
    """Return 1 throughout.

    Raises:
        LaminaError: the fraction is outside 0..1 (so do all schedules).
    """
    _check("constant", fraction=fraction)
    return 1.0


@register("schedule", source="arXiv 1608.03983 without restarts")
def warmup_cosine(fraction: float, warmup: float = 0.1, floor: float = 0.0) -> float:
    """Rise linearly to 1, then fall along half a cosine to `floor`.

    Args:
        warmup: fraction of training spent rising, 0..1.
        floor: multiplier at the end, 0..1.
    """
    _check("warmup_cosine", fraction=fraction, warmup=warmup, floor=floor)
    if fraction < warmup:
        return fraction / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _after(fraction, warmup)))


@register("schedule")
def warmup_linear(fraction: float, warmup: float = 0.1, floor: float = 0.0) -> float:
    """Rise linearly to 1, then fall linearly to `floor`: 1 is reached, unlike in `warmup_polynomial`.

    Args:
        warmup: fraction of training spent rising, 0..1.
        floor: multiplier at the end, 0..1.
    """
    _check("warmup_linear", fraction=fraction, warmup=warmup, floor=floor)
    if fraction < warmup:
        return fraction / warmup
    return 1 - (1 - floor) * _after(fraction, warmup)


@register("schedule", source="LAMB, arXiv 1904.00962")
def warmup_polynomial(fraction: float, warmup: float, power: float = 1.0) -> float:
    """Rise linearly while decaying polynomially from the start: `min(1, t / warmup) * (1 - t)^power`.

    The schedule of the large-batch runs of LAMB; `sqrt_batch_rule` says how base rate and warm-up follow the batch.

    Args:
        warmup: fraction of training spent rising, 0..1.
        power: > 0; 1 in the paper, 0.5 in NVIDIA's BERT recipe.
    """
    _check("warmup_polynomial", fraction=fraction, warmup=warmup)
    if power <= 0:
        raise LaminaError(f"warmup_polynomial: power must be > 0, got {power}")
    rise = min(1.0, fraction / warmup) if warmup > 0 else 1.0
    return float(rise * (1 - fraction) ** power)


@register("schedule", source="LAMB, arXiv 1904.00962, mixed-batch run")
def stages(fraction: float, stages: Sequence[tuple[float, float, float, float]]) -> float:
    """Run several `warmup_polynomial` schedules one after the other, each with a peak and a warm-up of its own.

    For training whose batch (or sequence length) changes on the way: the rate is warmed up again at the switch.
    BERT in two phases, 64k then 32k: `[(7038 / 8601, 1.0, 0.2843, 0.5), (1563 / 8601, 2 / 3, 0.128, 0.5)]`, lr 6e-3.

    Args:
        stages: (share of training, peak multiplier, warm-up as a fraction of the stage, power) of each; the
            shares sum to 1.
    Raises:
        LaminaError: the shares do not sum to 1, or a value is out of range.
    """
    _check("stages", fraction=fraction)
    total = math.fsum(share for share, *_ in stages)
    if not math.isclose(total, 1.0, rel_tol=1e-9):
        raise LaminaError(f"stages: the shares must sum to 1, got {total} from {[share for share, *_ in stages]}")
    if any(share <= 0 or peak < 0 for share, peak, *_ in stages):
        raise LaminaError(f"stages: each share must be > 0 and each peak >= 0, got {list(stages)}")
    start = 0.0
    for share, peak, warmup, power in stages[:-1]:
        if fraction < start + share:
            return peak * warmup_polynomial((fraction - start) / share, warmup, power)
        start += share
    share, peak, warmup, power = stages[-1]
    # The last share is what the others leave: rounding of their sum must not push a fraction past 1.
    return peak * warmup_polynomial(min(1.0, max(0.0, fraction - start) / (1 - start)), warmup, power)


def sqrt_batch_rule(lr: float, batch: int, new_batch: int, warmup: float | None = None) -> tuple[float, float | None]:
    """Return learning rate and warm-up fraction for another batch: `lr * sqrt(new / old)`, `warmup * new / old`.

    Args:
        warmup: fraction of training at the old batch; None stays None.
    Raises:
        LaminaError: a batch that is not positive, or the new warm-up would exceed the whole training.
    Source: LAMB, arXiv 1904.00962, section 4.3 (BERT: 5e-3 and 1/5 at 32768, so 6.25e-4 and 1/320 at 512).
    """
    if batch <= 0 or new_batch <= 0:
        raise LaminaError(f"sqrt_batch_rule: batches must be positive, got {batch} and {new_batch}")
    ratio = new_batch / batch
    if warmup is not None:
        _check("sqrt_batch_rule", warmup=warmup)
        if warmup * ratio > 1:
            raise LaminaError(
                f"sqrt_batch_rule: a warm-up of {warmup} at batch {batch} is {warmup * ratio:.3g} of training at batch "
                f"{new_batch}, more than all of it; pass a smaller warmup, or None"
            )
        warmup = warmup * ratio
    return lr * math.sqrt(ratio), warmup


def _after(fraction: float, warmup: float) -> float:
    """Return how far the part after the warm-up is, 0..1."""
    return (fraction - warmup) / (1 - warmup) if warmup < 1 else 0.0


def _check(name: str, **values: float) -> None:
    for argument, value in values.items():
        if not 0 <= value <= 1:
            raise LaminaError(f"{name}: {argument} must be within 0..1, got {value}")
