from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.data.flows import darcy_flow, poisson, random_fields
from lamina.errors import LaminaError


def archive(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


FILE = archive(a=np.arange(5 * 12).reshape(5, 3, 4) % 2 == 0, u=np.arange(5.0 * 24).reshape(5, 2, 3, 4))
EXAMPLES = [
    Example("data", "flows", options={"grid": 6, "train": 5, "test": 3, "batch": 2}, bad={"boundary": "periodic"}),
]


def naive_residual(a: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Flux out of every cell, face by face, with what is known of the boundary: u = 0 one spacing away."""
    n = len(a)
    out = np.zeros_like(u)
    for i in range(n):
        for j in range(n):
            for p, q in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                inside = 0 <= p < n and 0 <= q < n
                face = 2 / (1 / a[i, j] + 1 / a[p, q]) if inside else a[i, j]
                out[i, j] += face * (u[i, j] - (u[p, q] if inside else 0.0)) * (n + 1) ** 2
    return out


def test_the_pressure_solves_darcys_equation() -> None:
    a, u = darcy_flow(3, 7, seed=1)
    assert a.shape == u.shape == (3, 1, 7, 7)
    assert set(a.unique().tolist()) == {3.0, 12.0}
    for row in range(3):
        found = naive_residual(a[row, 0].double().numpy(), u[row, 0].double().numpy())
        np.testing.assert_allclose(found, 1.0, atol=1e-4)
    assert (u > 0).all()


def test_where_nothing_is_random_the_solution_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(darcy_flow.__globals__, "random_fields", lambda count, grid, seed: np.ones((count, grid, grid)))
    _, u = darcy_flow(1, 31, seed=0)
    # Of -12 laplace(u) = 1 in the middle of the unit square: 0.0736713 / 12.
    assert float(u[0, 0, 15, 15]) == pytest.approx(0.0736713 / 12, rel=2e-3)


PADS = {"dirichlet": "constant", "periodic": "wrap", "neumann": "edge"}


@pytest.mark.parametrize("boundary", PADS)
def test_poissons_equation_under_every_boundary(boundary: str) -> None:
    f, u = poisson(2, 9, 0, boundary)
    spacing = 1 / 10 if boundary == "dirichlet" else 1 / 9
    padded = np.pad(u.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode=PADS[boundary])
    around = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    found = (4 * u.double().numpy() - around) / spacing**2
    np.testing.assert_allclose(found, f.double().numpy(), atol=1e-4 * float(f.abs().max()))
    if boundary != "dirichlet":
        assert f.mean((2, 3)).abs().max() < 1e-6
        assert u.mean((2, 3)).abs().max() < 1e-6


def test_fields_are_drawn_by_the_seed_with_the_spectrum_of_the_paper() -> None:
    assert np.array_equal(random_fields(2, 8, 3), random_fields(2, 8, 3))
    assert not np.array_equal(random_fields(2, 8, 3), random_fields(2, 8, 4))
    from scipy.fft import dctn

    many = dctn(random_fields(400, 8, 0) / 8, axes=(1, 2), norm="ortho").std(0)
    k = np.arange(8)
    expected = 1 / (np.pi**2 * (k[:, None] ** 2 + k**2) + 9)
    expected[0, 0] = 0
    np.testing.assert_allclose(many, expected, rtol=0.15, atol=1e-12)
    wrapped = random_fields(1, 16, 0, periodic=True)[0]
    # Smooth across the seam, as everywhere.
    assert np.abs(wrapped[0] - wrapped[-1]).max() < 1.5 * np.abs(np.diff(wrapped, axis=0)).max()


def test_training_and_evaluation_share_no_row() -> None:
    found = data.flows(batch=2, grid=6, train=3, test=2)
    x = found.train.batch(torch.arange(3))
    held = found.evaluation.batch(torch.arange(2))
    assert x.keys() == {"inputs", "targets"}
    assert found.sizes == {"channels": 1, "image": 6}
    a, u = darcy_flow(5, 6, 0)
    assert torch.equal(torch.cat((x["inputs"], held["inputs"])), a)
    assert torch.equal(torch.cat((x["targets"], held["targets"])), u)
    assert data.flows("poisson", 2, grid=6, train=3, test=0, boundary="neumann").evaluation is None


def test_a_file_of_fields(tmp_path: Path) -> None:
    (tmp_path / "f.npz").write_bytes(FILE)
    found = data.flows(tmp_path / "f.npz", 2, train=3, test=1, inputs="a", targets="u", seed=5)
    x = found.train.batch(torch.arange(3))
    assert x["inputs"].shape == (3, 1, 3, 4)
    assert x["targets"].shape == (3, 2, 3, 4)
    assert found.sizes == {"channels": 1, "image": (3, 4)}
    everything = torch.arange(5.0 * 24).reshape(5, 2, 3, 4)
    rows = [int((everything == y).flatten(1).all(1).nonzero()) for y in x["targets"]]
    held = found.evaluation.batch(torch.tensor([0]))["targets"][0]
    assert len({*rows, int((everything == held).flatten(1).all(1).nonzero())}) == 4
    with pytest.raises(LaminaError, match=r"5 inputs and 5 targets; asked for are 6 pairs"):
        data.flows(tmp_path / "f.npz", 2, train=5, test=1, inputs="a", targets="u")
    with pytest.raises(LaminaError, match="has its own"):
        data.flows(tmp_path / "f.npz", 2, grid=8, inputs="a", targets="u")


def test_lines_and_volumes_of_a_file_are_read_as_such(tmp_path: Path) -> None:
    for dim, shape in ((1, (5, 7)), (1, (5, 2, 7)), (2, (5, 3, 7)), (3, (5, 3, 4, 7)), (3, (5, 2, 3, 4, 7))):
        np.savez(tmp_path / "f.npz", x=np.zeros(shape), y=np.zeros(shape))
        found = data.flows(tmp_path / "f.npz", 2, train=3, test=1, dim=dim)
        channels = shape[1] if len(shape) == dim + 2 else 1
        assert found.train.batch(torch.arange(3))["inputs"].shape == (3, channels, *shape[-dim:])
    with pytest.raises(LaminaError, match=r"on grids of 1 axes \(option dim\), got \(5, 2, 3, 4, 7\)"):
        data.flows(tmp_path / "f.npz", 2, train=3, test=1, dim=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "darcy", "dim": 1}, "dim is for files"),
        ({"dim": 4}, "dim must be 1, 2 or 3, got 4"),
        ({"source": "burger"}, "there is no 'burger'"),
        ({"grid": 3}, "grid must be at least 4, got 3"),
        ({"train": 0}, "train must be at least 1"),
        ({"source": "darcy", "boundary": "neumann"}, "boundary is for source 'poisson'"),
        ({"source": "poisson", "grid": 4, "train": 2, "test": 1, "boundary": "robin"}, "got 'robin'"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        data.flows(**options)
