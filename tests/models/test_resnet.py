from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models.resnet import ResNet, resnet18, resnet20, resnet34, resnet50


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TINY = {"depths": [1, 2], "widths": [4, 8], "stem": "small", "classes": 5}
BOTTLENECK = {"depths": [1, 2], "widths": [2, 4], "block": "bottleneck", "classes": 3}
EXAMPLES = [
    Example(
        "model",
        "resnet",
        options=TINY,
        batch=lambda: {"pixel_values": images(4, 3, 8, 8), "labels": torch.tensor([0, 4, 1, 2])},
        bad={"widths": [4]},
    ),
    Example(
        "model",
        "resnet",
        options=BOTTLENECK,
        batch=lambda: {"pixel_values": images(4, 3, 40, 40), "labels": torch.tensor([0, 2, 1, 2])},
        bad={"classes": 0},
    ),
    *(
        Example(
            "model",
            name,
            options={"classes": 3},
            batch=lambda: {"pixel_values": images(2, 3, 40, 40), "labels": torch.tensor([0, 2])},
            size_of="resnet",
        )
        for name in ("resnet18", "resnet20", "resnet34", "resnet50")
    ),
]


def make(**options: object) -> ResNet:
    torch.manual_seed(0)
    model = ResNet(**(TINY | options)).eval()  # type: ignore[arg-type]
    for module in model.modules():  # statistics and scales that a fresh network would not show
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
    return model


@pytest.mark.parametrize(
    ("build", "count"),
    [(resnet18, 11_689_512), (resnet34, 21_797_672), (resnet50, 25_557_032), (resnet20, 272_474)],
)
def test_parameter_counts(build: type[ResNet], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


def rename(name: str, bottleneck: bool) -> str:
    """transformers' names to ours."""
    name = name.replace("resnet.embedder.embedder.convolution", "stem.0")
    name = name.replace("resnet.embedder.embedder.normalization", "stem.1")
    name = name.replace("resnet.encoder.stages.", "stages.").replace(".layers.", ".")
    for index in range(3 if bottleneck else 2):
        name = name.replace(f".layer.{index}.convolution", f".conv{index + 1}")
        name = name.replace(f".layer.{index}.normalization", f".norm{index + 1}")
    # Both "layers" of a stage and "layer" of a block end in a number: the block's index is what is left.
    name = name.replace(".shortcut.convolution", ".shortcut.0").replace(".shortcut.normalization", ".shortcut.1")
    return name.replace("classifier.1", "head")


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_it_is_transformers_resnet(block: str) -> None:
    transformers = pytest.importorskip("transformers")
    bottleneck = block == "bottleneck"
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[32, 64] if bottleneck else [8, 16],
        depths=[2, 1],
        layer_type=block,
        num_labels=5,
    )
    ours = make(depths=[2, 1], widths=[8, 16], block=block, stem="imagenet")
    torch.manual_seed(1)
    peer = transformers.ResNetForImageClassification(config).eval()
    named = {rename(name, bottleneck): name for name in peer.state_dict()}
    assert set(named) == set(ours.state_dict())
    peer.load_state_dict({named[name]: tensor for name, tensor in ours.state_dict().items()})
    x = images(2, 3, 37, 31)
    for mode in (False, True):
        got, want = ours.train(mode)(x), peer.train(mode)(x).logits
        assert torch.allclose(got, want, atol=1e-5)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    theirs = {rename(name, bottleneck): p.grad for name, p in peer.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name], atol=1e-3, rtol=1e-4), name


def test_small_stem_written_out() -> None:
    model = make(depths=[1, 1])
    state = model.state_dict()

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = images(2, 3, 7, 9)
    y = norm(conv(x, "stem.0"), "stem.1").relu()
    for stage, stride in ((0, 1), (1, 2)):
        name = f"stages.{stage}.0"
        z = norm(conv(y, f"{name}.conv1", stride), f"{name}.norm1").relu()
        z = norm(conv(z, f"{name}.conv2"), f"{name}.norm2")
        y = (z + (norm(conv(y, f"{name}.shortcut.0", 2), f"{name}.shortcut.1") if stride == 2 else y)).relu()
    want = y.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]
    assert torch.allclose(model(x), want, atol=1e-5)


def test_slots_for_norm_and_activation() -> None:
    model = make(norm=lambda channels: nn.GroupNorm(2, channels), activation="silu")
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU)) for m in model.modules())
    assert sum(isinstance(m, nn.GroupNorm) for m in model.modules()) == 1 + 2 * 3 + 1
    assert sum(isinstance(m, nn.SiLU) for m in model.modules()) == 1 + 2 * 3


def test_initialisation_keeps_the_variance_of_gradients() -> None:
    torch.manual_seed(0)
    weight = resnet18().stages[3][0].conv1.weight.detach()  # 256 to 512 channels: counted by what goes out
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_compiles_and_stays_close_in_bfloat16() -> None:
    model, x = make(block="bottleneck"), images(2, 3, 9, 7)
    full = model(x)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), full, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block": "wide"}, RecipeError, "'basic' or 'bottleneck', got 'wide'"),
        ({"stem": "tiny"}, RecipeError, "'imagenet' or 'small', got 'tiny'"),
        ({"widths": [4]}, ShapeError, r"one width per depth, got depths \(1, 2\) and widths \(4,\)"),
        ({"classes": 0}, ShapeError, "sizes must be positive"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)
