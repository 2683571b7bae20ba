import math

import numpy as np
import pytest

from lamina.errors import LaminaError
from lamina.gradients import ArrivalModel, select_parameters, simulate
from lamina.gradients.coding import (
    GradientCodingScheme,
    Ledger,
    MultiplexedScheme,
    NotDecodable,
    SelectiveRepetitionScheme,
    UncodedScheme,
)
from lamina.gradients.stragglers import fit_alpha


def by_hand(scheme, times, mu, alpha, jobs):
    """The definition, round by round, with the schemes' own bookkeeping: (seconds of every round, waits)."""
    progress, rounds, waits = scheme.start(jobs), [], 0
    for r in range(jobs + scheme.delay):
        now = times[:, r] + alpha * scheme.load
        plan = progress.plan()
        if not any(plan.values()):
            rounds.append(0.0)
            progress.record(())
            continue
        limit = (1 + mu) * now.min()
        late = set(np.flatnonzero(now > limit).tolist())
        if progress.tolerates(late):
            rounds.append(min(limit, now.max()))
        else:
            rounds.append(now.max())
            waits += 1
            late = set()
        progress.record(late)
    return rounds, waits


@pytest.mark.parametrize("seed", range(12))
def test_many_settings_side_by_side_are_the_definition(seed):
    draw = np.random.default_rng(seed)
    n, B, x = int(draw.integers(4, 9)), int(draw.integers(1, 4)), int(draw.integers(1, 4))
    lam = int(draw.integers(1, n))
    times = ArrivalModel(enter=0.2, leave=0.6).draw(n, 40, seed)
    for scheme in (
        GradientCodingScheme(n, min(lam, n - 1)),
        SelectiveRepetitionScheme(n, B, x * B + 1, lam, "cyclic"),
        MultiplexedScheme(n, B, B + x, lam),
        UncodedScheme(n),
    ):
        rounds, waits = by_hand(scheme, times, 1.0, 0.5, 30)
        found = simulate(scheme, times, 1.0, 0.5, 30)
        np.testing.assert_allclose(found.rounds, rounds)
        assert (found.waits, found.seconds) == (waits, pytest.approx(sum(rounds)))


def test_without_a_code_and_with_endless_patience_everyone_is_waited_for():
    times = ArrivalModel().draw(16, 30, 1)
    assert simulate(UncodedScheme(16), times, jobs=30).seconds == pytest.approx(times.max(0).sum())
    for scheme in (GradientCodingScheme(16, 3), MultiplexedScheme(16, 1, 2, 4), SelectiveRepetitionScheme(16, 2, 3, 4)):
        total = 20 + scheme.delay
        found = simulate(scheme, times, math.inf, 2.0, 20)
        busy = total if not isinstance(scheme, SelectiveRepetitionScheme) else 20  # nothing is left to repeat
        assert found.seconds == pytest.approx(times[:, :busy].max(0).sum() + busy * 2.0 * scheme.load)


def test_outside_its_model_a_scheme_waits():
    times = np.ones((4, 3))
    times[:3, 1] = 5.0
    found = simulate(GradientCodingScheme(4, 2), times, jobs=3)
    assert (found.waits, list(found.rounds)) == (1, [1, 5, 1])
    assert simulate(GradientCodingScheme(4, 3), times, jobs=3).seconds == 4.0  # 1 + twice the fastest + 1
    assert simulate(GradientCodingScheme(4, 3), times, jobs=3, compat="reference").seconds == 7.0
    ledger = Ledger(GradientCodingScheme(4, 2))
    with pytest.raises(NotDecodable):
        ledger.decode(0)


def test_256_workers_take_what_the_authors_simulated():
    """The 80-job row of the card's table, within 5 %, in its order; the generator is only near their profile."""
    schemes = {
        122.64: UncodedScheme(256),
        109.36: GradientCodingScheme(256, 15),
        105.92: SelectiveRepetitionScheme(256, 2, 3, 23),
        103.73: MultiplexedScheme(256, 1, 2, 27),
    }
    times = ArrivalModel().draw(256, 82, 2)
    found = [simulate(s, times, 1.0, 2.2013, 80).seconds for s in schemes.values()]
    np.testing.assert_allclose(found, list(schemes), rtol=0.05)
    assert found == sorted(found, reverse=True)


def test_the_generator_straggles_as_it_says():
    times = ArrivalModel().draw(256, 400, 0)
    late = times > 1.1
    assert late.mean() == pytest.approx(0.0217, rel=0.1)
    assert late.sum(0).max() < 20
    ends = late[:, :-1] & ~late[:, 1:]
    assert ends.sum() / late[:, :-1].sum() == pytest.approx(0.9, abs=0.03)
    assert times[~late].min() >= 0.55
    assert np.array_equal(times, ArrivalModel().draw(256, 400, 0))


def test_the_best_parameters_are_those_of_a_search_one_by_one():
    times = ArrivalModel(enter=0.1).draw(8, 24, 3)
    found = select_parameters(times, 1.0, max_delay=3, jobs=20, max_window=7)
    loads = {
        "uncoded": [UncodedScheme(8)],
        "gradient_coding": [GradientCodingScheme(8, s) for s in range(1, 8)],
        "multiplexed_coding": [
            MultiplexedScheme(8, B, W, lam)
            for B, W in ((1, 2), (1, 3), (2, 2 + 1))
            for lam in range(1, 9)
            if W + B <= 4
        ],
        "selective_repetition": [
            SelectiveRepetitionScheme(8, B, W, lam)
            for B in (1, 2, 3)
            for W in range(B + 1, 8, B)
            for lam in range(1, 9)
            if -(-B * lam // (W - 1 + B)) < 8
        ],
    }
    for name, schemes in loads.items():
        one_by_one = [simulate(s, times, 1.0, 1.0, 20).seconds for s in schemes]
        assert found[name].seconds == pytest.approx(min(one_by_one))
        assert found[name].tried == len(schemes)
        assert simulate(found[name].scheme, times, 1.0, 1.0, 20).seconds == pytest.approx(min(one_by_one))


def test_alpha_is_the_slope():
    assert fit_alpha([0, 0.25, 0.5, 0.75, 1], [1 + 2.2 * x for x in (0, 0.25, 0.5, 0.75, 1)]) == pytest.approx(2.2)


GOOD = np.ones((4, 10))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: simulate(MultiplexedScheme(4, 2, 3, 2), GOOD, jobs=8),
            "8 jobs take 11 rounds, but the delays have 10",
        ),
        (lambda: simulate(UncodedScheme(5), GOOD, jobs=8), "5 workers x rounds, got shape"),
        (lambda: simulate(UncodedScheme(4), GOOD * np.nan, jobs=8), "finite numbers of seconds above 0"),
        (lambda: simulate(UncodedScheme(4), GOOD, -1.0, jobs=8), "mu and alpha must be at least 0, got mu=-1.0"),
        (lambda: simulate(UncodedScheme(4), GOOD, jobs=0), "jobs must be at least 1"),
        (lambda: simulate(UncodedScheme(4), GOOD, alpha=9.0, jobs=8, base_load=1.0), "no time at this load"),
        (lambda: select_parameters(GOOD, 1.0, ["gradient_codes"]), "did you mean 'gradient_coding'"),
        (lambda: select_parameters(GOOD[0], 1.0), "a matrix"),
        (lambda: fit_alpha([1, 1], [2, 2]), "two loads or more, got 1 loads"),
        (lambda: ArrivalModel(enter=1.5), "enter must be within 0..1, got 1.5"),
        (lambda: ArrivalModel(spread=-1), "spread must be at least 0"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(LaminaError, match=words):
        call()
