"""Places inside a model, and the tensors that a forward pass leaves there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lamina import probe
from lamina.batches import Batch, bare, call, logits
from lamina.errors import AnatomyError, LaminaError

LOGITS = ".logits"
"""The path that stands for a model's prediction."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is taken: what a module gives or is given, or the model's prediction."""

    path: str
    side: Literal["output", "input"] = "output"

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read `layer3`, `layer3:input` or `.logits`; `.` is the model itself.

        Raises:
            LaminaError: another word behind the colon.
        """
        path, _, side = text.partition(":")
        if side not in ("", "input", "output"):
            raise LaminaError(f"a place is 'path', 'path:input' or '{LOGITS}', got {text!r}")
        return cls("" if path == "." else path, "input" if side == "input" else "output")

    @property
    def is_logits(self) -> bool:
        """True for the prediction."""
        return self.path == LOGITS

    def __str__(self) -> str:
        name = self.path or "."
        return name if self.side == "output" else f"{name}:input"


PREDICTION = Place(LOGITS)


def watch(model: nn.Module, places: Sequence[Place], **options: Any) -> AbstractContextManager[probe.Captured]:
    """Return the `probe.capture` of these places, none of them the prediction."""
    inputs, outputs = ([p.path for p in places if p.side == side] for side in ("input", "output"))
    return probe.capture(model, inputs, outputs, **options)


def tensors(model: nn.Module, seen: probe.Captured, places: Sequence[Place]) -> dict[Place, Tensor]:
    """Take the tensors out of what was captured.

    Raises:
        AnatomyError: a module did not run.
    """
    for place in places:
        if place.path not in (seen.inputs if place.side == "input" else seen.outputs):
            raise AnatomyError(f"{type(bare(model)).__name__} did not run {place.path!r} on this batch")
    return {p: seen.input(p.path) if p.side == "input" else seen.tensor(p.path) for p in places}


def captured(
    model: nn.Module, batch: Batch, places: Sequence[Place], *, detach: bool, stop: bool
) -> dict[Place, Tensor]:
    """Run a model on a batch and return the tensors at these places.

    Args:
        detach: cut them off the graph.
        stop: end the pass behind the last one; the prediction must not be among them.
    """
    inside = [p for p in places if not p.is_logits]
    if not inside:
        return {PREDICTION: logits(call(model, batch))}
    runs = bare(model) if stop else model
    outputs: Any = None
    with watch(runs, inside, detach=detach, stop=stop) as seen:
        outputs = probe.run(runs, batch)
    found: dict[Place, Tensor] = tensors(model, seen, inside)
    return found if PREDICTION not in places else {**found, PREDICTION: logits(outputs)}


def missing_from(found: Mapping[Place, Tensor], places: Sequence[Place]) -> list[Place]:
    """List the places of which there is no tensor."""
    return [p for p in places if p not in found]
