"""Volume rendering: what a camera sees of a field, ray by ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn._precision import without_autocast
from lamina.nn.fields.occupancy import OccupancyGrid

Background = Literal["white", "black", "random"]

POINTS_AT_ONCE = 2**17
"""Where nothing is learned, rays are rendered so many points at a time: what is in between then stays in the cache."""


@dataclass(frozen=True)
class Samples:
    """Points along R rays, S on each."""

    points: Tensor
    """(R, S, 3)."""
    directions: Tensor
    """(R, S, 3), unit."""
    distances: Tensor
    """(R, S): t of each point, from the origin of its ray."""
    steps: Tensor
    """(R, S): length of the piece of the ray that a point stands for; 0 where the ray misses the box."""
    occupied: Tensor | None
    """(R, S) bool: where something may be; None = not asked."""


@dataclass(frozen=True)
class Rendering:
    """What was seen along R rays."""

    color: Tensor
    """(R, 3) in 0..1."""
    opacity: Tensor
    """(R,): the share of the colour that is not background."""
    depth: Tensor
    """(R,): expected distance, sum of weight times t."""
    weights: Tensor
    """(R, S): share of each point in the colour."""


class VolumeRenderer(nn.Module):
    """Renders any field (`bound`, `geometry`, `color`, `density`) along rays; float32 whatever the field computes in.

    field, origins (R, 3), unit directions (R, 3) -> a `Rendering`. Points stand in the middle of equal pieces of the
    ray's way through the box; rays that miss the box show the background.

    Args:
        samples: points a ray.
        background: what is behind: "white", "black", or "random", one colour a ray (drawn from torch's generator).
        jitter: in training, draw each point within its piece.
    Raises:
        LaminaError: no sample, or no such background. ShapeError: (at the call) no rays (R, 3), or directions that are
            not of length 1.
    Source: Max, Optical models for direct volume rendering (1995); Mildenhall et al., arXiv 2003.08934, equation 3.
    Example:
        >>> from lamina.nn.fields import GridField
        >>> rays = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]])
        >>> VolumeRenderer(samples=8)(GridField(resolution=4), *rays).color.shape
        torch.Size([1, 3])
    """

    def __init__(self, samples: int = 1024, background: Background = "white", *, jitter: bool = False) -> None:
        super().__init__()
        if samples < 1 or background not in ("white", "black", "random"):
            raise LaminaError(
                f"a renderer needs a sample and a background 'white', 'black' or 'random', got {samples=}, "
                f"{background=}"
            )
        self.samples, self.background, self.jitter = samples, background, jitter

    def forward(
        self, field: Any, origins: Tensor, directions: Tensor, occupancy: OccupancyGrid | None = None
    ) -> Rendering:
        """Return what is seen along the rays; empty cells of `occupancy` count as empty space, unasked."""
        check_rays(origins, directions)
        many = len(origins) * self.samples > POINTS_AT_ONCE
        if many and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            rays = max(POINTS_AT_ONCE // self.samples, 1)
            parts = zip(origins.split(rays), directions.split(rays), strict=True)
            found = [self.along(field, o, d, occupancy) for o, d in parts]
            names = ("color", "opacity", "depth", "weights")
            return Rendering(*(torch.cat([getattr(f, name) for f in found]) for name in names))
        return self.along(field, origins, directions, occupancy)

    def along(self, field: Any, origins: Tensor, directions: Tensor, occupancy: OccupancyGrid | None) -> Rendering:
        """Sample, evaluate, composite."""
        samples = self.sample(origins, directions, field.bound, occupancy)
        sigma, rgb = evaluate(field, samples)
        return self.composite(sigma, rgb, samples)

    def sample(
        self, origins: Tensor, directions: Tensor, bound: float, occupancy: OccupancyGrid | None = None
    ) -> Samples:
        """Place points along the rays inside the box [-bound, bound]^3."""
        near, far = through_box(origins, directions, bound)
        place = torch.arange(self.samples, device=origins.device) + 0.5
        if self.jitter and self.training and torch.is_grad_enabled():
            place = place + torch.rand(len(origins), self.samples, device=origins.device) - 0.5
        steps = ((far - near) / self.samples)[:, None].expand(-1, self.samples)
        distances = near[:, None] + steps * place
        points = (origins[:, None] + distances[..., None] * directions[:, None]).clamp(-bound, bound)
        inside = None if occupancy is None else occupancy(points)
        return Samples(points, directions[:, None].expand_as(points), distances, steps, inside)

    def composite(self, sigma: Tensor, rgb: Tensor, samples: Samples, behind: Tensor | None = None) -> Rendering:
        """Put densities (R, S) and colours (R, S, 3) together; `behind` (R, 3) in place of the background."""
        with without_autocast(sigma.device):
            weights = ray_weights(sigma.float(), samples.steps)
            opacity = weights.sum(1)
            behind = self.behind(sigma) if behind is None else behind
            color = (weights[..., None] * rgb.float()).sum(1) + (1 - opacity)[:, None] * behind
            return Rendering(color, opacity, (weights * samples.distances).sum(1), weights)

    def behind(self, sigma: Tensor) -> Tensor:
        """Return the colour behind each ray (R, 3) or of all (1, 3); for two renderings to compare, draw it once."""
        if self.background == "random":
            return torch.rand(len(sigma), 3, device=sigma.device)
        return torch.full((1, 3), float(self.background == "white"), device=sigma.device)

    def extra_repr(self) -> str:
        """Say the options."""
        return f"samples={self.samples}, background={self.background!r}, jitter={self.jitter}"


def evaluate(field: Any, samples: Samples) -> tuple[Tensor, Tensor]:
    """Return sigma (R, S) and rgb (R, S, 3) at the points; where nothing is, 0, and the field is not asked."""
    shape = samples.steps.shape
    x, d = samples.points.flatten(0, 1), samples.directions.flatten(0, 1)
    if samples.occupied is None:
        sigma, rgb = field(x, d)
        return sigma.reshape(shape), rgb.reshape(*shape, 3)
    inside = samples.occupied.flatten()
    if torch.compiler.is_compiling() or x.is_meta:
        # How many are inside is not known to a graph.
        sigma, rgb = field(x, d)
        return (sigma * inside).reshape(shape), rgb.reshape(*shape, 3)
    rows = inside.nonzero().squeeze(1)
    if not len(rows):
        # One point keeps every parameter in the graph; it weighs nothing.
        sigma, rgb = field(x[:1], d[:1])
        return (0 * sigma).expand(len(x)).reshape(shape), (0 * rgb).expand(len(x), 3).reshape(*shape, 3)
    sigma, rgb = field(x[rows], d[rows])
    full = sigma.new_zeros(len(x)).index_put((rows,), sigma), rgb.new_zeros(len(x), 3).index_put((rows,), rgb)
    return full[0].reshape(shape), full[1].reshape(*shape, 3)


def ray_weights(sigma: Tensor, steps: Tensor) -> Tensor:
    """Return w_i = alpha_i * prod_{j<i} (1 - alpha_j), alpha = 1 - exp(-sigma * step): (R, S) -> (R, S).

    Computed as differences of the transmittance, so that their sum is exactly 1 - exp(-sum sigma * step).
    """
    passed = (sigma * steps).cumsum(-1)
    left = torch.exp(-passed)
    before = torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], dim=1)
    return before - left


def through_box(origins: Tensor, directions: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return where rays enter and leave the box [-bound, bound]^3, in distances >= 0 (R,); equal where they miss it."""
    tiny = torch.where(directions < 0, -1e-9, 1e-9)
    slope = torch.where(directions.abs() < 1e-9, tiny, directions)
    first, second = (-bound - origins) / slope, (bound - origins) / slope
    near = torch.minimum(first, second).amax(-1).clamp(min=0)
    far = torch.maximum(first, second).amin(-1)
    return near, torch.maximum(near, far)


def check_rays(origins: Tensor, directions: Tensor, *, unit: bool = True) -> None:
    """Refuse what is no (R, 3) with one direction each, where `unit` of length 1.

    Raises:
        ShapeError: says what was given.
    """
    if origins.dim() != 2 or origins.shape[1:] != (3,) or directions.shape != origins.shape:
        raise ShapeError(
            f"rays are origins (R, 3) and directions (R, 3), got {tuple(origins.shape)} and {tuple(directions.shape)}"
        )
    if not origins.is_floating_point() or not directions.is_floating_point():
        raise ShapeError(f"rays must be floating-point, got {origins.dtype} and {directions.dtype}")
    if not unit or torch.compiler.is_compiling() or directions.is_meta:
        return
    off = (directions.detach().float().norm(dim=1) - 1).abs()
    if len(off) and not bool(off.max() < 1e-2):
        raise ShapeError(f"directions must have length 1, the farthest from it is off by {float(off.max()):.3g}")
