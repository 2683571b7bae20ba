"""The options of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lamina.errors import LaminaError, nearest

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long, how precisely and how carefully to train; the key `train` of a recipe.

    Raises:
        LaminaError: a value out of range (the message names the option, the value and what was expected).
    """

    steps: int
    """Optimizer steps, >= 1."""
    evaluate_every: int = 0
    """Evaluate every so many steps; 0 = at the end alone."""
    evaluate_batches: int | None = None
    """Global batches of one evaluation; None = the whole evaluation set."""
    precision: Precision = "fp32"
    """Of the forward pass (autocast); parameters stay float32. fp16 scales the loss."""
    accumulate: int = 1
    """Micro-batches a step: the global batch is split, the gradient stays the same."""
    clip: float | None = None
    """Largest norm of the whole gradient; None = not clipped."""
    compile: bool = False
    """Run the model through torch.compile."""
    seed: int = 0
    """Of the weights, the order of the data and dropout."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better loss; None = never."""
    checkpoint_every: int = 0
    """Write a checkpoint every so many steps; 0 = none."""
    keep_last: int = 2
    """Checkpoints kept, >= 1."""
    keep_best: bool = False
    """Keep the checkpoint of the best evaluation too, and end with its weights (best since the latest rewrite)."""
    device: str = "auto"
    """`auto` (cuda, mps, else cpu), or a torch device."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl (and two looks at the loss: only there does the CPU wait)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("steps", "accumulate", "keep_last", "log_every"):
            _whole(name, getattr(self, name), least=1)
        for name in ("evaluate_every", "checkpoint_every", "seed"):
            _whole(name, getattr(self, name), least=0)
        for name in ("patience", "evaluate_batches"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least=1)
        if self.precision not in get_args(Precision):
            near = nearest(str(self.precision), get_args(Precision))
            raise LaminaError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}{near}"
            )
        if self.clip is not None and not (self.clip > 0 and math.isfinite(self.clip)):
            raise LaminaError(f"clip must be a number above 0 or None, got {self.clip!r}")
        if self.patience is not None and not self.evaluate_every:
            raise LaminaError(f"patience={self.patience} counts evaluations, but evaluate_every is 0: set it too")
        if self.keep_best and not self.evaluate_every:
            raise LaminaError("keep_best compares evaluations, but evaluate_every is 0: set it too")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LaminaError(f"{name} must be a whole number of at least {least}, got {value!r}")
