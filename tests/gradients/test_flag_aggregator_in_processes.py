"""Flag Aggregator in a run that loses a worker in the middle, and goes on from its checkpoint."""

import os
import signal
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tests.processes import server
from tests.train.tiny import net, numbers, trainer

from lamina.errors import LaminaError
from lamina.gradients import FlagAggregator

WORLD, STEPS, LOST_AT = 3, 8, 6


class Halting(FlagAggregator):
    """Says when it is in the middle of a step, and waits for what comes."""

    def __init__(self, reached):
        super().__init__()
        self.reached, self.calls = reached, 0

    def reduce(self, gradients, group):
        self.calls += 1
        if self.calls == LOST_AT:
            self.reached.touch()
            time.sleep(60)
        return super().reduce(gradients, group)


def _train(rank, folder, name, lost, queue):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/{name}-{lost}.store", timedelta(seconds=60)
    dist.init_process_group("gloo", store, timeout, rank=rank, world_size=WORLD)
    run = trainer(
        folder / name,
        model=net(width=16, batch_norm=False),
        reducer=Halting(folder / "reached") if lost and rank == 1 else FlagAggregator(),
        steps=STEPS,
        checkpoint_every=2,
    )
    try:
        run.fit(resume=True)
    except LaminaError as error:
        queue.put(str(error))
        return
    queue.put(([p.detach().tolist() for p in run.model.parameters()], run.reducer._turn))
    dist.barrier()
    dist.destroy_process_group()


def among_workers(folder, name, lost=False):
    """What each worker said; one that is lost is killed by its process id."""
    context = server()
    queue = context.Queue()
    workers = [context.Process(target=_train, args=(r, folder, name, lost, queue)) for r in range(WORLD)]
    for worker in workers:
        worker.start()
    try:
        if lost:
            end = time.monotonic() + 200
            while not (folder / "reached").exists():
                assert time.monotonic() < end
                time.sleep(0.05)
            os.kill(workers[1].pid, signal.SIGKILL)
        return [queue.get(timeout=200) for _ in range(WORLD - lost)]
    finally:
        for worker in workers:
            worker.join(20)
            if worker.is_alive():
                worker.kill()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_lost_a_worker_goes_on_from_its_checkpoint_to_the_same_parameters(tmp_path):
    (whole, steps), *others = among_workers(tmp_path, "whole")
    assert steps == STEPS
    for sentence in among_workers(tmp_path, "cut", lost=True):
        assert sentence.startswith("worker 1 ended, or did not answer")
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir())[-1] == "step-000004"
    resumed = among_workers(tmp_path, "cut")
    assert [steps for _, steps in resumed] == [STEPS - 4] * WORLD
    assert all(parameters == whole for parameters, _ in others + resumed)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
