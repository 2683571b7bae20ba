"""Ridge regression: one answer by every way to it, and the penalty that held-out rows choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn import _ridge_system, fit_ridge, ridge, ridge_regression

Case = tuple[Tensor, Tensor]


def case(rows: int, width: int, outputs: int | None = 2, seed: int = 0, shift: float = 3.0) -> Case:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64) + shift
    noise = torch.randn(rows, outputs or 1, generator=g, dtype=torch.float64)
    y = x @ torch.randn(width, outputs or 1, generator=g, dtype=torch.float64) + 0.3 * noise - 5.0
    return x, y if outputs else y[:, 0]


def by_normal_equations(x: Tensor, y: Tensor, penalty: float) -> Case:
    """The definition: where the gradient is zero; the intercept is a column without a penalty."""
    wide = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    shift = penalty * torch.eye(wide.shape[1], dtype=x.dtype)
    shift[-1, -1] = 0
    found = torch.linalg.solve(wide.t() @ wide / len(x) + shift, wide.t() @ y / len(x))
    return found[:-1].t(), found[-1]


@pytest.mark.parametrize(("rows", "width"), [(63, 7), (7, 63), (63, 1), (1, 7), (8, 8), (9, 8), (2, 1)])
@pytest.mark.parametrize("penalty", [1e-4, 0.5])
def test_it_is_the_minimum_whichever_system_is_smaller(rows: int, width: int, penalty: float) -> None:
    x, y = case(rows, width)
    weights, intercept = ridge(x, y, penalty)
    expected = by_normal_equations(x, y, penalty)
    torch.testing.assert_close(weights, expected[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(intercept, expected[1], rtol=1e-8, atol=1e-8)


def test_scikit_learn_finds_the_same_with_penalty_times_rows() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    for rows, width in ((40, 9), (9, 40)):
        x, y = case(rows, width)
        peer = linear_model.Ridge(alpha=0.02 * rows, solver="cholesky").fit(x.numpy(), y.numpy())
        weights, intercept = ridge(x, y, 0.02)
        torch.testing.assert_close(weights, torch.from_numpy(peer.coef_), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(intercept, torch.from_numpy(peer.intercept_), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("rows", "width"), [(60, 12), (12, 60)])
@pytest.mark.parametrize("penalty", ["validate", 0.1])
def test_blocks_of_any_size_give_what_the_whole_gives(rows: int, width: int, penalty: Any) -> None:
    x, y = case(rows, width)
    whole = fit_ridge(x, y, penalty)
    for size in (1, 7, 30):
        found = fit_ridge(zip(x.split(size), y.split(size), strict=True), penalty=penalty)
        torch.testing.assert_close(found.weights, whole.weights, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found.penalty, whole.penalty)
    empty = fit_ridge([(x[:0], y[:0]), (x, y)], penalty=penalty)
    torch.testing.assert_close(empty.weights, whole.weights, rtol=1e-8, atol=1e-9)


def test_few_numbers_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case(60, 12), case(12, 60)]
    whole = [fit_ridge(x, y) for x, y in cases]
    monkeypatch.setattr(_ridge_system, "NUMBERS_AT_ONCE", 100)
    monkeypatch.setattr(ridge_regression, "SUMMED_FROM", 3)
    for (x, y), expected in zip(cases, whole, strict=True):
        torch.testing.assert_close(fit_ridge(x, y).weights, expected.weights, rtol=1e-8, atol=1e-9)
        pieces = zip(x.split(2), y.split(2), strict=True)
        torch.testing.assert_close(fit_ridge(pieces).weights, expected.weights, rtol=1e-8, atol=1e-9)


def held_rows(rows: int, seed: int = 0) -> Tensor:
    return ridge_regression._HeldOut(seed).next(rows)


@pytest.mark.parametrize(("rows", "width"), [(50, 12), (12, 50), (2, 3), (5, 2)])
@pytest.mark.parametrize("separate", [False, True])
def test_the_penalty_is_the_best_of_the_grid_on_the_held_out_rows(rows: int, width: int, separate: bool) -> None:
    x, y = case(rows, width)
    held = held_rows(rows)
    grid = torch.tensor(_ridge_system.GRID, dtype=torch.float64) * (x - x[~held].mean(0)).square().sum(1).mean() / rows
    errors = []
    for penalty in grid.tolist():
        weights, intercept = ridge(x[~held], y[~held], penalty)
        errors.append((x[held] @ weights.t() + intercept - y[held]).square().mean(0))
    told = torch.stack(errors) if separate else torch.stack(errors).mean(1, keepdim=True)
    found = fit_ridge(x, y, separate=separate)
    assert found.error is not None
    torch.testing.assert_close(found.error.reshape(-1), told.min(0).values, rtol=1e-6, atol=1e-9)
    if rows > 5:
        torch.testing.assert_close(found.penalty.reshape(-1), grid[told.argmin(0)], rtol=1e-9, atol=0)
    for one, penalty in enumerate(found.penalty.expand(2).tolist()):
        expected = by_normal_equations(x, y[:, one : one + 1], penalty)
        # The reference loses digits at the smallest penalties.
        torch.testing.assert_close(found.weights[one : one + 1], expected[0], rtol=1e-4, atol=1e-5)


def test_a_fifth_of_the_rows_is_held_out_and_two_rows_suffice() -> None:
    for seed in range(5):
        assert held_rows(1000, seed).sum() == 200
        assert held_rows(2, seed).sum() == 1
        assert 1 <= held_rows(7, seed).sum() <= 2
    assert not torch.equal(held_rows(1000, 0), held_rows(1000, 1))
    per_row = [ridge_regression._HeldOut(0)]
    assert torch.equal(torch.cat([per_row[0].next(1) for _ in range(53)]), held_rows(53))


def test_one_target_is_flat_and_a_large_mean_loses_no_digits() -> None:
    x, y = case(50, 8, outputs=None)
    weights, intercept = ridge(x, y, 1e-3)
    assert (weights.shape, intercept.shape) == ((8,), ())
    for rows in (slice(None), slice(0, 6)):
        near, _ = ridge(x[rows], y[rows], 1e-3)
        far, _ = ridge(x[rows] + 1e6, y[rows] - 1e6, 1e-3)
        torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-7)


def test_float32_features_are_solved_in_float64() -> None:
    x, y = case(60, 12)
    for a, b in ((x, y), (x[:9], y[:9])):
        narrow = fit_ridge(a.float(), b.float(), 1e-5)
        wide = fit_ridge(a.float().double(), b.float().double(), 1e-5)
        assert narrow.weights.dtype == torch.float64
        torch.testing.assert_close(narrow.weights, wide.weights, rtol=1e-9, atol=1e-10)
    half = fit_ridge(x.bfloat16(), y, 1e-2)
    torch.testing.assert_close(half.weights, fit_ridge(x.bfloat16().double(), y, 1e-2).weights)


@pytest.mark.parametrize("rows", [40, 5])
def test_columns_that_are_equal_or_constant_are_no_trouble(rows: int) -> None:
    x, y = case(rows, 5)
    twice = torch.cat([x, x, torch.ones(rows, 1, dtype=x.dtype)], 1)
    weights, _ = ridge(twice, y, 1e-15)
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights[:, :5], weights[:, 5:10])
    torch.testing.assert_close(2 * weights[:, :5], ridge(x, y, 5e-16)[0], rtol=1e-6, atol=1e-6)
    flat = fit_ridge(torch.ones(rows, 3), y)
    torch.testing.assert_close(flat.intercept, y.mean(0))
    assert flat.weights.abs().max() == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, y: ridge(x, y, 0.0), "above 0 and finite, got 0.0"),
        (lambda x, y: ridge(x, y, float("nan")), "above 0 and finite, got nan"),
        (lambda x, y: ridge(x, y, "cv"), "a number above 0 or 'validate', got 'cv'"),
        (lambda x, y: ridge(x[:1], y[:1]), "at least 2 rows to choose a penalty by holding some out, got 1"),
        (lambda x, y: ridge([], None, 1.0), "at least 1 rows, got 0"),
        (lambda x, y: ridge(x), "a tensor and its targets, or blocks"),
        (lambda x, y: ridge([(x, y)], y), "a tensor and its targets, or blocks"),
        (lambda x, y: ridge([(x, None)]), r"\(features, targets\), got Tensor and NoneType"),
        (lambda x, y: ridge(x / 0, y), r"features \(9, 4\) .* NaN or infinity"),
        (lambda x, y: ridge(x, y * float("nan")), r"targets \(9, 2\) .* NaN or infinity"),
        (lambda x, y: fit_ridge(x, y, memory_limit=300.0), "4 features take .* GB, above memory_limit"),
        (lambda x, y: fit_ridge(x[:3], y[:3], memory_limit=90.0), "3 rows of 4 features take .* GB"),
        (lambda x, y: fit_ridge(x[:4], y[:4], memory_limit=200.0), "products of 4 rows take"),
    ],
)
def test_what_cannot_be_solved_is_refused_in_a_sentence(call: Any, words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        call(*case(9, 4))


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (lambda x, y: [(x, y[:3])], r"as many rows, got \(9, 4\) and \(3, 2\)"),
        (lambda x, y: [(x[:, :0], y)], r"got \(9, 0\)"),
        (lambda x, y: [(x[0], y[0])], r"got \(4,\)"),
        (lambda x, y: [(x, y), (x[:, :3], y)], r"features \(n, 4\) and targets \(n, 2\), got \(9, 3\)"),
        (lambda x, y: [(x, y), (x, y[:, 0])], r"targets \(n, 2\), got \(9, 4\) and \(9,\)"),
        (lambda x, y: [(x.long(), y)], "must be floating-point .* torch.int64"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_with_their_shapes(blocks: Any, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        ridge(blocks(*case(9, 4)))
