from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data.scenes import looking_at_middle, rays_of, see_spheres, spheres
from lamina.errors import LaminaError, ShapeError
from lamina.nn import GridField, OccupancyGrid, VolumeRenderer
from lamina.nn.fields import Samples, ray_weights
from lamina.nn.fields.render import through_box


class Home(nn.Module):
    """A field as a user writes one: a formula."""

    bound = 1.0

    def __init__(self, density: float = 2.0) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(math.log(density)))

    def geometry(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.level + 0 * x[:, 0], x

    def color(self, g: Tensor, d: Tensor) -> Tensor:
        return torch.sigmoid(g)

    def density(self, s: Tensor) -> Tensor:
        return s.exp()

    def forward(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        s, g = self.geometry(x)
        return self.density(s), self.color(g, d)


class Truth(Home):
    def forward(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return spheres(x)


def rays(count: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = 8 * torch.rand(count, 2, generator=generator)
    found = rays_of(looking_at_middle(30.0, 20.0, 3.2).expand(count, 4, 4), pixels, (8, 8), 12.0)
    return found["origins"], found["directions"]


def test_constant_density_lets_the_exponential_of_its_length_through() -> None:
    origins, directions = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    for samples in (1, 7, 63):
        seen = VolumeRenderer(samples)(Home(1.3), origins, directions)
        assert seen.opacity.item() == pytest.approx(1 - math.exp(-1.3 * 2), abs=1e-6)
    sigma, steps = torch.rand(4, 9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64)
    alpha = 1 - torch.exp(-sigma * steps)
    naive = torch.stack([alpha[:, i] * (1 - alpha[:, :i]).prod(1) for i in range(9)], 1)
    torch.testing.assert_close(ray_weights(sigma, steps), naive, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(naive.sum(1), 1 - torch.exp(-(sigma * steps).sum(1)))


def test_one_opaque_sample_is_its_colour_and_a_miss_is_the_background() -> None:
    renderer = VolumeRenderer(3)
    steps = torch.ones(1, 3)
    samples = Samples(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), torch.tensor([[1.0, 2.0, 3.0]]), steps, None)
    rgb = torch.rand(1, 3, 3)
    seen = renderer.composite(torch.tensor([[0.0, 1e4, 5.0]]), rgb, samples)
    torch.testing.assert_close(seen.color, rgb[:, 1])
    assert float(seen.depth) == pytest.approx(2.0)
    past = VolumeRenderer(4, "black")(Home(), torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.equal(past.color, torch.zeros(1, 3))
    away = VolumeRenderer(4)(Home(), torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, 1.0]]))
    assert torch.equal(away.color, torch.ones(1, 3))


def test_composite_passes_gradcheck_with_its_background() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma, rgb = (torch.rand(s, generator=generator, dtype=torch.float64) for s in ((2, 5), (2, 5, 3)))
    steps, behind = torch.rand(2, 5, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)

    def color(sigma: Tensor, rgb: Tensor, behind: Tensor) -> Tensor:
        w = ray_weights(sigma, steps)
        return (w[..., None] * rgb).sum(1) + (1 - w.sum(1))[:, None] * behind

    assert torch.autograd.gradcheck(color, tuple(t.requires_grad_() for t in (sigma, rgb, behind)))
    samples = Samples(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), steps.float(), steps.float(), None)
    seen = VolumeRenderer(5).composite(sigma.float(), rgb.float(), samples, behind.float())
    torch.testing.assert_close(seen.color, color(sigma, rgb, behind).float(), rtol=1e-5, atol=1e-5)


def test_the_box_is_entered_and_left_where_geometry_says() -> None:
    origins = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 0.5], [3.0, 3.0, 0.0], [5.0, 0.0, 0.0]])
    directions = F.normalize(
        torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0], [-1.0, -1.0, 0.0], [0.0, 1.0, 0.0]]), dim=1
    )
    near, far = through_box(origins, directions, 1.0)
    torch.testing.assert_close(near[:3], torch.tensor([2.0, 0.0, 2 * math.sqrt(2)]))
    torch.testing.assert_close(far[:3], torch.tensor([4.0, 0.5, 4 * math.sqrt(2)]))
    assert near[3] == far[3]


def test_it_sees_what_the_formula_of_a_scene_says() -> None:
    origins, directions = rays(40)
    seen = VolumeRenderer(400)(Truth(), origins, directions).color
    assert float((seen - see_spheres(origins, directions, 600)).abs().max()) < 0.02


def test_many_rays_are_rendered_in_parts_to_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    origins, directions = rays(23)
    renderer, field = VolumeRenderer(5), Home()
    whole = renderer(field, origins, directions)
    monkeypatch.setattr("lamina.nn.fields.render.POINTS_AT_ONCE", 20)
    with torch.no_grad():
        parts = renderer(field, origins, directions)
    torch.testing.assert_close(parts.color, whole.color)
    torch.testing.assert_close(parts.weights, whole.weights)


@pytest.mark.parametrize("full", [True, False])
def test_empty_cells_are_not_asked_and_count_as_empty(full: bool) -> None:
    asked = []

    class Counting(Home):
        def geometry(self, x: Tensor) -> tuple[Tensor, Tensor]:
            asked.append(len(x))
            return super().geometry(x)

    grid = OccupancyGrid(4)
    if not full:
        grid.cells[:] = False
        grid.cells[4**3 // 2 :] = True
    origins, directions = rays(6)
    field, renderer = Counting(), VolumeRenderer(16)
    seen = renderer(field, origins, directions, grid)
    samples = renderer.sample(origins, directions, 1.0, grid)
    assert asked == [int(samples.occupied.sum())]
    expected = ray_weights(2.0 * samples.occupied.float(), samples.steps)
    torch.testing.assert_close(seen.weights, expected)
    seen.color.sum().backward()
    assert field.level.grad.abs() > 0
    nowhere = OccupancyGrid(4)
    nowhere.cells[:] = False
    empty = renderer(field, origins, directions, nowhere)
    assert torch.equal(empty.color, torch.ones(6, 3))
    empty.color.sum().backward()


def test_jitter_is_of_training_alone_and_stays_in_its_piece() -> None:
    origins, directions = rays(8)
    renderer = VolumeRenderer(10, jitter=True)
    middle = renderer.eval().sample(origins, directions, 1.0)
    torch.manual_seed(0)
    moved = renderer.train().sample(origins, directions, 1.0)
    gap = (moved.distances - middle.distances).abs() / middle.steps.clamp(min=1e-9)
    assert 0.3 < float(gap[middle.steps > 0].max()) <= 0.5 + 1e-3
    with torch.no_grad():
        assert torch.equal(renderer.sample(origins, directions, 1.0).distances, middle.distances)


def test_a_random_background_shows_through_what_is_thin() -> None:
    torch.manual_seed(0)
    one, other = (VolumeRenderer(4, "random")(Home(), *rays()).color for _ in range(2))
    assert not torch.equal(one, other)


def test_a_renderer_compiles_in_one_graph_with_an_occupancy_grid() -> None:
    torch.compiler.reset()
    field, grid, renderer = GridField(resolution=4), OccupancyGrid(4), VolumeRenderer(4)
    grid.cells[::2] = False
    compiled = torch.compile(lambda o, d: renderer(field, o, d, grid).color, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*rays()), renderer(field, *rays(), grid).color, rtol=1e-4, atol=1e-5)


def test_bad_options_and_rays_are_refused() -> None:
    with pytest.raises(LaminaError, match="background"):
        VolumeRenderer(4, "green")
    with pytest.raises(LaminaError, match="a sample"):
        VolumeRenderer(0)
    with pytest.raises(LaminaError, match="a cell"):
        OccupancyGrid(0)
    origins, directions = rays()
    for bad, words in ((2 * directions, "length 1"), (directions[:2], "directions"), (directions.long(), "floating")):
        with pytest.raises(ShapeError, match=words):
            VolumeRenderer(4)(Home(), origins, bad)
