from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor

from lamina.errors import ShapeError
from lamina.models import PairClassifier

ENCODER = {"name": "wide_transformer", "total_heads": 2, "width": 8, "head_width": 4}
SIZES: dict[str, Any] = {"encoder": ENCODER, "features": 6, "vocabulary": 32, "context": 12, "classes": 3}


def tokens(*shape: int) -> Tensor:
    return torch.randint(32, shape, generator=torch.Generator().manual_seed(0))


EXAMPLES = [
    Example(
        "model",
        "pair_classifier",
        SIZES,
        batch=lambda: {"input_ids": tokens(2, 2, 8), "labels": torch.tensor([0, 2])},
        bad={"features": 0},
    )
]


def test_both_sequences_go_through_the_one_encoder() -> None:
    torch.manual_seed(0)
    model, ids = PairClassifier(**SIZES, hidden=5).eval(), tokens(3, 2, 9)
    mask = torch.arange(9) < torch.randint(3, 10, (3, 2, 1))
    x, y = (model.encoder(ids[:, i], mask[:, i]) for i in range(2))
    assert x.shape == (3, 6)
    expected = model.head(model.activation(model.up(torch.cat((x, y, x * y, x - y), 1))))
    torch.testing.assert_close(model(ids, mask), expected)
    assert model(ids).shape == (3, 3)
    assert not torch.allclose(model(ids), model(ids.flip(1))), "the order of the pair counts"


@pytest.mark.parametrize("shape", [(3, 9), (3, 1, 9), (3, 3, 9)])
def test_one_sequence_is_no_pair(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="two sequences a row"):
        PairClassifier(**SIZES)(tokens(*shape))
