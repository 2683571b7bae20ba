from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lamina.errors import ShapeError
from lamina.nn import association_regimes, association_weights, hopfield_energy, hopfield_update
from lamina.nn.hopfield_association import associate


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(state: Tensor, stored: Tensor, beta: float) -> Tensor:
    """One state and one pattern at a time."""
    rows = []
    for xi in state:
        powers = [math.exp(beta * float(xi @ x)) for x in stored]
        rows.append(sum(p / sum(powers) * x for p, x in zip(powers, stored, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("count", [1, 7, 63])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)]
)
def test_one_update_is_the_sum_written_out(count: int, dtype: torch.dtype, tolerance: float) -> None:
    state, stored = drawn(3, 5, dtype=dtype), drawn(count, 5, seed=1, dtype=dtype)
    expected = naive(state.double(), stored.double(), 0.7)
    assert (hopfield_update(state, stored, 0.7).double() - expected).abs().max() <= tolerance * 3
    assert hopfield_update(state, stored, 0.7).dtype is dtype


def test_steps_are_updates_one_after_the_other_and_leading_dimensions_may_be_any() -> None:
    state, stored = drawn(2, 3, 4, 5), drawn(6, 5, seed=1)
    one = torch.stack([torch.stack([naive(s, stored, 1.3) for s in many]) for many in state])
    torch.testing.assert_close(hopfield_update(state, stored, 1.3), one)
    two = hopfield_update(one, stored, 1.3)
    torch.testing.assert_close(hopfield_update(state, stored, 1.3, steps=2), two)
    assert hopfield_update(state, stored, 1.3, steps=0) is state
    own = stored.expand(2, 3, 6, 5) + torch.arange(3.0)[:, None, None]
    found = hopfield_update(state, own, 1.3)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(found[b, h], naive(state[b, h], own[b, h], 1.3))


def test_beta_may_be_one_a_head() -> None:
    state, stored, beta = drawn(2, 3, 4, 5), drawn(6, 5, seed=1), torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    found = hopfield_update(state, stored, beta[:, None, None], steps=2)
    energy = hopfield_energy(state, stored, beta[:, None, None])
    for h in range(3):
        torch.testing.assert_close(found[:, h], hopfield_update(state[:, h], stored, float(beta[h]), steps=2))
        torch.testing.assert_close(energy[:, h], hopfield_energy(state[:, h], stored, float(beta[h])))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
def test_masks_forbid_or_weigh(shape: tuple[int, ...]) -> None:
    state, stored = drawn(2, 4, 5), drawn(6, 5, seed=1)
    forbidden = drawn(*shape, seed=2) > 0.3
    forbidden[..., 0] = False
    whole = forbidden.expand(2, 4, 6)
    expected = torch.stack(
        [torch.cat([naive(state[b, s][None], stored[~whole[b, s]], 0.9) for s in range(4)]) for b in range(2)]
    )
    torch.testing.assert_close(hopfield_update(state, stored, 0.9, mask=forbidden), expected)
    added = torch.zeros(shape, dtype=torch.float64).masked_fill(forbidden, float("-inf"))
    torch.testing.assert_close(hopfield_update(state, stored, 0.9, mask=added), expected)
    weights = association_weights(state, stored, 0.9, forbidden)
    torch.testing.assert_close(weights @ stored, expected)
    own = stored.expand(2, 6, 5) * torch.tensor([1.0, -0.5])[:, None, None]
    expected = torch.stack(
        [torch.cat([naive(state[b, s][None], own[b][~whole[b, s]], 0.9) for s in range(4)]) for b in range(2)]
    )
    torch.testing.assert_close(hopfield_update(state, own, 0.9, mask=forbidden), expected)
    assert not weights[whole].any()


def test_energy_by_hand() -> None:
    stored = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    beta, xi = 2.0, torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    expected = -math.log(math.exp(6.0) + math.exp(1.0)) / 2 + (1 + 0.25) / 2 + math.log(2) / 2 + 9 / 2
    assert float(hopfield_energy(xi, stored, beta)) == pytest.approx(expected, abs=1e-12)


def test_no_update_raises_the_energy_and_it_stays_within_its_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(1000):
        count, width = 1 + trial % 9, 1 + trial % 7
        stored = torch.randn(count, width, generator=generator, dtype=torch.float64)
        state = torch.randn(4, width, generator=generator, dtype=torch.float64) * 2
        beta = float(torch.rand((), generator=generator, dtype=torch.float64)) * 5 + 0.01
        before = hopfield_energy(state, stored, beta)
        for _ in range(3):
            state = hopfield_update(state, stored, beta)
            after = hopfield_energy(state, stored, beta)
            assert (after <= before + 1e-10).all()
            # After an update the states lie in the convex hull.
            assert (after >= -1e-10).all()
            assert (after <= 2 * stored.square().sum(-1).max() + 1e-10).all()
            before = after


def test_its_gradient_is_the_state_less_its_update() -> None:
    state, stored = drawn(3, 4).requires_grad_(), drawn(6, 4, seed=1)
    (found,) = torch.autograd.grad(hopfield_energy(state, stored, 0.8).sum(), state)
    torch.testing.assert_close(found, state - hopfield_update(state, stored, 0.8), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda s, x: hopfield_energy(s, x, 0.8), (state, stored.requires_grad_()))
    assert torch.autograd.gradcheck(lambda s, x: hopfield_update(s, x, 0.8, steps=2), (state, stored))


def test_a_large_memory_is_gone_through_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    state, stored = drawn(2, 3, 4), drawn(50, 4, seed=1)
    expected = hopfield_energy(state, stored, 0.8)
    monkeypatch.setattr("lamina.nn.hopfield_association.BLOCK", 7)
    torch.testing.assert_close(hopfield_energy(state, stored, 0.8), expected)


@pytest.mark.parametrize("widths", [(5, 5), (5, 3), (3, 5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_fused_path_is_the_dense_one_with_values_of_any_width(widths: tuple[int, int], groups: int) -> None:
    q, k, v = (
        drawn(2, 4, 7, widths[0]),
        drawn(2, 4 // groups, 6, widths[0], seed=1),
        drawn(2, 4 // groups, 6, widths[1]),
    )
    for mask in (None, drawn(2, 1, 7, 6, seed=3) > 0, drawn(7, 6, seed=3)):
        scores = 0.3 * q @ k.repeat_interleave(groups, 1).mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e30) if mask.dtype is torch.bool else scores + mask
        expected = scores.softmax(-1) @ v.repeat_interleave(groups, 1)
        if mask is not None and mask.dtype is torch.bool:
            expected = expected * mask.any(-1, keepdim=True)
        torch.testing.assert_close(associate(q, k, v, 0.3, mask), expected)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads the process's peak memory from /proc")
@pytest.mark.parametrize("values", [16, 9])
def test_twenty_thousand_patterns_without_a_table_of_scores(values: int) -> None:
    states, patterns = 2000, 20_000
    q, k = drawn(1, 1, states, 16, dtype=torch.float32), drawn(1, 1, patterns, 16, seed=1, dtype=torch.float32)
    v = k[..., :values]
    dense = [(0.5 * part @ k.mT).softmax(-1) @ v for part in q.split(100, dim=2)]
    found, taken = peak(lambda: associate(q, k, v, 0.5))
    torch.testing.assert_close(found, torch.cat(dense, dim=2), rtol=1e-4, atol=1e-5)
    assert taken < states * patterns * 4 / 10


def peak(run):
    """What a call returns, and the most bytes it held above what was there before."""
    # 5 resets the high-water mark of the process.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    found = run()
    return found, status("VmHWM") - before


def status(key: str) -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def test_a_state_that_may_find_nothing_is_zero_with_finite_gradients() -> None:
    state, stored = drawn(3, 4).requires_grad_(), drawn(6, 4, seed=1).requires_grad_()
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1] = True
    for given in (mask, torch.zeros(3, 6, dtype=torch.float64).masked_fill(mask, float("-inf"))):
        for found in (
            hopfield_update(state, stored, 1.0, mask=given),
            association_weights(state, stored, 1.0, given) @ stored,
        ):
            assert not found[1].any()
            assert found[0].any()
            grads = torch.autograd.grad(found.sum(), (state, stored))
            assert all(torch.isfinite(g).all() for g in grads)
            assert not grads[0][1].any()


def test_the_regimes_of_heads_by_hand() -> None:
    single = torch.tensor([0.95, 0.05, 0.0, 0.0, 0.0])
    cluster = torch.tensor([0.0, 0.45, 0.5, 0.05, 0.0])
    spread = torch.full((5,), 0.2)
    weights = torch.stack([w.expand(2, 3, 5) for w in (single, cluster, spread)], dim=1)  # (2, 3, 3, 5)
    assert association_regimes(weights).tolist() == [1.0, 2.0, 5.0]
    assert association_regimes(weights, threshold=0.5).tolist() == [1.0, 2.0, 3.0]
    # A masked state has no weights and is left out; the median is over examples and states.
    weights[:, 2, :, :] = 0.0
    weights[0, 1, 0] = single
    assert association_regimes(weights).tolist()[:2] == [1.0, 2.0]
    assert math.isnan(association_regimes(weights).tolist()[2])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hopfield_update(drawn(3, 4), drawn(5, 6), 1.0), ShapeError, r"one width d.*\(3, 4\).*\(5, 6\)"),
        (lambda: hopfield_update(drawn(4), drawn(5, 4), 1.0), ShapeError, "states"),
        (lambda: hopfield_update(drawn(2, 3, 4), drawn(3, 5, 4), 1.0), ShapeError, r"leading dimensions \(2,\)"),
        (lambda: hopfield_update(drawn(3, 4), drawn(0, 4), 1.0), ShapeError, "nothing is stored"),
        (lambda: hopfield_energy(torch.ones(3, 4, dtype=torch.long), drawn(5, 4), 1.0), ShapeError, "floats.*int64"),
        (lambda: hopfield_update(drawn(3, 4).half(), drawn(5, 4), 1.0), ShapeError, "one kind, got torch.float16"),
        (lambda: hopfield_update(drawn(3, 4), drawn(5, 4), 0.0), ValueError, "beta must be positive and finite, got 0"),
        (lambda: hopfield_energy(drawn(3, 4), drawn(5, 4), math.nan), ValueError, "beta"),
        (lambda: hopfield_update(drawn(3, 4), drawn(5, 4), 1.0, steps=-1), ValueError, "steps must not be negative"),
        (lambda: association_regimes(drawn(3, 4)), ShapeError, r"\(B, heads, S, N\), got \(3, 4\)"),
        (lambda: association_regimes(drawn(1, 1, 3, 4), threshold=1.0), ValueError, "between 0 and 1"),
    ],
)
def test_refusals(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
