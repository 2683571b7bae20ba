import math
import os
import signal
import time
import warnings
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from tests.gradients.workers import run
from tests.processes import server
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lamina.errors import LaminaError, PlanError, ShapeError
from lamina.gradients import (
    Bulyan,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MeaMed,
    Median,
    Phocas,
    TrimmedMean,
    attach,
    lost_worker,
)
from lamina.gradients.robust import exchange
from lamina.gradients.robust.columns import comparators, nearest_mean, sort_rows

EXAMPLES = [
    Example("reducer", "median"),
    Example("reducer", "geometric_median", bad={"smoothing": 0.0}),
    Example("reducer", "trimmed_mean", options={"f": 1}, workers=3, bad={"f": -1}),
    Example("reducer", "mea_med", options={"f": 1}, workers=3, bad={"f": -1}),
    Example("reducer", "phocas", options={"f": 1}, workers=3, bad={"f": -1}),
    Example("reducer", "krum", options={"f": 1}, workers=5, bad={"select": 0}),
    Example("reducer", "bulyan", options={"f": 1}, workers=7, bad={"compat": "aggregathor"}),
]

RULES = {
    "median": lambda f: Median(),
    "trimmed": TrimmedMean,
    "mea_med": MeaMed,
    "phocas": Phocas,
    "krum": Krum,
    "multi-krum": lambda f: Krum(f, "multi"),
    "bulyan": Bulyan,
    "geometric": lambda f: GeometricMedian(),
    "flag": lambda f: FlagAggregator(),
    "krum-garfield": lambda f: Krum(f, compat="garfield"),
    "bulyan-garfield": lambda f: Bulyan(f, compat="garfield"),
}


def numbers(*values):
    return torch.tensor(values)[:, None]


def nearest(values, centre, count):
    return np.mean(sorted(np.sort(values), key=lambda v: abs(v - centre))[:count])


def krum_scores(g, f, left=None, square=True, count=None):
    left = list(range(len(g))) if left is None else left
    scores = []
    for i in left:
        d = sorted(np.linalg.norm(g[i] - g[j]) ** (2 if square else 1) for j in left if j != i)
        scores.append(sum(d[: count or max(1, len(left) - f - 2)]))
    return scores


def naive(name, g, f):
    """The definitions, in numpy, one coordinate or one pair at a time."""
    p = len(g)
    columns = g.T
    if name == "median":
        return np.median(g, 0)
    if name == "trimmed":
        return np.sort(g, 0)[f : p - f].mean(0)
    if name == "mea_med":
        return np.array([nearest(c, np.median(c), p - f) for c in columns])
    if name == "phocas":
        return np.array([nearest(c, np.sort(c)[f : p - f].mean(), p - f) for c in columns])
    if name == "krum":
        return g[np.argmin(krum_scores(g, f))]
    if name == "multi-krum":
        return g[np.argsort(krum_scores(g, f))[: p - f - 2]].mean(0)
    if name == "krum-garfield":
        return g[np.argmin(krum_scores(g, f, square=False, count=p - f - 1))]
    if name == "bulyan":
        left = list(range(p))
        picked = [left.pop(int(np.argmin(krum_scores(g, f, left)))) for _ in range(p - 2 * f)]
        return np.array([nearest(c, np.median(c), p - 4 * f) for c in g[picked].T])
    if name == "bulyan-garfield":
        order = np.argsort(krum_scores(g, f, square=False, count=p - f - 2))
        picked = np.stack([g[order[i : p - f - 2]].mean(0) for i in range(p - 2 * f - 2)])
        q = len(picked)
        return np.array([nearest(c, np.sort(c)[(q - 1) // 2], q - 2 * f) for c in picked.T])
    raise AssertionError(name)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33])
def test_the_network_sorts_whatever_it_is_given(count):
    # A network sorts everything if it sorts all zeros and ones; for many entries, some of them.
    generator = torch.Generator().manual_seed(count)
    bits = torch.randint(2, (count, 4000), generator=generator).float()
    if count <= 7:
        bits = torch.tensor([[i >> k & 1 for i in range(1 << count)] for k in range(count)]).float()
    assert torch.equal(torch.stack(sort_rows(bits.clone())), bits.sort(0).values)
    assert all(i < j < count for i, j in comparators(count))


def test_hand_cases():
    values = numbers(1.0, 2.0, 3.0, 4.0, 100.0)
    assert Median().aggregate(values).item() == 3
    assert TrimmedMean(1).aggregate(values).item() == 3
    assert MeaMed(1).aggregate(values).item() == 2.5
    assert Phocas(1).aggregate(values).item() == 2.5
    # 0 and 2 are as near to the median: the lower counts.
    assert MeaMed(1).aggregate(numbers(2.0, 0.0, 1.0)).item() == 0.5
    # 2 and 3 are as near to their two nearest: the lower rank is picked.
    assert Krum(1).aggregate(values).item() == 2
    assert Krum(1).aggregate(values.flip(0)).item() == 3
    assert Krum(1, "multi").aggregate(values).item() == 2.5
    assert GeometricMedian().aggregate(values).item() == pytest.approx(3, abs=1e-3)
    assert Bulyan(1).aggregate(numbers(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0)).item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 63])
@pytest.mark.parametrize("name", [n for n in RULES if n not in ("geometric", "flag")])
def test_a_rule_is_its_definition(name, n, dtype):
    f, workers = 2, 11
    g = torch.randn(workers, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    g[3] *= 50
    found = RULES[name](f).aggregate(g)
    assert found.dtype == dtype
    expected = torch.from_numpy(naive(name, g.double().numpy(), f))
    torch.testing.assert_close(
        found.double(),
        expected,
        **({"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}),
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_the_nearest_are_found_for_any_share(count, keep, seed):
    keep = min(keep, count)
    values = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centre = torch.zeros(5, dtype=torch.float64)
    found = nearest_mean(sort_rows(values.clone()), centre, keep)
    np.testing.assert_allclose(found, [nearest(c, 0.0, keep) for c in values.T.numpy()])


def test_the_geometric_median_has_the_least_sum_of_distances_and_shrugs_off_a_huge_gradient():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    for huge in (1.0, 1e15):
        g[0] = huge * torch.ones(5, dtype=torch.float64)
        found = GeometricMedian(1000, smoothing=1e-12).aggregate(g)
        # The sum of unit vectors towards the workers is zero there.
        towards = g - found
        assert (towards / towards.norm(dim=1, keepdim=True)).sum(0).norm() < 1e-4
    assert GeometricMedian().aggregate(g.float()).norm() < 5


@pytest.mark.parametrize("name", RULES)
def test_equal_workers_give_their_gradient(name):
    g = torch.randn(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(RULES[name](1).aggregate(g.expand(11, -1)), g)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30, -1e30])
def test_a_faulty_minority_does_not_carry_a_rule_away(name, poison):
    generator = torch.Generator().manual_seed(0)
    honest = 1 + 0.1 * torch.randn(9, 20, generator=generator)
    rows = torch.cat([honest[:4], torch.full((2, 20), poison), honest[4:]])
    rows[4, 1:] = 1.0
    rule = RULES[name](2)
    found = rule.aggregate(rows)
    assert (found - 1).abs().max() < (0.5 if name != "flag" else 1.1)
    if not math.isfinite(poison):
        assert rule.failed == (4, 5)
        # The two were among those it may lose, so it goes on as if there had been no faulty ones but them.
        torch.testing.assert_close(found, RULES[name](0).aggregate(honest))
    if rule.weights is not None and name not in ("flag", "geometric"):
        assert rule.weights[5] == 0 or name == "bulyan-garfield"


@pytest.mark.parametrize(
    ("rule", "needed", "words"),
    [
        (TrimmedMean(2), 5, r"TrimmedMean with f = 2 needs at least 2 f \+ 1 = 5 workers, got 4"),
        (MeaMed(2), 5, r"MeaMed with f = 2 needs at least 2 f \+ 1 = 5 workers, got 4"),
        (Phocas(2), 5, r"Phocas with f = 2 needs at least 2 f \+ 1 = 5 workers, got 4"),
        (Krum(2), 7, r"Krum with f = 2 needs at least 2 f \+ 3 = 7 workers, got 6"),
        (Bulyan(2), 11, r"Bulyan with f = 2 needs at least 4 f \+ 3 = 11 workers, got 10"),
        (Median(), 2, "Median needs at least 2 workers, got 1"),
        (GeometricMedian(), 2, "GeometricMedian needs at least 2 workers, got 1"),
        (Krum(1, 3), 6, "Krum can select up to workers - f - 2 = 2, got select = 3"),
    ],
)
def test_too_few_workers_are_refused(rule, needed, words):
    rule.aggregate(torch.randn(needed, 3))
    with pytest.raises(LaminaError, match=words):
        rule.aggregate(torch.randn(needed - 1, 3))


def test_too_few_that_are_left_are_refused():
    rows = torch.randn(5, 3)
    rows[:3] = math.nan
    with pytest.raises(
        LaminaError, match="Krum with f = 1 has 2 of 5 workers left, and needs 3 beside the 3 that failed"
    ):
        Krum(1).aggregate(rows)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Krum(-1), "f, the number of workers that may be faulty, must be a whole number >= 0, got -1"),
        (lambda: Bulyan(1.5), "must be a whole number >= 0, got 1.5"),
        (lambda: Krum(1, "best"), "select must be a whole number >= 1 or 'multi', got 'best'"),
        (lambda: Krum(1, compat="reference"), "compat must be None or 'garfield', got 'reference'"),
        (lambda: GeometricMedian(0), "iters must be a whole number >= 1, got 0"),
        (lambda: GeometricMedian(smoothing=0.0), "smoothing must be above 0, got 0.0"),
    ],
)
def test_an_option_out_of_its_range_is_refused(make, words):
    with pytest.raises(LaminaError, match=words):
        make()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n", [3, 40])
def test_slices_give_what_whole_gradients_would(name, n):
    world = 7
    sent = torch.randn(world, n, generator=torch.Generator().manual_seed(n))
    alone = RULES[name](1)
    expected = alone.aggregate(sent)

    def work(rank):
        rule = RULES[name](1)
        mine = {"b": sent[rank, 2:], "a": sent[rank, :2]}
        # The order of names is each worker's own.
        mine = mine if rank % 2 else dict(reversed(mine.items()))
        reduced = rule.reduce(mine, None)
        assert list(reduced) == list(mine)
        return reduced, rule.weights

    for reduced, weights in run(world, work):
        torch.testing.assert_close(
            torch.cat([reduced["a"], reduced["b"]]), torch.cat([expected[:2], expected[2:]]), rtol=1e-4, atol=1e-5
        )
        assert weights is None or torch.allclose(weights, alone.weights, atol=1e-6)


def test_a_worker_with_other_shapes_or_nothing_is_named_on_all():
    def work(rank):
        told = []
        for gradients in (
            {"w": torch.ones(3 if rank != 2 else 4)},
            {"w": torch.ones(3)} if rank != 1 else {},
            {"w": torch.ones(3).to(torch.bfloat16 if rank == 0 else torch.float32)},
        ):
            with pytest.raises(LaminaError) as caught:
                Median().reduce(gradients, None)
            told.append(str(caught.value))
            assert isinstance(caught.value, ShapeError) == ("other" in told[-1])
        return told

    for other, nothing, dtype in run(3, work):
        assert other.startswith("worker 2 sent gradients of other names, shapes or types than most")
        assert "numbers a worker: [3, 3, 4]" in other
        assert nothing.startswith("worker 1 sent no gradient")
        assert dtype.startswith("worker 0 sent gradients of other names")


def test_sparse_gradients_are_refused():
    sparse = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)

    def work(rank):
        with pytest.raises(PlanError, match="Krum takes dense gradients, but that of 'w' is sparse"):
            Krum(0).reduce({"w": sparse}, None)

    run(2, work)


def _join(rank, world, file, seconds):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timeout)


def _train(rank, world, file, queue):
    """Train a little over real processes, one of which sends garbage, under DDP and in a plain loop."""
    _join(rank, world, file, 60)
    results = []
    for rule, wrap in (
        (FlagAggregator(), True),
        (FlagAggregator(per_layer=True), False),
        (Median(), True),
        (Krum(0), True),
    ):
        torch.manual_seed(0)
        model = nn.Linear(5, 1)
        true = torch.randn(5, 1)
        wrapped = DistributedDataParallel(model) if wrap else model
        handle = attach(wrapped, rule)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(60):
            x = torch.randn(16, 5, generator=generator)
            model.zero_grad()
            loss = (wrapped(x) - x @ true).square().mean() * (-10 if rank == world - 1 else 1)
            loss.backward()
            handle.reduce()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        results.append((float((model.weight.detach().T - true).abs().max()), [p.tolist() for p in model.parameters()]))
    queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


def _die(rank, world, file, queue):
    """Worker 2 is killed while it packs its gradient, after the roll call: in the middle of a step."""
    _join(rank, world, file, 30)
    lost_worker.PATIENCE = 3.0
    rule, gradients = FlagAggregator(), {"w": torch.randn(1000)}
    rule.reduce(gradients, None)
    if rank == 2:
        exchange.Exchange.slices = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        rule.reduce(gradients, None)
    except LaminaError as error:
        queue.put((str(error), time.monotonic() - begun))


def spawn(work, world, file):
    context = server()
    queue = context.Queue()
    workers = [context.Process(target=work, args=(r, world, file, queue)) for r in range(world)]
    for worker in workers:
        worker.start()
    return queue, workers


def end(workers):
    for worker in workers:
        worker.join(20)
        if worker.is_alive():
            worker.kill()


@pytest.mark.distributed
@pytest.mark.slow
def test_four_workers_learn_although_one_sends_garbage(tmp_path):
    queue, workers = spawn(_train, 4, tmp_path / "store")
    try:
        results = [queue.get(timeout=120) for _ in workers]
    finally:
        end(workers)
    for each in results:
        for (far, weights), (_, others) in zip(each, results[0], strict=True):
            assert far < 0.05
            assert weights == others


@pytest.mark.distributed
@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_step_is_named_and_nobody_hangs(tmp_path):
    queue, workers = spawn(_die, 4, tmp_path / "store")
    try:
        told = [queue.get(timeout=120) for _ in range(3)]
    finally:
        end(workers)
    for sentence, seconds in told:
        assert seconds < 20, "it waited for the group's timeout"
        assert sentence.startswith("worker 2 ended, or did not answer")
        assert "nothing was combined: start again from the last checkpoint" in sentence
