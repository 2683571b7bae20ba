from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.contract.example import Example
from tests.nn.test_fields import SMALL

from lamina import data, io
from lamina.data import Loader
from lamina.data.scenes import looking_at_middle, rays_of
from lamina.errors import LaminaError, ShapeError
from lamina.models import RadianceField, turntable
from lamina.nn import GridField
from lamina.objectives import Regression
from lamina.train import report


def batch() -> dict[str, torch.Tensor]:
    pixels = torch.tensor([[1.0, 2.0], [3.5, 3.0], [2.0, 5.0]])
    return rays_of(looking_at_middle(30.0, 20.0, 3.2).expand(3, 4, 4), pixels, (6, 6), 9.0)


FIELD = {"name": "hash_field", **SMALL["hash_field"]}
EXAMPLES = [
    Example(
        "model",
        "radiance_field",
        {"field": {"name": "grid_field", "resolution": 3}, "samples": 4, "occupancy": 2},
        batch=batch,
        bad={"background": "green"},
    ),
]


@pytest.mark.parametrize("name", SMALL)
def test_a_field_of_each_kind_learns_from_photographs(name: str) -> None:
    found = data.scenes(rays=64, views="photographs", image=12, train=4, test=1)
    torch.manual_seed(0)
    options = {**SMALL[name], **({"resolution": 8} if "resolution" in SMALL[name] else {})}
    model, rows = RadianceField({"name": name, **options}, samples=16), Loader(found.train, 64)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(Regression()(model, next(rows))["loss"])
        losses[-1].backward()
        optimizer.step()
    found = torch.stack(losses).detach()
    assert float(found[-5:].mean()) < 0.8 * float(found[:3].mean())


def test_the_occupancy_grid_is_saved_and_skips_what_is_empty(tmp_path: object) -> None:
    model = RadianceField(GridField(resolution=9), samples=12, occupancy=8).eval()
    model.lamina_node = {**model.lamina_node, "field": {"name": "grid_field", "resolution": 9}}
    with torch.no_grad():
        model.field.values[:, 0] = -2.0
        model.field.values[model.field.vertices().norm(dim=1) < 0.4, 0] = 6.0
    hazy = model(**batch())
    assert model.update_occupancy() < 0.5
    clear = model(**batch())
    assert not torch.equal(hazy, clear)
    io.save(model, tmp_path / "model")
    assert torch.equal(io.load(tmp_path / "model")(**batch()), clear)
    with pytest.raises(LaminaError, match="no occupancy grid"):
        RadianceField(FIELD, samples=2).update_occupancy()


def test_directions_are_brought_to_length_one() -> None:
    model, rays = RadianceField(FIELD, samples=4).eval(), batch()
    twice = {**rays, "directions": 2 * rays["directions"]}
    torch.testing.assert_close(model(**twice), model(**rays))
    with pytest.raises(ShapeError, match="rays are origins"):
        model(rays["origins"], rays["directions"][:2])


def test_a_field_of_pictures_is_refused() -> None:
    with pytest.raises(LaminaError, match="dim 3"):
        RadianceField(GridField(resolution=4, dim=2))


def test_a_turn_round_the_scene_shows_each_side_and_stands_in_the_report(tmp_path: Path) -> None:
    model = RadianceField(GridField(resolution=9), samples=24).train()
    with torch.no_grad():
        model.field.values.zero_()
        model.field.values[:, 0] = -9.0
        one_side = (model.field.vertices() - torch.tensor([0.5, 0.0, 0.0])).norm(dim=1) < 0.4
        model.field.values[one_side, 0] = 6.0
        model.field.values[one_side, 1] = -20.0  # no red
    seen = turntable(model, count=4, size=12)
    assert seen.shape == (12, 48, 3)
    assert model.training
    cameras = [looking_at_middle(90.0 * i, 25.0, 3.2) for i in range(4)]
    middle = torch.tensor([[6.5, 6.5]])
    for i, camera in enumerate(cameras):
        rays = rays_of(camera[None], middle, (12, 12), 6 / math.tan(0.5 * 0.6911))
        expected = model.eval()(**rays)[0].detach()
        torch.testing.assert_close(seen[6, 12 * i + 6], expected, rtol=1e-4, atol=1e-5)
    # From the side the ball is to the left of the middle, from the opposite side to the right.
    red = seen[..., 0].unflatten(1, (4, 12)).mean(0)
    assert (red[1, :6].mean() < red[1, 6:].mean()) != (red[3, :6].mean() < red[3, 6:].mean())
    (tmp_path / "metrics.jsonl").write_text("")
    page = report.write(tmp_path, pictures=model.pictures()).read_text()
    assert "A turn round the scene" in page
    assert "data:image/png;base64,iVBOR" in page
