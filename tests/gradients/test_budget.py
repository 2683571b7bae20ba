import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamina.errors import LaminaError, ShapeError
from lamina.gradients import solve_budget

layer = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=4)


def brute_force(errors, sizes, budget):
    best = None
    for choice in itertools.product(*[range(len(e)) for e in errors]):
        if sum(e[c] for e, c in zip(errors, choice, strict=True)) <= budget:
            size = sum(s[c] for s, c in zip(sizes, choice, strict=True))
            best = size if best is None else min(best, size)
    return best


def total(table, choice):
    return sum(row[c] for row, c in zip(table, choice, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(layer, min_size=1, max_size=6), st.integers(1, 40), st.randoms(use_true_random=False))
@example([[(0, 5), (2, 1)]], 1, None)
def test_it_equals_brute_force_where_errors_are_whole_buckets(layers, budget, random):
    errors = [[e for e, _ in options] for options in layers]
    sizes = [[s for _, s in options] for options in layers]
    default = [random.randrange(len(e)) for e in errors] if random else None
    chosen, true = solve_budget(errors, sizes, budget, budget, default=default)
    expected = brute_force(errors, sizes, budget)
    assert true == total(errors, chosen)
    if expected is None:
        assert true == sum(map(min, errors)), "nothing fits: the least error"
    else:
        assert total(sizes, chosen) == expected
        assert true <= budget


def realistic(layers, options, seed=0):
    """Errors fall and sizes rise along the options; layers differ by orders of magnitude."""
    g = np.random.default_rng(seed)
    scale = g.lognormal(0, 2, (layers, 1))
    errors = np.sort(g.random((layers, options)), axis=1)[:, ::-1] * scale
    return errors, np.sort(g.integers(1, 100_000, (layers, options)), axis=1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("buckets", [7, 100, 10_000])
def test_the_true_error_is_within_the_budget_and_the_size_at_most_the_default_s(seed, buckets):
    errors, sizes = realistic(30, 9, seed)
    default = [4] * 30
    budget = math.fsum(errors[:, 4])
    chosen, true = solve_budget(errors, sizes, budget, buckets, default=default)
    assert true <= budget
    assert total(sizes, chosen) <= total(sizes, default)
    if buckets == 10_000:
        assert total(sizes, chosen) < 0.9 * total(sizes, default)


def test_leaving_options_out_beforehand_changes_no_answer(monkeypatch):
    from lamina.gradients import budget as module

    def everything(steps, sizes, room):
        return np.isfinite(sizes)

    for seed in range(5):
        errors, sizes = realistic(12, 6, seed)
        limit = math.fsum(errors[:, 3]) / 2
        quick, _ = solve_budget(errors, sizes, limit, 500)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_worth_trying", everything)
            slow, _ = solve_budget(errors, sizes, limit, 500)
        assert total(sizes, quick) == total(sizes, slow)


def test_a_large_budget_takes_the_cheapest_and_identical_layers_match_the_uniform_choice():
    errors, sizes = realistic(10, 5)
    assert solve_budget(errors, sizes, 1e9)[0] == [0] * 10
    same, cost = [[8.0, 4.0, 2.0]] * 6, [[1, 2, 4]] * 6
    chosen, true = solve_budget(same, cost, 24.0, default=[1] * 6)
    assert (total(cost, chosen), true) == (12, 24.0)


def test_what_is_no_number_is_not_taken_and_layers_may_have_different_options():
    chosen, true = solve_budget([[math.nan, 1.0], [2.0], [math.inf, 0.5, 0.25]], [[1, 9], [5], [1, 3, 4]], 3.5, 7)
    assert (chosen, true) == ([1, 0, 1], 3.5)
    assert solve_budget([[0.0, 0.0]], [[7, 5]], 0.0) == ([1], 0.0)
    assert solve_budget([], [], 1.0) == ([], 0.0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (([[1.0]], [[1, 2]], 1.0), "same layers and options"),
        (([[math.nan]], [[1]], 1.0), "layer 0 has no option with a finite error"),
        (([[-1.0]], [[1]], 1.0), "errors must be at least 0, layer 0"),
        (([[1.0]], [[1]], -1.0), "budget must be at least 0, got -1"),
        (([[1.0]], [[1]], math.nan), "budget must be at least 0, got nan"),
    ],
)
def test_bad_tables_are_refused(given, sentence):
    with pytest.raises(LaminaError, match=sentence):
        solve_budget(*given)
    with pytest.raises(ShapeError, match="default must name one option of each of 1 layers"):
        solve_budget([[1.0]], [[1]], 1.0, default=[3])


def test_five_hundred_layers_take_a_fraction_of_a_second():
    errors, sizes = realistic(500, 16)
    begun = time.perf_counter()
    solve_budget(errors, sizes, math.fsum(errors[:, 8]), default=[8] * 500)
    # Tens of milliseconds; the benchmark has the figure.
    assert time.perf_counter() - begun < 2
