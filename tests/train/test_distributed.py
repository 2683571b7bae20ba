from __future__ import annotations

import pytest
import torch

from lamina.errors import LaminaError
from lamina.train import distributed
from lamina.train.distributed import World
from lamina.train.precision import TrainingError


def test_one_process_needs_no_group() -> None:
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.first, world.device.type) == (0, 1, True, "cpu")
    assert world.everyone({"a": 1}) == [{"a": 1}]
    assert world.total(torch.tensor([2.0])).tolist() == [2.0]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(
        LaminaError, match="device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', got 'gpu'"
    ):
        distributed.start("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(LaminaError, match="device is 'cuda', but this torch finds no CUDA device"):
        distributed.start("cuda")


def test_an_error_of_one_is_raised_on_all() -> None:
    World().agree(None)
    with pytest.raises(TrainingError, match="disk full"):
        World().agree("disk full")


def test_only_lost_peers_are_worded_anew() -> None:
    def fail(error: Exception, world: World) -> None:
        with distributed.lost_peers_told(world):
            raise error

    two = World(rank=1, size=2)
    with pytest.raises(
        TrainingError, match=r"process 1 of 2 lost another one.*start again with resume.*\[Connection cl"
    ):
        fail(RuntimeError("Connection closed by peer [127.0.0.1]"), two)
    with pytest.raises(RuntimeError, match="shape"):
        fail(RuntimeError("shape mismatch"), two)
    with pytest.raises(LaminaError, match="timed out by hand"):
        fail(LaminaError("timed out by hand"), two)
    with pytest.raises(RuntimeError, match="Connection closed"):
        fail(RuntimeError("Connection closed by peer"), World())
