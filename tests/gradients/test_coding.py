"""Codes and schemes by themselves: the sum is exact for every pattern that a scheme bears, never wrong for others."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import LaminaError
from lamina.gradients.coding import (
    Arbitrary,
    Bursty,
    CodingMatrix,
    GradientCodingScheme,
    Item,
    Ledger,
    MultiplexedScheme,
    NotDecodable,
    PerRound,
    SelectiveRepetitionScheme,
    UncodedScheme,
    conforms,
    least_load,
)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def off(found, expected):
    """How far a sum is from the exact one, relative to the length of what is summed."""
    exact = expected.double().sum(0)
    return float((found.double() - exact).norm() / expected.double().norm())


@pytest.mark.parametrize(("n", "s", "kind"), [(5, 2, "cyclic"), (6, 2, "repetition"), (7, 6, "cyclic"), (4, 0, "auto")])
def test_any_n_minus_s_messages_give_the_exact_sum_and_fewer_raise(n, s, kind):
    code = CodingMatrix(n, s, kind)
    gradients = numbers(n, 7)
    sent = {w: code.encode(w, gradients[held]) for w, held in enumerate(code.assignment())}
    assert all(len(held) == s + 1 for held in code.assignment())
    for count in range(s + 1):
        for late in itertools.combinations(range(n), count):
            found = code.decode({w: m for w, m in sent.items() if w not in late})
            assert off(found, gradients) < 1e-5
    for late in itertools.combinations(range(n), s + 1):
        left = {w: m for w, m in sent.items() if w not in late}
        if code.decodes(left):
            assert off(code.decode(left), gradients) < 1e-5  # a whole group is not among them
        else:
            with pytest.raises(NotDecodable, match="needs"):
                code.decode(left)


def test_the_cyclic_matrix_is_as_published_and_the_weights_are_the_least_squares_ones():
    code = CodingMatrix(7, 3, "cyclic")
    for i, row in enumerate(code.matrix):
        assert row[i] == 1
        assert set(np.flatnonzero(row)) <= {(i + k) % 7 for k in range(4)}
    assert np.linalg.matrix_rank(code.matrix, tol=1e-8) == 4
    for late in ([0, 1, 2], [1, 4, 6], [5], []):
        kept = [w for w in range(7) if w not in late]
        least, *_ = np.linalg.lstsq(code.matrix[kept].T, np.ones(7), rcond=None)
        np.testing.assert_allclose(code.weights(kept)[kept], least, atol=1e-9)
        np.testing.assert_allclose(code.weights(kept) @ code.matrix, 1, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 63])
def test_odd_sizes_and_other_dtypes(size, dtype):
    code = CodingMatrix(7, 2, "cyclic")
    gradients = numbers(7, size, seed=size, dtype=dtype)
    sent = {w: code.encode(w, gradients[held].float()) for w, held in enumerate(code.assignment()) if w not in (2, 3)}
    assert off(code.decode(sent), gradients) < 1e-5


def test_a_code_for_many_workers_sends_float64_where_float32_would_not_do():
    code = CodingMatrix(40, 6, "cyclic")
    gradients = numbers(40, 20)
    assert code.exact
    sent = {w: code.encode(w, gradients[held]) for w, held in enumerate(code.assignment()) if w % 7}
    assert all(m.dtype == torch.float64 for m in sent.values())
    assert off(code.decode(sent), gradients) < 1e-9
    assert not CodingMatrix(40, 3).exact  # repetition


def play(scheme, pattern, jobs, seed=0):
    """Send what the plan says, lose what the pattern says, and hold every decoded job against the exact sum."""
    gradients = numbers(jobs, len(scheme.sizes), 3, seed=seed)
    progress, ledger, last = scheme.start(jobs), Ledger(scheme), {}
    for round in range(jobs + scheme.delay):
        late = set(pattern[round]) if round < len(pattern) else set()
        for worker, items in progress.plan().items():
            for item in items if worker not in late else ():
                message = scheme.encode(worker, item, gradients[item.job][scheme.chunks(worker, item)])
                ledger.add(worker, item, message)
                if ledger.decodable(item.job):
                    last.setdefault(item.job, round - item.job)
        job = progress.due
        progress.record(late)
        if job is not None:
            assert off(ledger.decode(job), gradients[job]) < 1e-5
    return last


def cover(scheme, model, rounds):
    """Walk through every pattern of a model over some rounds, and hold every job to its deadline.

    Histories that leave the same behind are walked on from once; what is compared are messages by name, each once: by
    the tests of the matrix the sum is exact where they suffice. Returns how many patterns there are, how many states
    they lead through, and the latest round, counted from a job's first, in which its last needed message came.
    """
    sets = [frozenset(c) for k in range(scheme.n + 1) for c in itertools.combinations(range(scheme.n), k)]
    start = scheme.start(rounds)
    states = {((), frozenset(), ""): (1, start)}
    seen, slowest = 0, 0
    for round in range(rounds + scheme.delay):
        following = {}
        for (recent, arrived, _), (count, progress) in states.items():
            for late in sets if round < rounds else [frozenset()]:
                if not conforms([*recent, late], model):
                    continue
                now = set(arrived)
                for worker, items in progress.plan().items():
                    for item in items if worker not in late else ():
                        assert (worker, item) not in now
                        now.add((worker, item))
                job = round - scheme.delay
                if job >= 0:
                    assert whole(scheme, now, job)
                    slowest = max(slowest, 0 if whole(scheme, arrived, job) else scheme.delay)
                after = copy.copy(progress)
                after.__dict__ = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(progress).items()}
                after.record(late)
                kept = frozenset((w, i) for w, i in now if i.job > job)
                window = (*recent, late)[1 - model.window :] if model.window > 1 else ()
                key = window, kept, str(after.state_dict())
                following[key] = (following.get(key, (0, None))[0] + count, after)
        seen += len(following)
        states = following
    return sum(count for count, _ in states.values()), seen, slowest


def whole(scheme, arrived, job):
    """Say whether the messages that came suffice for a job, by the definition."""
    wanted, groups = scheme.parts()
    mine = [(w, i) for w, i in arrived if i.job == job]
    own = {(w, i.part) for w, i in mine if i.kind == "D1"}
    return own >= wanted and all(
        scheme.code.decodes({w for w, i in mine if i.kind != "D1" and i.part == g}) for g in range(groups)
    )


SMALL = [
    (GradientCodingScheme(5, 2), PerRound(2)),
    (SelectiveRepetitionScheme(4, 1, 2, 2), Bursty(1, 2, 2)),
    (SelectiveRepetitionScheme(4, 1, 2, 2, "cyclic"), Bursty(1, 2, 2)),
    (SelectiveRepetitionScheme(4, 2, 3, 2, "cyclic"), Bursty(2, 3, 2)),
    (MultiplexedScheme(4, 1, 2, 2), Bursty(1, 2, 2)),
    (MultiplexedScheme(4, 2, 3, 2), Bursty(2, 3, 2)),
    (MultiplexedScheme(4, 1, 2, 4), Bursty(1, 2, 4)),
]


@pytest.mark.parametrize(("scheme", "model"), SMALL)
def test_every_pattern_of_the_model_over_eight_rounds_is_decoded_in_time(scheme, model):
    count, _, slowest = cover(scheme, model, 8)
    assert count > 10_000
    assert slowest == scheme.delay  # some pattern needs the whole of it


def test_few_stragglers_a_round_are_borne_as_well_and_the_second_model_of_m():
    cyclic = SelectiveRepetitionScheme(4, 1, 2, 2, "cyclic")
    assert cover(cyclic, cyclic.model, 6)[0] > cover(cyclic, Bursty(1, 2, 2), 6)[0]
    assert cover(MultiplexedScheme(4, 1, 2, 2), Arbitrary(1, 2, 2), 6)[0] > 1000
    assert cover(MultiplexedScheme(4, 2, 3, 1), Arbitrary(2, 4, 1), 6)[0] > 50


@st.composite
def schemes(draw):
    n = draw(st.integers(2, 9))
    kind = draw(st.sampled_from(["auto", "cyclic"]))
    which = draw(st.sampled_from(["gc", "sr", "m"]))
    if which == "gc":
        return GradientCodingScheme(n, draw(st.integers(0, n - 1)), kind)
    B, lam = draw(st.integers(1, 3)), draw(st.integers(0, n))
    if which == "m":
        return MultiplexedScheme(n, B, B + draw(st.integers(1, 2)), lam, kind)
    W = draw(st.integers(1, 3)) * B + 1
    return SelectiveRepetitionScheme(n, B, W, min(lam, (n - 1) * (W - 1 + B) // B), kind)


@settings(deadline=None, max_examples=40)
@given(schemes(), st.integers(0, 10**6))
def test_whatever_the_waiting_rule_lets_pass_is_decoded_exactly(scheme, seed):
    draw, jobs = np.random.default_rng(seed), 8
    progress, pattern = scheme.start(jobs), []
    while not progress.over:
        late = set(draw.permutation(scheme.n)[: draw.integers(0, scheme.n + 1)].tolist())
        while not progress.tolerates(late):
            late.pop()
        pattern.append(late)
        progress.record(late)
    play(scheme, pattern, jobs, seed)


@settings(deadline=None, max_examples=40)
@given(schemes(), st.integers(0, 10**6))
def test_the_rule_lets_every_history_of_the_burst_model_pass(scheme, seed):
    draw = np.random.default_rng(seed)
    model = scheme.model if isinstance(scheme, GradientCodingScheme) else Bursty(scheme.B, scheme.W, scheme.lam)
    progress, history = scheme.start(), []
    for _ in range(12):
        late = set(draw.permutation(scheme.n)[: draw.integers(0, scheme.n + 1)].tolist())
        while not conforms([*history, late], model):
            late.pop()
        assert progress.tolerates(late)
        progress.record(late)
        history.append(late)


def test_a_plan_is_the_same_from_the_history_and_from_a_state_that_came_back():
    scheme = MultiplexedScheme(5, 2, 3, 3)
    history = [{0}, {0, 1}, set(), {2}, set()]
    progress = scheme.start()
    for late in history:
        progress.record(late)
    other = scheme.start()
    other.load_state_dict(progress.state_dict())
    assert other.plan() == progress.plan() == scheme.plan(history, 5)
    assert scheme.plan([], 0) == {w: [Item(0, "D1", 0)] for w in range(5)}
    lost = scheme.plan([{0}], 2)[0]  # its first chunk of job 0 goes again, in place of a coded one
    assert lost == [Item(2, "D1", 0), Item(1, "D1", 1), Item(0, "D1", 0)]
    assert scheme.plan([{0}], 2)[1][-1] == Item(0, "D2", 0)


@pytest.mark.parametrize("scheme", [SelectiveRepetitionScheme(6, 2, 3, 4), MultiplexedScheme(6, 2, 3, 4)])
def test_no_rounds_beyond_the_last_job_but_what_is_still_needed(scheme):
    progress = scheme.start(3)
    for _ in range(3):
        progress.record(())
    rest = [item for items in progress.plan().values() for item in items]
    assert all(item.job < 3 for item in rest)
    assert bool(rest) == isinstance(scheme, MultiplexedScheme)
    assert not progress.over
    for _ in range(scheme.delay):
        progress.record(())
    assert progress.over


def test_a_pattern_outside_the_model_is_never_a_wrong_gradient():
    for scheme, pattern in (
        (GradientCodingScheme(5, 2), [{0, 1, 2}]),
        (SelectiveRepetitionScheme(4, 1, 2, 2, "cyclic"), [{0, 1}, {0, 1}]),
        (MultiplexedScheme(4, 1, 2, 2), [{0}, {0}]),
        (MultiplexedScheme(4, 2, 3, 2), [{0}, set(), {1, 2}, set()]),
    ):
        assert not conforms(pattern, scheme.model)
        progress = scheme.start()
        for late in pattern[:-1]:
            progress.record(late)
        assert scheme.delay == 3 or not progress.tolerates(pattern[-1])
        if scheme.delay < 3:
            with pytest.raises(NotDecodable, match="job 0"):
                play(scheme, pattern, 4)


def test_a_message_counts_once():
    ledger = Ledger(MultiplexedScheme(3, 1, 2, 1))
    for item in (Item(0, "D1", 0), Item(0, "D2", 0)):
        ledger.add(1, item, torch.ones(2))
        with pytest.raises(LaminaError, match=r"worker 1 sent D\d 0 of job 0 twice"):
            ledger.add(1, item, torch.ones(2))
    with pytest.raises(NotDecodable, match=r"job 0 lacks own chunks .*\(0, 0\), \(2, 0\)"):
        ledger.decode(0)
    again = Ledger(ledger.scheme)
    again.load_state_dict(ledger.state_dict())
    assert str(again.state_dict()) == str(ledger.state_dict())


def test_loads_are_the_published_ones():
    for scheme, load in (
        (MultiplexedScheme(256, 1, 2, 27), 0.0075431),
        (MultiplexedScheme(256, 1, 2, 52), 0.0076678),
        (SelectiveRepetitionScheme(256, 2, 3, 23), 0.0507812),
        (GradientCodingScheme(256, 15), 0.0625),
        (UncodedScheme(256), 1 / 256),
    ):
        assert scheme.load == pytest.approx(load, abs=6e-8)
        assert sum(scheme.sizes) == pytest.approx(1)
    assert SelectiveRepetitionScheme(20, 3, 4, 7).s == 4  # B = W - 1: half of lam, rounded up
    assert MultiplexedScheme(8, 1, 2, 0).load == pytest.approx(1 / 8)
    assert SelectiveRepetitionScheme(8, 1, 2, 0).load == 1 / 8


@pytest.mark.parametrize(
    "scheme", [MultiplexedScheme(4, 2, 3, 2), MultiplexedScheme(4, 1, 3, 4), GradientCodingScheme(4, 2)]
)
def test_what_a_worker_computes_a_round_is_the_load(scheme):
    sizes = scheme.sizes
    for late in ([], [{0}] * 6):
        plan = scheme.plan(late, 6)
        for worker, items in plan.items():
            share = sum(sizes[c] for item in items for c in scheme.chunks(worker, item))
            idle = 0 if getattr(scheme, "groups", 1) else scheme.B * sizes[0]
            assert scheme.load - idle - 1e-12 <= share <= scheme.load + 1e-12


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4096), st.integers(1, 5), st.integers(1, 20), st.data())
def test_the_load_of_m_meets_the_lower_bound_at_its_ends_and_falls_to_one_nth(n, B, more, data):
    W, lam = B + more, data.draw(st.integers(0, n))
    load, least = MultiplexedScheme(n, B, W, lam).load, least_load(n, B, W, lam)
    assert load >= least * (1 - 1e-12)
    for end in (n - 1, n):
        assert MultiplexedScheme(n, B, W, end).load == pytest.approx(least_load(n, B, W, end))
    assert MultiplexedScheme(n, B, 100_000, n - 1).load * n == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CodingMatrix(4, 4), "s must be in 0..n-1, got s=4, n=4"),
        (lambda: CodingMatrix(5, 2, "repetition"), r"s \+ 1 = 3 and n = 5"),
        (lambda: CodingMatrix(5, 2, "Cyclic"), "kind must be"),
        (lambda: GradientCodingScheme(4, 4), "s=4 takes at least 5 workers, got 4"),
        (lambda: MultiplexedScheme(4, 2, 2, 1), "B must be in 1..W-1, got B=2 and W=2"),
        (lambda: MultiplexedScheme(4, 1, 2, 5), "lam=5 takes at least 5 workers, got 4"),
        (lambda: MultiplexedScheme(4, 1, 2, -1), "lam must be at least 0, got -1"),
        (lambda: SelectiveRepetitionScheme(4, 2, 4, 1), "divides W - 1, got B=2 and W=4"),
        (lambda: UncodedScheme(0), "at least 1 worker, got n=0"),
        (lambda: Bursty(3, 2, 1), "B=3, W=2, lam=1"),
    ],
)
def test_bad_parameters_are_refused(make, words):
    with pytest.raises(LaminaError, match=words):
        make()


def test_the_models_of_stragglers_by_hand():
    assert conforms([{0}, {1}, {0}], Bursty(1, 2, 2))
    assert not conforms([{0}, {0}], Bursty(1, 2, 2))
    assert conforms([{0}, {0}, set(), set(), set(), {0}], Bursty(2, 4, 1))
    assert not conforms([{0}, {0}, set(), {0}], Bursty(2, 4, 1))
    assert not conforms([{0}, {1}, {2}], Bursty(1, 3, 2))
    assert conforms([{0}, set(), {0}], Arbitrary(2, 3, 1))
    assert not conforms([{0}, set(), {0}], Arbitrary(1, 3, 1))
    assert conforms([{0, 1}, {2, 3}], PerRound(2))
    assert not conforms([{0, 1}, {1, 2, 3}], PerRound(2))
    model = SelectiveRepetitionScheme(6, 1, 2, 4).model
    assert conforms([{0, 1}, {0, 1}], model)  # not bursty, but few
    assert not conforms([{0, 1, 2}, {0}], model)
