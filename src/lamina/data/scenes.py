"""Rays through a scene in space: pixels of photographs, or pixels of cameras that no one ever had.

A scene is made up here (`spheres`), where every colour is known, or comes from photographs with their cameras.
Source: Fang et al., One is All: Progressive Volume Distillation (AAAI 2023), arXiv 2211.15977, section 4.1 (cameras).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lamina.data._scene_files import Photographs, read_photographs
from lamina.data.examples import Data
from lamina.errors import LaminaError
from lamina.registry import register

RADIUS = 3.2
"""Distance of the cameras from the middle of a made-up scene: 4, scaled by 0.8 into the unit box."""
VIEW = 0.6911
"""Angle that a camera of NeRF-Synthetic sees from side to side, in radians."""
HIGHEST_ELEVATION = 80.0


@register("data", source="Fang et al., AAAI 2023, arXiv 2211.15977; lego: Mildenhall et al., NeRF (2020)")
def scenes(
    source: str | Path = "spheres",
    rays: int = 4096,
    *,
    views: Literal["random", "photographs"] = "random",
    poses: int = 300,
    image: int = 100,
    train: int = 12,
    test: int = 5,
    facing: Literal["object", "forward"] = "object",
    scale: float = 0.8,
    split: float = 0.1,
    seed: int = 0,
) -> Data:
    """Rays of cameras: `origins` and unit `directions` (N, 3), `pose_id` and `epoch` (N,), `labels` (N, 3) of pixels.

    With views="random" every batch is one camera's: `poses` cameras are drawn anew each epoch, a pure function of
    (seed, epoch, number), so that resuming is exact; what their rays should see a teacher says. With "photographs" rays
    are the pixels of all training images, in any order, and `labels` their colours. Evaluation is all pixels of images
    kept aside, with labels, in both cases. White is behind everything.

    Args:
        source: "spheres" (three soft textured spheres), an .npz file with `images` (N, H, W, 3 or 4) uint8, `c2w`
            (N, 4, 4) and `focal` in pixels, or a folder with `transforms_train.json` and its images (NeRF-Synthetic).
        rays: a batch, over all processes.
        views: whose rays.
        poses: cameras an epoch, for random views.
        image: pixels a side of made-up cameras. A file's cameras have its own.
        train: photographs of a made-up scene.
        test: photographs kept aside, of a made-up scene.
        facing: where random cameras stand: "object", on a dome round the middle, looking there (of a file: as far and
            as high as its own); "forward", inside the box round the file's cameras, looking as one of these does.
        scale: factor of the positions of a file's cameras, so that what they see lies in [-1, 1]^3.
        split: share of a file's images kept aside, where it has no file of its own for that.
        seed: of everything drawn.
    Raises:
        LaminaError: a number out of range, no such file, or not what it should hold.
    """
    if min(rays, poses, train, test) < 1 or image < 2 or not scale > 0:
        raise LaminaError(
            "scenes need a ray, a pose, a training and a test view, 2 pixels a side and a scale above 0, got "
            f"{rays=}, {poses=}, {train=}, {test=}, {image=}, {scale=}"
        )
    if views not in ("random", "photographs") or facing not in ("object", "forward"):
        raise LaminaError(f"views are 'random' or 'photographs', facing 'object' or 'forward', got {views!r}, {facing!r}")  # fmt: skip  # noqa: E501
    made_up = str(source) == "spheres"
    if made_up and facing == "forward":
        raise LaminaError("facing 'forward' is for photographs that look one way; 'spheres' are seen from all round")
    if made_up:
        seen, held = photograph_spheres(train, image, seed), photograph_spheres(test, image, seed, aside=True)
    else:
        seen, held = read_photographs(Path(source), scale, split, seed)
    evaluation = Pixels(held)
    sizes = {"image": seen.size[0] if seen.size[0] == seen.size[1] else seen.size}
    if views == "photographs":
        return Data(Pixels(seen), evaluation, rays, sizes, "scenes")
    cameras = RandomCameras(seen, facing, seed) if not made_up else RandomCameras(None, facing, seed)
    random = RandomRays(cameras, poses, rays, seen.size, seen.focal, seed)
    return Data(random, evaluation, rays, sizes, "scenes")


class Pixels:
    """Every pixel of some photographs, as a ray and its colour."""

    def __init__(self, photographs: Photographs) -> None:
        self.photographs = photographs
        self.epoch = 0

    def __len__(self) -> int:
        height, width = self.photographs.size
        return len(self.photographs.images) * height * width

    def set_epoch(self, epoch: int) -> None:
        """Note it for the batches."""
        self.epoch = epoch

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rays of some pixels, image after image, row after row."""
        p, (height, width) = self.photographs, self.photographs.size
        pose, pixel = indices // (height * width), indices % (height * width)
        column, row = pixel % width, pixel // width
        found = rays_of(p.cameras[pose], torch.stack([column, row], -1) + 0.5, p.size, p.focal)
        labels = p.images[pose, row, column]
        return {**found, "pose_id": pose, "epoch": torch.full_like(pose, self.epoch), "labels": labels}


class RandomRays:
    """Rays through random pixels of random cameras, `rays` of each camera in a row."""

    def __init__(
        self, cameras: RandomCameras, poses: int, rays: int, size: tuple[int, int], focal: float, seed: int
    ) -> None:
        self.cameras, self.poses, self.rays, self.size, self.focal = cameras, poses, rays, size, focal
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return self.poses * self.rays

    def set_epoch(self, epoch: int) -> None:
        """Draw other cameras from here on."""
        self.epoch = epoch

    def arrange(self, order: Tensor, batch: int) -> Tensor:
        """Keep the rays of a camera together: cameras in the order in which their first rays come."""
        first = order[order % self.rays == 0].long()
        return (first[:, None] + torch.arange(self.rays)).flatten()

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return rays by number: the camera's times `rays`, plus the ray's."""
        pose, ray = indices // self.rays, indices % self.rays
        parts, height_width = {}, torch.tensor(self.size[::-1])
        for number in pose.unique().tolist():
            mine = pose == number
            pixels = torch.rand(self.rays, 2, generator=generator(self.seed, self.epoch, f"{number}:rays"))
            camera = self.cameras.camera(self.epoch, number, self.poses).expand(int(mine.sum()), 4, 4)
            parts[number] = mine, rays_of(camera, pixels[ray[mine]] * height_width, self.size, self.focal)
        found = {name: torch.empty(len(pose), 3) for name in ("origins", "directions")}
        for mine, rays in parts.values():
            for name, values in found.items():
                values[mine] = rays[name]
        return {**found, "pose_id": pose, "epoch": torch.full_like(pose, self.epoch)}


class RandomCameras:
    """Cameras drawn round an object, or among cameras that look one way; see `scenes`."""

    def __init__(self, like: Photographs | None, facing: str, seed: int) -> None:
        self.facing, self.seed = facing, seed
        self.near = self.far = RADIUS
        self.low, self.high = 0.0, HIGHEST_ELEVATION
        self.like = None if like is None else like.cameras
        if self.like is not None:
            centres = self.like[:, :3, 3]
            radius = centres.norm(dim=1)
            up = torch.rad2deg(torch.asin((centres[:, 2] / radius).clamp(-1, 1)))
            self.near, self.far = float(radius.min()) - 0.01, float(radius.max()) + 0.01
            self.low, self.high = up.quantile(0.05).item(), up.quantile(0.95).item()

    def camera(self, epoch: int, number: int, poses: int) -> Tensor:
        """Return one camera (4, 4), camera to world, of the `poses` of an epoch."""
        a, b, c, d = torch.rand(4, generator=generator(self.seed, epoch, str(number))).tolist()
        if self.facing == "forward" and self.like is not None:
            camera = self.like[int(d * len(self.like))].clone()
            low, high = self.like[:, :3, 3].amin(0), self.like[:, :3, 3].amax(0)
            camera[:3, 3] = low + (high - low) * torch.tensor([a, b, c])
            return camera
        # Bands of elevation, one a camera: an epoch sweeps over all of them.
        elevation = self.low + (self.high - self.low) * (number + a) / poses
        return looking_at_middle(360 * b - 180, elevation, self.near + (self.far - self.near) * c)


def looking_at_middle(azimuth: float, elevation: float, radius: float) -> Tensor:
    """Return a camera (4, 4) at these degrees, z up, that looks at the origin; it looks along its own -z."""
    turn, up = math.radians(azimuth), math.radians(elevation)
    back = torch.tensor([math.cos(up) * math.cos(turn), math.cos(up) * math.sin(turn), math.sin(up)])
    right = torch.tensor([-math.sin(turn), math.cos(turn), 0.0])
    camera = torch.eye(4)
    camera[:3, :3] = torch.stack([right, torch.linalg.cross(back, right), back], dim=1)
    camera[:3, 3] = radius * back
    return camera


def rays_of(cameras: Tensor, pixels: Tensor, size: tuple[int, int], focal: float) -> dict[str, Tensor]:
    """Return origins and directions of the rays through pixels (N, 2) (column, row, from the top left) of N cameras."""
    height, width = size
    x, y = (pixels[:, 0] - width / 2) / focal, -(pixels[:, 1] - height / 2) / focal
    local = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    directions = torch.nn.functional.normalize((cameras[:, :3, :3] @ local[:, :, None]).squeeze(-1), dim=-1)
    return {"origins": cameras[:, :3, 3].contiguous(), "directions": directions}


@dataclass(frozen=True)
class Sphere:
    """One of the soft spheres."""

    centre: tuple[float, float, float]
    radius: float
    color: tuple[float, float, float]
    waves: float
    """Of the texture: how many per unit of length."""


SPHERES = (
    Sphere((-0.35, -0.25, -0.1), 0.38, (0.9, 0.25, 0.2), 2.0),
    Sphere((0.38, -0.1, 0.05), 0.33, (0.2, 0.75, 0.3), 3.0),
    Sphere((0.0, 0.4, 0.15), 0.3, (0.25, 0.35, 0.9), 2.5),
)
DENSEST, SOFTNESS = 40.0, 0.03


def spheres(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return density (N,) and colour (N, 3) of the made-up scene at points (N, 3): the truth behind `spheres`."""
    centres = x.new_tensor([s.centre for s in SPHERES])
    radii, colors = x.new_tensor([s.radius for s in SPHERES]), x.new_tensor([s.color for s in SPHERES])
    waves = 2 * math.pi * x.new_tensor([s.waves for s in SPHERES])
    away = x[:, None] - centres
    each = DENSEST * torch.sigmoid((radii - away.norm(dim=-1)) / SOFTNESS)
    stripes = 0.5 + 0.5 * torch.sin(waves * away[..., 0]) * torch.sin(waves * away[..., 2])
    colored = colors * (0.4 + 0.6 * stripes[..., None])
    density = each.sum(1)
    return density, (each[..., None] * colored).sum(1) / density.clamp(min=1e-6)[:, None]


Formula = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A made-up scene: points (N, 3) -> density (N,) and colour (N, 3)."""


def see_spheres(origins: Tensor, directions: Tensor, samples: int = 192, scene: Formula = spheres) -> Tensor:
    """Return what rays see of the made-up scene, or of another within 1.2 of the middle, on white: (N, 3)."""
    near = -(origins * directions).sum(1) - 1.2
    step = 2.4 / samples
    t = near[:, None] + step * (torch.arange(samples) + 0.5)
    points = origins[:, None] + t[..., None] * directions[:, None]
    density, color = scene(points.flatten(0, 1))
    left = torch.exp(-(density.view(t.shape) * step).cumsum(1))
    weights = torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], 1) - left
    return (weights[..., None] * color.view(*t.shape, 3)).sum(1) + left[:, -1:]


def photograph_spheres(
    count: int, image: int, seed: int, *, aside: bool = False, scene: Formula = spheres
) -> Photographs:
    """Take photographs of a made-up scene, from cameras that no random view has; `aside`: other ones."""
    kind = "test" if aside else "train"
    draws = [torch.rand(2, generator=generator(seed, i, kind)).tolist() for i in range(count)]
    # Evenly spread: a few photographs should not leave a side unseen.
    cameras = torch.stack(
        [
            looking_at_middle(360 * (i + a) / count - 180, 5 + 60 * ((i * 0.618 + b / 3) % 1.0), RADIUS)
            for i, (a, b) in enumerate(draws)
        ]
    )
    size, focal = (image, image), 0.5 * image / math.tan(0.5 * VIEW)
    empty = Photographs(torch.empty(count, image, image, 3), cameras, focal)
    pixels = Pixels(empty)
    rays = [pixels.batch(part) for part in torch.arange(len(pixels)).split(2**12)]
    seen = torch.cat([see_spheres(r["origins"], r["directions"], scene=scene) for r in rays])
    return Photographs(seen.view(count, *size, 3), cameras, focal)


def generator(seed: int, epoch: int, what: str) -> torch.Generator:
    """Return a generator of draws that depend on these alone."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{what}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
