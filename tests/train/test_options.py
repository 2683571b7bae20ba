from __future__ import annotations

import pytest

from lamina.errors import LaminaError
from lamina.train import TrainOptions


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 1.5}, r"steps must be a whole number of at least 1, got 1\.5"),
        ({"accumulate": True}, "accumulate must be a whole number of at least 1, got True"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"keep_last": 0}, "keep_last must be a whole number of at least 1, got 0"),
        ({"evaluate_batches": 0}, "evaluate_batches must be a whole number of at least 1, got 0"),
        ({"precision": "fp15"}, "precision must be one of fp32, bf16, fp16, got 'fp15'; did you mean"),
        ({"clip": 0.0}, r"clip must be a number above 0 or None, got 0\.0"),
        ({"clip": float("nan")}, "clip must be a number above 0 or None, got nan"),
        ({"patience": 2}, "patience=2 counts evaluations, but evaluate_every is 0"),
        ({"keep_best": True}, "keep_best compares evaluations, but evaluate_every is 0"),
    ],
)
def test_bad_numbers_are_refused_by_name(options, sentence) -> None:
    with pytest.raises(LaminaError, match=sentence):
        TrainOptions(**{"steps": 10, **options})
