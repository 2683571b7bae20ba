from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.objectives import similarity
from lamina.objectives.similarity import anatomical, cauchy, gaussian, identity, rbf, same


def psi(n: int = 5, regions: int = 4, measures: int = 3) -> Tensor:
    return torch.randn(n, regions, measures, generator=torch.Generator().manual_seed(0))


def by_hand(values: Tensor, by: str, map: str) -> Tensor:
    """Pair by pair, over what both have."""
    found = torch.zeros(len(values), len(values))
    parts = values if by == "region" else values.transpose(1, 2)
    for i, one in enumerate(parts):
        for j, two in enumerate(parts):
            seen = []
            for a, b in zip(one, two, strict=True):
                common = ~(a.isnan() | b.isnan())
                if common.any():
                    cosine = float(a[common] @ b[common] / (a[common].norm() * b[common].norm()))
                    seen.append(max(cosine, 0.0) if map == "clamp" else (1 + cosine) / 2)
            found[i, j] = sum(seen) / len(seen) if seen else 0.0
    return found


@pytest.mark.parametrize("by", ["region", "measure"])
@pytest.mark.parametrize("map", ["clamp", "affine"])
def test_anatomical_is_the_mean_of_cosines_pair_by_pair(by: str, map: str) -> None:
    values = psi(7)
    values[0, 1, 2] = values[3, 1] = values[4] = torch.nan
    torch.testing.assert_close(anatomical(values, by, map), by_hand(values, by, map))


def test_many_regions_are_compared_in_parts_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, compare, sizes = anatomical(psi(7, 9)), similarity._cosines, []

    def noted(vectors: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(vectors))
        return compare(vectors)

    monkeypatch.setattr(similarity, "_cosines", noted)
    monkeypatch.setattr(similarity, "CHUNK", 100)
    torch.testing.assert_close(anatomical(psi(7, 9)), whole)
    assert sizes == [2, 2, 2, 2, 1], "of 49 numbers a region, two regions are within a hundred"


@pytest.mark.parametrize("by", ["region", "measure"])
def test_anatomical_is_symmetric_in_0_to_1_and_1_with_itself(by: str) -> None:
    w = anatomical(psi(63), by)
    torch.testing.assert_close(w, w.T)
    torch.testing.assert_close(w.diagonal(), torch.ones(63))
    assert w.min() >= 0
    assert w.max() <= 1 + 1e-6
    assert w.float().std() > 0.05


def test_local_and_global_are_one_where_there_is_one_region_and_one_measure() -> None:
    values = psi(7, 1, 1)
    assert torch.equal(anatomical(values, "region"), anatomical(values, "measure"))
    assert not torch.allclose(anatomical(psi(7), "region"), anatomical(psi(7), "measure"))


def test_the_order_of_regions_is_no_matter_unless_it_is_one_subjects() -> None:
    values, order = psi(7), torch.tensor([2, 0, 3, 1])
    for by in ("region", "measure"):
        torch.testing.assert_close(anatomical(values[:, order], by), anatomical(values, by))
    mixed = values.clone()
    mixed[0] = values[0, order]
    changed = (anatomical(mixed, "measure") - anatomical(values, "measure")).abs()
    assert changed[0, 1:].max() > 0.05
    torch.testing.assert_close(changed[1:, 1:], torch.zeros(6, 6))


def test_kernels_by_hand() -> None:
    age = torch.tensor([20.0, 22.0, 60.0])
    torch.testing.assert_close(rbf(age, 2.0)[0], torch.tensor([1.0, math.exp(-0.5), math.exp(-200.0)]))
    torch.testing.assert_close(gaussian(age, 2.0), rbf(age, 2.0) / (math.sqrt(2 * math.pi) * 2.0))
    torch.testing.assert_close(cauchy(age, 2.0)[0], torch.tensor([1.0, 0.5, 1 / 401]))
    assert torch.equal(same(torch.tensor([1, 2, 1]))[0], torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(identity(age), torch.eye(3))


@pytest.mark.parametrize("kernel", [rbf, gaussian, cauchy])
def test_only_distances_matter_to_a_kernel(kernel: object) -> None:
    age = torch.arange(7.0)
    torch.testing.assert_close(kernel(age + 8), kernel(age))
    assert kernel(age.to(torch.int64)).dtype == torch.float32
    assert kernel(age.bfloat16()).dtype == torch.float32
    assert kernel(age.double()).dtype == torch.float64


def test_what_is_not_known_is_like_nothing() -> None:
    age = torch.tensor([20.0, torch.nan, 20.0])
    expected = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 0, 1]])
    for kernel in (rbf, cauchy, same):
        assert torch.equal(kernel(age), expected)


def test_bad_input_is_met_with_a_sentence() -> None:
    with pytest.raises(LaminaError, match=r"gaussian of width 0\.3 gives weights up to 1\.33, above 1: rbf"):
        gaussian(torch.zeros(3), 0.3)
    for kernel in (rbf, gaussian, cauchy):
        with pytest.raises(LaminaError, match="width of a kernel must be above 0, got 0"):
            kernel(torch.zeros(3), 0.0)
    with pytest.raises(ShapeError, match=r"one number a row, \(N,\), got \(3, 2\)"):
        rbf(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match=r"measurements \(N, regions, measures\), got torch.float32 \(3, 2\)"):
        anatomical(torch.zeros(3, 2))
    with pytest.raises(LaminaError, match=r"by='region' or 'measure'.*got 'voxel', 'clamp'"):
        anatomical(psi(), "voxel")  # type: ignore[arg-type]
