from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.rewrite.batch_norms import drawn, images, small
from torch import Tensor, nn

from lamina.batches import call
from lamina.errors import AnatomyError, LaminaError
from lamina.nn import PRepBN, RepBN
from lamina.rewrite import Calibrate, ConvBN, history, replay, rewrite
from lamina.train.phases import Scheduled, carry_out

EXAMPLES = [Example("pass", "calibrate", {"batches": 2}, model=small, batch=images, bad={"batches": 0})]


class Net(nn.Module):
    """Two norms, the second behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = PRepBN(4), nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.first(x)))


def batches(count: int) -> list[dict[str, Tensor]]:
    return [{"inputs": 3 + 2 * drawn(9, 4, seed=s)} for s in range(count)]


def test_it_is_the_average_over_batches_with_dropout_off_and_touches_nothing_else() -> None:
    torch.manual_seed(0)
    model = Net().train()
    model.second.momentum = 0.3
    given = [b["inputs"] for b in batches(3)]
    kept = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    decision = Calibrate(3).decide(model, batches(5))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert (model.second.momentum, model.first.rep.momentum) == (0.3, 0.1)
    model = rewrite(model, Calibrate(3), data=batches(5))
    rep: Any = model.first.rep
    torch.testing.assert_close(rep.running_mean, torch.stack([x.mean(0) for x in given]).mean(0))
    torch.testing.assert_close(rep.running_var, torch.stack([x.var(0) for x in given]).mean(0))
    # What the second sees: the first with the statistics of each batch (gains 1, skip 1), nothing dropped.
    seen = [x + (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in given]
    torch.testing.assert_close(model.second.running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
    torch.testing.assert_close(model.second.running_var, torch.stack([x.var(0) for x in seen]).mean(0))
    assert model.second.num_batches_tracked == rep.num_batches_tracked == decision.batches == 3
    changed = {"first.rep.running_mean", "first.rep.running_var", "second.running_mean", "second.running_var"}
    changed |= {"first.rep.num_batches_tracked", "second.num_batches_tracked"}
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, kept[k])} == changed


def test_the_decision_holds_the_very_statistics() -> None:
    model, original = Net(), Net()
    model = rewrite(model, Calibrate(), data=batches(2))
    record = history(model)[0]
    assert record.decision["batches"] == 2, "the data ended before"
    again = replay(original, history(model))
    for a, b in zip(again.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)
    assert Calibrate(1).decide(model, batches(1)).table() == "statistics of 2 norms over 1 batches"


def test_frozen_blocks_keep_their_statistics() -> None:
    model = rewrite(small().eval(), ConvBN(freeze_statistics=True))
    with pytest.raises(AnatomyError, match="no norm with running statistics"):
        Calibrate().decide(model, [images()])
    torch.manual_seed(0)
    model = small().eval()
    expected = copy.deepcopy(model).train()
    for norm in (m for m in expected.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
        norm.reset_running_stats()
    call(expected, images())
    found = rewrite(model, ConvBN(), Calibrate(1), data=[images()])
    for (name, a), b in zip(expected.named_buffers(), found.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_trainer_gives_it_as_many_batches_as_it_asks_for() -> None:
    from tests.train.tiny import data, net

    model, _ = carry_out(
        Scheduled(Calibrate(11), "after"),
        net(),
        None,
        data=data(),
        seed=0,
        device=torch.device("cpu"),
        optimizer=None,
    )
    assert history(model)[0].decision["batches"] == 11


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(LaminaError, match="batches must be at least 1, got 0"):
        Calibrate(0)
    with pytest.raises(AnatomyError, match="no norm with running statistics"):
        Calibrate().decide(nn.Linear(2, 2), batches(1))
    with pytest.raises(AnatomyError, match="needs data"):
        Calibrate().decide(Net())
    with pytest.raises(AnatomyError, match=r"'first\.rep' saw no batch"):
        Calibrate().decide(Net(), [])
    with pytest.raises(AnatomyError, match="meta device"):
        Calibrate().decide(nn.Sequential(RepBN(4)).to("meta"), batches(1))
