import copy
import logging
import math

import pytest
import torch
from tests.contract.example import Example
from tests.gradients.workers import run
from torch import nn

from lamina.errors import LaminaError
from lamina.gradients import QSGD, LGreCo, Median, PowerSGD, TopK, attach
from lamina.recipe import build

EXAMPLES = [
    Example(
        "reducer",
        "l_greco",
        options={"base": {"name": "topk", "density": 0.2}, "period": 2, "start_step": 0, "window": 1},
        bad={"alpha": 0.0},
    )
]

FAMILIES = [lambda: QSGD(4, bucket=64), lambda: TopK(0.05), lambda: PowerSGD(2, min_compression_rate=1.0)]
NAMES = ["qsgd", "topk", "powersgd"]
SHAPES = {"a": (48, 32), "b": (64, 16), "c": (16, 8, 3, 3), "bias": (48,), "d": (7, 63)}
SHORT = {"period": 4, "start_step": 2, "window": 2}


def gradients(seed, scale=1.0):
    """Layers that differ in what compression loses: spectra that fall slowly or quickly, most of it in few entries."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        flat = torch.randn(shape[0], math.prod(shape[1:]), generator=g)
        decay = torch.logspace(0, -i, flat.shape[1])
        found[name] = (scale * 10.0 ** (i - 2) * flat * decay).view(shape)
    return found


def layers(given):
    return {n: g for n, g in given.items() if g.ndim > 1}


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_the_choice_is_no_larger_and_no_worse_than_the_uniform_setting(family):
    reducer = LGreCo(family())
    given = layers(gradients(0))
    chosen = reducer.choose(given)
    base = reducer.base
    sizes = {n: base.size(g.shape, chosen[n]) for n, g in given.items()}
    uniform = {n: base.size(g.shape, base.capped(g.shape, base.option)) for n, g in given.items()}
    errors = [float(base.errors(g, [chosen[n]])) for n, g in given.items()]
    limit = [float(base.errors(g, [base.capped(g.shape, base.option)])) for n, g in given.items()]
    report = reducer.report()
    assert report["bytes"] == sum(sizes.values()) <= report["uniform_bytes"] == sum(uniform.values())
    assert math.isclose(report["true_error"], sum(errors), rel_tol=1e-6)
    assert math.isclose(report["budget"], sum(limit), rel_tol=1e-6)
    assert report["true_error"] <= report["budget"]
    assert len(set(chosen.values())) > 1
    assert report["bytes"] < report["uniform_bytes"]


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
@pytest.mark.parametrize("norm", ["l2", "l2sq"])
def test_scaling_every_gradient_changes_nothing(family, norm):
    choices = [LGreCo(family(), norm=norm).choose(layers(gradients(0, scale))) for scale in (1.0, 2.0**-12, 2.0**8)]
    assert choices[0] == choices[1] == choices[2]


def test_the_norms_of_the_paper_and_their_squares_differ():
    one, other = (LGreCo(PowerSGD(4, min_compression_rate=1.0), norm=norm) for norm in ("l2", "l2sq"))
    given = {n: g / g.norm() for n, g in layers(gradients(1)).items()}
    assert one.choose(given) != other.choose(given)
    assert other.report()["true_error"] <= other.report()["budget"]


def test_much_room_takes_the_cheapest_and_too_little_the_best_and_says_so(caplog):
    given = layers(gradients(0))
    base = PowerSGD(4, min_compression_rate=1.0)
    assert LGreCo(base, alpha=1e6).choose(given) == {n: min(base.options(g.shape)) for n, g in given.items()}
    with caplog.at_level(logging.WARNING):
        strict = LGreCo(PowerSGD(4, min_compression_rate=1.0), alpha=1e-3)
        found = strict.choose(given)
    assert "asks for less error than any option has" in caplog.text
    best = {n: float(base.errors(g, base.options(g.shape)).min()) for n, g in given.items()}
    assert math.isclose(strict.report()["true_error"], sum(best.values()), rel_tol=1e-6)
    assert strict.report()["true_error"] > strict.report()["budget"]
    assert set(found) == set(given)


def test_identical_layers_cost_what_uniform_ones_do():
    x = gradients(0)["a"]
    reducer = LGreCo(PowerSGD(4, min_compression_rate=1.0), grid=[4, 8])
    assert set(reducer.choose(dict.fromkeys("pqrs", x)).values()) == {4}


def test_layers_that_have_one_option_alone_are_within_the_budget_to_the_last_bit():
    for seed in range(20):
        reducer = LGreCo(PowerSGD(4, min_compression_rate=1.0), grid=[4])
        assert set(reducer.choose({n: g / 3 for n, g in layers(gradients(seed)).items()}).values()) == {4}
        assert reducer.report()["true_error"] == reducer.report()["budget"]


def test_a_grid_of_one_s_own_is_capped_by_the_layer():
    reducer = LGreCo(PowerSGD(8, min_compression_rate=1.0), grid=[1, 8, 40])
    chosen = reducer.choose(layers(gradients(0)))
    assert chosen["d"] in (1, 7)
    assert {chosen[n] for n in "abc"} <= {1, 8, 16, 32}


def steps_of(rank, reducer, count, first=0):
    return [reducer.reduce(gradients(50 * rank + s), None) for s in range(first, first + count)]


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_workers_choose_alike_and_average_to_the_same_bits_across_choices(family):
    def work(rank):
        reducer = LGreCo(family(), **SHORT)
        found, knobs, sent = [], [], []
        for step in range(12):
            before = reducer.bytes_sent()
            found += steps_of(rank, reducer, 1, step)
            knobs.append(reducer.report()["options"])
            sent.append(reducer.bytes_sent() - before)
        return found, knobs, sent, reducer

    first, second = run(2, work)
    for a, b in zip(first[0], second[0], strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert first[1] == second[1]
    _, knobs, sent, reducer = first
    # Raw for two steps; then, with a window of two gradients, chosen at steps 2, 6 and 10.
    assert knobs[1] == {}
    assert set(knobs[2]) == set(layers(SHAPES_AS_TENSORS))
    assert reducer.report()["choices"] == 3
    assert sent[0] == 4 * sum(math.prod(s) for s in SHAPES.values())
    words = 8 * (2 + len(SHAPES))
    planned = sum(reducer.base.size(SHAPES[n], knobs[11][n]) for n in knobs[11])
    assert sent[11] == planned + 4 * 48 + 16
    assert sent[10] == planned + 4 * 48 + 16 + words, "the first worker broadcasts the knobs"
    assert second[2][10] == sent[11]
    assert planned < sum(reducer.base.size(SHAPES[n], reducer.base.option) for n in knobs[11])


SHAPES_AS_TENSORS = {n: torch.zeros(s) for n, s in SHAPES.items()}


def test_the_choice_is_made_from_the_first_worker_s_mean_over_the_window_with_error_feedback():
    def work(rank):
        reducer, corrected = LGreCo(TopK(0.05), period=3, start_step=0, window=2), []
        for step in range(6):
            g = gradients(50 * rank + step)
            corrected.append({n: reducer.base.corrected(n, x) for n, x in layers(g).items()})
            reducer.reduce(g, None)
            if step == 4:
                window = dict(reducer.memory["window"])
        # Chosen at steps 2 and 5, from steps 0, 1 and 3, 4.
        return reducer.report()["options"], corrected, window, reducer.memory["window"]

    (options, corrected, window, left), (others, _, none, _) = run(2, work)
    torch.testing.assert_close(window, {n: corrected[3][n] + g for n, g in corrected[4].items()})
    mean = {n: (corrected[3][n] + corrected[4][n]) / 2 for n in corrected[3]}
    assert options == others == LGreCo(TopK(0.05)).choose(mean)
    assert left == none == {}, "step 5 is in no window, and the first worker alone keeps one"


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_killed_and_resumed_equals_never_killed(family):
    def work(rank, stop=None):
        reducer, found = LGreCo(family(), **SHORT), []
        for step in range(9):
            if step == stop:
                state = copy.deepcopy(reducer.state_dict())
                reducer = LGreCo(family(), **SHORT)
                reducer.load_state_dict(state)
            found += steps_of(rank, reducer, 1, step)
        return found, reducer.report()["options"], reducer.bytes_sent()

    whole = run(2, work)
    # At, before and after a choice, and in the middle of a window.
    for stop in (2, 3, 5):
        for (a, *rest), (b, *again) in zip(whole, run(2, lambda r, s=stop: work(r, s)), strict=True):
            assert rest == again
            for x, y in zip(a, b, strict=True):
                assert all(torch.equal(x[n], y[n]) for n in x)


def test_buckets_that_are_cut_anew_and_layers_that_come_and_go():
    def work(rank):
        reducer = LGreCo(TopK(0.05), period=3, start_step=0, window=2)
        for step in range(12):
            g = gradients(50 * rank + step)
            if step >= 6:
                g["e"] = g.pop("a").T.contiguous()
            cut = list(g) if step == 0 else list(g)[::-1]
            for names in (cut,) if step == 0 else (cut[:2], cut[2:]):
                reducer.reduce({n: g[n] for n in names}, None)
        return reducer.report()

    first, second = run(2, work)
    assert first["options"] == second["options"]
    assert set(first["options"]) == {"b", "c", "d", "e"}
    assert first["choices"] == 4
    assert first["skipped"] == 0
    assert first["base"]["steps"] == 12


def test_what_is_no_number_does_not_enter_the_window_and_an_empty_window_is_counted():
    def work(rank):
        reducer = LGreCo(TopK(0.05, nonfinite="pass_on"), period=2, start_step=0, window=2)
        for step in range(5):
            g = gradients(50 * rank + step)
            if rank == 0 and step < 2:
                g["a"].fill_(math.inf)
            if rank == 0 and step in (2, 3):
                for x in g.values():
                    x.fill_(math.nan)
            reducer.reduce(g, None)
        return reducer.report()

    first, second = run(2, work)
    # At step 2 without `a`; at step 4 without anything: the old knobs stay.
    assert set(first["options"]) == set(second["options"]) == {"b", "c", "d"}
    assert (first["choices"], first["skipped"]) == (1, 1)
    assert first["base"]["passed_on"] == 4


def test_gradients_of_two_precisions_are_priced_as_they_are_sent():
    def work(rank):
        reducer = LGreCo(TopK(0.05), period=2, start_step=0, window=1)
        for step in range(3):
            g = gradients(50 * rank + step)
            g["a"] = g["a"].bfloat16()
            reducer.reduce(g, None)
        return reducer.report()

    report, _ = run(2, work)
    a = TopK().size(SHAPES["a"], 0.05, 2)
    assert report["uniform_bytes"] == a + sum(TopK().size(SHAPES[n], 0.05, 4) for n in "bcd")


def test_it_stands_in_a_recipe_and_in_a_plain_loop():
    reducer = build({"name": "l_greco", "base": {"name": "powersgd", "rank": 2}, "alpha": 1.5}, "reducer")
    assert (reducer.base.option, reducer.alpha) == (2, 1.5)

    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 20))

    def work(rank):
        model = copy.deepcopy(start)
        handle = attach(model, LGreCo(TopK(0.1), **SHORT))
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        losses = []
        for _ in range(14):
            x = torch.randn(16, 20, generator=torch.Generator().manual_seed(rank))
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            handle.reduce()
            optimizer.step()
            losses.append(float(loss.detach()))
        return [p.detach() for p in model.parameters()], losses

    (a, losses), (b, _) = run(2, work)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LGreCo(Median()), r"base must be a compressor \(qsgd, topk, powersgd\), got a Median"),
        (lambda: LGreCo(TopK(), alpha=0), "alpha must be above 0, got 0"),
        (lambda: LGreCo(TopK(), period=5), "period must be at least window, got 5 and 10"),
        (lambda: LGreCo(TopK(), window=0), "window must be a whole number of at least 1, got 0"),
        (lambda: LGreCo(TopK(), start_step=-1), "start_step must be a whole number of at least 0, got -1"),
        (lambda: LGreCo(TopK(), grid=[]), "grid must have at least one option, got an empty one"),
        (lambda: LGreCo(QSGD(), grid=[2, 3]), r"grid must have the compressor's own bits 4, got \[2, 3\]"),
        (lambda: LGreCo(QSGD(), grid=[4, 11]), "bits must be a whole number from 2 to 8, got 11"),
        (lambda: LGreCo(QSGD(), norm="l1"), "norm must be 'l2' or 'l2sq', got 'l1'"),
    ],
)
def test_bad_options_are_refused(make, sentence):
    with pytest.raises(LaminaError, match=sentence):
        make()
