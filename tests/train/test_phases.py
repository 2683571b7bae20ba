from __future__ import annotations

import pytest
import torch
from tests.train.tiny import DropLast, WidenClasses, data, net

from lamina.errors import LaminaError
from lamina.objectives import Classification, Distillation
from lamina.rewrite import history, rewrite
from lamina.train.phases import Calibration, Scheduled, in_order, replay_training


def test_times_are_checked_and_sorted() -> None:
    for wrong in ("now", -0.1, 1.5, True, None):
        with pytest.raises(LaminaError, match="'before', 'after' or a fraction"):
            Scheduled(DropLast(), wrong)
    given = [Scheduled(DropLast(), "after"), Scheduled(DropLast(), 1.0), Scheduled(DropLast(), 0.25), DropLast()]
    assert [s.at for s in in_order(given, 10)] == ["before", 0.25, 1.0, "after"]
    assert [s.due(10) for s in in_order(given, 10)] == [-1, 2, 10, 10]


def test_calibration_batches_are_the_same_each_time() -> None:
    calibration = Calibration(data(), 3, torch.device("cpu"))
    first, second = list(calibration), list(calibration)
    assert len(first) == 4
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(first, second, strict=True))
    other = list(Calibration(data(), 4, torch.device("cpu")))
    assert not torch.equal(first[0]["inputs"], other[0]["inputs"])


def test_replay_tells_the_objective_before_each_rewrite() -> None:
    done = rewrite(net(), DropLast(), WidenClasses())
    objective = Distillation()
    again = replay_training(net(), objective, history(done))
    assert history(again) == history(done)
    # The teacher is the model just before the latest rewrite: one block fewer, the old head.
    assert (len(objective.teacher.blocks), objective.teacher.head.out_features) == (2, 5)


def test_replay_starts_where_the_model_is() -> None:
    done = rewrite(net(), DropLast(), WidenClasses())
    half = rewrite(net(), DropLast())
    assert history(replay_training(half, Classification(), history(done))) == history(done)
    with pytest.raises(
        LaminaError, match=r"rewritten by \['tests.*WidenClasses'\].*resume with the model that the run"
    ):
        replay_training(rewrite(net(), WidenClasses()), Classification(), history(done))
