"""Train a model with Fourier heads so that its densities stay smooth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina import probe
from lamina.batches import Batch, bare
from lamina.errors import LaminaError
from lamina.nn import FourierHead, fourier_penalty
from lamina.objectives.objective import Losses, WeightedSum
from lamina.recipe import build
from lamina.registry import Slot, register

Seen = dict[str, list[Tensor]]
"""Penalties of the calls of each head, by its path."""


@register("objective", source="Gillman et al., Fourier Head (2024), arXiv 2410.22269, equation 5")
class FourierSmoothness(nn.Module):
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

    needs: ClassVar[Literal["outputs", "model"]] = "model"

    def __init__(self, base: Annotated[Any, Slot("objective")] = "classification", gamma: float = 1e-6) -> None:
        super().__init__()
        if not gamma >= 0:
            raise LaminaError(f"gamma must be at least 0, got {gamma}")
        # A sum of one term: it names the term, shares a forward pass with what needs one, and keeps the term's state.
        self.base = WeightedSum([(1.0, build(base, "objective"))], ["task"])
        self.gamma = gamma
        self._seen: Seen | None = None

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the base's losses with the penalty added."""
        with self._watching(model) as seen:
            losses = self.base(model, batch)
        return self._with_penalty(losses, seen)

    @property
    def observing(self) -> Callable[[nn.Module], AbstractContextManager[None]] | None:
        """A context under which a forward pass leaves what `loss` needs; None where the base calls the model itself."""
        return self._observe if self.base.needs == "outputs" else None

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses of outputs computed under `observing`.

        Raises:
            LaminaError: they were not.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise LaminaError("fourier_smoothness needs the model: call the objective, not its loss()")
        return self._with_penalty(self.base.loss(outputs, batch), seen)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield the base's own parameters."""
        yield from self.base.parameters()

    def before_rewrite(self, model: nn.Module) -> None:
        """Tell the base that the model is about to be rewritten."""
        self.base.before_rewrite(model)

    def set_progress(self, fraction: float) -> None:
        """Tell the base how far training is."""
        self.base.set_progress(fraction)

    def _with_penalty(self, losses: Losses, seen: Seen) -> Losses:
        found = [torch.stack(calls).mean() for calls in seen.values() if calls]
        if seen and not found:
            raise LaminaError(f"fourier_smoothness: none of the Fourier heads ran on this batch: {', '.join(seen)}")
        loss = losses["loss"]
        penalty = torch.stack(found).sum() if found else torch.zeros_like(loss)
        heads = torch.full_like(loss.detach(), len(found))
        return {**losses, "loss": loss + self.gamma * penalty, "penalty": penalty.detach(), "heads": heads}

    @contextmanager
    def _observe(self, model: nn.Module) -> Iterator[None]:
        with self._watching(model) as seen:
            yield
        self._seen = seen

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[Seen]:
        """Collect the penalty of every call of every Fourier head from the coefficients it computes anyway."""
        root = bare(model)
        paths = [f"{p}.linear".lstrip(".") for p, m in root.named_modules() if isinstance(m, FourierHead)]
        seen: Seen = {path: [] for path in paths}

        def note(path: str) -> probe.Callback:
            return lambda module, args, kwargs, output: seen[path].append(fourier_penalty(output))

        with probe.observe(model, {path: note(path) for path in paths}) if paths else nullcontext():
            yield seen
