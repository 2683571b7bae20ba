from __future__ import annotations

from typing import Any

import pytest
import torch

from lamina.errors import LaminaError, ShapeError
from lamina.experiments.linear_probe import linear_probe


def blobs(apart: float, rows: int = 60, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    centres = apart * torch.randn(classes, 4, generator=draw)
    return centres[labels] + torch.randn(rows, 4, generator=draw), labels


def test_classes_that_are_there_are_found_and_others_are_not() -> None:
    known, blind = linear_probe(*blobs(3.0), folds=3), linear_probe(*blobs(0.0), folds=3)
    assert known["auc"] > 0.97
    assert known["balanced_accuracy"] > 0.9
    assert abs(blind["auc"] - 0.5) < 0.2
    several = linear_probe(*blobs(3.0, classes=3), folds=3)
    assert set(several) == {"balanced_accuracy"}
    assert several["balanced_accuracy"] > 0.9


def test_a_linear_target_is_found_to_its_noise() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=draw)
    y = 40 + x @ torch.arange(5.0) + 0.1 * torch.randn(200, generator=draw)
    found = linear_probe(x, y, "regress")
    assert found["r2"] > 0.99
    assert found["mae"] < 0.15
    assert found["constant_mae"] == pytest.approx(float((y - y.median()).abs().mean()), rel=0.05)


def test_rows_are_judged_that_it_was_not_fitted_to() -> None:
    """More features than rows: a model judged on its own rows would be perfect."""
    draw = torch.Generator().manual_seed(0)
    found = linear_probe(torch.randn(40, 100, generator=draw), torch.arange(40) % 2)
    assert found["auc"] < 0.8


def test_rare_classes_count_as_much_as_others() -> None:
    x, _ = blobs(0.0)
    rare = (torch.arange(60) < 6).long()
    assert linear_probe(x, rare)["balanced_accuracy"] < 0.65


def test_seeds_cut_the_folds() -> None:
    x, y = blobs(0.5)
    one, again, other = (linear_probe(x, y.float(), "regress", seed=s) for s in (1, 1, 2))
    assert one == again != other


BAD: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: linear_probe(torch.zeros(4), torch.zeros(4)),
        ShapeError,
        r"features \(N, d\) and targets \(N,\), got \(4,\)",
    ),
    (lambda: linear_probe(*blobs(0.0), "guess"), LaminaError, "task must be 'classify' or 'regress', got 'guess'"),  # type: ignore[arg-type]
    (lambda: linear_probe(*blobs(0.0), folds=61), LaminaError, "rows of the rarest class, of at least two, 30, got 61"),
    (lambda: linear_probe(torch.ones(9, 2), torch.zeros(9)), LaminaError, "of at least two, 9, got 5"),
    (lambda: linear_probe(torch.full((9, 2), torch.nan), torch.zeros(9)), LaminaError, "not finite"),
]


@pytest.mark.parametrize(("call", "kind", "sentence"), BAD)
def test_bad_input_is_met_with_a_sentence(call: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        call()
