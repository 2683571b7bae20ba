"""What is timed: the model's own calls, batch by batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.train import latency
from lamina.train.latency import ForwardTimes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


class Slow(nn.Module):
    """Takes so many seconds, once more where it calls itself."""

    def __init__(self, clock: Clock, seconds: float, again: bool = False) -> None:
        super().__init__()
        self.clock, self.seconds, self.again = clock, seconds, again

    def forward(self, first: bool = True) -> None:
        self.clock.now += self.seconds
        if self.again and first:
            self(False)


def test_calls_of_a_batch_add_up_and_a_teacher_does_not_count(clock: Clock) -> None:
    model, teacher = Slow(clock, 2.0), Slow(clock, 16.0)
    times = ForwardTimes(torch.device("cpu"))
    assert times.median == 0.0
    for calls in (1, 4, 2, 0):
        with times.batch(model):
            teacher()
            for _ in range(calls):
                model()
    assert times.seconds == [2.0, 8.0, 4.0]
    assert times.median == 4.0


def test_a_model_that_calls_itself_is_timed_once(clock: Clock) -> None:
    model, times = Slow(clock, 2.0, again=True), ForwardTimes(torch.device("cpu"))
    with times.batch(model):
        model()
    assert times.seconds == [4.0]


def test_nothing_stays_on_the_model_and_an_error_leaves_no_time(clock: Clock) -> None:
    model, times = Slow(clock, 2.0), ForwardTimes(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), times.batch(model):
        model()
        raise ZeroDivisionError
    assert times.seconds == []
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
