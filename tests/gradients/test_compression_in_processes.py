"""Compressors in real processes: under DistributedDataParallel, against torch's hook, in the trainer, with faults."""

import json
import os
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.processes import server
from tests.train.tiny import DropLast, net, numbers, trainer
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lamina.errors import LaminaError
from lamina.gradients import QSGD, LGreCo, PowerSGD, TopK, attach
from lamina.objectives import Classification
from lamina.optim import LAMB
from lamina.train.phases import Scheduled


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 30))


def rows(rank, step):
    return torch.randn(8, 40, generator=torch.Generator().manual_seed(100 * step + rank))


def train(wrapped, rank, steps, first=0):
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        (wrapped(rows(rank, step)) - rows(rank, step)[:, :30]).square().mean().backward()
        optimizer.step()


def torch_s_hook_gives_the_same(rank):
    """Weights and error buffers over 20 steps; ours begins with the Q that theirs draws."""
    theirs, ours = DistributedDataParallel(model()), DistributedDataParallel(model())
    state = PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2, random_seed=0)
    theirs.register_comm_hook(state, powerSGD_hook)
    reducer = PowerSGD(4, start_step=2)
    attach(ours, reducer)
    train(ours, rank, 2)
    order, shapes = list(reducer.memory._seen), {n: p.shape for n, p in ours.module.named_parameters()}
    torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
    for name in order:
        if len(shapes[name]) == 2 and reducer.worthwhile(shapes[name], 4):
            reducer.memory["factor"][name] = torch.randn(1, shapes[name][1], 4)[0]
    train(ours, rank, 18, first=2)
    train(theirs, rank, 20)
    assert len(reducer.memory["factor"]) == 3
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    errors = dict(zip(order, state.error_dict[0].split([shapes[n].numel() for n in order]), strict=True))
    for name, kept in reducer.memory["residual"].items():
        torch.testing.assert_close(kept, errors[name].view(shapes[name]), rtol=1e-3, atol=1e-5)


def every_reducer_trains_alike_under_ddp_and_outside(rank):
    """Many small buckets, which are cut anew after the first step."""
    for make in (
        lambda: QSGD(4, bucket=64),
        lambda: TopK(0.1),
        lambda: PowerSGD(2),
        lambda: LGreCo(PowerSGD(2), period=3, start_step=3, window=2),
    ):
        plain, kept = model(), make()
        handle = attach(plain, kept)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for step in range(8):
            optimizer.zero_grad()
            (plain(rows(rank, step)) - rows(rank, step)[:, :30]).square().mean().backward()
            handle.reduce()
            optimizer.step()
        wrapped, reducer = DistributedDataParallel(model(), bucket_cap_mb=0.004), make()
        attach(wrapped, reducer)
        train(wrapped, rank, 8)
        for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            both = [torch.empty_like(b) for _ in range(2)]
            dist.all_gather(both, b.detach())
            assert torch.equal(*both), reducer
        assert kept.memory.steps == reducer.memory.steps == 8
        assert 0 < reducer.bytes_sent() < 8 * 4 * sum(p.numel() for p in plain.parameters())


def a_gradient_that_is_no_number_is_named_in_backward(rank):
    wrapped = DistributedDataParallel(model())
    attach(wrapped, TopK(0.1))
    x = rows(rank, 0) * (float("nan") if rank == 1 else 1.0)
    with pytest.raises(LaminaError, match=r"NaN or infinity: worker 1 in '\d.(weight|bias)'; nothing was combined"):
        wrapped(x).square().mean().backward()


def the_trainer_resumes_with_each_worker_s_own_residuals(rank, folder):
    """Killed in the middle of a window, and just before a rewrite and a choice."""

    class Stop(Exception):
        pass

    class Stopping(Classification):
        def __init__(self, at=None):
            super().__init__()
            self.calls, self.at = 0, at

        def __call__(self, module, batch):
            if module.training:
                self.calls += 1
                if self.calls == self.at:
                    raise Stop
            return super().__call__(module, batch)

    def make(name, at=None):
        return trainer(
            folder / name,
            model=net(width=24, batch_norm=False),
            objective=Stopping(at),
            optimizer=lambda m: LAMB(m.parameters(), lr=1e-2),
            reducer=LGreCo(TopK(0.1), period=4, start_step=1, window=2),
            rewrites=[Scheduled(DropLast(), 0.5)],
            checkpoint_every=1,
        )

    make("whole").fit()
    for at in (4, 3):
        with pytest.raises(Stop):
            make("cut", at).fit(resume=True)
    last = make("cut")
    last.fit(resume=True)
    if rank == 0:
        assert numbers(folder / "whole") == numbers(folder / "cut")
    assert last.reducer.report()["choices"] == 3
    residuals = last.reducer.memory["residual"]
    assert set(residuals) == {n for n, p in last.model.named_parameters() if p.ndim > 1}
    mine = torch.cat([r.flatten() for r in residuals.values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert not torch.equal(*both)


def a_worker_that_sends_nothing_or_dies_is_told_within_the_timeout(rank):
    reducer, quick = TopK(0.1), dist.new_group(timeout=timedelta(seconds=1.5))
    if rank == 1:
        time.sleep(4)
        os._exit(0)
    for _ in range(2):
        # Once it is late, then it is gone.
        begun = time.perf_counter()
        with pytest.raises(Exception, match=r"^worker 1 ended, or did not answer .* this is worker 0 of 2"):
            reducer.reduce({"w": rows(0, 0)}, quick)
        assert time.perf_counter() - begun < 10


def _work(rank, folder, queue):
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch_s_hook_gives_the_same(rank)
    every_reducer_trains_alike_under_ddp_and_outside(rank)
    a_gradient_that_is_no_number_is_named_in_backward(rank)
    the_trainer_resumes_with_each_worker_s_own_residuals(rank, folder)
    queue.put("done")
    # What is put goes by a thread of its own, which the end would cut off.
    queue.close()
    queue.join_thread()
    a_worker_that_sends_nothing_or_dies_is_told_within_the_timeout(rank)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes(tmp_path):
    context = server()
    queue = context.Queue()
    workers = [context.Process(target=_work, args=(r, tmp_path, queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [queue.get(timeout=5) for _ in workers] == ["done", "done"]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_recipe_trains_over_four_processes(tmp_path):
    root = Path(__file__).parents[2]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "lamina"]
    options = [
        "train.steps=12",
        "gradients.start_step=2",
        "gradients.period=3",
        "gradients.window=2",
        "model.width=32",
        "train.checkpoint_every=4",
    ]
    ended = subprocess.run(
        [
            *command,
            "train",
            str(root / "recipes/compressed.yaml"),
            *options,
            "--folder",
            str(out),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    rows = numbers(out)
    assert [r["event"] for r in rows].count("rewrite") == 1
    assert rows[-1]["step"] == 12
    state = json.loads((out / "checkpoints" / "step-000012" / "state.json").read_text())
    reducers = [p["reducer"] for p in state["processes"]]
    assert [r["choices"] for r in reducers] == [4, 4, 4, 4]
    assert all(r["base"]["memory"]["options"] == reducers[0]["base"]["memory"]["options"] for r in reducers)
    assert len({str(r["base"]["memory"]["residual"]) for r in reducers}) == 4, "a checkpoint keeps each worker's own"
