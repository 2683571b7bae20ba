"""What layers on frozen random features share: trained values, and their fit in closed form, also inside a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.anatomy import get, undisturbed
from lamina.batches import Batch, bare, to_device
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.nn._precision import without_autocast
from lamina.nn.ridge_regression import fit_ridge
from lamina.probe import run_captured

Penalty = float | Literal["validate"]

IGNORE = -100
"""Label of a row that counts for nothing, as for the objectives."""


class RandomFeatureReadout(nn.Module):
    """Base of layers whose output is linear in features that are frozen and random.

    A subclass has `features`, a module without parameters whose output (..., *shape) the values weigh.

    Args:
        features: the frozen feature map.
        shape: of one row of features.
        out_features: outputs.
    """

    intercept: Tensor

    def __init__(self, features: nn.Module, shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        if out_features < 1:
            raise LaminaError(f"{type(self).__name__} needs out_features of at least 1, got {out_features}")
        self.features = features
        self.out_features = out_features
        self.value = nn.Parameter(torch.zeros(out_features, *shape))
        self.register_buffer("intercept", torch.zeros(out_features))

    def read(self, features: Tensor) -> Tensor:
        """Return the outputs (..., out_features) of features (..., F), in the dtype of the values, autocast or not."""
        value = self.value.flatten(1)
        with without_autocast(features.device):
            return F.linear(features.to(value.dtype), value, self.intercept)

    @torch.no_grad()
    def fit_features(self, blocks: Iterable[tuple[Tensor, Tensor]], penalty: Penalty = "validate") -> float:
        """Fit values and intercept to blocks of (features (n, F), targets), see `fit_ridge`; return the penalty.

        Targets are (n, out_features), (n,) for one output, or class numbers (n,) for several: then 1 for the class and
        0 for the others, and rows of class -100 are left out.
        """
        found = fit_ridge(((phi, y) for phi, y in self._with_targets(blocks)), penalty=penalty)
        self.value.copy_(found.weights.view_as(self.value))
        self.intercept.copy_(found.intercept)
        return float(found.penalty)

    def _with_targets(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for phi, targets in blocks:
            if phi.shape[:-1] != targets.shape[: phi.dim() - 1]:
                raise ShapeError(
                    f"targets {tuple(targets.shape)} do not belong to {tuple(phi.shape[:-1])} rows of features"
                )
            phi, y = phi.flatten(0, -2), targets.to(phi.device).flatten(0, phi.dim() - 2)
            if y.dim() == 1 and self.out_features > 1:
                kept = y != IGNORE
                phi, y = phi[kept], one_hot(y[kept], self.out_features)
            y = y.reshape(len(phi), -1)
            if y.shape[1] != self.out_features:
                raise ShapeError(
                    f"targets of {self.out_features} outputs are (n, {self.out_features}) or class numbers (n,), got "
                    f"{tuple(targets.shape)}"
                )
            yield phi, y


@torch.no_grad()
def fit_readout(
    model: nn.Module,
    batches: Iterable[Batch],
    penalty: Penalty = "validate",
    *,
    path: str | None = None,
    target: Callable[[Batch], Tensor] | None = None,
) -> float:
    """Fit the random-feature layer of a model in closed form, on what the rest of the model gives it.

    One pass over the data in evaluation mode, ended at the layer; batch by batch, see `fit_ridge` for the memory. The
    rest of the model is left as it is: this is the last step after a trunk is trained, or the only one.

    Args:
        batches: as for training; moved to the model's device.
        penalty: above 0, or "validate", see `fit_ridge`.
        path: of the layer, where a model has several.
        target: takes the targets out of a batch; default `labels`. Class numbers, or numbers (see `fit_features`).
    Returns:
        The penalty.
    Raises:
        AnatomyError: no random-feature layer in the model, or several and no path. LaminaError: see `fit_ridge`.
    Example:
        >>> from lamina.nn import RandomFeatureMLP
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), RandomFeatureMLP(8, 2, num_features=16))
        >>> x = torch.randn(64, 3)
        >>> fit_readout(model, [{"inputs": x, "labels": (x[:, 0] > 0).long()}]) > 0
        True
    """
    model = bare(model)
    place, layer = _find(model, path)
    inside = f"{place}.features".lstrip(".")
    device = next(model.parameters()).device

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            moved = to_device(batch, device)
            seen = run_captured(model, moved, [inside], stop=True)
            yield seen.tensor(inside), _targets(moved) if target is None else target(moved)

    with undisturbed(model):
        return layer.fit_features(blocks(), penalty)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Turn class numbers (n,) into (n, classes) of 0 and 1.

    Raises:
        ShapeError: numbers that are not whole, or no class.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(f"class numbers of {classes} classes must be whole, got {labels.dtype} {tuple(labels.shape)}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ShapeError(f"class numbers must lie in 0..{classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    return F.one_hot(labels.long(), classes)


def refuse_non_finite(what: str, *values: Tensor) -> None:
    """Refuse NaN and infinity where a value can be looked at (not in a graph, nor under vmap).

    Raises:
        LaminaError: a value is not finite.
    """
    if torch.compiler.is_compiling() or any(v.is_meta for v in values):
        return
    try:
        finite = [bool(torch.isfinite(v).all()) for v in values]
    except RuntimeError:
        return
    if not all(finite):
        shapes = ", ".join(str(tuple(v.shape)) for v, right in zip(values, finite, strict=True) if not right)
        raise LaminaError(f"{what} got NaN or infinity in its input of shape {shapes}")


def _find(model: nn.Module, path: str | None) -> tuple[str, Any]:
    found = {p: m for p, m in model.named_modules() if isinstance(m, RandomFeatureReadout)}
    if path is not None:
        layer = get(model, path)
        if not isinstance(layer, RandomFeatureReadout):
            raise AnatomyError(
                f"{path!r} is a {type(layer).__name__}, no random-feature layer; these are: {[*found] or 'none'}"
            )
        return path, layer
    if not found:
        raise AnatomyError(
            f"{type(model).__name__} has no random-feature layer: put one in, such as by "
            'Replace("head", "random_feature_mlp")'
        )
    if len(found) > 1:
        raise AnatomyError(
            f"{type(model).__name__} has {len(found)} random-feature layers, {[*found]}: name one by path"
        )
    return next(iter(found.items()))


def _targets(batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise LaminaError(f"a batch to fit to needs a tensor 'labels', or pass target=; it has {sorted(batch)}")
    return labels
