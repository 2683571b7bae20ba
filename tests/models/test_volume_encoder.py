from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import VolumeEncoder, load_anatcl
from lamina.rewrite import Replace, rewrite

SIZES = {
    "resnet3d_18": (18, 33_160_000, 512),
    "resnet3d_34": (34, 63_469_632, 512),
    "resnet3d_50": (50, 46_155_072, 2048),
    "resnet3d_101": (101, 85_201_216, 2048),
}
TINY: dict[str, Any] = {"width": 2, "stem": "small"}


def scans(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


EXAMPLES = [
    Example("model", "volume_encoder", TINY, batch=lambda: {"inputs": scans(3, 1, 9, 8, 11)}, bad={"depth": 20}),
    *(
        Example(
            "model", name, {"width": 8}, batch=lambda: {"inputs": scans(2, 1, 32, 32, 32)}, size_of="volume_encoder"
        )
        for name in SIZES
    ),
]


def make(**options: Any) -> VolumeEncoder:
    torch.manual_seed(0)
    return VolumeEncoder(**(TINY | options)).eval()


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    depth, count, features = SIZES[name]
    with torch.device("meta"):
        model = VolumeEncoder(depth)
        assert sum(p.numel() for p in model.parameters()) == count
        if depth in (18, 50):
            assert model(torch.empty(2, 1, 121, 128, 121)).shape == (2, features)
    assert model.out_features == features


def official(model: VolumeEncoder) -> dict[str, Tensor]:
    """The state of an encoder in the published file's names, and weights that are none of the start's."""
    renamed, draw = {}, torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        told = name.replace("stem.0", "conv1").replace("stem.1", "bn1").replace("shortcut", "downsample")
        for stage in range(4):
            told = told.replace(f"stages.{stage}.", f"layer{stage + 1}.")
        for norm in (1, 2, 3):
            told = told.replace(f".norm{norm}", f".bn{norm}")
        moved = value.float() + 0.1 * torch.rand(value.shape, generator=draw)
        renamed[f"encoder.{told}"] = moved.to(value.dtype)
    return renamed | {"head.0.weight": torch.zeros(2, 2)}


def plain(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published ResNet-18 on volumes, step by step, from its state."""
    state = {k.removeprefix("encoder."): v for k, v in state.items()}

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return nn.functional.conv3d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{n}"][:, None, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = norm(conv(x, "conv1", 2), "bn1").relu()
    x = nn.functional.max_pool3d(x, 3, 2, 1)
    for layer in range(1, 5):
        for block in range(2):
            at = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = norm(conv(x, f"{at}.conv1", stride), f"{at}.bn1").relu()
            y = norm(conv(y, f"{at}.conv2"), f"{at}.bn2")
            if stride == 2:
                x = norm(conv(x, f"{at}.downsample.0", 2), f"{at}.downsample.1")
            x = (x + y).relu()
    return x.mean((2, 3, 4))


def test_published_weights_give_the_published_features() -> None:
    model = make(stem="imagenet")
    state, x = official(model), scans(2, 1, 33, 40, 35)
    before = model(x)
    assert load_anatcl(state, model) is model
    torch.testing.assert_close(model(x), plain(state, x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x), before)


def test_states_that_do_not_fit_are_refused() -> None:
    model = make(stem="imagenet")
    state = official(model)
    for change, sentence in (
        ({}, r"lacks conv1\.weight: is it of a 3-D ResNet-18"),
        ({"encoder.conv1.weight": torch.zeros(1), "encoder.conv9.weight": torch.zeros(1)}, "has conv9.weight, which"),
        ({"encoder.conv1.weight": torch.zeros(1)}, r"conv1\.weight is \(1,\), the model's stem\.0\.weight \(2, 1, 7"),
    ):
        rest = {k: v for k, v in state.items() if k != "encoder.conv1.weight"} | change
        with pytest.raises(LaminaError, match=sentence):
            load_anatcl(rest, model)


@pytest.mark.parametrize("depth", [34, 50])
def test_a_state_that_lacks_weights_is_told_of_by_the_depth_of_the_model(depth: Literal[34, 50]) -> None:
    with torch.device("meta"):
        model = VolumeEncoder(depth, width=2)
    with pytest.raises(LaminaError, match=f"is it of a 3-D ResNet-{depth}"):
        load_anatcl({}, model)


def test_views_are_rows_of_their_own() -> None:
    model, x = make(), scans(2, 3, 1, 8, 8, 8)
    found = model(x)
    assert found.shape == (2, 3, 16)
    torch.testing.assert_close(found, torch.stack([model(x[:, v]) for v in range(3)], dim=1))


def test_a_head_in_its_slot_reads_the_features() -> None:
    model, x = make(classes=3), scans(2, 1, 8, 8, 8)
    torch.testing.assert_close(model(x), model.head(model.features(x)))
    assert model(x).shape == (2, 3)
    assert model(scans(2, 2, 1, 8, 8, 8)).shape == (2, 2, 3)
    replaced = rewrite(model, Replace("head", "prototype_head", options={"num_prototypes": 4}))
    assert type(replaced.head).__name__ == "PrototypeHead"
    assert replaced(x).shape == (2, 3)


def test_norm_and_activation_are_slots() -> None:
    model = make(activation="silu", norm=lambda channels: nn.GroupNorm(1, channels))
    assert any(isinstance(m, nn.SiLU) for m in model.modules())
    assert not any(isinstance(m, (nn.ReLU, nn.BatchNorm3d)) for m in model.modules())
    assert model(scans(1, 1, 8, 8, 8)).isfinite().all()


def test_it_starts_as_the_paper_says_and_residuals_at_zero_if_asked() -> None:
    model = make(width=8)
    for block in (model.stages[1][0], model.stages[3][0]):
        weight = block.conv1.weight
        assert weight.shape[0] == 2 * weight.shape[1]
        assert float(weight.detach().std()) == pytest.approx((2 / (weight.shape[0] * 27)) ** 0.5, rel=0.1)
        assert torch.equal(block.norm2.weight, torch.ones_like(block.norm2.weight))
    for depth, last in ((18, "norm2"), (50, "norm3")):
        zero = make(depth=depth, zero_init_residual=True)
        assert all(not getattr(b, last).weight.any() for stage in zero.stages for b in stage)
        assert zero.stages[0][0].norm1.weight.all()


BAD: list[tuple[dict[str, Any], tuple[int, ...], str]] = [
    ({"stem": "imagenet"}, (1, 1, 31, 40, 40), r"at least 32 a side, got \(31, 40, 40\); stem='small'"),
    ({}, (1, 1, 7, 8, 8), r"at least 8 a side, got \(7, 8, 8\)$"),
    ({}, (1, 8, 8, 8), r"takes floating-point \(B, 1, D, H, W\), .*got torch.float32 \(1, 8, 8, 8\)"),
    ({"in_channels": 2}, (1, 1, 8, 8, 8), r"takes floating-point \(B, 2, D, H, W\)"),
]


@pytest.mark.parametrize(("options", "shape", "sentence"), BAD)
def test_inputs_that_do_not_fit_are_refused(options: dict[str, Any], shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ShapeError, match=sentence):
        make(**options)(torch.zeros(shape))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="depth must be one of 18, 34, 50, 101, got 20"):
        VolumeEncoder(20)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="stem must be 'imagenet' or 'small', got 'tiny'"):
        VolumeEncoder(stem="tiny")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="sizes must be positive, got in_channels=0, width=64, classes=None"):
        VolumeEncoder(in_channels=0)
    with pytest.raises(RecipeError, match="zero_init_residual needs a norm with a weight, and Identity has none"):
        make(norm=nn.Identity, zero_init_residual=True)
