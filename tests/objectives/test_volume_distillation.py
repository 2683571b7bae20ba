from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.nn.test_fields import KINDS, SMALL, lively
from tests.nn.test_volume_renderer import Home, rays
from torch import Tensor, nn

from lamina import data
from lamina.data import Loader
from lamina.errors import LaminaError, ShapeError
from lamina.models import RadianceField
from lamina.nn import GridField, HashField, LowRankField, MLPField, OccupancyGrid, VolumeRenderer
from lamina.nn.fields import ray_weights
from lamina.objectives import VolumeDistillation, WeightedSum
from lamina.objectives._field_pair import within_forward

HASH = {"name": "hash_field", **SMALL["hash_field"]}


def small(name: str, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return lively(KINDS[name](**{**SMALL[name], **options}))


def batch(count: int = 6) -> dict[str, Tensor]:
    origins, directions = rays(count)
    return {"origins": origins, "directions": directions}


def student() -> nn.Module:
    torch.manual_seed(1)
    return RadianceField({"name": "mlp_field", **SMALL["mlp_field"]}, samples=5, jitter=False)


EXAMPLES = [
    Example(
        "objective",
        "volume_distillation",
        {
            "teacher": {"name": "radiance_field", "field": HASH, "samples": 5, "seed": 4},
            "stages": [0, 0],
            "occupancy": 4,
        },
        model=student,
        batch=batch,
        bad={"stages": [0.5, 0.2]},
    ),
    Example(
        "objective",
        "volume_distillation",
        {
            "teacher": {"name": "radiance_field", "field": HASH, "samples": 5, "seed": 4},
            "stages": [0, 1],
            "distance": "mse",
        },
        model=student,
        batch=batch,
        bad={"feature_decay": 1.5},
    ),
    Example(
        "objective",
        "volume_distillation",
        {
            "teacher": {"name": "radiance_field", "field": HASH, "samples": 5, "seed": 4},
            "stages": [0, 0],
            "distance": "mse",
            "active": [
                {"name": "hard_views", "ratio": 0.5, "capacity": 1},
                {"name": "hard_rays", "ratio": 0.4, "capacity": 4},
                {"name": "hard_points", "min_opacity": 0.2},
            ],
        },
        model=student,
        batch=lambda: {
            **batch(),
            "pose_id": torch.zeros(6, dtype=torch.int64),
            "epoch": torch.zeros(6, dtype=torch.int64),
        },
        bad={"active": ["hard_point"]},
    ),
]


class Counted:
    """How often a module's method was called, and with what."""

    def __init__(self, owner: Any, name: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(args)
            return original(*args, **kwargs)

        setattr(owner, name, call)


def test_the_loss_of_each_stage_is_the_published_sum() -> None:
    one, other, given = small("mlp_field", 1), small("hash_field", 2), batch()
    renderer = VolumeRenderer(5)
    follow = VolumeDistillation(other, renderer, stages=(0.2, 0.4))
    samples = renderer.sample(given["origins"], given["directions"], 1.0)
    x, d = samples.points.flatten(0, 1), samples.directions.flatten(0, 1)

    def told(field: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, g = field.geometry(x)
        s, rgb = s.clamp(-2, 7), field.color(g, d)
        w = ray_weights(s.exp().view(6, 5), samples.steps)
        seen = (w[..., None] * rgb.view(6, 5, 3)).sum(1) + 1 - w.sum(1)[:, None]
        return torch.cat([s[:, None], g], 1), s, rgb, seen

    with torch.no_grad():
        gaps = [(a - b).norm() for a, b in zip(told(one), told(other), strict=True)]
    for step, (fraction, stage) in enumerate(((0.1, 1), (0.2, 1), (0.3, 2), (0.41, 3), (1.0, 3))):
        follow.set_progress(fraction)
        found = follow(one, given)
        expected = 0.002 * 0.995**step * gaps[0]
        if stage > 1:
            expected = expected + 0.002 * (gaps[1] + gaps[2])
        if stage > 2:
            expected = expected + gaps[3]
        torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["render"], gaps[3] if stage == 3 else torch.zeros(()), rtol=1e-4, atol=1e-5)
    mse = VolumeDistillation(other, renderer, stages=(0, 0), distance="mse", weights={"feature": 0.0})(one, given)
    assert float(mse["render"]) == pytest.approx(float(gaps[3]) ** 2 / 18, rel=1e-3)


def test_early_stages_leave_out_what_is_not_compared() -> None:
    one, renderer = small("mlp_field", 1), VolumeRenderer(5)
    colors, composites = Counted(one, "color"), Counted(renderer, "composite")
    follow = VolumeDistillation(small("hash_field", 2), renderer, stages=(0.3, 0.6))
    taught = Counted(follow.teacher, "color")
    counts = []
    for fraction in (0.1, 0.5, 0.9):
        follow.set_progress(fraction)
        follow(one, batch())
        counts.append((len(colors.calls), len(taught.calls) - 1, len(composites.calls)))
    # The first call of the teacher's colour was to see that it is finite.
    assert counts[0][0] == 0
    assert counts[0][2] == counts[1][2] == 0
    assert counts == [(0, 0, 0), (1, 1, 0), (2, 2, 2)]


def test_both_are_asked_at_the_very_same_points() -> None:
    one, other = small("mlp_field", 1), small("hash_field", 2)
    follow = VolumeDistillation(other, VolumeRenderer(5, jitter=True), stages=(0, 0))
    follow(one, batch())
    seen = [Counted(f, "geometry") for f in (one, other)]
    follow(one, batch())
    assert torch.equal(seen[0].calls[0][0], seen[1].calls[0][0])


def test_the_features_weight_decays_once_a_step_and_comes_back_with_the_state() -> None:
    follow = VolumeDistillation(small("hash_field"), VolumeRenderer(3))
    for _ in range(7):
        follow(small("mlp_field"), batch())
    assert int(follow.steps) == 7
    for part in range(6):
        if part % 2 == 0:
            follow.set_progress(0.01 + part / 100)
        follow(small("mlp_field"), batch())
    assert int(follow.steps) == 10, "two micro-batches are one step"
    with torch.no_grad():
        follow(small("mlp_field"), batch())
    assert int(follow.steps) == 10
    again = VolumeDistillation(small("hash_field"), VolumeRenderer(3))
    again.load_state_dict(follow.state_dict())
    assert int(again.steps) == 10


def test_the_teacher_is_outside_of_the_state_frozen_and_follows_the_device() -> None:
    teacher = RadianceField(HASH, samples=5)
    before = copy.deepcopy(teacher.state_dict())
    follow = VolumeDistillation(teacher, stages=(0, 0))
    assert set(follow.state_dict()) == {"steps"}
    assert list(follow.parameters()) == []
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        follow.train()(model, batch())["loss"].backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    follow.double()
    assert next(teacher.parameters()).dtype == torch.float64


def test_a_grid_that_follows_a_grid_ends_at_its_values() -> None:
    """Points at the vertices determine them: least squares has one solution, the teacher."""
    teacher, one = small("grid_field", 1), small("grid_field", 2)
    with torch.no_grad():
        teacher.values[0, 0] = -50.0
    follow = VolumeDistillation(teacher, weights={"render": 0.0, "density": 1.0, "color": 1.0}, distance="mse")
    vertices = one.vertices()
    optimizer = torch.optim.Adam(one.parameters(), 0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        d = nn.functional.normalize(torch.randn(len(vertices), 3, generator=generator), dim=1)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        follow(one, {"points": vertices, "directions": d})["loss"].backward()
        optimizer.step()
    x = 1.6 * torch.rand(63, 3, generator=generator) - 0.8
    d = nn.functional.normalize(torch.randn(63, 3, generator=generator), dim=1)
    with torch.no_grad():
        found, goal = (f.color(f.geometry(x)[1], d) for f in (one, teacher))
        values = one.values[:, 0].clamp(-2, 7), teacher.values[:, 0].clamp(-2, 7)
    torch.testing.assert_close(found, goal, atol=5e-3, rtol=0)
    torch.testing.assert_close(*values, atol=1e-3, rtol=0)


def test_a_teacher_of_minus_fifty_and_one_of_minus_two_are_the_same() -> None:
    losses = []
    for value in (-50.0, -2.0):
        teacher = small("grid_field", 1)
        with torch.no_grad():
            teacher.values[:, 0] = value
        losses.append(
            VolumeDistillation(teacher, VolumeRenderer(5), stages=(0, 0))(small("hash_field"), batch())["loss"]
        )
    assert torch.equal(*losses)


PAIRS = list(itertools.product(KINDS, KINDS))
RING = [
    ("hash_field", "mlp_field"),
    ("mlp_field", "grid_field"),
    ("low_rank_field", "hash_field"),
    ("grid_field", "low_rank_field"),
]


@pytest.mark.parametrize(("old", "new"), RING)
def test_each_kind_follows_another_and_is_followed(old: str, new: str) -> None:
    """Most of 200 steps' work is done in 60 at this size; all pairs are the slow test's."""
    first, last = descend(old, new, steps=60)
    assert last < first / 2


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_every_pair_of_kinds_brings_the_loss_down_five_times_in_200_steps(old: str, new: str) -> None:
    first, last = descend(old, new, steps=200)
    assert last < first / 5


def scene(name: str) -> nn.Module:
    """A teacher that holds something: a ball, hard-wired into the output of a field by a few steps of regression."""
    torch.manual_seed(5)
    field = KINDS[name](**MIDDLING[name])
    optimizer = torch.optim.Adam(field.parameters(), 0.03)
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        x = 2 * torch.rand(128, 3, generator=generator) - 1
        d = nn.functional.normalize(torch.randn(128, 3, generator=generator), dim=1)
        s, g = field.geometry(x)
        goal = 4 * torch.sigmoid((0.6 - x.norm(dim=1)) * 8) - 1
        loss = (s - goal).square().mean() + (field.color(g, d) - (x + 1) / 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return field


MIDDLING: Mapping[str, dict[str, Any]] = {
    "hash_field": {"levels": 4, "log2_table": 10, "base": 4, "finest": 16},
    "mlp_field": {"depth": 3, "width": 32, "frequencies": 3, "skip": None},
    "low_rank_field": {"resolution": 8, "density_rank": 4, "color_rank": 8},
    "grid_field": {"resolution": 8},
}
TEACHERS: dict[str, nn.Module] = {}


def descend(old: str, new: str, steps: int) -> tuple[float, float]:
    """Squared rendering error before and after."""
    if old not in TEACHERS:
        TEACHERS[old] = scene(old)
    torch.manual_seed(6)
    one = KINDS[new](**MIDDLING[new])
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.05 * torch.randn_like(p))
    follow = VolumeDistillation(TEACHERS[old], VolumeRenderer(8), stages=(0.05, 0.3))
    rows = Loader(data.scenes(rays=32, poses=30, image=12, test=1, train=1).train, 32)
    optimizer = torch.optim.AdamW(one.parameters(), 0.02, betas=(0.9, 0.99), eps=1e-15)
    fixed = [next(rows) for _ in range(3)]

    def error() -> float:
        with torch.no_grad():
            return sum(float(follow(one, b)["measure"]) for b in fixed)

    first = error()
    for step in range(steps):
        follow.set_progress((step + 1) / steps)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        optimizer.zero_grad()
        follow(one, next(rows))["loss"].backward()
        optimizer.step()
    return first, error()


def test_a_low_rank_student_pays_for_the_size_of_its_density_in_the_last_stage_alone() -> None:
    one = small("low_rank_field")
    found = [
        VolumeDistillation(small("hash_field"), VolumeRenderer(4), stages=(0, s), l1=w)(one, batch())["loss"].detach()
        for s in (0, 1)
        for w in (0.5, 0.0)
    ]
    assert float(found[0] - found[1]) == pytest.approx(0.5 * float(one.size_penalty().detach()), rel=1e-4)
    assert float(found[2]) == float(found[3])


def test_outside_of_what_the_teacher_fills_neither_is_asked() -> None:
    teacher, one = small("grid_field", 1), small("hash_field", 2)
    with torch.no_grad():
        teacher.values[:, 0] = -4.0
        teacher.values[teacher.vertices()[:, 2] > 0, 0] = 6.0
    follow = VolumeDistillation(teacher, VolumeRenderer(9), stages=(0, 0), occupancy=6)
    follow(one, batch())
    asked = Counted(one, "geometry")
    follow(one, batch())
    (x,) = asked.calls[0]
    assert 0 < len(x) < 6 * 9
    # The teacher's own grid does the same.
    model = RadianceField(teacher, samples=9, occupancy=6, jitter=False)
    model.update_occupancy()
    VolumeDistillation(model, VolumeRenderer(9), stages=(0, 0))(one, batch())
    assert torch.equal(asked.calls[-1][0], x)


def test_where_nothing_is_the_step_weighs_nothing() -> None:
    teacher = RadianceField(HASH, samples=5, occupancy=4)
    teacher.occupancy.cells[:] = False
    one = small("mlp_field")
    losses = VolumeDistillation(teacher, VolumeRenderer(5), stages=(0, 0), weights={"render": 1.0})(one, batch())
    losses["loss"].backward()
    assert float(losses["loss"].detach()) < 1e-5
    assert all(p.grad is None or not p.grad.any() for p in one.parameters())


def test_equal_fields_have_a_finite_gradient() -> None:
    one = small("hash_field")
    losses = VolumeDistillation(copy.deepcopy(one), VolumeRenderer(5), stages=(0, 0))(one, batch())
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in one.parameters())


def test_the_model_before_a_rewrite_becomes_the_teacher() -> None:
    follow, model = VolumeDistillation(stages=(0, 0)), student()
    assert float(follow(model, batch())["loss"]) == 0.0
    follow.before_rewrite(model)
    with torch.no_grad():
        model.field.color_net[0].weight.mul_(3)
    assert float(follow(model, batch())["loss"].detach()) > 0.01
    assert any(name.startswith("taken.") for name in follow.state_dict()), "a checkpoint must have it"
    given = VolumeDistillation(RadianceField(HASH, samples=5))
    kept = given.teacher
    given.before_rewrite(model)
    assert given.teacher is kept


def test_a_field_of_ones_own_and_one_inside_a_foreign_network_take_part() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Foreign(nn.Module):
        """A network of transformers as the body of a field."""

        bound = 1.0

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.read = nn.Linear(3, 8)
            self.body = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))
            self.tell = nn.Linear(8 + 3, 3)

        def geometry(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.read(x) + self.body(self.read(x))
            return h[:, 0], h

        def color(self, g: Tensor, d: Tensor) -> Tensor:
            return torch.sigmoid(self.tell(torch.cat([g, d], 1)))

    teacher = nn.Sequential(nn.Identity(), Foreign())
    one = Home()
    follow = VolumeDistillation(teacher, VolumeRenderer(5), stages=(0.5, 0.6))
    with pytest.warns(UserWarning, match="width 4"):
        found = follow(one, batch())
    assert float(found["color"]) > 0, "without comparable features the second stage comes first"
    found["loss"].backward()
    assert one.level.grad is not None


def test_a_picture_is_followed_by_points_alone() -> None:
    one, other = HashField(levels=2, log2_table=6, finest=16, dim=2), GridField(resolution=5, dim=2)
    follow = VolumeDistillation(other, weights={"render": 0.0}, stages=(0, 0))
    losses = follow(one, {"points": torch.rand(7, 2)})
    losses["loss"].backward()
    assert float(losses["color"]) > 0
    assert float(losses["density"]) == 0


def test_in_a_sum_its_terms_are_logged_by_name() -> None:
    follow = VolumeDistillation(small("hash_field"), VolumeRenderer(4), stages=(0, 0))
    found = WeightedSum([(1.0, follow)])(small("mlp_field"), batch())
    assert {"volume_distillation.render", "volume_distillation.feature"} <= set(found)


def test_wrappers_see_a_pass_and_the_models_forward_is_there_again() -> None:
    model, seen = student(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    VolumeDistillation(small("hash_field"), VolumeRenderer(4))(model, batch())
    assert seen == [1]
    assert "forward" not in vars(model)

    def failing() -> None:
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        within_forward(model, failing)
    assert "forward" not in vars(model)


class Broken(Home):
    def geometry(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.level / 0 + x[:, 0], x


@pytest.mark.parametrize(
    ("teacher", "given", "words"),
    [
        (Broken(), {}, "not finite"),
        (GridField(resolution=3, bound=2.0), {}, "one box"),
        (nn.Linear(2, 2), {}, "one field"),
        (GridField(resolution=3), {"origins": None}, "'origins'"),
        (GridField(resolution=3), {"directions": None}, "'directions'"),
    ],
)
def test_what_cannot_be_followed_is_refused(teacher: nn.Module, given: dict[str, Any], words: str) -> None:
    rows = {k: v for k, v in {**batch(), **given}.items() if v is not None}
    with pytest.raises(LaminaError, match=words):
        VolumeDistillation(teacher, VolumeRenderer(3))(small("hash_field"), rows)


def test_points_without_cameras_need_the_render_weight_at_zero() -> None:
    with pytest.raises(LaminaError, match="render"):
        VolumeDistillation(GridField(resolution=3))(small("hash_field"), {"points": torch.zeros(2, 3)})
    long = {**batch(), "directions": 2 * batch()["directions"]}
    with pytest.raises(ShapeError, match="length 1"):
        VolumeDistillation(GridField(resolution=3), VolumeRenderer(3))(small("hash_field"), long)
    for options in ({"weights": {"colour": 1.0}}, {"weights": {"color": -1.0}}, {"distance": "l3"}, {"l1": -1.0}):
        with pytest.raises(LaminaError, match=r"\w+ \w+"):
            VolumeDistillation(GridField(resolution=3), **options)


def test_a_compiled_student_is_followed_eagerly_to_the_same_loss() -> None:
    model = student()
    follow = VolumeDistillation(small("hash_field"), stages=(0, 0), weights={"feature": 0.0})
    expected = follow(model, batch())["loss"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(follow(torch.compile(model, backend="eager"), batch())["loss"], expected)


def test_the_published_sizes_of_the_options_are_the_defaults() -> None:
    follow = VolumeDistillation(GridField(resolution=3))
    assert follow.stages == (1 / 15, 1 / 6)
    assert follow.weights == {"feature": 0.002, "density": 0.002, "color": 0.002, "render": 1.0, "depth": 0.0}
    assert (list(follow.hard), follow.hard_points) == ([], None)
    assert (follow.feature_decay, follow.l1, follow.distance) == (0.995, 1e-4, "norm")
    assert isinstance(follow.grid, type(None))
    assert isinstance(VolumeDistillation(GridField(resolution=3), occupancy=4).grid, OccupancyGrid)
    assert {LowRankField, MLPField} <= set(KINDS.values())
