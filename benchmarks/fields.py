"""Radiance fields: rays a second of a hash field against a perceptron, and the hash table against plain indexing.

Both fields at their published sizes, 64 samples a ray. The plain encoding is what is usually written: rows fetched by
advanced indexing, multiplied, summed; same rows, same weights, same results.

Run: OMP_NUM_THREADS=1 python -m benchmarks fields
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.data.scenes import looking_at_middle, rays_of
from lamina.nn import GridField, HashField, LowRankField, MLPField, OccupancyGrid, VolumeRenderer
from lamina.objectives import HardPoints, HardRays, VolumeDistillation

RAYS, SAMPLES = 128, 64


def rays() -> tuple[Tensor, Tensor]:
    pixels = 64 * torch.rand(RAYS, 2, generator=torch.Generator().manual_seed(0))
    found = rays_of(looking_at_middle(30.0, 20.0, 3.2).expand(RAYS, 4, 4), pixels, (64, 64), 89.0)
    return found["origins"], found["directions"]


def looking(field: nn.Module, *, learning: bool, renderer: VolumeRenderer | None = None) -> Callable[[], object]:
    origins, directions = rays()
    seen = renderer or VolumeRenderer(SAMPLES)

    def run() -> object:
        if not learning:
            with torch.no_grad():
                return seen(field, origins, directions).color
        field.zero_grad()
        seen(field, origins, directions).color.square().mean().backward()
        return None

    return run


def encoding(field: HashField, *, plain: bool) -> Callable[[], object]:
    """The encoding of 8,192 points, forward and backward."""
    x = 2 * torch.rand(RAYS * SAMPLES, 3, generator=torch.Generator().manual_seed(1)) - 1

    def run() -> object:
        field.zero_grad()
        if plain:
            index, weight = field.vertices(x)
            # In the order in which such code has them.
            index, weight = index.long().contiguous(), weight.contiguous()
            found = (field.table[index] * weight[..., None]).sum(2).flatten(1)
        else:
            found = field.encode(x)
        found.square().mean().backward()
        return None

    return run


def distilling(stage: tuple[float, float], active: Sequence[HardRays | HardPoints] = ()) -> Callable[[], object]:
    """A step of distillation, hash to perceptron of 64."""
    student = MLPField(depth=4, width=64, frequencies=5, skip=None)
    follow = VolumeDistillation(HashField(), VolumeRenderer(SAMPLES), stages=stage, active=active)
    follow.set_progress(0.5)
    batch = dict(zip(("origins", "directions"), rays(), strict=True))

    def run() -> object:
        student.zero_grad()
        follow(student, batch)["loss"].backward()
        return None

    return run


def empty(field: nn.Module) -> Callable[[], object]:
    """Rendering with an occupancy grid that has an eighth of the box."""
    origins, directions = rays()
    grid, renderer = OccupancyGrid(32), VolumeRenderer(SAMPLES)
    cell = torch.arange(32**3)
    inside = [(cell // 32**i % 32 - 15.5).abs() < 8 for i in range(3)]
    grid.cells = inside[0] & inside[1] & inside[2]

    def run() -> object:
        with torch.no_grad():
            return renderer(field, origins, directions, grid).color

    return run


def check(field: HashField) -> None:
    """The two encodings agree, and so do their gradients."""
    found = []
    for plain in (True, False):
        encoding(field, plain=plain)()
        assert field.table.grad is not None
        found.append(field.table.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-9)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hashed, deep, low, grid = HashField(), MLPField(), LowRankField(), GridField()
    check(hashed)
    rows: list[Row] = []
    names = ("hash_field", "mlp_field")
    for learning in (False, True):
        what = f"{RAYS} rays of {SAMPLES} samples, {'forward and backward' if learning else 'forward'}"
        ours, peer = looking(hashed, learning=learning), looking(deep, learning=learning)
        rows.append(pair(what, ours, peer, names=names, goal="<= 0.333", rounds=11))
        for name, field in (("low_rank_field", low), ("grid_field", grid)):
            ours = looking(field, learning=learning)
            rows.append(pair(what, ours, peer, names=(name, names[1]), goal="none", rounds=5, warmup=1))
    what = "hash encoding of 8,192 points, forward and backward"
    both = encoding(hashed, plain=False), encoding(hashed, plain=True)
    rows.append(pair(what, *both, names=("hash_field.encode", "advanced indexing"), goal="<= 0.333", rounds=11))
    what = "a step of distillation, hash to a perceptron of 64"
    steps = distilling((1.0, 1.0)), distilling((0.0, 0.0))
    rows.append(pair(what, *steps, names=("stage 1", "stage 3"), goal="< 1", rounds=11))
    what = f"{RAYS} rays of {SAMPLES} samples, an eighth of the box occupied, forward"
    skipped = empty(hashed), looking(hashed, learning=False)
    rows.append(pair(what, *skipped, names=("with the occupancy grid", "without"), goal="< 1", rounds=11))
    for row in rows:
        if row.peer == "mlp_field":
            print(f"  {row.ours}: {1 / row.ratio:.1f} x the rays a second of {row.peer} ({row.what})")
    write("fields", rows)


if __name__ == "__main__":
    main()
