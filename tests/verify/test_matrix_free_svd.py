from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.verify import SingularTriples, matrix_free_svd


def matrix(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def svd(a: Tensor, k: int, **options: object) -> SingularTriples:
    return matrix_free_svd(lambda x: x @ a.T, lambda y: y @ a, a.shape[1], a.shape[0], k, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["block", "lanczos"])
@pytest.mark.parametrize(("outputs", "inputs", "k"), [(63, 7, 7), (7, 63, 5), (40, 40, 3), (1, 5, 1), (5, 1, 1)])
def test_values_and_vectors_are_those_of_numpy(method, outputs, inputs, k):
    a = matrix(outputs, inputs)
    found = svd(a, k, method=method)
    u, values, vt = np.linalg.svd(a.numpy())
    np.testing.assert_allclose(found.values, values[:k], rtol=1e-6)
    overlaps = [(found.left.numpy() * u.T[:k]).sum(1), (found.right.numpy() * vt[:k]).sum(1)]
    # Up to the sign, which is that of both.
    np.testing.assert_allclose(np.abs(overlaps), 1, atol=1e-4)
    np.testing.assert_allclose(overlaps[0] * overlaps[1], 1, atol=2e-4)


@pytest.mark.parametrize("method", ["block", "lanczos"])
def test_a_tight_tolerance_gives_what_the_triples_are_defined_by(method):
    a = matrix(50, 30) * 0.8 ** torch.arange(30)
    found = svd(a, 4, method=method, tolerance=1e-12)
    torch.testing.assert_close(found.right @ a.T, found.values[:, None] * found.left, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.left @ a, found.values[:, None] * found.right, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.left @ found.left.T, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.right @ found.right.T, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["block", "lanczos"])
def test_equal_values_missing_ranks_and_nothing_at_all(method):
    torch.testing.assert_close(svd(torch.eye(6, dtype=torch.float64), 3, method=method).values, torch.ones(3).double())
    one = torch.outer(matrix(9, 1)[:, 0], matrix(1, 4)[0])
    expected = torch.tensor([one.norm(), 0, 0]).double()
    torch.testing.assert_close(svd(one, 3, method=method).values, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(svd(0 * one, 2, method=method).values, torch.zeros(2).double())


@pytest.mark.parametrize("method", ["block", "lanczos"])
def test_values_that_are_0_but_for_rounding_settle(method):
    a = matrix(60, 3) @ matrix(3, 60, seed=1)
    found = svd(a, 5, method=method)
    assert found.steps < 50
    expected = torch.linalg.svdvals(a)[:5]
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-11 * float(expected[0]))


@pytest.mark.parametrize("method", ["block", "lanczos"])
def test_the_seed_decides_the_start_and_nothing_else_does(method):
    a = matrix(30, 20)
    first, again = svd(a, 2, method=method, tolerance=1e-3), svd(a, 2, method=method, tolerance=1e-3)
    other = svd(a, 2, method=method, tolerance=1e-3, seed=1)
    assert torch.equal(first.right, again.right)
    assert not torch.equal(first.right, other.right)


def test_what_does_not_settle_is_said(monkeypatch):
    monkeypatch.setattr(sys.modules["lamina.verify.matrix_free_svd"], "LIMIT", 2)
    for method in ("block", "lanczos"):
        with pytest.warns(UserWarning, match="have not settled to 1e-06 in 2 steps"):
            svd(matrix(60, 50), 2, method=method)


def test_bad_input():
    a = matrix(3, 4)
    with pytest.raises(LaminaError, match=r"k must be 1\.\.3 for a map of 4 to 3 numbers, got 4"):
        svd(a, 4)
    with pytest.raises(LaminaError, match=r"k must be 1\.\.3"):
        svd(a, 0)
    with pytest.raises(LaminaError, match="tolerance must be above 0, got 0"):
        svd(a, 1, tolerance=0)
    with pytest.raises(LaminaError, match="no method is called 'lancsoz'; did you mean 'lanczos'"):
        svd(a, 1, method="lancsoz")
