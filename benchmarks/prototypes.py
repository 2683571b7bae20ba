"""Elastic deformation of a batch against the loop over images with SciPy that the published code runs (batch 250 of
28 x 28, sigma 4, alpha 20); a training step of the published network with either; distances against torch.cdist.

Run: OMP_NUM_THREADS=1 python -m benchmarks prototypes
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from benchmarks.harness import Row, pair, write
from lamina.data import elastic_deformation
from lamina.models import PrototypeNetwork
from lamina.nn import squared_distances
from lamina.objectives import PrototypeObjective

BATCH, SIGMA, ALPHA = 250, 4.0, 20.0


def by_scipy(images: Tensor, random: np.random.Generator) -> Tensor:
    """Image by image, as the published code does."""
    rows, columns = np.mgrid[: images.shape[2], : images.shape[3]]
    found = np.empty(images.shape, dtype=np.float32)
    for i, (image,) in enumerate(images.numpy()):
        dx, dy = (
            ALPHA * ndimage.gaussian_filter(random.uniform(-1, 1, image.shape), SIGMA, mode="constant")
            for _ in range(2)
        )
        found[i, 0] = ndimage.map_coordinates(image, [rows + dy, columns + dx], order=1)
    return torch.from_numpy(found)


def train_step(deform: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], object]:
    torch.manual_seed(0)
    model, objective = PrototypeNetwork(), PrototypeObjective()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def run() -> object:
        optimizer.zero_grad()
        objective(model, {"pixel_values": deform(x), "labels": y})["loss"].backward()
        optimizer.step()
        return None

    return run


def forward_and_backward(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def run() -> object:
        x.grad = None
        layer(x).sum().backward()
        return None

    return run


def main() -> None:
    torch.set_num_threads(1)
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    x, y = torch.rand(BATCH, 1, 28, 28, generator=generator), torch.arange(BATCH) % 10

    def ours(images: Tensor) -> Tensor:
        return elastic_deformation(images, ALPHA, SIGMA)

    def peer(images: Tensor) -> Tensor:
        return by_scipy(images, random)

    names = ("elastic_deformation", "loop over images with SciPy")
    rows: list[Row] = [
        pair("deform 250 images", lambda: ours(x), lambda: peer(x), names=names, goal="<= 0.1"),
        pair(
            "training step of the published network, deformation included",
            train_step(ours, x, y),
            train_step(peer, x, y),
            names=names,
            goal="<= 1",
        ),
    ]
    z = torch.rand(1024, 512, generator=generator).requires_grad_()
    prototypes = torch.rand(200, 512, generator=generator)
    rows.append(
        pair(
            "distances of 1024 latents of width 512 to 200 prototypes, forward and backward",
            forward_and_backward(lambda v: squared_distances(v, prototypes), z),
            forward_and_backward(lambda v: torch.cdist(v, prototypes).square(), z),
            names=("squared_distances", "torch.cdist squared"),
            goal="<= 1",
            rounds=25,
        )
    )
    write("prototypes", rows, ("scipy",))


if __name__ == "__main__":
    main()
