from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor, nn

from lamina import io
from lamina.errors import ShapeError
from lamina.nn import GridField, HashField, LowRankField, MLPField, OccupancyGrid
from lamina.nn.fields import clip_log_density, spherical_harmonics, truncated_exp, weighted_rows

SMALL = {
    "hash_field": {"levels": 3, "log2_table": 8, "base": 4, "finest": 12},
    "mlp_field": {"depth": 3, "width": 8, "frequencies": 3, "skip": 0},
    "low_rank_field": {"resolution": 5, "density_rank": 2, "color_rank": 3},
    "grid_field": {"resolution": 4},
}
KINDS = {"hash_field": HashField, "mlp_field": MLPField, "low_rank_field": LowRankField, "grid_field": GridField}


def points(n: int = 6, dim: int = 3, seed: int = 0) -> Tensor:
    return 1.8 * torch.rand(n, dim, generator=torch.Generator().manual_seed(seed)) - 0.9


def directions(n: int = 6, seed: int = 1) -> Tensor:
    return F.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)), dim=1)


def inputs() -> tuple[Tensor, Tensor]:
    return points(), directions()


EXAMPLES = [
    Example("field", "hash_field", SMALL["hash_field"], inputs=inputs, bad={"log2_table": 30}),
    Example("field", "mlp_field", SMALL["mlp_field"], inputs=inputs, bad={"skip": 2}),
    Example("field", "low_rank_field", SMALL["low_rank_field"], inputs=inputs, bad={"resolution": 1}),
    Example("field", "grid_field", SMALL["grid_field"], inputs=inputs, bad={"bands": 5}),
]


def small(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[name](**{**SMALL[name], **options})


def lively(field: nn.Module) -> nn.Module:
    """Numbers as a trained field has them, not those of a start that is nearly constant."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return field


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [1, 7, 63])
def test_a_field_gives_densities_within_the_clip_and_colours(name: str, count: int) -> None:
    sigma, rgb = lively(small(name))(points(count), directions(count))
    assert sigma.shape == (count,)
    assert rgb.shape == (count, 3)
    assert ((sigma >= math.exp(-2) * 0.999) & (sigma <= math.exp(7) * 1.001)).all()
    assert ((rgb >= 0) & (rgb <= 1)).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_field_of_a_picture_has_no_density_and_learns_its_colours(name: str) -> None:
    field, x = small(name, dim=2), points(40, 2)
    truth = torch.stack([x[:, 0].sin(), x[:, 1].cos(), x[:, 0] * x[:, 1]], 1) * 0.4 + 0.5
    optimizer = torch.optim.Adam(field.parameters(), 0.03)
    first = None
    for _ in range(80):
        optimizer.zero_grad()
        loss = (field(x) - truth).square().mean()
        first = first or float(loss.detach())
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 5


def test_the_published_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        fields = HashField(), MLPField(), LowRankField(), GridField()
    assert fields[0].table.shape == (5_303_704, 2)
    assert fields[0].geometry_net[0].weight.shape == (64, 28)
    assert [tuple(p.weight.shape) for p in fields[1].trunk][3:6] == [(256, 256), (256, 319), (256, 256)]
    assert tuple(fields[1].trunk[0].weight.shape) == (256, 63)
    assert fields[2].basis.weight.shape == (15, 144)
    assert fields[3].values.shape == (128**3, 28)
    for field in fields[:3]:
        assert [tuple(p.shape) for p in field.color_net.parameters()] == [(64, 31), (64, 64), (3, 64)]


# The hash table.


def trilinear(grid: Tensor, x: Tensor) -> Tensor:
    """grid (F, S, S, S) with axes (z, y, x), x (N, 3) in -1..1 over the vertices: by torch's own interpolation."""
    return F.grid_sample(grid[None], x[None, :, None, None], align_corners=True, mode="bilinear")[0, :, :, 0, 0].T


def test_a_level_that_fits_its_table_is_trilinear_interpolation_of_a_dense_grid() -> None:
    field = HashField(levels=1, features=2, log2_table=12, base=8, finest=8)
    lively(field)
    side, scale = 9 - 1 + 1, 7.0  # res = ceil(8 - 1) + 1 = 8, vertices 0..8
    dense = field.table[: side**3].detach().reshape(side, side, side, 2).permute(3, 0, 1, 2)
    x = points(63)
    place = (x + 1) / 2 * scale + 0.5
    torch.testing.assert_close(field.encode(x), trilinear(dense, place / (side - 1) * 2 - 1), rtol=1e-4, atol=1e-5)
    index, _ = field.vertices(points(500, seed=5))
    assert int(index.max()) < side**3


def naive_hash(field: HashField, x: np.ndarray, levels: int, base: int, finest: int, log2: int) -> np.ndarray:
    """The published encoding, point by point, in Python's whole numbers, cut to 32 bits where uint32 would."""
    table, found, start = field.table.detach().numpy(), [], 0
    growth = (finest / base) ** (1 / (levels - 1))
    for level in range(levels):
        scale = base * growth**level - 1
        res = math.ceil(scale) + 1
        rows = min(2**log2, -(-((res + 1) ** 3) // 8) * 8)
        values = np.zeros((len(x), 2))
        for n, point in enumerate(x):
            p = (point + 1) / 2 * scale + 0.5
            low = np.floor(p).astype(int)
            for corner in itertools.product((0, 1), repeat=3):
                v = [int(a) + b for a, b in zip(low, corner, strict=True)]
                if (res + 1) ** 3 <= 2**log2:
                    row = v[0] + v[1] * (res + 1) + v[2] * (res + 1) ** 2
                else:
                    row = (v[0] ^ (v[1] * 2654435761 & 0xFFFFFFFF) ^ (v[2] * 805459861 & 0xFFFFFFFF)) % rows
                share = np.prod([f if b else 1 - f for f, b in zip(p - low, corner, strict=True)])
                values[n] += share * table[start + row]
        found.append(values)
        start += rows
    assert start == len(table)
    return np.concatenate(found, axis=1)


def test_the_encoding_is_the_published_one_collisions_included() -> None:
    field = lively(HashField(levels=4, log2_table=7, base=4, finest=50))
    assert 0 < len(field.strides) < 4
    x = points(7)
    found = field.encode(x).detach().numpy()
    np.testing.assert_allclose(found, naive_hash(field, x.double().numpy(), 4, 4, 50, 7), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("wide", [1, 2, 5, 28])
def test_weighted_rows_and_their_gradients_are_those_of_the_plain_formula(wide: int) -> None:
    generator = torch.Generator().manual_seed(wide)
    table = torch.randn(11, wide, generator=generator, requires_grad=True)
    index = torch.randint(11, (63, 8), generator=generator)
    weight = torch.rand(63, 8, generator=generator, requires_grad=True)
    plain = (table[index] * weight[..., None]).sum(1)
    found = weighted_rows(table, index.int(), weight)
    torch.testing.assert_close(found, plain)
    towards = torch.randn(63, wide, generator=generator)
    expected = torch.autograd.grad((plain * towards).sum(), (table, weight))
    got = torch.autograd.grad((found * towards).sum(), (table, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_reach_the_coordinates() -> None:
    for name in KINDS:
        field, x = lively(small(name)), points(40).requires_grad_()
        (slope,) = torch.autograd.grad(field.geometry(x)[0].sum(), x)
        step = 1e-3
        for axis in range(3):
            move = step * torch.eye(3)[axis]
            with torch.no_grad():
                rise = (field.geometry(x + move)[0] - field.geometry(x - move)[0]) / (2 * step)
            # A few points are within a step of a vertex or a bend of a ReLU.
            assert float(torch.isclose(slope[:, axis], rise, rtol=0.02, atol=0.02).float().mean()) >= 0.9


# Spherical harmonics.


def test_the_harmonics_are_orthonormal_on_the_sphere_and_scipys_up_to_sign() -> None:
    special = pytest.importorskip("scipy.special")
    d = F.normalize(torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    basis = spherical_harmonics(d, 4)
    torch.testing.assert_close(4 * math.pi * basis.T @ basis / len(d), torch.eye(16), atol=2e-2, rtol=0)
    d = d[:50].double().numpy()
    polar, turn = np.arccos(d[:, 2]), np.arctan2(d[:, 1], d[:, 0])
    column = 0
    for band in range(4):
        for m in range(-band, band + 1):
            y = special.sph_harm_y(band, abs(m), polar, turn)
            real = y.real if m == 0 else math.sqrt(2) * (y.imag if m < 0 else y.real)
            np.testing.assert_allclose(np.abs(basis[:50, column].numpy()), np.abs(real), atol=1e-5)
            column += 1


# Low rank.


def test_a_low_rank_field_is_the_sum_of_plane_times_line_exactly() -> None:
    field = lively(LowRankField(resolution=6, density_rank=2, color_rank=3)).double()
    planes, lines = field.density_planes.detach(), field.density_lines.detach()[..., 0]
    # At the vertices nothing is interpolated: planes (xy, xz, yz) with the first axis along the columns... of its name.
    grid = (
        torch.einsum("rij,rk->ijk", planes[0], lines[0])  # xy, z
        + torch.einsum("rik,rj->ijk", planes[1], lines[1])  # xz, y
        + torch.einsum("rjk,ri->ijk", planes[2], lines[2])  # yz, x
    )
    line = torch.linspace(-1, 1, 6, dtype=torch.float64)
    x = torch.stack([a.flatten() for a in torch.meshgrid(line, line, line, indexing="ij")], 1)
    s, _ = field.geometry(x)
    torch.testing.assert_close(s, grid.flatten(), rtol=1e-5, atol=1e-5)
    outside = torch.tensor([[1.6, 0.0, 0.0], [0.0, -1.7, 0.1]], dtype=torch.float64)
    assert torch.equal(field.geometry(outside)[0], torch.zeros(2, dtype=torch.float64))


def test_the_size_penalty_is_the_mean_absolute_value_of_each_density_factor() -> None:
    field = small("low_rank_field")
    expected = sum(float(p.detach().abs().mean()) for p in (*field.density_planes, *field.density_lines))
    assert float(field.size_penalty().detach()) == pytest.approx(expected, rel=1e-5)


# The grid.


def test_a_grid_field_interpolates_its_values_and_sums_harmonics() -> None:
    field = lively(small("grid_field"))
    side = field.resolution
    dense = field.values.detach().reshape(side, side, side, 28).permute(3, 0, 1, 2)
    x, d = points(63), directions(63)
    expected = trilinear(dense, x)
    s, coefficients = field.geometry(x)
    torch.testing.assert_close(s, expected[:, 0], rtol=1e-4, atol=1e-5)
    rgb = torch.sigmoid(torch.einsum("nck,nk->nc", expected[:, 1:].reshape(-1, 3, 9), spherical_harmonics(d, 3)))
    torch.testing.assert_close(field.color(coefficients, d), rgb, rtol=1e-4, atol=1e-5)
    vertex = field.vertices()[[0, 5, 63]]
    torch.testing.assert_close(field.geometry(vertex)[0], field.values[[0, 5, 63], 0])


def test_a_sparse_grid_is_the_dense_one_where_something_is_and_empty_elsewhere(tmp_path: object) -> None:
    field = lively(GridField(resolution=9))
    right = lambda p: p[..., 0] > 0.3  # noqa: E731
    sparse = field.sparse(right)
    assert len(sparse.values) < 0.55 * len(field.values)
    x, d = points(200), directions(200)
    inside = x[:, 0] > 0.3
    for a, b in zip(sparse(x[inside], d[inside]), field(x[inside], d[inside]), strict=True):
        torch.testing.assert_close(a, b)
    far = x[:, 0] < -0.2
    assert torch.allclose(sparse(x[far], d[far])[0], torch.tensor(-2.0).exp())
    sparse(x, d)[0].sum().backward()
    io.save(sparse, tmp_path / "sparse")
    for a, b in zip(io.load(tmp_path / "sparse")(x, d), sparse(x, d), strict=True):
        assert torch.equal(a, b)
    whole = sparse.sparse(OccupancyGrid(8))
    assert len(whole.values) == 1 + 9**3
    assert torch.equal(whole(x, d)[0], sparse(x, d)[0])
    with pytest.raises(ShapeError, match="nothing occupied"):
        field.sparse(lambda p: torch.zeros(len(p), dtype=torch.bool))


# Density.


def test_the_exponential_has_a_finite_gradient_anywhere() -> None:
    s = torch.tensor([-50.0, -2.0, 0.5, 7.0, 50.0], requires_grad=True)
    found = truncated_exp(s)
    torch.testing.assert_close(found, s.detach().exp())
    found.sum().backward()
    torch.testing.assert_close(s.grad, s.detach().clamp(-12, 12).exp())
    half = torch.tensor([30.0], dtype=torch.float16, requires_grad=True)
    assert truncated_exp(half).dtype == torch.float32
    truncated_exp(half).sum().backward()
    assert torch.isfinite(truncated_exp(half)).all()


@given(st.floats(-9, 12), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_a_soft_clip_lets_a_gradient_through_only_where_it_leads_back(value: float, slope: float) -> None:
    s = torch.tensor([value], requires_grad=True)
    (clip_log_density(s, soft=True) * slope).sum().backward()
    after = value - math.copysign(1.0, slope)
    inside = -2 <= value <= 7
    inwards = inside or abs(min(max(after, -2), 7) - after) < abs(min(max(value, -2), 7) - value)
    assert s.grad.item() == pytest.approx(slope if inwards else 0.0)
    hard = torch.tensor([value], requires_grad=True)
    (clip_log_density(hard) * slope).sum().backward()
    assert hard.grad.item() == pytest.approx(slope if inside else 0.0)


def test_a_soft_clip_pulls_a_strayed_field_back_and_the_hard_one_cannot() -> None:
    moved = []
    for soft in (True, False):
        field = GridField(resolution=2, soft_clip=soft)
        with torch.no_grad():
            field.values[:, 0] = 9.0
        field(points(), directions())[0].sum().backward()
        moved.append(float(field.values.grad[:, 0].abs().sum()))
    assert moved[0] > 0
    assert moved[1] == 0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("x", "d", "words"),
    [
        (points(4, 2), directions(4), r"\(\.\.\., 3\)"),
        (points(4), directions(5), "a direction each"),
        (points(4), None, "no directions"),
        (points(4)[None], directions(4)[None], "points"),
    ],
)
def test_other_shapes_are_refused(name: str, x: Tensor, d: Tensor | None, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        small(name)(x, d)


@pytest.mark.parametrize("name", KINDS)
def test_a_field_alone_is_saved_and_loaded(name: str, tmp_path: object) -> None:
    field = lively(small(name, bound=1.5)).eval()
    io.save(field, tmp_path / "field")
    loaded = io.load(tmp_path / "field")
    assert loaded.bound == 1.5
    for a, b in zip(loaded(*inputs()), field(*inputs()), strict=True):
        assert torch.equal(a, b)


def test_an_occupancy_grid_keeps_what_is_dense_and_its_neighbours() -> None:
    field = GridField(resolution=9)
    with torch.no_grad():
        field.values[:, 0] = -2.0
        field.values[(field.vertices().norm(dim=1) < 0.3), 0] = 5.0
    grid = OccupancyGrid(16).update(field)
    assert grid(torch.zeros(1, 3)).all()
    assert not grid(torch.tensor([[0.9, 0.9, 0.9], [-0.9, 0.0, 0.0]])).any()
    assert 0.01 < grid.share < 0.3
    dense = points(3000)[field.geometry(points(3000))[0] > 0]
    assert grid(dense).all()
