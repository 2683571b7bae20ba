"""The number format of the forward pass, and the sentence where a processor cannot do it."""

import pytest
import torch

from lamina.train.precision import TrainingError, autocast

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
