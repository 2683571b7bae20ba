"""A training step under gradient coding; among processes: tests/gradients/test_coding_in_processes.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina.data import Loader
from lamina.data.examples import Columns
from lamina.errors import LaminaError, PlanError
from lamina.gradients import GradientCoding, Mean, attach
from lamina.gradients.coding.tasks import COUNT
from lamina.parallel.data_parallel import Placed
from lamina.train.coded import ChunkLoader, coded_gradients, is_coded
from lamina.train.distributed import World


def columns(rows=23):
    return Columns({"inputs": torch.randn(rows, 4), "labels": torch.arange(rows) % 3})


def test_chunks_are_the_rows_of_so_many_processes_and_the_position_is_a_loader_s():
    data = columns()
    loaders = [Loader(data, 9, seed=3, rank=r, world=3) for r in range(3)]
    chunks = ChunkLoader(data, 9, seed=3, chunks=3)
    for held in ((0, 1), (2,), (), (1, 2), (0, 1, 2)):
        expected = [next(loader) for loader in loaders]
        for chunk, batch in zip(held, chunks.take(held), strict=True):
            assert all(torch.equal(batch[k], expected[chunk][k]) for k in batch)
        assert chunks.state_dict() == loaders[0].state_dict()
    fresh = ChunkLoader(data, 9, seed=3, chunks=3)
    fresh.load_state_dict(chunks.state_dict())
    assert torch.equal(fresh.take([1])[0]["inputs"], chunks.take([1])[0]["inputs"])
    with pytest.raises(LaminaError, match="seed"):
        ChunkLoader(data, 9, seed=4, chunks=3).load_state_dict(chunks.state_dict())


class Plain:
    """An objective with a mean over rows and no parameters of its own."""

    def __call__(self, model, batch):
        loss = F.cross_entropy(model(batch["inputs"]), batch["labels"])
        return {"loss": loss, "count": torch.tensor(float(len(batch["labels"])))}

    def parameters(self):
        return []


class Everyone(GradientCoding):
    """Keeps what a worker hands over, and gives back the sum of all of it."""

    def reduce(self, gradients, group):
        self.given = gradients
        return {n: g.sum(0) for n, g in gradients.items()}


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_hands_over_a_sum_a_task_and_sets_the_mean(parts):
    data = columns(12)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Dropout(0.0), nn.Linear(5, 3))
    reducer = Everyone(1, kind="repetition")
    placed = Placed(model, model, attach(model, reducer))
    loader = ChunkLoader(data, 12, seed=0, chunks=2)
    weighted, counted, _, _ = coded_gradients(placed, Plain(), loader, 0, world=World(1, 2), parts=parts)
    rows = next(Loader(data, 12, seed=0))
    losses = Plain()(model, rows)
    expected = torch.autograd.grad(losses["loss"], list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert counted == 12
    torch.testing.assert_close(weighted / counted, losses["loss"].double(), rtol=1e-6, atol=0)
    assert reducer.given["0.weight"].shape == (2, 5, 4)
    assert reducer.given[COUNT].tolist() == [6, 6]


def test_fp16_and_batch_statistics_are_refused_and_others_are_not_coded():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    placed = Placed(model, model, attach(model, GradientCoding(1)))
    loader = ChunkLoader(columns(), 9, seed=0, chunks=3)
    with pytest.raises(PlanError, match="use bf16"):
        coded_gradients(placed, Plain(), loader, 0, world=World(0, 3), precision="fp16")
    with pytest.raises(LaminaError, match="freeze it"):
        coded_gradients(placed, Plain(), loader, 0, world=World(0, 3))
    assert not is_coded(Mean(), World(0, 3))
    assert not is_coded(GradientCoding(1), World())
    assert is_coded(GradientCoding(0), World(0, 3))
