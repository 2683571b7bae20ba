"""The coded reducers among workers that are threads: real sleeps, real losses, exact sums."""

import copy
import logging
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.gradients.coded_workers import run
from torch import nn

from lamina.errors import LaminaError, MissingExtra, PlanError, ShapeError
from lamina.gradients import GradientCoding, MultiplexedCoding, SelectiveRepetition, attach
from lamina.gradients.coding import (
    GradientCodingScheme,
    LocalCrew,
    MultiplexedScheme,
    RayCrew,
    SelectiveRepetitionScheme,
    UncodedScheme,
    interleave,
    train_coded,
)
from lamina.gradients.coding.actors import _Actor
from lamina.gradients.coding.crew import Work, save_vector
from lamina.gradients.coding.tasks import chunk_gradient, row_ranges
from lamina.gradients.coding.waiting import Waiting
from lamina.models import Transformer
from lamina.objectives import NextToken
from lamina.parallel.data_parallel import Placement, place
from lamina.train.packing import pack, unpack

EXAMPLES = [
    Example("reducer", "gradient_coding", options={"s": 2}, workers=3, bad={"s": -1}),
    Example("reducer", "selective_repetition", options={"B": 1, "W": 2, "lam": 4}, workers=4, bad={"B": 0}),
    Example("reducer", "multiplexed_coding", options={"B": 1, "W": 2, "lam": 3}, workers=3, bad={"lam": -1}),
]

MAKE = {
    "gc": lambda **o: GradientCoding(1, **o),
    "sr": lambda **o: SelectiveRepetition(1, 2, 2, **o),
    "m": lambda **o: MultiplexedCoding(2, 3, 2, **o),
}


@pytest.fixture
def late(monkeypatch):
    """Set {(worker, round)}: these, and no others, are waited for no longer once everyone else is there."""
    chosen = set()

    def over(self, missing):
        if not missing or time.monotonic() > self._end:
            return real(self, missing)
        mine = {w for w, round in chosen if round == self.progress.round}
        return set(missing) <= mine and self.progress.tolerates(missing)

    real = Waiting.over
    monkeypatch.setattr(Waiting, "over", over)
    monkeypatch.setattr(Waiting, "left", lambda self: 0.005)
    return chosen


def sums(jobs, chunks):
    return torch.randn(jobs, chunks, 7, generator=torch.Generator().manual_seed(jobs))


def until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


def rounds(reducer, link, jobs, before=lambda round: None, begin=0, end=None):
    """Go through the rounds of one worker; hold what is decoded against the exact sum, and return who was late."""
    reducer.jobs, chunks, seen = jobs, reducer.chunks(link.workers), []
    gradients = sums(jobs, chunks)
    for round in range(begin, jobs + reducer.delay if end is None else end):
        tasks = reducer.tasks(round, link.rank, link.workers)
        before(round)
        rows = [gradients[divmod(t, chunks)] for t in tasks]
        stacked = torch.stack(rows) if rows else gradients.new_zeros(0, 7)
        found = reducer.reduce({"w": stacked, "b": stacked[:, 0]}, None)
        assert bool(found) == (round >= reducer.delay)
        if found:
            exact = gradients[round - reducer.delay].sum(0)
            assert reducer.decoded == round - reducer.delay
            torch.testing.assert_close(found["w"], exact, rtol=0, atol=1e-5 * float(gradients[0].norm()))
            torch.testing.assert_close(found["b"], exact[0], rtol=0, atol=1e-5 * float(gradients[0].norm()))
        seen.append((sorted(reducer.stragglers), None if not found else found["w"]))
    if link.rank == 0:
        reducer.close()
    return seen


@pytest.mark.parametrize("name", MAKE)
def test_a_straggler_is_not_waited_for_and_everyone_has_the_same_exact_sum(name, late):
    late |= {(2, 1), (3, 3)}
    made = {}

    def work(reducer, link):
        made[link.rank] = reducer

        def before(round):
            if (link.rank, round) in late:
                until(lambda: made[0]._progress.round > round)

        return rounds(reducer, link, 5, before)

    everyone = run(lambda: MAKE[name](seed=1), 4, work)
    for seen in everyone:
        assert not isinstance(seen, BaseException), seen
        for (who, vector), (others, theirs) in zip(seen, everyone[0], strict=True):
            assert who == others
            assert vector is None or torch.equal(vector, theirs)
    assert [who for who, _ in everyone[0]][:4] == [[], [2], [], [3]]
    assert sorted(made[0].seconds) == ([] if name == "sr" else [0, 1, 2, 3])  # nothing is left to repeat
    assert made[2].bytes_sent() < made[1].bytes_sent()  # a straggler keeps what is late


def test_a_straggler_is_told_nothing_to_do_in_rounds_that_are_over(late):
    late |= {(1, 0), (1, 1), (1, 2)}
    made, asked = {}, []

    def work(reducer, link):
        made[link.rank] = reducer

        def before(round):
            if link.rank == 1:
                asked.append(list(reducer.tasks(round, 1, 4)))
                until(lambda: made[0]._progress.round > 2)

        return rounds(reducer, link, 4, before)

    everyone = run(lambda: GradientCoding(1), 4, work)
    assert [who for who, _ in everyone[1]] == [[1], [1], [1], []]
    assert asked == [[0, 1], [], [], [12, 13]]


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_the_waiting_rule_by_hand(monkeypatch):
    clock = Clock(monkeypatch)
    waiting = Waiting(GradientCodingScheme(4, 1).start(), clock.now, wait=1.0, timeout=50.0)
    assert not waiting.over({0, 1, 2, 3})
    assert waiting.left() == 50.0
    clock.now = 102.0
    waiting.arrived(0, clock.now)
    assert waiting.left() == 2.0
    clock.now = 103.9
    assert not waiting.over({1})
    clock.now = 104.0
    assert waiting.over({1})
    assert not waiting.waited
    assert not waiting.over({1, 2})
    assert waiting.waited
    assert waiting.over(set())
    assert waiting.seconds == {0: 2.0}
    clock.now = 150.0
    with pytest.raises(LaminaError, match=r"workers 1, 2 did not answer within 50.0 s in round 0"):
        waiting.over({1, 2})


def test_patience_without_end_waits_for_everyone():
    def work(reducer, link):
        return rounds(reducer, link, 2, lambda round: time.sleep(0.05 * link.rank))

    everyone = run(lambda: GradientCoding(1, wait=float("inf")), 3, work)
    assert [who for who, _ in everyone[0]] == [[], []]


@pytest.mark.parametrize("name", MAKE)
def test_killed_and_resumed_is_never_killed(name):
    def whole(reducer, link):
        return [v for _, v in rounds(reducer, link, 6)]

    def half(reducer, link):
        first = rounds(reducer, link, 6, end=4)
        tensors = {}
        stored = pack(copy.deepcopy(reducer.state_dict()), "reducer", tensors)
        fresh = MAKE[name](wait=float("inf"))
        fresh.load_state_dict(unpack(stored, tensors.__getitem__))
        assert str(fresh.state_dict()) == str(reducer.state_dict())
        reducer.close()
        fresh._link = link
        return [v for _, v in [*first, *rounds(fresh, link, 6, begin=4)]]

    expected = run(lambda: MAKE[name](wait=float("inf")), 4, whole)
    for found, as_before in zip(run(lambda: MAKE[name](wait=float("inf")), 4, half), expected, strict=True):
        assert not isinstance(found, BaseException), found
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, as_before, strict=True))


def test_a_worker_that_ends_is_a_straggler_from_then_on_or_the_end_of_all(caplog, late):
    def ends(reducer, link):
        def before(round):
            if link.rank == 2 and round == 1:
                raise RuntimeError("out of memory")

        return rounds(reducer, link, 4, before)

    with caplog.at_level(logging.WARNING):
        found = run(lambda: GradientCoding(1), 4, ends)
    assert "worker 2 ended" in caplog.text
    assert [who for who, _ in found[0]] == [[], [2], [2], [2]]
    assert isinstance(found[2], RuntimeError)
    found = run(lambda: MultiplexedCoding(1, 2, 2), 4, ends)
    for rank in (0, 1, 3):
        assert isinstance(found[rank], LaminaError)
        assert "worker 2 ended, which the code does not bear in round 2" in str(found[rank])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda g: g.index_fill(1, torch.tensor([0]), float("nan")),
            "worker 1 computed a gradient with NaN or infinity",
        ),
        (lambda g: g[:, :3], "worker 1 has gradients of other names, shapes or types"),
        (lambda g: g[:1], "worker 1 could not use its own gradients"),
    ],
)
@pytest.mark.parametrize("rank", [1, 0])
def test_a_worker_with_numbers_that_cannot_be_used_is_named_on_all(spoil, words, rank):
    def work(reducer, link):
        chunks = reducer.chunks(4)
        rows = torch.stack([sums(1, chunks)[0, t] for t in reducer.tasks(0, link.rank, 4)])
        return reducer.reduce({"w": spoil(rows) if link.rank == rank else rows}, None)

    found = run(lambda: GradientCoding(1), 4, work)
    for error in found if rank else [found[0]]:
        assert isinstance(error, LaminaError)
    told = str(found[3])
    if rank:
        assert words in told
    else:
        assert "worker" in told or "takes the gradients" in told


def test_a_round_that_cannot_end_fails_in_time():
    def work(reducer, link):
        reducer.tasks(0, link.rank, 2)
        if link.rank:
            time.sleep(1.0)
        return reducer.reduce({"w": torch.ones(1, 2)}, None)

    begun = time.monotonic()
    found = run(lambda: GradientCoding(0, timeout=0.3), 2, work)
    assert time.monotonic() - begun < 10
    for error in found:
        assert "worker 1 did not answer within 0.3 s in round 0" in str(error)


def test_alone_there_is_nobody_to_code_with():
    gradients = {"w": torch.randn(3, 2)}
    for make in MAKE.values():
        reducer = make()
        assert reducer.reduce(gradients, None)["w"] is gradients["w"]
        assert list(reducer.tasks(3, 0, 1)) == [3]
        assert reducer.bytes_sent() == 0


def test_a_gradient_that_is_not_stacked_is_refused():
    def work(reducer, link):
        handle = attach(nn.Linear(2, 2), reducer)
        handle.model(torch.ones(1, 2)).sum().backward()
        return handle.reduce()

    for error in run(lambda: GradientCoding(1), 2, work):
        assert (
            isinstance(error, ShapeError) or "could not use its own gradients" in str(error) or "stacked" in str(error)
        )


def test_a_trainer_takes_no_code_with_a_delay():
    with pytest.raises(PlanError, match=r"decodes a gradient 3 steps later: train 4 models in turns with .*interleave"):
        place(nn.Linear(2, 2), Placement(), device=torch.device("cpu"), reducer=MAKE["m"]())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GradientCoding(1, kind="cyclical"), "kind must be"),
        (lambda: GradientCoding(1, wait=-0.1), "wait must be at least 0"),
        (lambda: GradientCoding(1, timeout=0), "timeout must be above 0"),
        (lambda: SelectiveRepetition(2, 4, 3), "divides W - 1"),
        (lambda: MultiplexedCoding(2, 2, 3), "B must be in 1..W-1"),
        (lambda: GradientCoding(3).tasks(0, 0, 3), "s=3 takes at least 4 workers, got 3"),
        (lambda: MultiplexedCoding(1, 2, 4).tasks(0, 0, 3), "lam=4 takes at least 4 workers, got 3"),
    ],
)
def test_bad_options_are_refused(make, words):
    with pytest.raises(LaminaError, match=words):
        make()


class Home(nn.Module):
    """A home-made classifier with dropout, whose draws belong to the chunk, not to the worker."""

    def __init__(self, seed, width):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.drop, self.outer = nn.Linear(5, width), nn.Dropout(0.3), nn.Linear(width, 3)

    def forward(self, x):
        return self.outer(self.drop(torch.tanh(self.inner(x))))


def objective(model, batch):
    logits = model(batch["inputs"])
    return {"loss": F.cross_entropy(logits, batch["labels"]), "count": torch.tensor(float(len(batch["labels"])))}


def rows_of_job(job, rows=30):
    generator = torch.Generator().manual_seed(job)
    return {
        "inputs": torch.randn(rows, 5, generator=generator),
        "labels": torch.randint(3, (rows,), generator=generator),
    }


def several(count, drop=True):
    models = [Home(k, 4 + k) for k in range(count)]
    for model in models:
        model.train(drop)
    return models, [torch.optim.SGD(m.parameters(), lr=0.2) for m in models]


def uncoded(count, steps):
    """One machine, whole batches."""
    models, optimizers = several(count, drop=False)
    for job in range(steps):
        optimizers[job % count].zero_grad()
        objective(models[job % count], rows_of_job(job))["loss"].backward()
        optimizers[job % count].step()
    return models


def assert_alike(models, others, atol=1e-4):
    for model, other in zip(models, others, strict=True):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "scheme", [MultiplexedScheme(5, 2, 3, 3), SelectiveRepetitionScheme(5, 1, 2, 3), UncodedScheme(5)]
)
def test_training_with_stragglers_is_training_on_one_machine(scheme, late):
    models, optimizers = several(4, drop=False)
    late |= {(1, 3), (2, 4), (2, 7), (4, 9), (3, 9)} if scheme.delay else set()
    jobs = []
    with LocalCrew(5, lambda worker, round: 60.0 if (worker, round) in late else 0.0) as crew:
        report = train_coded(
            crew, scheme, models, optimizers, objective, rows_of_job, 12, decoded=lambda job, vector: jobs.append(job)
        )
    assert jobs == list(range(12))
    assert_alike(models, uncoded(4, 12), atol=1e-5)
    assert report.times.shape == (5, 12 + scheme.delay)
    assert {(w, r) for r, who in enumerate(report.stragglers) for w in who} == late
    assert {(w, r) for w, r in np.argwhere(np.isnan(report.times)).tolist() if r < 12} == late
    assert report.seconds < 30


def test_random_layers_draw_alike_wherever_a_chunk_is_computed():
    model = Home(0, 4)
    batch = rows_of_job(0)
    before = torch.get_rng_state()
    one, again, other = (chunk_gradient(model, objective, batch, seed=3, job=1, chunk=c) for c in (2, 2, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["outer.weight"], other["outer.weight"])


def test_rows_are_cut_once_and_in_the_shares_of_the_chunks():
    scheme = MultiplexedScheme(4, 2, 3, 2)
    ranges = row_ranges(600, scheme.sizes)
    assert [i for r in ranges for i in range(600)[r]] == list(range(600))
    assert max(abs((r.stop - r.start) - 600 * size) for r, size in zip(ranges, scheme.sizes, strict=True)) < 1.5


def test_a_worker_that_fails_is_asked_again_and_then_named():
    def faulty(model, batch):
        raise ValueError("no memory")

    models, optimizers = several(1)
    with LocalCrew(2) as crew, pytest.raises(LaminaError, match=r"worker \d failed: ValueError: no memory, 3 times"):
        train_coded(crew, UncodedScheme(2), models, optimizers, faulty, rows_of_job, 2)


def test_too_few_models_and_batch_statistics_are_refused():
    models, optimizers = several(3)
    with pytest.raises(LaminaError, match="takes 4 models in turns, got 3"), LocalCrew(4) as crew:
        train_coded(crew, MultiplexedScheme(4, 2, 3, 2), models, optimizers, objective, rows_of_job, 4)
    with pytest.raises(LaminaError, match="crew has 4"), LocalCrew(4) as crew:
        train_coded(crew, UncodedScheme(3), models, optimizers, objective, rows_of_job, 4)
    normed = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    sgd = torch.optim.SGD(normed.parameters(), lr=0.1)
    with pytest.raises(LaminaError, match="1 \\(BatchNorm1d\\) takes its statistics from the rows"):
        interleave([normed], [sgd], objective, rows_of_job, GradientCoding(1), 2)
    with pytest.raises(LaminaError, match="5 rows cannot be cut into 6 chunks"), LocalCrew(6) as crew:
        train_coded(crew, UncodedScheme(6), models, optimizers, objective, rows_of_job(0, 5), 4)


def test_alone_interleaving_is_plain_training():
    models, optimizers = several(2, drop=False)
    interleave(models, optimizers, objective, rows_of_job, GradientCoding(1), 10)
    assert_alike(models, uncoded(2, 10), atol=1e-6)


def test_interleaving_goes_on_after_a_kill_as_if_there_had_been_none():
    whole, optimizers = several(2)
    interleave(whole, optimizers, objective, rows_of_job, GradientCoding(1), 9)
    models, optimizers = several(2)
    reducer = GradientCoding(1)
    interleave(models, optimizers, objective, rows_of_job, reducer, 5)
    fresh, again = GradientCoding(1), several(2)
    fresh.load_state_dict(copy.deepcopy(reducer.state_dict()))
    for model, other in zip(again[0], models, strict=True):
        model.load_state_dict(other.state_dict())
    interleave(*again, objective, rows_of_job, fresh, 9)
    assert_alike(again[0], whole, atol=0)


def test_a_transformers_model_and_ours_are_trained_in_turns():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    torch.manual_seed(0)
    made = [LlamaForCausalLM(config), Transformer(1, 8, 2, vocabulary=16, context=6)]
    exact = copy.deepcopy(made)
    rows = {"input_ids": torch.randint(16, (14, 6), generator=torch.Generator().manual_seed(0))}
    for job in range(2):
        NextToken()(exact[job], rows)["loss"].backward()
        torch.optim.SGD(exact[job].parameters(), lr=0.1).step()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in made]
    with LocalCrew(3) as crew:
        train_coded(crew, MultiplexedScheme(3, 1, 2, 1), made, optimizers, NextToken(), rows, 2, wait=float("inf"))
    assert_alike(made, exact, atol=1e-5)


def test_the_last_words_of_a_run_do_not_reach_the_next():
    """An actor's threads take calls in any order: the end of a run's last round once ended the next one's first."""
    models, _ = several(2)
    scheme = UncodedScheme(2)
    work = Work(models, objective, rows_of_job, scheme)
    items = scheme.start(2).plan()[0]
    first, other = save_vector(models[0]).numpy(), torch.zeros_like(save_vector(models[0])).numpy()
    actor = _Actor(0, 1, work, None)
    exact = actor.compute(1, 0, items, {0: 5}, first)[0][0]
    actor.begin(2, work)
    assert actor.compute(1, 0, items, {0: 5}, other) == ([], "dropped its messages: the run was over")
    actor.end_round(1, 11)
    messages, problem = actor.compute(2, 0, items, {0: 5}, first)
    assert problem == ""
    assert (messages[0] == exact).all()
    actor.end_round(2, 0)
    assert actor.compute(2, 0, items, {0: 5}, first)[1] == "dropped its messages: the round was over"


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"lamina\[scale\]"):
        RayCrew(2)
