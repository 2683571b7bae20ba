"""Two data-parallel processes agree with one, for every module and every reducer."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.contract.collect import label, make, of
from tests.contract.test_modules import MODULES, feed, loss_of, trained
from torch.nn.parallel import DistributedDataParallel

from lamina.gradients import attach


def _work(rank, file, queue):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    wrong = []
    for example in MODULES:
        torch.manual_seed(0)
        module, run = make(example), feed(example)
        if not trained(module):
            continue
        reference = [p.detach().clone() for p in module.parameters()]
        loss_of(run(DistributedDataParallel(module))).backward()
        sums = torch.stack([p.grad.double().abs().sum() for p in trained(module) if p.grad is not None])
        both = [torch.empty_like(sums) for _ in range(2)]
        dist.all_gather(both, sums)
        if not torch.equal(both[0], both[1]) or not all(
            torch.equal(a, b) for a, b in zip(reference, module.parameters(), strict=True)
        ):
            wrong.append(label(example))
    for example in of("reducer"):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        handle = attach(module, make(example))
        module(torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
        handle.reduce()
        mine = module.weight.grad.clone()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        if not torch.equal(both[0], both[1]) or handle.reducer.bytes_sent() <= 0:
            wrong.append(label(example))
    queue.put(wrong)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_agree_on_every_gradient(tmp_path):
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_work, args=(r, tmp_path / "store", queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    try:
        results = [queue.get(timeout=240) for _ in workers]
    finally:
        for worker in workers:
            worker.join(20)
            if worker.is_alive():
                worker.kill()
    assert results == [[], []]
