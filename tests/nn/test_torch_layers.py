from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example

from lamina import registry
from lamina.nn.torch_layers import ACTIVATIONS, NORMS

SHAPES = {"batch_norm_1d": (4, 3), "batch_norm_2d": (4, 3, 2, 2), "batch_norm_3d": (4, 3, 2, 2, 2)}

EXAMPLES = [Example("layer", name, inputs=lambda: (torch.randn(2, 5),)) for name in ACTIVATIONS] + [
    Example("norm", name, options={"num_features": 3}, inputs=lambda shape=SHAPES[name]: (torch.randn(shape),))
    for name in NORMS
]
EXAMPLES.append(Example("layer", "linear", {"in_features": 5, "out_features": 3}, inputs=lambda: (torch.randn(2, 5),)))

EXAMPLES.append(
    Example(
        "layer",
        "conv2d",
        {"in_channels": 2, "out_channels": 3, "kernel_size": 3},
        inputs=lambda: (torch.randn(1, 2, 4, 4),),
    )
)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torchs_functions(name: str) -> None:
    x = torch.linspace(-3, 3, 13)
    function = {"identity": lambda y: y}.get(name) or getattr(torch.nn.functional, name, None) or getattr(torch, name)
    assert torch.equal(registry.find("layer", name)()(x), function(x))


@pytest.mark.parametrize("name", NORMS)
def test_norms_standardise_channels(name: str) -> None:
    x = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0)) * 3 + 1
    y = registry.find("norm", name)(3)(x).transpose(0, 1).flatten(1)
    assert torch.allclose(y.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(y.var(1, unbiased=False), torch.ones(3), atol=1e-3)
