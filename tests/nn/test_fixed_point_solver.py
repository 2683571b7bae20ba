from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn import fixed_point
from lamina.nn.fixed_point_solver import extreme_eigenvalues


def contraction(rows: int, width: int, size: float = 0.95) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return size * matrix / torch.linalg.matrix_norm(matrix, 2), torch.randn(rows, width, generator=generator).double()


@pytest.mark.parametrize("solver", ["splitting", "anderson"])
@pytest.mark.parametrize("width", [1, 7, 63])
def test_a_linear_map_has_the_fixed_point_of_a_linear_solve(solver: str, width: int) -> None:
    a, b = contraction(5, width)
    z, info = fixed_point(lambda z: z @ a.T + b, torch.zeros_like(b), solver, tol=1e-12, max_iter=2000)  # type: ignore[arg-type]
    expected = torch.linalg.solve(torch.eye(width).double() - a, b.T).T
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-8)
    assert info.converged
    assert info.residual <= 1e-12


def test_anderson_takes_fewer_steps_and_is_exact_once_its_memory_spans_the_space() -> None:
    a, b = contraction(3, 4)
    found = {
        s: fixed_point(lambda z: z @ a.T + b, torch.zeros_like(b), s, 1e-9, 2000, memory=6, damping=1e-14)[1]
        for s in ("splitting", "anderson")
    }
    assert found["anderson"].iterations <= 4 + 4
    assert found["splitting"].iterations > 3 * found["anderson"].iterations


def test_rows_do_not_depend_on_each_other() -> None:
    a, b = contraction(6, 7)
    whole, _ = fixed_point(lambda z: z @ a.T + b, torch.zeros_like(b), tol=1e-6)
    for i in range(6):
        alone, _ = fixed_point(lambda z, i=i: z @ a.T + b[i : i + 1], torch.zeros(1, 7).double(), tol=1e-6)
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-12)


def test_a_map_without_one_is_reported_as_it_is() -> None:
    _, info = fixed_point(lambda z: 1 - z, torch.tensor([[0.0], [0.25]]), "splitting", max_iter=9)
    assert (info.iterations, info.converged) == (9, False)
    assert info.residual > 0.5
    assert not fixed_point(lambda z: z * torch.nan, torch.ones(2, 3), max_iter=5)[1].converged
    assert fixed_point(lambda z: z, torch.zeros(0, 3))[1].converged


def test_any_shape_after_the_rows() -> None:
    z, info = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3, 4, 5), tol=1e-6)
    torch.testing.assert_close(z, torch.full((2, 3, 4, 5), 2.0), rtol=0, atol=1e-4)
    assert info.converged


def test_both_ends_of_a_spectrum() -> None:
    torch.manual_seed(0)
    half = torch.randn(20, 20, dtype=torch.float64)
    matrix = half + half.T
    values = torch.linalg.eigvalsh(matrix)
    low, high = extreme_eigenvalues(lambda v: v @ matrix, 20, matrix, 20)
    assert (low, high) == pytest.approx((float(values[0]), float(values[-1])), abs=1e-9)
    low, high = extreme_eigenvalues(lambda v: v @ matrix, 20, matrix, 8)
    assert float(values[0]) <= low < high <= float(values[-1])
    assert high == pytest.approx(float(values[-1]), rel=0.05)
    assert extreme_eigenvalues(lambda v: 3 * v, 5, matrix) == pytest.approx((3, 3))
    assert extreme_eigenvalues(lambda v: 0 * v, 1, matrix) == pytest.approx((0, 0))


def test_bad_input_is_met_with_a_sentence() -> None:
    with pytest.raises(LaminaError, match="solver must be 'anderson' or 'splitting', got 'newton'"):
        fixed_point(lambda z: z, torch.zeros(1, 1), "newton")  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="tol > 0"):
        fixed_point(lambda z: z, torch.zeros(1, 1), tol=0.0)
    with pytest.raises(ShapeError, match=r"keep the shape \(2, 3\), it gave \(2, 2\)"):
        fixed_point(lambda z: z[:, :2], torch.zeros(2, 3))
