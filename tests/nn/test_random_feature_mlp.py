"""The random-feature MLP: features, kernel, fit; as a head of other models and in their slots."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.models import ResNet, Transformer, VisionTransformer
from lamina.nn import RandomFeatureMLP


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


EXAMPLES = [
    Example(
        "layer",
        "random_feature_mlp",
        {"in_features": 5, "out_features": 3, "num_features": 7},
        lambda: (normal(4, 2, 5, dtype=torch.float32),),
        bad={"num_features": 0},
    )
]


def layer(width: int = 5, outputs: int = 1, features: int = 7, **options: Any) -> RandomFeatureMLP:
    return RandomFeatureMLP(width, outputs, features, **options).double()


@pytest.mark.parametrize("size", [1, 7, 63])
def test_features_are_those_of_the_loop_in_every_precision(size: int) -> None:
    made, x = layer(size), normal(3, size)
    heads, ones = made.features.weight.tolist(), [[*row, 1.0] for row in x.tolist()]
    rows = [[max(0.0, sum(w * v for w, v in zip(h, row, strict=True))) for h in heads] for row in ones]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(made.features(x), expected, rtol=0, atol=1e-12)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        low = copy.deepcopy(made).to(dtype)
        assert (low.features(x.to(dtype)).double() - expected).abs().max() <= close * expected.abs().max()
        assert low(x.to(dtype)).dtype == dtype
    with torch.no_grad():
        made.value.normal_()
        made.intercept.normal_()
    found = made(x.view(3, 1, size))
    torch.testing.assert_close(found[:, 0], expected @ made.value.t() + made.intercept)


def test_weights_have_the_deviation_of_the_scale_and_are_frozen() -> None:
    made = layer(100, features=500, weight_scale=4.0)
    assert made.features.weight.std().item() == pytest.approx(0.4, rel=0.01)
    assert [n for n, _ in made.named_parameters()] == ["value"]
    before = torch.get_rng_state()
    assert torch.equal(layer(3).features.weight, layer(3).features.weight)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert not torch.equal(layer(3, seed=1).features.weight, layer(3).features.weight)


def test_the_kernel_is_what_many_features_come_to() -> None:
    first, second = normal(3, 4), normal(2, 4, seed=1)
    exact = layer(4, weight_scale=2.0).kernel(first, second)
    errors = []
    for count in (1000, 10_000):
        drawn = []
        for seed in range(40):
            made = layer(4, features=count, weight_scale=2.0, seed=seed)
            drawn.append(made.features(first) @ made.features(second).t() / count - exact)
        errors.append(torch.stack(drawn).square().mean().sqrt().item())
    assert errors[1] < 0.03 * exact.abs().mean()
    assert errors[0] / errors[1] == pytest.approx(math.sqrt(10), rel=0.35)


def test_it_learns_what_a_linear_layer_cannot() -> None:
    x, test = normal(400, 5), normal(100, 5, seed=1)
    y, truth = (torch.stack([v[:, 0].abs(), v[:, 1] * v[:, 2]], 1) for v in (x, test))
    made = layer(outputs=2, features=300, weight_scale=2.0)
    assert made.fit(x, y) > 0
    left = (made(test) - truth).square().mean(0) / truth.var(0)
    assert left.max() < 0.2
    loaded = layer(outputs=2, features=300, weight_scale=2.0)
    loaded.load_state_dict(copied(made))
    assert torch.equal(loaded(test), made(test))


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


MODELS = [
    (lambda **o: Transformer(1, 8, 2, vocabulary=7, context=4, **o), torch.zeros(2, 4, dtype=torch.long)),
    (lambda **o: Transformer(1, 8, 2, vocabulary=9, context=4, classes=7, **o), torch.zeros(2, 4, dtype=torch.long)),
    (lambda **o: VisionTransformer(8, 4, 1, 8, 2, classes=7, **o), torch.zeros(2, 3, 8, 8)),
    (lambda **o: ResNet((1,), (8,), stem="small", classes=7, **o), torch.zeros(2, 3, 8, 8)),
]


@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_it_stands_in_the_head_slot_of_our_models(make: Any, inputs: Tensor) -> None:
    model = make(head={"name": "random_feature_mlp", "num_features": 5})
    assert (model.head.in_features, model.head.out_features, model.head.num_features) == (8, 7, 5)
    assert model(inputs).shape[-1] == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_features": 0}, "at least 1, got 0, 1024"),
        ({"num_features": 0}, "at least 1, got 5, 0"),
        ({"out_features": 0}, "out_features of at least 1, got 0"),
        ({"weight_scale": 0.0}, "weight_scale must be above 0"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        RandomFeatureMLP(**{"in_features": 5, **options})


def test_bad_input_is_refused_with_its_shape() -> None:
    for x, words in (
        (normal(2, 4), r"floating-point \(\.\.\., 5\), got torch.float64 \(2, 4\)"),
        (torch.zeros(2, 5, dtype=torch.long), r"got torch.int64 \(2, 5\)"),
        (torch.full((2, 5), math.nan).double(), r"NaN or infinity in its input of shape \(2, 5\)"),
    ):
        with pytest.raises(LaminaError, match=words):
            layer()(x)
    assert layer()(torch.zeros(0, 5).double()).shape == (0, 1)
