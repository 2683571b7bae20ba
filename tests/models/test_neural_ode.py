from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina.errors import LaminaError, ShapeError
from lamina.models import NeuralODEClassifier, NeuralSDEClassifier
from lamina.nn import TimeMLP

STEPS = "an adaptive solve has as many steps as its numbers ask for"


def images(rows: int = 3) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(rows, 1, 3, 3, generator=torch.Generator().manual_seed(0))}


EXAMPLES = [
    Example(
        "model",
        "neural_ode_classifier",
        {"features": 9, "classes": 3, "hidden": 5},
        batch=images,
        bad={"augment": -1},
        no_compile=STEPS,
    ),
    Example(
        "model",
        "neural_sde_classifier",
        {"features": 9, "classes": 3, "width": 4, "hidden": 5},
        batch=images,
        bad={"trajectories": 0},
        no_compile=STEPS,
    ),
]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_defaults_are_the_paper_s_networks() -> None:
    ode, sde = NeuralODEClassifier(), NeuralSDEClassifier()
    assert count(ode) == (785 * 100 + 100) + (101 * 784 + 784) + (784 * 10 + 10)
    assert count(sde) == (784 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + (32 * 32 + 32) + (32 * 10 + 10)
    assert isinstance(ode.ode.func, TimeMLP)
    assert ode.ode.func.up.weight.shape == (100, 785)
    assert (sde.sde.rtol, sde.sde.atol) == (0.14, 0.14)


def test_the_class_is_read_where_the_state_ends() -> None:
    torch.manual_seed(0)
    model, x = NeuralODEClassifier(9, 3, hidden=5, augment=2), images()["pixel_values"]
    z = torch.cat([x.flatten(1), torch.zeros(3, 2)], 1)
    torch.testing.assert_close(model(x), model.head(model.ode(z)))


def test_images_of_any_size_stay_images_for_a_field_of_maps() -> None:
    model = NeuralODEClassifier(3, 4, hidden=6, augment=1, func="time_conv", maps=True)
    for size in (1, 7, 12):
        assert model(torch.rand(2, 3, size, size + 1)).shape == (2, 4)
    with pytest.raises(ShapeError, match=r"images \(B, 3, H, W\)"):
        model(torch.rand(2, 1, 4, 4))


def test_evaluation_averages_trajectories() -> None:
    torch.manual_seed(0)
    model = NeuralSDEClassifier(9, 3, width=4, hidden=5, trajectories=3).eval()
    x = images()["pixel_values"]
    z = model.embed(x.flatten(1))
    paths = [model.head(model.sde(z, seed=i)) for i in range(3)]
    torch.testing.assert_close(model(x), torch.stack(paths).mean(0))
    assert model.train()(x).shape == (3, 3)


def test_any_field_and_head_go_into_the_slots() -> None:
    model = NeuralODEClassifier(
        9, 3, hidden=8, func="feed_forward", head={"name": "prototype_head", "num_prototypes": 4}
    )
    assert model(images()["pixel_values"]).shape == (3, 3)
    model = NeuralSDEClassifier(9, 3, width=4, drift="time_mlp", diffusion="time_mlp", hidden=5)
    assert model(images()["pixel_values"]).shape == (3, 3)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match="9 numbers a row"):
        NeuralODEClassifier(9, 3)(torch.rand(2, 8))
    with pytest.raises(ShapeError, match="features must be at least 1"):
        NeuralODEClassifier(0)
    with pytest.raises(LaminaError, match="above 0"):
        NeuralSDEClassifier(9, rtol=0.0)
