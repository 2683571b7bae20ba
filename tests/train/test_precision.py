"""The number format of the forward pass, and the sentence where a processor cannot do it."""

import pytest
import torch

from lamina.train import precision as precisions
from lamina.train.precision import TrainingError, autocast, slowdown, tell_if_slow

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_in_the_precision_asked_for(precision, dtype):
    with autocast(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_a_layer_that_the_processor_cannot_run_is_named_by_what_to_do():
    torchs = "could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload with"
    with (
        pytest.raises(TrainingError, match=r"cannot run a layer of the model in bf16 \(could .* primitive\): set prec"),
        autocast("bf16", CPU),
    ):
        raise RuntimeError(torchs)


def test_another_error_of_the_model_stays_itself():
    with pytest.raises(RuntimeError, match="shapes") as caught, autocast("bf16", CPU):
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, TrainingError)


@pytest.mark.parametrize(
    ("precision", "ratio", "told"), [("bf16", 12.3, True), ("bf16", 1.5, False), ("fp32", 9, False)]
)
def test_a_slow_precision_is_told(precision, ratio, told, monkeypatch, caplog):
    monkeypatch.setattr(precisions, "slowdown", lambda dtype: ratio)
    tell_if_slow(precision, CPU)
    assert [r.getMessage() for r in caplog.records] == (
        ["bf16 is 12 times slower than fp32 on this processor, which has no instructions for it: set precision to fp32"]
        if told
        else []
    )


def test_the_slowdown_is_a_ratio_of_times():
    assert slowdown(torch.float32, size=64) == 1
    assert 0 < slowdown(torch.bfloat16, size=64) < 1e4
