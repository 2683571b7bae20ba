"""What a field is: density and colour at points of space, as a volume renderer and a distillation take them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._inputs import check_features
from lamina.nn._precision import without_autocast
from lamina.nn.fields.spherical_harmonics import spherical_harmonics

LOWEST, HIGHEST = -2.0, 7.0
"""Log-densities outside carry no visual meaning: they are clipped before anything else is done with them."""


class Field(nn.Module):
    """Root of the fields here. Anything with `bound`, `geometry` and `color` of this shape is a field to the rest.

    x (N, 3) in the box [-bound, bound]^3, unit directions d (N, 3) -> density sigma (N,) >= 0, rgb (N, 3) in 0..1;
    with dim=2 (a picture) x (N, 2) -> rgb (N, 3), and there is neither density nor direction.

    Args:
        node: name and options of the part, by which a saved field is built again.
        bound: half the side of the box.
        dim: 3 or 2.
        soft_clip: let gradients through the clip of the log-density where they point inwards.
    """

    features: int = 15
    """Numbers of the geometry feature g that two fields can compare; 0 = `color` takes something of its own kind."""

    def __init__(self, node: dict[str, Any], bound: float, dim: int, soft_clip: bool) -> None:
        super().__init__()
        if not bound > 0 or dim not in (2, 3):
            raise ShapeError(f"a field needs a bound above 0 and dim 2 or 3, got {bound=} and {dim=}")
        self.bound, self.dim, self.soft_clip = float(bound), dim, soft_clip
        # `lamina.io` reads it; a field is no model to the registry, which would note it by itself.
        name = f"{type(self).__module__.rpartition('.')[0]}:{type(self).__name__}"
        self.lamina_node = {"name": name, **node, "bound": bound, "dim": dim, "soft_clip": soft_clip}

    def geometry(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the raw log-density s (N,) (None where dim is 2) and the feature g that `color` takes."""
        raise NotImplementedError

    def color(self, g: Tensor, d: Tensor | None) -> Tensor:
        """Return rgb (N, 3) from the feature and the direction."""
        raise NotImplementedError

    def density(self, s: Tensor) -> Tensor:
        """Return sigma = exp(clip(s)) (N,), float32."""
        return truncated_exp(clip_log_density(s, soft=self.soft_clip))

    def forward(self, x: Tensor, d: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """Return (sigma, rgb), or rgb alone where dim is 2."""
        self.check(x, d)
        s, g = self.geometry(x)
        rgb = self.color(g, d)
        return rgb if s is None else (self.density(s), rgb)

    def check(self, x: Tensor, d: Tensor | None) -> None:
        """Refuse what is no (N, dim) with one direction a point.

        Raises:
            ShapeError: says what was given.
        """
        name = type(self).__name__
        check_features(name, x, self.dim)
        if x.dim() != 2 or (self.dim == 3 and (d is None or d.shape != x.shape)):
            given = "no directions" if d is None else f"directions {tuple(d.shape)}"
            raise ShapeError(
                f"{name} takes points (N, {self.dim}) and a direction each, got {tuple(x.shape)} and {given}"
            )

    def in_unit(self, x: Tensor) -> Tensor:
        """Return the points in 0..1, float32; what is outside the box is put on its side."""
        return (x.float() / (2 * self.bound) + 0.5).clamp(0, 1)


class FieldWithNetworks(Field):
    """A field whose colour is a small network of the feature and the direction: 31 -> 64 -> 64 -> 3, without biases."""

    def __init__(self, node: dict[str, Any], bound: float, dim: int, soft_clip: bool) -> None:
        super().__init__(node, bound, dim, soft_clip)
        width = self.features + (16 if dim == 3 else 0)
        self.color_net = bias_free(width, 64, 64, 3)

    def color(self, g: Tensor, d: Tensor | None) -> Tensor:
        """Return rgb (N, 3), float32."""
        if d is not None and self.dim == 3:
            g = torch.cat([spherical_harmonics(d, 4).to(g.dtype), g], dim=-1)
        rgb: Tensor = self.color_net(g)
        return torch.sigmoid(rgb.float())

    def split(self, numbers: Tensor) -> tuple[Tensor | None, Tensor]:
        """Cut the output of a geometry network into s and g."""
        return (numbers[:, 0], numbers[:, 1:]) if self.dim == 3 else (None, numbers)


def bias_free(*widths: int) -> nn.Sequential:
    """Linear layers without biases, ReLU in between."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def truncated_exp(s: Tensor) -> Tensor:
    """Return exp(s) in float32, with the gradient exp(clip(s, -12, 12)), which is finite for any s."""
    with without_autocast(s.device):
        s = s.float()
        held = s.detach()
        # The second term is 0: it only carries the gradient.
        return held.exp() + held.clamp(-12, 12).exp() * (s - held)


def clip_log_density(s: Tensor, low: float = LOWEST, high: float = HIGHEST, *, soft: bool = False) -> Tensor:
    """Clip s (any shape); `soft` lets a gradient through outside where a step against it would lead back inside."""
    if not soft:
        return s.clamp(low, high)
    clipped: Tensor = _SoftClip.apply(s, low, high)
    return clipped


class _SoftClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(s)
        ctx.low, ctx.high = low, high
        return s.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (s,) = ctx.saved_tensors
        gradient = gradients[0]
        outwards = ((s < ctx.low) & (gradient > 0)) | ((s > ctx.high) & (gradient < 0))
        return gradient.masked_fill(outwards, 0.0), None, None
