import copy
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from tests.processes import in_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lamina.errors import LaminaError
from lamina.gradients import FlagAggregator, GradientCoding, Mean, Median, TopK, attach
from lamina.gradients.reducer import flatten, unflatten
from lamina.gradients.robust import median

EXAMPLES = [Example("reducer", "mean")]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 10**6))
def test_median_equals_numpy_s(workers, n, seed):
    rows = torch.randn(workers, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(median(rows), torch.from_numpy(__import__("numpy").median(rows.numpy(), axis=0)))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_median_withstands_a_faulty_minority(poison):
    honest = torch.tensor([[1.0, -1.0], [1.1, -1.1], [0.9, -0.9]])
    rows = torch.cat([honest, torch.full((2, 2), poison)])
    result = median(rows)
    assert torch.isfinite(result).all()
    assert (result[0] >= 0.9) & (result[0] <= 1.1)
    assert (result[1] >= -1.1) & (result[1] <= -0.9)


def test_flatten_and_unflatten_are_inverse_with_mixed_dtypes_and_shapes():
    g = torch.Generator().manual_seed(0)
    gradients = {
        "a": torch.randn(3, 5, generator=g),
        "b": torch.randn((), generator=g),
        "c": torch.randn(4, generator=g).bfloat16(),
        "d": torch.randn(2, 0),
    }
    flat = flatten(gradients)
    assert {k: v.numel() for k, v in flat.items()} == {"torch.float32": 16, "torch.bfloat16": 4}
    for name, value in unflatten(flat, gradients).items():
        assert torch.equal(value, gradients[name])
        assert value.dtype == gradients[name].dtype


def test_alone_both_reducers_return_the_gradient_and_send_nothing():
    gradients = {"w": torch.randn(3, 2, generator=torch.Generator().manual_seed(0))}
    for reducer in (Mean(), Median()):
        assert torch.equal(reducer.reduce(gradients, None)["w"], gradients["w"])
        assert reducer.bytes_sent() == 0
        assert list(reducer.tasks(3, 1, 4)) == [1]


def test_the_byte_counter_is_saved():
    reducer = Mean()
    reducer.sent = 12
    other = Mean()
    other.load_state_dict(reducer.state_dict())
    assert other.bytes_sent() == 12


def _work(rank, world):
    warnings.simplefilter("error")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    inputs = torch.randn(world, 6, 4)
    local = []
    for r in range(world):
        model = copy.deepcopy(base)
        model(inputs[r]).square().sum().backward()
        local.append([p.grad for p in model.parameters()])
    stacked = [torch.stack(g) for g in zip(*local, strict=True)]
    wrong = []
    for name, reducer, expected in (
        ("mean", Mean(), [g.mean(0) for g in stacked]),
        ("median", Median(), [g.median(0).values for g in stacked]),
    ):
        for wrap in (True, False):
            model = copy.deepcopy(base)
            wrapped = DistributedDataParallel(model) if wrap else model
            handle = attach(wrapped, reducer)
            wrapped(inputs[rank]).square().sum().backward()
            handle.reduce()
            for p, e in zip(model.parameters(), expected, strict=True):
                if not torch.allclose(p.grad, e, atol=1e-5):
                    wrong.append((name, wrap))
        count = sum(p.numel() for p in base.parameters())
        # The median: a roll call, everything once to whom it concerns, and the combined slice (padded to three).
        sent = {"mean": 4 * count, "median": 24 + 4 * 4 * -(-count // 3)}[name]
        if reducer.bytes_sent() != 2 * sent:
            wrong.append((name, "bytes", reducer.bytes_sent(), 2 * sent))
    return wrong


@pytest.mark.distributed
def test_three_workers_get_the_mean_and_the_median_under_ddp_and_in_a_plain_loop(tmp_path):
    assert in_processes(_work, 3, tmp_path, 3) == [[], [], []]


def _one_is_silent(rank):
    """Worker 1 has no gradient; in 60 s the process group would give up."""
    told = []
    reducers = (Mean(), TopK(0.1), TopK(0.1, start_step=5), FlagAggregator(), GradientCoding(1))
    begun = time.monotonic()
    for reducer in reducers:
        with pytest.raises(LaminaError) as error:
            if isinstance(reducer, GradientCoding):
                tasks = reducer.tasks(0, rank, 3)
                reducer.reduce({} if rank == 1 else {"w": torch.ones(len(tasks), 4)}, None)
            else:
                model = nn.Linear(3, 2)
                handle = attach(model, reducer)
                if rank != 1:
                    model(torch.ones(1, 3)).sum().backward()
                handle.reduce()
        told.append(str(error.value))
    return told, time.monotonic() - begun


@pytest.mark.distributed
def test_a_worker_without_a_gradient_is_named_on_all_and_nobody_waits(tmp_path):
    for told, seconds in in_processes(_one_is_silent, 3, tmp_path):
        assert seconds < 20
        for sentence in told[:3]:
            assert sentence.startswith("worker 1 had no parameter with a gradient to combine (call backward() before")
        assert told[3].startswith("worker 1 sent no gradient")
        assert "no parameter has a gradient" in told[4] or told[4].startswith("worker 1 could not use its own gradient")
