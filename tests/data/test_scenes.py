from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contract.example import Example
from torch import Tensor

from lamina import data
from lamina.data import Loader
from lamina.data.scenes import RandomRays, looking_at_middle, rays_of, see_spheres, spheres
from lamina.errors import LaminaError

SIZES = {"rays": 6, "poses": 4, "image": 5, "train": 2, "test": 1}


def archive(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def ring(count: int = 10) -> np.ndarray:
    return np.stack([looking_at_middle(36.0 * i, 20.0 + i, 4.0).numpy() for i in range(count)])


IMAGES = np.random.default_rng(0).integers(0, 256, (10, 6, 8, 4), dtype=np.uint8)
FILE = archive(images=IMAGES, c2w=ring(), focal=np.float32(9.0))
EXAMPLES = [
    Example("data", "scenes", SIZES, bad={"poses": 0}),
    Example("data", "scenes", {**SIZES, "views": "photographs"}, bad={"facing": "forward"}),
    Example("data", "scenes", {**SIZES, "source": "{folder}/toy.npz", "facing": "forward"}, files={"toy.npz": FILE}),
]


def loader(found: data.Data, **options: int) -> Loader:
    return Loader(found.train, found.batch, seed=1, **options)


def test_a_camera_looks_at_the_middle_from_where_it_stands() -> None:
    camera = looking_at_middle(40.0, 25.0, 3.2)
    torch.testing.assert_close(camera[:3, :3].T @ camera[:3, :3], torch.eye(3))
    assert float(torch.linalg.det(camera[:3, :3])) == pytest.approx(1.0, abs=1e-5)
    middle = rays_of(camera[None], torch.tensor([[5.0, 4.0]]), (8, 10), 12.0)
    torch.testing.assert_close(middle["directions"], -middle["origins"] / 3.2)
    assert float(camera[2, 3]) == pytest.approx(3.2 * math.sin(math.radians(25.0)), abs=1e-5)
    # One pixel to the right and one up: along the camera's own x and y.
    right, up = (
        rays_of(camera[None], torch.tensor([p]), (8, 10), 12.0)["directions"] for p in ([6.0, 4.0], [5.0, 3.0])
    )
    assert float((right - middle["directions"]) @ camera[:3, 0]) > 0.07
    assert float((up - middle["directions"]) @ camera[:3, 1]) > 0.07


def test_a_batch_is_of_one_camera_and_an_epoch_sweeps_over_the_elevations() -> None:
    found = data.scenes(rays=6, poses=8, image=5)
    batches = [next(it) for it in [loader(found)] for _ in range(16)]
    for batch in batches:
        assert len(batch["pose_id"].unique()) == 1
        assert len(batch["origins"].unique(dim=0)) == 1
        torch.testing.assert_close(batch["directions"].norm(dim=1), torch.ones(6))
        assert "labels" not in batch
    first, second = batches[:8], batches[8:]
    assert sorted(int(b["pose_id"][0]) for b in first) == list(range(8))
    assert {int(b["epoch"][0]) for b in second} == {1}
    heights = [
        math.degrees(math.asin(float(b["origins"][0, 2]) / 3.2))
        for b in sorted(first, key=lambda b: int(b["pose_id"][0]))
    ]
    assert all(10 * i <= h <= 10 * (i + 1) for i, h in enumerate(heights))
    by_number = [{int(b["pose_id"][0]): b["origins"] for b in part} for part in (first, second)]
    assert not torch.equal(by_number[0][3], by_number[1][3])


def test_poses_depend_on_seed_epoch_and_number_alone() -> None:
    found = data.scenes(rays=6, poses=4, image=5)
    whole = loader(found)
    expected = [next(whole) for _ in range(9)]
    state = loader(found)
    for _ in range(5):
        next(state)
    resumed = loader(data.scenes(rays=6, poses=4, image=5))
    resumed.load_state_dict(state.state_dict())
    for batch in expected[5:]:
        for name, values in next(resumed).items():
            assert torch.equal(values, batch[name])
    shards = [loader(data.scenes(rays=6, poses=4, image=5), rank=r, world=2) for r in range(2)]
    for batch in expected[:5]:
        one, two = (next(s) for s in shards)
        together = torch.stack([one["directions"], two["directions"]], 1).flatten(0, 1)
        assert torch.equal(together, batch["directions"])
    other = loader(data.scenes(rays=6, poses=4, image=5, seed=1))
    assert not torch.equal(next(other)["origins"], expected[0]["origins"])


def test_rays_of_a_batch_may_be_asked_for_in_any_order() -> None:
    train = data.scenes(rays=6, poses=4, image=5).train
    assert isinstance(train, RandomRays)
    whole = train.batch(torch.arange(24))
    some = torch.tensor([17, 3, 3, 22, 0])
    for name, values in train.batch(some).items():
        assert torch.equal(values, whole[name][some])


def test_photographs_are_what_the_formula_shows_of_their_pixels() -> None:
    found = data.scenes(**{**SIZES, "views": "photographs"})
    assert len(found.train) == 2 * 25
    assert len(found.evaluation) == 25
    rows = found.train.batch(torch.tensor([0, 31, 49]))
    assert rows["pose_id"].tolist() == [0, 1, 1]
    torch.testing.assert_close(rows["labels"], see_spheres(rows["origins"], rows["directions"]))
    held = found.evaluation.batch(torch.arange(25))
    assert not torch.equal(held["origins"][0], rows["origins"][0])


def naive_sight(origin: Tensor, direction: Tensor, samples: int) -> Tensor:
    """What one ray sees, sample by sample."""
    color, left, step = torch.zeros(3), 1.0, 2.4 / samples
    start = -float(origin @ direction) - 1.2
    for i in range(samples):
        sigma, rgb = spheres((origin + (start + step * (i + 0.5)) * direction)[None])
        alpha = 1 - math.exp(-float(sigma) * step)
        color, left = color + left * alpha * rgb[0], left * (1 - alpha)
    return color + left


def test_the_formula_is_seen_as_a_loop_over_samples_sees_it() -> None:
    found = data.scenes(**{**SIZES, "views": "photographs"}).train.batch(torch.tensor([12, 37]))
    seen = see_spheres(found["origins"], found["directions"], 64)
    for i in range(2):
        torch.testing.assert_close(
            seen[i], naive_sight(found["origins"][i], found["directions"][i], 64), rtol=1e-4, atol=1e-5
        )


def test_a_file_gives_its_pixels_on_white_and_random_cameras_like_its_own(tmp_path: Path) -> None:
    (tmp_path / "toy.npz").write_bytes(FILE)
    found = data.scenes(tmp_path / "toy.npz", rays=8, views="photographs", split=0.2)
    assert found.sizes["image"] == (6, 8)
    assert len(found.train) == 8 * 48
    assert len(found.evaluation) == 2 * 48
    row = found.evaluation.batch(torch.tensor([3]))
    torch.testing.assert_close(row["origins"].norm(dim=1), torch.tensor([3.2]))
    values = torch.from_numpy(IMAGES).float() / 255
    white = values[..., :3] * values[..., 3:] + 1 - values[..., 3:]
    assert any(torch.allclose(row["labels"][0], image[0, 3]) for image in white)
    around = loader(data.scenes(tmp_path / "toy.npz", rays=8, poses=20))
    for _ in range(20):
        origin = next(around)["origins"][0]
        assert 3.18 <= float(origin.norm()) <= 3.22
        assert 19 <= math.degrees(math.asin(float(origin[2] / origin.norm()))) <= 30
    forward = loader(data.scenes(tmp_path / "toy.npz", rays=8, poses=5, facing="forward"))
    own = torch.from_numpy(ring()[:, :3, 3]) * 0.8
    origin = next(forward)["origins"][0]
    assert ((origin >= own.amin(0) - 1e-5) & (origin <= own.amax(0) + 1e-5)).all()


def test_a_folder_of_nerf_synthetic_is_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 3), ("test", 1)):
        frames = []
        for i in range(count):
            image.fromarray(IMAGES[i]).save(tmp_path / f"{part}_{i}.png")
            frames.append({"file_path": f"./{part}_{i}", "transform_matrix": ring()[i].tolist()})
        (tmp_path / f"transforms_{part}.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames}))
    found = data.scenes(tmp_path, rays=8, views="photographs")
    assert len(found.train) == 3 * 48
    assert len(found.evaluation) == 48
    assert found.train.photographs.focal == pytest.approx(4 / math.tan(0.35))
    (tmp_path / "transforms_train.json").write_text('{"frames": []}')
    with pytest.raises(LaminaError, match="does not describe cameras"):
        data.scenes(tmp_path, rays=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "spheress"}, "does not exist"),
        ({"image": 1}, "2 pixels"),
        ({"rays": 10_000, "poses": 1, "views": "photographs", "image": 4}, "too few for a batch"),
        ({"views": "film"}, "photographs"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        data.scenes(**options)


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.npz").write_bytes(archive(images=IMAGES.astype(np.float32), c2w=ring(), focal=np.float32(9)))
    with pytest.raises(LaminaError, match="uint8"):
        data.scenes(tmp_path / "toy.npz", rays=8)
    (tmp_path / "one.npz").write_bytes(archive(images=IMAGES[:2], c2w=ring(2), focal=np.float32(9)))
    with pytest.raises(LaminaError, match="aside"):
        data.scenes(tmp_path / "one.npz", rays=8)


def test_the_real_photographs_are_read() -> None:
    path = Path(os.environ.get("LAMINA_DATA") or "nowhere") / "nerf" / "lego_100.npz"
    if not path.is_file():
        pytest.skip("LAMINA_DATA names no folder with nerf/lego_100.npz")
    found = data.scenes(path, rays=16, views="photographs")
    assert found.sizes["image"] == 100
    assert len(found.train) == 90 * 100 * 100
    assert float(found.evaluation.batch(torch.tensor([0]))["labels"].min()) == 1.0
