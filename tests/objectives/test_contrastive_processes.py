"""Rows of two processes are compared with each other: the loss and the gradient of the whole batch.

The contract test of two processes does this for one mode in the default run; here are all, with views, a head, unequal
shares and values that are not known.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.objectives.test_contrastive import AGE, MODES, PSI, encoder, subjects
from tests.processes import in_processes
from torch import Tensor, nn

from lamina.nn import ProjectionHead
from lamina.objectives import WeightedContrastive


def shared(rank: int | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Seven subjects in two views, one of them like no other; of a rank, its unequal share."""
    batch = subjects(7)
    batch["inputs"] = torch.stack([batch["inputs"], batch["inputs"].flip(1)], dim=1)
    batch["age"][3] = torch.nan
    cut = {None: slice(None), 0: slice(0, 2), 1: slice(2, 7)}[rank]
    return encoder(), {k: v[cut] for k, v in batch.items()}


def pretraining(mode: str, **options: Any) -> WeightedContrastive:
    torch.manual_seed(5)
    return WeightedContrastive([AGE | {"missing": "drop"}, PSI], mode, head=ProjectionHead(3, 4), **options)  # type: ignore[arg-type]


def flat(*modules: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for m in modules for p in m.parameters() if p.grad is not None])


def _worker(rank: int) -> dict[str, Any]:
    results = {}
    for mode in MODES:
        net, mine = shared(rank)
        objective = pretraining(mode)
        found = objective(net, mine)
        (found["loss"] * found["count"] / 7).backward()
        gradients = flat(net, objective)
        loss = found["loss"].detach() * found["count"] / 7
        for tensor in (gradients, loss):
            dist.all_reduce(tensor)
        with torch.no_grad():
            alone = objective(net, mine)["loss"]
        local = pretraining(mode, gather=False)(net, mine)["loss"].detach()
        results[mode] = (loss, gradients, alone, local, found["loss"].detach())
    return results


@pytest.mark.slow
@pytest.mark.distributed
def test_over_two_processes_it_is_the_loss_and_gradient_of_the_whole_batch(tmp_path: Any) -> None:
    results = in_processes(_worker, 2, tmp_path)
    for mode in MODES:
        net, batch = shared()
        objective = pretraining(mode)
        whole = objective(net, batch)["loss"]
        whole.backward()
        for rank in range(2):
            loss, gradients, alone, local, own = results[rank][mode]
            torch.testing.assert_close(loss, whole.detach())
            torch.testing.assert_close(gradients, flat(net, objective), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone, local)
            assert not torch.allclose(own, local)
