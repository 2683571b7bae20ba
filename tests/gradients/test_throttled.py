import time

import pytest
import torch
from tests.contract.example import Example
from tests.gradients.workers import run

from lamina.errors import LaminaError
from lamina.gradients import Mean, Throttled, TopK

EXAMPLES = [Example("reducer", "throttled", options={"bytes_per_second": 1e9}, bad={"bytes_per_second": 0.0})]


def test_a_step_takes_as_long_as_its_bytes_and_gives_the_same_bits():
    x = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))

    def work(rank):
        seconds = []
        for rate in (4e5, 8e5):
            slow = Throttled(Mean(), bytes_per_second=rate)
            begun = time.perf_counter()
            found = slow.reduce({"w": x + rank}, None)["w"]
            seconds.append(time.perf_counter() - begun)
            assert torch.equal(found, Mean().reduce({"w": x + rank}, None)["w"])
            assert slow.bytes_sent() == 40_000
        return seconds

    for at_400, at_800 in run(2, work):
        assert at_400 >= 0.1
        assert at_800 >= 0.05


def test_it_hands_on_what_the_reducer_inside_knows():
    slow = Throttled({"name": "topk", "density": 0.5})
    assert isinstance(slow.base, TopK)
    slow.base.traffic.sent = 7
    other = Throttled(TopK(0.5))
    other.load_state_dict(slow.state_dict())
    assert other.bytes_sent() == 7
    assert list(other.tasks(0, 2, 4)) == [2]
    with pytest.raises(LaminaError, match="bytes_per_second must be above 0, got -1"):
        Throttled("mean", bytes_per_second=-1)
