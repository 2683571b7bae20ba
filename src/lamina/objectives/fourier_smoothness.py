"""Train a model with Fourier heads so that its densities stay smooth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lamina import probe
from lamina.batches import bare
from lamina.errors import LaminaError
from lamina.nn import FourierHead, fourier_penalty
from lamina.objectives._penalized import PenalizedByWatching
from lamina.objectives.objective import Losses
from lamina.registry import Slot, register

Seen = dict[str, list[Tensor]]
"""Penalties of the calls of each head, by its path."""


@register("objective", source="Gillman et al., Fourier Head (2024), arXiv 2410.22269, equation 5")
class FourierSmoothness(PenalizedByWatching[Seen]):
    """Another objective, plus what high frequencies of the model's Fourier heads cost.

    loss = base + gamma * sum over every `FourierHead` in the model of its `penalty`, a mean over all positions that the
    head saw, padding included. One forward pass. Logs `task` (the base's loss), `penalty` (without gamma) and `heads`,
    how many ran: 0, and the base alone, for a model that has none, as before a pass puts one there.

    Args:
        base: objective of the task at hand, or its recipe node.
        gamma: weight of the penalty, at least 0; the paper's 1e-6 is for bins 4096 and frequencies 550.
    Raises:
        LaminaError: a negative gamma, or (at the call) a model none of whose Fourier heads ran.
    """

    def __init__(self, base: Annotated[Any, Slot("objective")] = "classification", gamma: float = 1e-6) -> None:
        super().__init__(base)
        if not gamma >= 0:
            raise LaminaError(f"gamma must be at least 0, got {gamma}")
        self.gamma = gamma

    def complete(self, losses: Losses, seen: Seen) -> Losses:
        """Add the penalties of every head that ran."""
        found = [torch.stack(calls).mean() for calls in seen.values() if calls]
        if seen and not found:
            raise LaminaError(f"fourier_smoothness: none of the Fourier heads ran on this batch: {', '.join(seen)}")
        loss = losses["loss"]
        penalty = torch.stack(found).sum() if found else torch.zeros_like(loss)
        heads = torch.full_like(loss.detach(), len(found))
        return {**losses, "loss": loss + self.gamma * penalty, "penalty": penalty.detach(), "heads": heads}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Seen]:
        """Collect the penalty of every call of every Fourier head from the coefficients it computes anyway."""
        root = bare(model)
        paths = [f"{p}.linear".lstrip(".") for p, m in root.named_modules() if isinstance(m, FourierHead)]
        seen: Seen = {path: [] for path in paths}

        def note(path: str) -> probe.Callback:
            return lambda module, args, kwargs, output: seen[path].append(fourier_penalty(output))

        with probe.observe(model, {path: note(path) for path in paths}) if paths else nullcontext():
            yield seen
