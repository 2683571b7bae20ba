"""The coordinate check: do activations stay as large when the network gets wider, also after a few steps?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lamina.batches import Batch, call, logits
from lamina.errors import LaminaError
from lamina.optim.groups import parameter_groups
from lamina.optim.parametrization.rates import mup
from lamina.optim.parametrization.widths import MUP_NAME
from lamina.probe import Callback, first_tensor, observe
from lamina.recipe import Node, factory

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Coordinates:
    """Mean absolute activation of every module at every width after every number of steps."""

    widths: tuple[int, ...]
    sizes: Mapping[str, tuple[tuple[float, ...], ...]]
    """By path: a row a number of steps (0, 1, ...), a column a width."""

    def slopes(self, step: int = -1) -> dict[str, float]:
        """Return the exponent with which each module's activations grow with the width: 0 is right, above 0.1 is not.

        A read-out's may be as low as -0.5 at the start (step 0), and rises to 0; a query's that carries the scale of
        its logits is -0.5. NaN: no activation but zeros.
        """
        x = np.log(np.asarray(self.widths, dtype=np.float64))
        return {path: _slope(x, rows[step]) for path, rows in self.sizes.items()}

    def table(self, step: int = -1) -> str:
        """Word the check for people: a line a module, a column a width, and the slope."""
        head = " ".join(f"{w:>9}" for w in self.widths)
        room = max(len(path) for path in self.sizes)
        lines = [f"{'':{room}} {head}     slope"]
        for path, slope in self.slopes(step).items():
            row = " ".join(f"{v:9.3g}" for v in self.sizes[path][step])
            lines.append(f"{path:{room}} {row} {slope:9.2f}")
        return "\n".join(lines)

    def plot(self, path: str | Path, title: str = "") -> Path:
        """Draw a panel for each number of steps, a line a module; SVG, PNG or PDF by the name. Returns the path."""
        from matplotlib.figure import Figure

        steps = len(next(iter(self.sizes.values())))
        drawing = Figure(figsize=(2.6 * steps, 2.8), layout="constrained")
        for step, axis in enumerate(drawing.subplots(1, steps, sharey=True, squeeze=False)[0]):
            for name, rows in self.sizes.items():
                axis.plot(self.widths, rows[step], marker="o", markersize=3, label=name)
            axis.set(xscale="log", yscale="log", xlabel="width", title=f"{step} steps")
        drawing.supylabel("mean |activation|")
        drawing.suptitle(title)
        drawing.axes[-1].legend(fontsize=6)
        drawing.savefig(path)
        return Path(path)


def coordinate_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    batch: Batch,
    steps: int = 4,
    optimizer: Node = "adamw",
    *,
    loss: Loss | None = None,
    modules: Sequence[str] | None = None,
    seeds: int = 1,
) -> Coordinates:
    """Train a model at several widths for a few steps on one batch, and record how large activations are.

    Args:
        make_model: makes the model of a width, in muP (then its rates are muP's) or not.
        widths: two at least, such as 32, 64, ... 2048.
        batch: as in training.
        steps: of the optimizer; activations are recorded before each, and after the last.
        optimizer: its node, with the base's rate: `{name: adam, lr: 1e-3}`.
        loss: of model and batch; None = cross entropy of the logits and `labels`, or of the next `input_ids`.
        modules: paths to look at; None = every module without modules of its own that gives a tensor.
        seeds: the models' global seeds are 0, 1, ...; the mean is recorded.
    Raises:
        LaminaError: fewer than two widths, no steps, a batch that the default loss has no target in.
    Source: Yang et al. (2022), arXiv 2203.03466, appendix D.1.
    Example:
        >>> def make(width): return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
        >>> batch = {"inputs": torch.randn(8, 4), "labels": torch.zeros(8, dtype=torch.long)}
        >>> found = coordinate_check(make, [16, 64], batch, steps=2)
        >>> list(found.slopes()), len(found.sizes["0"])
        (['0', '1'], 3)
    """
    if len(set(widths)) < 2 or steps < 1 or seeds < 1:
        raise LaminaError(
            f"coordinate_check wants two widths, a step and a seed at least, got {widths}, {steps}, {seeds}"
        )
    measured: dict[str, list[list[float]]] = {}
    for column, width in enumerate(widths):
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                rows = _trained(make_model(width), batch, steps, optimizer, loss or default_loss, modules)
            for path, values in rows.items():
                table = measured.setdefault(path, [[0.0] * len(widths) for _ in values])
                for step, value in enumerate(values):
                    table[step][column] += value / seeds
    return Coordinates(tuple(widths), {path: tuple(map(tuple, table)) for path, table in measured.items()})


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy of a model's logits: of `labels` where there are some, else of the next token."""
    scores = logits(call(model, batch)).float()
    if "labels" in batch:
        labels = batch["labels"]
        return F.cross_entropy(scores.flatten(0, -2), labels.flatten())
    if "input_ids" in batch:
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    raise LaminaError(f"the batch has neither labels nor input_ids, only {', '.join(batch)}: pass a loss")


def _trained(
    model: nn.Module, batch: Batch, steps: int, optimizer: Node, loss: Loss, modules: Sequence[str] | None
) -> dict[str, list[float]]:
    model.train()
    paths = (
        list(modules) if modules is not None else [n for n, m in model.named_modules() if n and not any(m.children())]
    )
    rule = _optimizer(model, optimizer)
    found: dict[str, list[float]] = {}
    for step in range(steps + 1):
        seen: dict[str, list[float]] = {}

        with observe(model, {path: _noting(seen, path) for path in paths}):
            value = loss(model, batch)
        for path, sizes in seen.items():
            found.setdefault(path, []).append(math.fsum(sizes) / len(sizes))
        if step < steps:
            rule.zero_grad()
            value.backward()
            rule.step()
    return found


def _noting(seen: dict[str, list[float]], path: str) -> Callback:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None and tensor.is_floating_point():
            seen.setdefault(path, []).append(float(tensor.detach().abs().double().mean()))

    return note


def _optimizer(model: nn.Module, node: Node) -> Optimizer:
    if any(r.name == MUP_NAME for r in getattr(model, "lamina_history", ())):
        return mup(model, node)
    made: Optimizer = factory("optimizer", node)(parameter_groups(model, 0.0))
    return made


def _slope(x: np.ndarray[Any, Any], sizes: Sequence[float]) -> float:
    if min(sizes) <= 0.0:
        return math.nan
    return float(np.polyfit(x, np.log(np.asarray(sizes)), 1)[0])
