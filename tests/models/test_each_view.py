from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.models import EachView, VolumeEncoder
from lamina.recipe import build

ENCODER: dict[str, Any] = {"name": "resnet", "depths": [1], "widths": [4], "stem": "small", "head": "identity"}


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


EXAMPLES = [
    Example(
        "model",
        "each_view",
        {"encoder": ENCODER, "channels": 1, "classes": 4},
        batch=lambda: {"inputs": images(3, 2, 1, 8, 8), "labels": torch.zeros(3, 2, dtype=torch.long)},
        bad={"dims": 1},
    )
]


def test_every_view_is_a_row_of_the_encoder() -> None:
    torch.manual_seed(0)
    model = build({"name": "each_view", "encoder": ENCODER}, "model", channels=1, classes=10, image=8).eval()
    x = images(5, 3, 1, 8, 8)
    found = model(x)
    assert found.shape == (5, 3, 4)
    torch.testing.assert_close(found, torch.stack([model.encoder(x[:, v]) for v in range(3)], dim=1))
    torch.testing.assert_close(model(x[:, 0]), found[:, 0])
    torch.testing.assert_close(found[:, 0], model(x[:, :1])[:, 0])


def test_any_module_will_do() -> None:
    linear = nn.Linear(7, 2)
    model = EachView(linear, dims=2)
    assert model.encoder is linear
    assert model(images(3, 2, 7)).shape == (3, 2, 2)

    class Named(nn.Module):
        def forward(self, pixel_values: Tensor) -> tuple[Tensor, None]:
            return pixel_values.mean((2, 3)), None

    assert EachView(Named())(images(3, 2, 4, 5, 5)).shape == (3, 2, 4)
    torch.manual_seed(0)
    volumes, x = VolumeEncoder(width=2, stem="small").eval(), images(2, 2, 1, 8, 8, 8)
    torch.testing.assert_close(EachView(volumes, dims=5)(x), volumes(x))


def test_bad_input_is_met_with_a_sentence() -> None:
    with pytest.raises(LaminaError, match="dims must be at least 2"):
        EachView(nn.Identity(), dims=1)
    for shape in ((3, 8, 8), (3, 2, 2, 1, 8, 8)):
        with pytest.raises(ShapeError, match="rows of 4 dimensions with the batch's, or one more for views"):
            EachView(nn.Identity())(images(*shape))
