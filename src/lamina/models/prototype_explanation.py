"""What a prototype head decides by: the nearest prototypes, what each adds to each logit, what each looks like.

For any model with a `PrototypeHead` in it. What a prototype looks like is decoded where there is a decoder, else the
training input whose latent is nearest to it, and `Explanation.pictures_from` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lamina import anatomy, probe
from lamina.batches import Batch, bare, first_input
from lamina.errors import AnatomyError, LaminaError
from lamina.nn import PrototypeHead

Source = Literal["decoder", "nearest training input", "nothing"]


@dataclass(frozen=True)
class NearestTraining:
    """The training input whose latent is nearest to each prototype, m of them."""

    rows: Tensor
    """(m,) number of the input, counted through all batches."""
    distances: Tensor
    """(m,) squared distance of its latent."""
    inputs: Tensor
    """(m, ...) the inputs themselves."""
    labels: Tensor | None
    """(m,) their labels, where the batches have any."""


@dataclass(frozen=True)
class Explanation:
    """A prediction for each of B inputs, taken apart; `contributions.sum(1) + others` are the logits."""

    logits: Tensor
    """(B, K)"""
    prototypes: Tensor
    """(B, top) numbers of the nearest prototypes, the nearest first."""
    classes: Tensor
    """(B, top) the class that nearness to each speaks for most."""
    distances: Tensor
    """(B, top) squared."""
    weights: Tensor
    """(B, top, K) of these prototypes; negative: nearness speaks for the class."""
    contributions: Tensor
    """(B, top, K) distance times weight."""
    others: Tensor
    """(B, K) what the prototypes that are not among the top add."""
    pictures: Tensor | None
    """(B, top, ...) what the prototypes look like."""
    pictures_from: Source

    def __str__(self) -> str:
        """Word it, a paragraph an input."""
        return "\n".join(self._worded(row) for row in range(len(self.logits)))

    def _worded(self, row: int) -> str:
        told = int(self.logits[row].argmax())
        lines = [f"input {row}: class {told}, logit {float(self.logits[row, told]):.3f}"]
        added = self.contributions[row, :, told]
        table = zip(self.prototypes[row], self.classes[row], self.distances[row], added, strict=True)
        lines += [
            f"  prototype {int(j)} (class {int(c)}) at squared distance {float(d):.3f} adds {float(a):.3f}"
            for j, c, d, a in table
        ]
        shown = {"nothing": "no pictures: there is no decoder, and no training inputs were given"}
        lines.append(f"  the other prototypes add {float(self.others[row, told]):.3f}")
        return "\n".join([*lines, f"  ({shown.get(self.pictures_from, f'pictures: {self.pictures_from}')})"])


def find_prototype_head(model: nn.Module) -> tuple[str, PrototypeHead]:
    """Return the path and the module of a model's prototype head.

    Raises:
        AnatomyError: it has none, or several.
    """
    found = [(p, m) for p, m in bare(model).named_modules() if isinstance(m, PrototypeHead)]
    if len(found) != 1:
        seen = f"{len(found)}: {', '.join(p for p, _ in found)}" if found else "none"
        raise AnatomyError(
            f"an explanation by prototypes needs one PrototypeHead in {type(bare(model)).__name__}, which has {seen}; "
            "Replace('head', 'prototype_head') puts one there"
        )
    return found[0]


@torch.no_grad()
def explain_prototypes(
    model: nn.Module,
    batch: Batch,
    top: int = 3,
    *,
    pictures: Callable[[], Tensor] | None = None,
    nearest: NearestTraining | None = None,
) -> Explanation:
    """Explain the predictions of any model with a `PrototypeHead`, in evaluation mode.

    Where the head is called with (B, T, q), every position is one input, row after row.

    Args:
        batch: as `lamina.batches.call` takes it.
        top: how many prototypes an input, the nearest first; at most all.
        pictures: makes (m, ...), what each prototype looks like; a `PrototypeNetwork` brings its decoder.
        nearest: of `nearest_training`: shown where there are no pictures.
    Raises:
        LaminaError: a top below 1. AnatomyError: not one prototype head.
    """
    if top < 1:
        raise LaminaError(f"top is how many prototypes to show, at least 1, got {top}")
    path, head = find_prototype_head(model)
    z = _latents(model, path, batch)
    added = head.contributions(z)
    distances, order = head.layer(z).sort(1)
    chosen = order[:, :top]
    kept = added.gather(1, chosen[..., None].expand(-1, -1, head.num_classes))
    shown = pictures() if pictures is not None else None if nearest is None else nearest.inputs
    source: Source = "decoder" if pictures is not None else "nothing" if nearest is None else "nearest training input"
    return Explanation(
        logits=added.sum(1),
        prototypes=chosen,
        classes=head.prototype_class()[chosen],
        distances=distances[:, :top],
        weights=head.linear.weight.t()[chosen],
        contributions=kept,
        others=added.sum(1) - kept.sum(1),
        pictures=None if shown is None else shown[chosen],
        pictures_from=source,
    )


@torch.no_grad()
def nearest_training(model: nn.Module, data: Iterable[Batch]) -> NearestTraining:
    """Find the input nearest to each prototype among batches, in evaluation mode.

    The head must be called with one latent an input. Inputs are the first tensor of a batch that is not a target.

    Raises:
        LaminaError: no batch, or not one latent an input. AnatomyError: not one prototype head.
    """
    path, head = find_prototype_head(model)
    best: NearestTraining | None = None
    start = 0
    for batch in data:
        inputs = first_input(batch)
        distances = head.layer(_latents(model, path, batch))
        if len(distances) != len(inputs):
            raise LaminaError(f"{path or 'the head'} saw {len(distances)} latents of {len(inputs)} inputs: one each")
        near, rows = distances.min(0)
        labels = batch.get("labels", batch.get("targets"))
        told = labels[rows] if isinstance(labels, Tensor) else None
        best = _nearer(best, NearestTraining(rows + start, near, inputs[rows], told))
        start += len(inputs)
    if best is None:
        raise LaminaError("the training inputs nearest to the prototypes were asked for, and data has no batch")
    return best


def _latents(model: nn.Module, path: str, batch: Batch) -> Tensor:
    """Return what the head is called with, (B, q)."""
    inner, place = bare(model), f"{path}.layer".lstrip(".")
    with anatomy.undisturbed(inner):
        captured = probe.run_captured(inner, batch, inputs=[place], stop=True)
    z = captured.input(place)
    return z.reshape(-1, z.shape[-1])


def _nearer(old: NearestTraining | None, new: NearestTraining) -> NearestTraining:
    if old is None:
        return new
    better = new.distances < old.distances
    wide = better.view(-1, *[1] * (new.inputs.dim() - 1))
    labels = None
    if old.labels is not None and new.labels is not None:
        labels = torch.where(better, new.labels, old.labels)
    return NearestTraining(
        torch.where(better, new.rows, old.rows),
        torch.where(better, new.distances, old.distances),
        torch.where(wide, new.inputs, old.inputs),
        labels,
    )
