"""Two data-parallel processes, each with data of its own, agree with one that has all of it."""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tests.contract.collect import label, make, of
from tests.contract.foreign import ours
from tests.contract.test_modules import MODULES, loss_of, trained
from tests.contract.test_training_parts import optimize, rows, small
from tests.processes import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lamina.batches import call
from lamina.errors import LaminaError
from lamina.gradients import attach
from lamina.objectives import MaskedToken
from lamina.parallel.data_parallel import Placement, place
from lamina.rewrite import history, rewrite
from lamina.train.distributed import World
from lamina.train.step import gradients, rows_of


def of_rank(value, rank):
    """Other numbers on the second rank: a batch, a tuple of inputs, or one tensor."""
    if isinstance(value, dict):
        return {k: of_rank(v, rank) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(of_rank(v, rank) for v in value)
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return value
    return value + 0.3 * rank * value.flip(-1) if value.is_floating_point() else value.roll(rank, -1)


def gradient(module, example, rank, of=None):
    """The gradient of one process: on the module, or on `of`, which wraps it."""
    torch.manual_seed(1)
    given = of_rank(dict(example.batch()) if example.kind == "model" else example.inputs(), rank)
    torch.manual_seed(2)  # dropout, the same in every arm
    loss_of(call(of or module, given) if example.kind == "model" else (of or module)(*given)).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def modules(rank):
    differing = 0
    for example in MODULES:
        torch.manual_seed(0)
        module = make(example)
        if not trained(module):
            continue
        alone = [gradient(copy.deepcopy(module), example, r) for r in range(2)]
        found = gradient(module, example, rank, DistributedDataParallel(module))
        differing += any(not torch.equal(g, alone[1][n]) for n, g in alone[0].items())
        close = [torch.allclose(found[n], (g + alone[1][n]) / 2, rtol=1e-3, atol=1e-5) for n, g in alone[0].items()]
        yield label(example), all(close)
    # Equal data on both would make every mean right.
    yield "modules get other data on each rank", differing > len(MODULES) // 2


def reducers(rank):
    for example in of("reducer"):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        handle = attach(module, make(example))
        module(torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
        if example.workers > 2:
            yield label(example), refused(handle.reduce, "workers, got 2")
            continue
        handle.reduce()
        yield label(example), everywhere(module.weight.grad) and handle.reducer.bytes_sent() > 0


def refused(call, words):
    try:
        call()
    except LaminaError as error:
        return words in str(error)
    return False


def optimizers(rank):
    for example in of("optimizer"):
        model = small()
        wrapped, optimizer = DistributedDataParallel(model), optimize(example, model)
        for step in range(3):

            def closure(wrapped=wrapped, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = (wrapped(rows(2 * step + rank)) - 1).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        moved = not torch.equal(model[0].weight, small()[0].weight)
        yield label(example), moved and all(everywhere(p) for p in model.parameters())


def objectives(rank):
    """The batch of one process, shared out by rows, gives the same gradient."""
    for example in of("objective"):
        parts = []
        for world, chosen in ((World(), slice(None)), (World(rank, 2), slice(rank, None, 2))):
            model, objective = example.model(), make(example)
            if hasattr(objective, "before_rewrite"):
                objective.before_rewrite(copy.deepcopy(model))
                with torch.no_grad():
                    next(model.parameters()).mul_(1.5)
            torch.manual_seed(1)
            batch = dict(example.batch())
            count = rows_of(batch)
            batch = {k: v[chosen] if isinstance(v, Tensor) and v.shape[:1] == (count,) else v for k, v in batch.items()}
            placed = place(model, Placement(data=2), device=torch.device("cpu"))
            if world.size == 1:
                placed.module, placed.replicated = placed.bare, None
            # The first arm is one process with everything: nothing in it may talk to the other.
            alone = mock.patch.object(dist, "is_initialized", return_value=False) if world.size == 1 else nullcontext()
            with alone:
                gradients(placed, objective, batch, world=world)
            parts.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        # Masks are drawn by shape, and so differ; that the processes agree holds for them as well.
        same = isinstance(objective, MaskedToken) or all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*parts, strict=True)
        )
        yield label(example), same and all(everywhere(g) for g in parts[1])


def passes(rank):
    """Each process has other calibration data: the first decides for both."""
    for example in of("pass"):
        torch.manual_seed(0)
        model, batch = (example.model(), example.batch()) if example.model is not None else ours()
        model = rewrite(model.eval(), make(example), data=[of_rank(dict(batch), rank)])
        agreed = [None, None]
        dist.all_gather_object(agreed, history(model))
        yield label(example), agreed[0] == agreed[1] and all(everywhere(p) for p in model.parameters())


def everywhere(tensor):
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.detach().contiguous())
    return torch.equal(*both)


def _work(rank):
    checked = [c for kind in (modules, reducers, optimizers, objectives, passes) for c in kind(rank)]
    return [name for name, _ in checked], [name for name, right in checked if not right]


@pytest.mark.distributed
def test_two_processes_agree_with_one(tmp_path):
    results = in_processes(_work, 2, tmp_path, seconds=240)
    assert [wrong for _, wrong in results] == [[], []]
    assert {label(e) for e in of("reducer", "optimizer", "objective", "pass")} <= set(results[0][0])
