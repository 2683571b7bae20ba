"""Coded training among real processes: gloo and Ray, with real sleeps and real kills."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.gradients.test_coding_reducers import Home, objective, rows_of_job, several, uncoded
from tests.parallel.test_data_parallel import free_port
from tests.processes import server

from lamina.errors import LaminaError
from lamina.gradients import GradientCoding, MultiplexedCoding, SelectiveRepetition
from lamina.gradients.coding import (
    GradientCodingScheme,
    MultiplexedScheme,
    RayCrew,
    SelectiveRepetitionScheme,
    UncodedScheme,
    interleave,
    train_coded,
)
from lamina.gradients.coding.crew import Work, save_vector
from lamina.gradients.stragglers import select_parameters
from lamina.recipe import load
from lamina.train.metrics import read
from lamina.train.run import train

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

WORLD, STEPS = 4, 12
REDUCERS = {
    "gc": lambda: GradientCoding(1, wait=3.0),
    "sr": lambda: SelectiveRepetition(1, 2, 2, wait=3.0),
    "m": lambda: MultiplexedCoding(2, 3, 2, wait=3.0),
}


def close(models, values, atol=1e-4):
    expected = [p for m in models for p in m.parameters()]
    return all(torch.allclose(p, torch.tensor(v), rtol=0, atol=atol) for p, v in zip(expected, values, strict=True))


def work(rank, name, killed, file, queue):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    chance = random.Random(rank)
    calls = [0]

    def late(model, batch):
        calls[0] += 1
        if killed and rank == 2 and calls[0] == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3 if rank and chance.random() < 0.05 else 0.01)
        return objective(model, batch)

    reducer = REDUCERS[name]()
    models, optimizers = several(4, drop=False)
    error = ""
    try:
        interleave(models, optimizers, late, rows_of_job, reducer, STEPS)
    except Exception as raised:
        error = str(raised)
    queue.put((rank, [p.detach().tolist() for m in models for p in m.parameters()], error, reducer.bytes_sent()))


def among_processes(name, killed, folder):
    context = server()
    queue = context.Queue()
    workers = [context.Process(target=work, args=(r, name, killed, folder / "store", queue)) for r in range(WORLD)]
    for worker in workers:
        worker.start()
    try:
        return sorted(queue.get(timeout=120) for _ in range(WORLD - killed))
    finally:
        for worker in workers:
            worker.join(20)
            if worker.is_alive():
                worker.kill()


@pytest.mark.parametrize("name", REDUCERS)
def test_processes_with_stragglers_train_as_one_machine(name, tmp_path):
    models = uncoded(4, STEPS)
    found = among_processes(name, False, tmp_path)
    assert [error for _, _, error, _ in found] == [""] * WORLD
    assert all(values == found[0][1] and sent > 0 for _, values, _, sent in found)
    assert close(models, found[0][1])


def test_a_killed_process_is_borne_by_gradient_coding(tmp_path):
    found = among_processes("gc", True, tmp_path)
    assert [rank for rank, *_ in found] == [0, 1, 3]
    assert [error for _, _, error, _ in found] == ["", "", ""]
    assert close(uncoded(4, STEPS), found[0][1])


def test_a_killed_process_ends_a_code_that_does_not_bear_it_by_name(tmp_path):
    for rank, _, error, _ in among_processes("m", True, tmp_path):
        assert "worker 2 ended, which the code does not bear" in error, (rank, error)


RECIPE = Path(__file__).parents[2] / "recipes" / "coded.yaml"
CHANGES = [
    *["train.steps=8", "train.evaluate_every=4", "train.checkpoint_every=4", "train.log_every=1"],
    *["model.depth=2", "model.width=16", "data.source=book.txt", "data.context=16", "data.batch=12"],
]


def losses(folder):
    return [row["loss"] for row in read(folder / "metrics.jsonl") if row["event"] == "step"]


def test_the_trainer_takes_coded_steps_as_plain_ones(tmp_path, monkeypatch):
    """The recipe among four processes, with a drop pass and distillation on the way, against one process."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog; " * 80)
    monkeypatch.chdir(tmp_path)
    train(load(RECIPE, [*CHANGES, "gradients=mean"]), folder="plain")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--master-port",
        str(free_port()),
    ]
    command += ["--master-port", str(free_port()), "-m", "lamina", "train", str(RECIPE), "--folder", "coded", *CHANGES]
    ran = subprocess.run(
        [*command, "gradients={name: gradient_coding, s: 1, wait: 5.0}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    coded, plain = losses(tmp_path / "coded"), losses(tmp_path / "plain")
    torch.testing.assert_close(torch.tensor(coded), torch.tensor(plain), rtol=1e-3, atol=1e-4)


def delay(worker, round):
    return 0.8 if (3 * worker + 5 * round) % 13 == 0 else 0.03


def long(worker, round):
    return 20.0


@pytest.fixture
def crew(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with RayCrew(4, delay, cpus=0) as crew:
        yield crew


@pytest.mark.filterwarnings("ignore")
def test_ray_actors_train_several_models_at_once_with_sleeps_and_kills(crew):
    """Uncoded first, to measure; then each scheme on the same actors; one is killed between runs, one in each."""
    for scheme in (
        UncodedScheme(4),
        GradientCodingScheme(4, 1),
        SelectiveRepetitionScheme(4, 1, 2, 2),
        MultiplexedScheme(4, 2, 3, 2),
    ):
        models, optimizers = several(4, drop=False)
        models[3].extra = Home(7, 2)  # one of another shape; what is not reached keeps its values
        exact = uncoded(4, STEPS)
        killed, jobs = [], []

        def look(job, vector, killed=killed, scheme=scheme, jobs=jobs):
            jobs.append(job)
            if job == 4 and not isinstance(scheme, UncodedScheme):
                process = crew.processes()[2]
                killed.append(process)
                threading.Timer(0.05, os.kill, (process, signal.SIGKILL)).start()

        report = train_coded(
            crew, scheme, models, optimizers, objective, rows_of_job, STEPS, wait=3.0, timeout=120, decoded=look
        )
        assert jobs == list(range(STEPS))
        assert len(report.replaced) == len(killed)
        for model, other in zip(models, exact, strict=True):
            for name, parameter in other.named_parameters():
                torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=0, atol=1e-4)
        if isinstance(scheme, UncodedScheme):
            chosen = select_parameters(report.times, 0.01, ["multiplexed_coding"], max_delay=3, jobs=STEPS - 3)
            assert chosen["multiplexed_coding"].seconds < report.seconds
            before = crew.processes()
            os.kill(before[1], signal.SIGKILL)
        elif isinstance(scheme, GradientCodingScheme):
            assert crew.processes()[1] != before[1]


@pytest.mark.filterwarnings("ignore")
def test_a_busy_worker_hears_that_a_round_is_over_and_a_halted_one_is_named(crew):
    models, _ = several(2)
    scheme = UncodedScheme(4)
    crew.delay = long
    work = Work(models, objective, rows_of_job, scheme)
    crew.begin(work, timeout=60)
    items, values = scheme.start(2).plan()[0], {m: (0, save_vector(model)) for m, model in enumerate(models)}
    for round in range(3):
        crew.order(0, round, items, values)
    assert crew.reply(2.0) is None
    begun = time.monotonic()
    crew.end_round(2)
    told = [crew.reply(10.0) for _ in range(3)]
    assert time.monotonic() - begun < 10
    assert {(t.round, t.problem) for t in told} == {(r, "dropped its messages: the round was over") for r in range(3)}
    halted = crew.processes()[1]
    os.kill(halted, signal.SIGSTOP)
    try:
        with pytest.raises(LaminaError, match=r"^worker 1 did not begin within 2 s"):
            crew.begin(work, timeout=2)
    finally:
        os.kill(halted, signal.SIGCONT)
