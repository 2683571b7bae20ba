from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.test_volume_renderer import Home, rays
from tests.objectives.test_volume_distillation import batch, small, student
from tests.processes import in_processes
from torch import Tensor, nn

from lamina import data
from lamina.errors import LaminaError
from lamina.nn import GridField, VolumeRenderer
from lamina.nn.fields import ray_weights
from lamina.objectives import HardPoints, HardRays, HardSamples, HardViews, VolumeDistillation, WeightedSum
from lamina.train.options import TrainOptions
from lamina.train.trainer import Trainer

ALL_POINTS = HardPoints(keep=1.0, min_opacity=0.0)


def of_view(pose: int, epoch: int, count: int = 10) -> dict[str, Tensor]:
    origins, directions = rays(count, seed=10 * epoch + pose)
    whose = {"pose_id": torch.full((count,), pose), "epoch": torch.full((count,), epoch)}
    return {"origins": origins, "directions": directions, **whose}


def trained(active: Any, steps: int = 6, **options: Any) -> list[Tensor]:
    """Losses of some steps of one student; every two steps are an epoch."""
    torch.manual_seed(0)
    one = small("mlp_field", 1)
    follow = VolumeDistillation(
        small("hash_field", 2), VolumeRenderer(5), active=active, **{"stages": (0, 0), **options}
    )
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    losses = []
    for step in range(steps):
        follow.set_progress((step + 1) / steps)
        found = follow(one, of_view(step % 2, step // 2))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(found["loss"].detach())
    return losses


@pytest.mark.parametrize("distance", ["norm", "mse"])
def test_with_all_points_or_before_a_pool_is_full_it_is_plain_distillation_step_for_step(distance: str) -> None:
    plain = trained((), distance=distance)
    assert trained((ALL_POINTS,), distance=distance) == plain
    assert trained((HardViews(), HardRays()), distance=distance) == plain
    later = trained((HardViews(ratio=0.5, capacity=1, from_epoch=0), HardRays(capacity=3)), distance=distance)
    assert later[:3] == plain[:3]
    assert later[3:] != plain[3:]


def test_point_distances_are_those_of_the_points_that_either_shows() -> None:
    one, other, given = small("mlp_field", 1), small("hash_field", 2), batch()
    level, renderer = HardPoints(keep=0.4, min_opacity=0.4), VolumeRenderer(5)
    follow = VolumeDistillation(other, renderer, stages=(0, 0), active=(level,))
    found = follow(one, given)
    samples = renderer.sample(given["origins"], given["directions"], 1.0)
    x, d = samples.points.flatten(0, 1), samples.directions.flatten(0, 1)
    told, chosen = [], torch.zeros(30, dtype=torch.bool)
    with torch.no_grad():
        for field in (one, other):
            s, g = field.geometry(x)
            s = s.clamp(-2, 7)
            told.append((torch.cat([s[:, None], g], 1), s, field.color(g, d)))
            chosen |= level.select(ray_weights(s.exp().view(6, 5), samples.steps)).flatten()
    assert 0 < chosen.sum() < 30
    for name, a, b in zip(("feature", "density", "color"), *told, strict=True):
        torch.testing.assert_close(found[name], (a - b)[chosen].norm(), rtol=1e-4, atol=1e-5)
    plain = VolumeDistillation(other, renderer, stages=(0, 0))(one, given)
    torch.testing.assert_close(found["render"], plain["render"])
    with torch.no_grad():
        assert torch.equal(follow(one, given)["feature"], VolumeDistillation(other, renderer)(one, given)["feature"])


@pytest.mark.parametrize("distance", ["norm", "mse"])
def test_where_all_rays_are_background_point_losses_are_zero(distance: str) -> None:
    teacher, one = GridField(resolution=3), GridField(resolution=4)
    with torch.no_grad():
        for field in (teacher, one):
            field.values[:, 0] = -2.0
        one.values[:, 1:] = 1.0
    follow = VolumeDistillation(teacher, VolumeRenderer(5), stages=(0, 0), distance=distance, active=(HardPoints(0.3, 0.9),))  # fmt: skip  # noqa: E501
    found = follow(one, batch())
    found["loss"].backward()
    assert float(found["density"]) == float(found["color"]) == 0.0
    assert float(found["render"]) > 0
    assert torch.isfinite(one.values.grad).all()


def test_hard_rays_are_added_after_the_pool_is_full_and_point_at_what_is_wrong() -> None:
    teacher = Home(8.0)
    one = Home(8.0)
    one.color = lambda g, d: torch.sigmoid(g) - 0.4 * (g[:, :1] > 0)  # type: ignore[method-assign]
    rayed = HardRays(ratio=0.25, capacity=12)
    follow = VolumeDistillation(teacher, VolumeRenderer(8), stages=(0, 0), active=(rayed,))
    counts = []
    for step in range(8):
        found = follow(one, of_view(step, 0, 20))
        counts.append(int(found["count"]))
        assert not any(b.requires_grad for b in rayed.buffers())
    assert counts == [20, 20, 20, 25, 25, 25, 25, 25]
    middle = rayed.pool["origins"] - (rayed.pool["origins"] * rayed.pool["directions"]).sum(1, True) * rayed.pool["directions"]  # fmt: skip  # noqa: E501
    assert (middle[:, 0] > 0).float().mean() >= 0.9
    with torch.no_grad():
        assert int(follow(one, of_view(9, 0, 20))["count"]) == 20, "evaluations are left alone"


def test_views_that_are_hard_come_again_and_added_rays_belong_to_none() -> None:
    viewed, rayed = HardViews(ratio=0.5, capacity=1, from_epoch=0), HardRays(ratio=0.2, capacity=2)
    follow = VolumeDistillation(small("hash_field"), VolumeRenderer(4), stages=(0, 0), active=(rayed, viewed))
    assert list(follow.hard) == [viewed, rayed], "views first"
    one = small("mlp_field")
    for epoch in range(3):
        for pose in range(2):
            follow(one, of_view(pose, epoch))
    assert len(viewed.replaced) == 1
    assert viewed.seen[:, 1].tolist() == [10.0, 10.0]


def test_mining_begins_with_what_is_rendered() -> None:
    rayed = HardRays(ratio=0.2, capacity=20)
    follow = VolumeDistillation(small("hash_field"), VolumeRenderer(4), stages=(0.2, 0.5), active=(rayed, HardPoints()))
    for fraction, filled in ((0.1, 0), (0.4, 0), (0.6, 2)):
        follow.set_progress(fraction)
        follow(small("mlp_field"), of_view(0, 0))
        assert int(rayed.filled) == filled
        assert rayed.fraction == fraction


def test_the_distance_of_depths_is_off_until_it_has_a_weight_and_has_the_right_gradient() -> None:
    one, other = small("mlp_field", 1), small("hash_field", 2)
    options: dict[str, Any] = {"stages": (0, 0), "weights": {"depth": 0.5}}
    found = VolumeDistillation(other, VolumeRenderer(5), **options)(one, batch())
    origins, directions = rays(6)
    with torch.no_grad():
        depths = [VolumeRenderer(5)(f, origins, directions).depth for f in (one, other)]
    torch.testing.assert_close(found["depth"], (depths[0] - depths[1]).norm(), rtol=1e-4, atol=1e-5)
    plain = VolumeDistillation(other, VolumeRenderer(5), stages=(0, 0))(one, batch())
    assert "depth" not in plain
    torch.testing.assert_close(found["loss"] - plain["loss"], 0.5 * found["depth"], rtol=1e-4, atol=1e-5)
    sigma, steps = (torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))

    def depth(s: Tensor) -> Tensor:
        return (ray_weights(s, steps) * steps.cumsum(1)).sum(1)

    assert torch.autograd.gradcheck(depth, sigma.requires_grad_())
    samples = VolumeRenderer(7).sample(origins[:2], directions[:2], 1.0)
    dense = sigma.detach().float().requires_grad_()
    seen = VolumeRenderer(7).composite(dense, torch.zeros(2, 7, 3), samples).depth
    exact = sigma.detach().requires_grad_()
    (ray_weights(exact, samples.steps.double()) * samples.distances.double()).sum().backward()
    torch.testing.assert_close(torch.autograd.grad(seen.sum(), dense)[0].double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_levels_come_by_name_and_node_with_their_options() -> None:
    active = [
        {"name": "hard_points", "keep": 0.4},
        {"name": "hard_rays", "capacity": 5, "seed": 3},
        HardSamples(capacity=3),
    ]
    follow = VolumeDistillation(GridField(resolution=3), active=active)
    assert (follow.hard_points.keep, follow.hard_points.min_opacity) == (0.4, 0.5)
    assert [type(part) for part in follow.hard] == [HardRays, HardSamples]
    assert (follow.hard[0].capacity, follow.hard[0].seed) == (5, 3)
    assert "hard.0.filled" in WeightedSum([(1.0, follow)]).parts["0"].state_dict()


@pytest.mark.parametrize(
    ("active", "words"),
    [
        (["hard_ray"], r"active\[0\]: no level .* 'hard_rays'"),
        (["hard_rays", {"name": "hard_views", "capcity": 3}], r"active\[1\].*hard_views.*capacity"),
        ([{"name": "hard_points", "keep": 2.0}], r"active\[0\].*keep"),
        ([3], r"active\[0\]: no level"),
        (["hard_rays", HardRays()], "hard_rays twice"),
        ("hard_rays", "must be a list"),
    ],
)
def test_levels_that_do_not_exist_are_refused(active: Any, words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        VolumeDistillation(GridField(resolution=3), active=active)


@pytest.mark.parametrize("level", [HardRays(capacity=3), HardViews(), HardPoints()])
def test_points_without_rays_cannot_be_mined(level: Any) -> None:
    follow = VolumeDistillation(GridField(resolution=3), weights={"render": 0.0}, active=(level,))
    given = {"points": torch.zeros(2, 3), "directions": rays(2)[1]}
    with pytest.raises(LaminaError, match="'origins'"):
        follow(GridField(resolution=4), given)
    if isinstance(level, HardViews):
        follow.renderer = VolumeRenderer(3)
        with pytest.raises(LaminaError, match="'pose_id'"):
            follow(GridField(resolution=4), batch())


class Stop(Exception):
    pass


class Stopping(VolumeDistillation):
    """As it is, but killed in the middle."""

    stop: int | None = None

    def forward(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        found = super().forward(model, batch)
        if self.stop is not None and int(self.steps) == self.stop:
            raise Stop
        return found


def training(folder: Path, stop: int | None = None) -> Trainer:
    torch.manual_seed(4)
    teacher = small("hash_field", 2)
    active = (HardViews(ratio=0.4, capacity=2, from_epoch=0), HardRays(ratio=0.25, capacity=4), HardPoints())
    follow = Stopping(teacher, VolumeRenderer(4), stages=(0, 0), active=active)
    follow.stop = stop
    return Trainer(
        student(),
        data.scenes(rays=16, poses=3, image=6, train=1, test=1),
        WeightedSum([(1.0, follow)]),
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
        options=TrainOptions(steps=12, log_every=1, checkpoint_every=10, device="cpu"),
        folder=folder,
    )


def resumed(rank: int, folder: Path) -> dict[str, Tensor]:
    whole, cut = training(folder / "whole"), training(folder / "cut", stop=11)
    whole.fit()
    with pytest.raises(Stop):
        cut.fit()
    last = training(folder / "cut")
    last.fit(resume=True)
    states = [t.objective.terms[0].hard.state_dict() for t in (whole, last)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert len(whole.objective.terms[0].hard[0].replaced) == 1
    for a, b in zip(whole.model.parameters(), last.model.parameters(), strict=True):
        assert torch.equal(a, b)
    return copy.deepcopy(states[0])


def test_a_run_killed_in_an_epoch_goes_on_with_the_same_pools(tmp_path: Path) -> None:
    resumed(0, tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
def test_each_process_gets_its_own_pools_back(tmp_path: Path) -> None:
    first, second = in_processes(resumed, 2, tmp_path, tmp_path)
    for name in ("0.new_frame", "1.pool_directions"):
        assert first[name].shape == second[name].shape
        assert not torch.equal(first[name], second[name]), name
