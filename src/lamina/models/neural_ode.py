"""Classifiers whose body is a neural ODE or SDE, in the sizes of the local regularisation paper.

Source: Pal, Edelman, Rackauckas, Locally Regularized Neural Differential Equations (2023), arXiv 2303.02262.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn.ode.block import NeuralODE, field_of
from lamina.nn.ode.sde import NeuralSDE
from lamina.nn.ode.solve import Adjoint
from lamina.nn.ode.step import SOURCE
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("model", "neural_ode_classifier", source=f"{SOURCE}, MNIST and CIFAR-10")
class NeuralODEClassifier(nn.Module):
    """Let the input itself follow a learned ODE, and read the class off where it ends.

    pixel_values (B, ...) -> logits (B, classes). The defaults are the paper's MNIST network (166,418 parameters) but
    for its tolerances, which are 1.4e-8 there. Images stay images where `func` takes maps, such as `time_conv`: of any
    size then, and the head reads the mean over their positions.

    Args:
        features: numbers an input has, or its channels where it stays an image.
        hidden: channels inside func; None = its own default.
        augment: zeros put beside the features (as channels, for images), so that paths can cross.
        func: built as func(width=features + augment, hidden=hidden), as far as it names them.
        maps: keep images as they are, instead of flattening them.
        head: built as head(features + augment, classes).
        times, method, rtol, atol, adjoint: of the `NeuralODE`.
    Raises:
        ShapeError: sizes below 1, or inputs with other features.
    Example:
        >>> NeuralODEClassifier(16, classes=3, hidden=8)(torch.rand(2, 1, 4, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        features: int = 784,
        classes: int = 10,
        *,
        hidden: int | None = 100,
        augment: int = 0,
        func: Annotated[Node, Slot("layer")] = "time_mlp",
        maps: bool = False,
        head: Annotated[Node, Slot("layer")] = "linear",
        times: Sequence[float] = (0.0, 1.0),
        method: Literal["tsit5", "dopri5"] = "tsit5",
        rtol: float = 1e-4,
        atol: float = 1e-4,
        adjoint: Adjoint = "discrete",
    ) -> None:
        super().__init__()
        _check(features=features, classes=classes, hidden=hidden)
        if augment < 0:
            raise ShapeError(f"augment must not be negative, got {augment}")
        self.features, self.augment, self.maps, width = features, augment, maps, features + augment
        self.ode = NeuralODE(field_of(func, width, hidden), times, method, rtol, atol, adjoint)
        self.head: nn.Module = factory("layer", head)(width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits."""
        z = _inputs(self, pixel_values, self.features, maps=self.maps)
        if self.augment:
            z = torch.cat([z, z.new_zeros(len(z), self.augment, *z.shape[2:])], dim=1)
        z = self.ode(z)
        return self.head(z.flatten(2).mean(-1) if self.maps else z)


@register("model", "neural_sde_classifier", source=f"{SOURCE}, MNIST")
class NeuralSDEClassifier(nn.Module):
    """Let a linear image of the input follow a learned SDE, and read the class off where it ends.

    pixel_values (B, ...) -> logits (B, classes). The defaults are the paper's MNIST network (30,698 parameters).

    Args:
        features: numbers an input has.
        width: of the state.
        drift: built as drift(width=width, hidden=hidden), as far as it names them; None = two layers with tanh.
        diffusion: likewise; None = one linear layer.
        head: built as head(width, classes).
        trajectories: noise paths whose logits are averaged in evaluation; training follows one.
        times, method, rtol, atol, adjoint: of the `NeuralSDE`.
    Raises:
        ShapeError: sizes below 1, or inputs with other features. LaminaError: no trajectory.
    """

    def __init__(
        self,
        features: int = 784,
        classes: int = 10,
        *,
        width: int = 32,
        hidden: int = 64,
        drift: Annotated[Node, Slot("layer")] | None = None,
        diffusion: Annotated[Node, Slot("layer")] | None = None,
        head: Annotated[Node, Slot("layer")] = "linear",
        trajectories: int = 1,
        times: Sequence[float] = (0.0, 1.0),
        method: Literal["sri2w1", "euler_heun"] = "sri2w1",
        rtol: float = 0.14,
        atol: float = 0.14,
        adjoint: Adjoint = "discrete",
    ) -> None:
        super().__init__()
        _check(features=features, classes=classes, width=width, hidden=hidden)
        if trajectories < 1:
            raise LaminaError(f"trajectories must be at least 1, got {trajectories}")
        self.features, self.trajectories = features, trajectories
        self.embed = nn.Linear(features, width)
        moved = _drift(width, hidden) if drift is None else field_of(drift, width, hidden)
        spread = nn.Linear(width, width) if diffusion is None else field_of(diffusion, width, hidden)
        self.sde = NeuralSDE(moved, spread, times, method, rtol, atol, adjoint)
        self.head: nn.Module = factory("layer", head)(width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits."""
        z = self.embed(_inputs(self, pixel_values, self.features, maps=False))
        if self.training or self.trajectories == 1:
            return self.head(self.sde(z))
        paths = [self.head(self.sde(z, seed=self.sde.seed + i)) for i in range(self.trajectories)]
        return torch.stack(paths).mean(0)


def _drift(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))


def _inputs(model: nn.Module, x: Tensor, features: int, *, maps: bool) -> Tensor:
    """Return (B, features), or the maps (B, features, H, W)."""
    z = x if maps else x.flatten(1)
    if z.shape[1:2] != (features,) or (maps and x.dim() != 4):
        wanted = f"images (B, {features}, H, W)" if maps else f"{features} numbers a row"
        raise ShapeError(f"{type(model).__name__} takes {wanted}, got {tuple(x.shape)}")
    return z


def _check(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ShapeError(f"{name} must be at least 1, got {size}")
