from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lamina import data
from lamina.data.scenes import looking_at_middle, rays_of
from lamina.errors import LaminaError, ShapeError
from lamina.objectives import HardViews
from lamina.objectives.hard_views import frame_of, turned

POSES = 20


def camera(pose: int, epoch: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * epoch + pose)
    azimuth, elevation = torch.rand(2, generator=generator).tolist()
    return looking_at_middle(360 * azimuth, 70 * elevation, 3.2)


def view(pose: int, epoch: int, count: int = 16) -> dict[str, Tensor]:
    pixels = 8 * torch.rand(count, 2, generator=torch.Generator().manual_seed(pose))
    found = rays_of(camera(pose, epoch).expand(count, 4, 4), pixels, (8, 8), 12.0)
    return {**found, "pose_id": torch.full((count,), pose), "epoch": torch.full((count,), epoch)}


def errors(batch: dict[str, Tensor]) -> Tensor:
    """The higher a camera stands the worse."""
    return 0.01 + (batch["origins"][:, 2] + 1).square()


def lived(hard: HardViews, epochs: range) -> list[dict[str, Tensor]]:
    found = []
    for epoch in epochs:
        for pose in range(POSES):
            found.append(hard.propose(view(pose, epoch)))
            hard.observe(found[-1], errors(found[-1]))
    return found


def changed(proposed: list[dict[str, Tensor]], epoch: int) -> list[int]:
    return [i for i, b in enumerate(proposed) if not torch.equal(b["origins"], view(i, epoch)["origins"])]


def test_the_worst_tenth_is_kept_and_exactly_a_tenth_of_later_epochs_is_replaced() -> None:
    hard = HardViews(capacity=4, from_epoch=3)
    for epoch in range(7):
        before = hard.pool.get("centre", torch.empty(0)).clone()
        proposed = lived(hard, range(epoch, epoch + 1))
        assert int(hard.filled) == min(2 * epoch, 4)
        # Full after the second epoch; replaced in every epoch after from_epoch, as are the drawn rows of the pool.
        if epoch > 2:
            assert (hard.pool["centre"] != before).any(1).sum() == (0 if epoch <= 3 else 2)
        assert len(changed(proposed, epoch)) == (0 if epoch <= 3 else 2)
        assert sorted(hard.replaced) == changed(proposed, epoch)
        if epoch == 1:
            heights = torch.stack([camera(p)[:3, 3] for p in range(POSES)])
            worst = heights[heights[:, 2].topk(2).indices]
            torch.testing.assert_close(hard.pool["centre"], worst)
    assert hard._buffers["pool_centre"].shape == (4, 3)


def test_a_replaced_camera_is_a_pool_camera_turned_a_little_about_its_centre() -> None:
    hard = HardViews(capacity=4, from_epoch=1)
    lived(hard, range(4))
    for epoch in range(4, 9):
        pool = {k: v.clone() for k, v in hard.pool.items()}
        hard.propose(view(0, epoch))
        frame, centre = hard.new_frame.double(), hard.new_centre
        unit = torch.eye(3, dtype=torch.float64).expand_as(frame)
        torch.testing.assert_close(frame @ frame.mT, unit, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.linalg.det(frame), torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)
        for f, c in zip(frame, centre, strict=True):
            same = (pool["centre"] == c).all(1).nonzero().flatten()
            assert len(same), "centres stay where they were, to the bit"
            turn = min(angle(f @ pool["frame"][i].double().T) for i in same)
            assert 0 < turn <= 3 * math.pi / 20
        for pose in hard.replaced:
            given = view(pose, epoch)
            found = hard.propose(given)
            torch.testing.assert_close(found["directions"].norm(dim=1), torch.ones(16))
            number = hard.replaced.index(pose)
            looks = nn.functional.normalize(found["directions"].sum(0), dim=0)
            torch.testing.assert_close(looks, -hard.new_frame[number, :, 2], atol=1e-5, rtol=0)
            assert torch.equal(found["origins"], hard.new_centre[number].expand(16, 3))
            # Rigidly: angles between rays are what they were.
            for d in (given["directions"], found["directions"]):
                assert d.dtype == torch.float32
            gram = [d @ d.T for d in (given["directions"], found["directions"])]
            torch.testing.assert_close(*gram, atol=1e-5, rtol=0)
        lived(hard, range(epoch, epoch + 1))


def angle(rotation: Tensor) -> float:
    return math.acos(min(1.0, (float(rotation.trace()) - 1) / 2))


def test_a_frame_is_that_of_the_camera_and_a_turn_that_of_the_formula() -> None:
    for pose in range(3):
        back = camera(pose)[:3, 2]
        torch.testing.assert_close(frame_of(-5 * back), camera(pose)[:3, :3], atol=1e-5, rtol=0)
    for straight in (1.0, -1.0):
        frame = frame_of(torch.tensor([0.0, 0.0, straight]))
        torch.testing.assert_close(frame @ frame.T, torch.eye(3))
    x = turned(0.0, 0.0, 0.3) @ torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(x, torch.tensor([0.0, math.cos(0.3), math.sin(0.3)], dtype=torch.float64))
    both = turned(0.2, 0.4, 0.3)
    torch.testing.assert_close(both, turned(0.2, 0, 0) @ turned(0, 0.4, 0) @ turned(0, 0, 0.3))


def test_cameras_that_look_one_way_get_centres_in_the_box_of_the_hard_ones() -> None:
    hard = HardViews(capacity=4, from_epoch=1, facing="forward", bound=0.5)
    lived(hard, range(4))
    low, high = hard.pool["centre"].amin(0), hard.pool["centre"].amax(0)
    margin = 0.05 * (high - low)
    seen = []
    for epoch in range(4, 9):
        hard.propose(view(0, epoch))
        seen.append(hard.new_centre)
        lived(hard, range(epoch, epoch + 1))
        low, high = torch.minimum(low, hard.pool["centre"].amin(0)), torch.maximum(high, hard.pool["centre"].amax(0))
        margin = 0.05 * (high - low)
    centres = torch.cat(seen)
    assert len(centres.unique(dim=0)) == len(centres)
    # Centres far out stay in their box; the tenth that is added does not lead out of the scene's.
    least, most = torch.maximum(low - margin, low.clamp(max=-0.5)), torch.minimum(high + margin, high.clamp(min=0.5))
    assert ((centres >= least - 1e-6) & (centres <= most + 1e-6)).all()


def test_rows_added_by_others_and_views_that_are_not_finite_do_not_count() -> None:
    hard = HardViews(ratio=0.5, capacity=2, start=0.3)
    given = {k: torch.cat([view(0, 0)[k], view(1, 0)[k]]) for k in view(0, 0)}
    given["pose_id"] = torch.where(torch.arange(32) < 28, given["pose_id"], -1)
    wrong = torch.ones(32)
    wrong[28:] = 1e6
    wrong[16] = math.nan
    hard.observe(hard.propose(given), wrong)
    assert not len(hard.seen_id), "not before it starts"
    hard.set_progress(0.5)
    hard.observe(hard.propose(given), wrong)
    hard.observe(given, wrong)
    assert hard.seen[0, :2].tolist() == [32.0, 32.0]
    hard.propose(view(0, 1))
    torch.testing.assert_close(hard.pool["centre"], camera(0)[None, :3, 3])


def test_a_temperature_draws_hard_views_by_their_psnr() -> None:
    chosen = []
    for seed in range(40):
        hard = HardViews(capacity=2, temperature=(50.0, 1e-3), seed=seed)
        hard.set_progress(1.0 if seed < 5 else 0.0)
        lived(hard, range(1))
        hard.propose(view(0, 1))
        chosen.append(tuple(hard.pool["centre"][:, 2].tolist()))
    heights = torch.stack([camera(p)[2, 3] for p in range(POSES)])
    for drawn in chosen[:5]:
        assert sorted(drawn) == pytest.approx(heights.topk(2).values.sort().values.tolist()), "cold: the worst"
    assert len(set(chosen)) > 10, "hot: nearly any"


def test_a_resumed_run_proposes_the_same_and_another_process_something_else() -> None:
    hard, other = HardViews(capacity=4, seed=5), HardViews(capacity=4, seed=5)
    lived(hard, range(5))
    for pose in range(7):
        batch = hard.propose(view(pose, 5))
        hard.observe(batch, errors(batch))
    other.load_state_dict(copy.deepcopy(hard.state_dict()))
    aside = copy.deepcopy(other)
    expected, found = lived(hard, range(5, 8)), lived(other, range(5, 8))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(expected, found, strict=True) for k in a)
    with mock.patch("torch.distributed.is_initialized", return_value=True), mock.patch("torch.distributed.get_rank", return_value=1):  # fmt: skip  # noqa: E501
        different = lived(aside, range(5, 8))
    assert any(not torch.equal(a["origins"], b["origins"]) for a, b in zip(expected, different, strict=True))


def test_views_of_the_data_set_scenes_are_understood() -> None:
    rows = data.scenes(rays=64, poses=3, image=8, train=1, test=1).train
    hard = HardViews(ratio=0.4, capacity=1, from_epoch=0)
    for epoch in range(3):
        rows.set_epoch(epoch)
        for pose in range(3):
            given = rows.batch(torch.arange(64 * pose, 64 * pose + 64))
            batch = hard.propose(given)
            back = rows.cameras.camera(epoch, pose, 3)[:3, 2]
            assert float(frame_of(given["directions"].sum(0))[:, 2] @ back) > 0.99
            hard.observe(batch, torch.full((64,), float(pose)))
    assert len(hard.replaced) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"jitter": -0.1}, "jitter"),
        ({"from_epoch": -1}, "from_epoch"),
        ({"facing": "inward"}, "facing"),
        ({"temperature": (1.0, 0.0)}, "temperature"),
        ({"ratio": 1.0}, "ratio"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        HardViews(**options)


def test_a_batch_that_does_not_say_whose_view_it_is_is_refused() -> None:
    hard = HardViews(capacity=1, ratio=0.2)
    batch = view(0, 0)
    del batch["pose_id"]
    with pytest.raises(LaminaError, match="'pose_id'"):
        hard.propose(batch)
    with pytest.raises(ShapeError, match="one error a row"):
        hard.observe(view(0, 0), torch.zeros(3))
    with pytest.raises(LaminaError, match="capacity 1, less than the 4"):
        lived(hard, range(2))
    assert isinstance(hard, nn.Module)
