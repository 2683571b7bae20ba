"""3-D ResNets that turn volumes (brain scans, CT, video as a block) into features."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models.resnet import BasicBlock, BottleneckBlock, Make, convolution
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SIZES: dict[int, tuple[type[BasicBlock] | type[BottleneckBlock], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
}
"""Depth -> its block, and how many a stage."""

SMALLEST = {"imagenet": 32, "small": 8}
"""Stem -> the side below which the last stage would see nothing but padding."""

SOURCE = "Barbano et al., Anatomical Foundation Models for Brain MRIs (2024), arXiv 2408.07079, section 3"


@register("model", source=SOURCE)
class VolumeEncoder(nn.Module):
    """A ResNet of 3-D convolutions, from volumes to features averaged over the volume.

    inputs (B, in_channels, D, H, W) -> (B, out_features), 8 * width of them at depth 18 and 34, 32 * width at 50 and
    101. Also (B, V, in_channels, D, H, W), V views of each row -> (B, V, out_features). Any size from 32 a side, also
    of unequal sides (8 with the small stem).

    Args:
        depth: 18, 34 (blocks of two 3x3x3 convolutions), 50 or 101 (bottlenecks); 18 is what is published of AnatCL.
        in_channels: of the volume.
        width: channels of the first stage; each stage doubles them.
        stem: "imagenet" (7x7x7 of stride 2 and max-pooling: a quarter of the size) or "small" (3x3x3, full size).
        zero_init_residual: start every block as the identity, its last norm at 0.
        classes: outputs of a head behind the features (a class each, or one for a regression); None = features only.
        norm: built as norm(channels), works on (B, channels, D, H, W).
        activation: built without arguments; "identity" where the norm brings its own.
        head: built as head(out_features, classes).
    Raises:
        RecipeError: an unknown depth or stem, or zero_init_residual with a norm that has no weight.
        ShapeError: a size that is not positive, or (at the call) an input of another shape or too small.
    Source: He et al. (2016), arXiv 1512.03385, table 1, with 3-D convolutions, as in `SOURCE`. Convolutions start as
        there: normal by the fan-out.
    Example:
        >>> VolumeEncoder(width=8)(torch.randn(2, 1, 32, 32, 32)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101] = 18,
        in_channels: int = 1,
        width: int = 64,
        *,
        stem: Literal["imagenet", "small"] = "imagenet",
        zero_init_residual: bool = False,
        classes: int | None = None,
        norm: Annotated[Node, Slot("norm")] = "batch_norm_3d",
        activation: Annotated[Node, Slot("layer")] = "relu",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        _check(depth, in_channels, width, stem, classes)
        block, depths = SIZES[depth]
        make_norm, make_activation = factory("norm", norm), factory("layer", activation)
        self.depth, self.in_channels, self.smallest = depth, in_channels, SMALLEST[stem]
        self.stem = _stem(in_channels, width, stem, make_norm, make_activation)
        self.stages = nn.ModuleList()
        channels = width
        for stage, count in enumerate(depths):
            blocks: list[nn.Module] = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width << stage, stride, make_norm, make_activation, nn.Conv3d))
                channels = (width << stage) * block.expansion
            self.stages.append(nn.Sequential(*blocks))
        self.out_features = channels
        self.head: nn.Module = nn.Identity() if classes is None else factory("layer", head)(channels, classes)
        _initialize(self, zero_init_residual)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features, or the head's outputs, of volumes or of views of them."""
        self._check_input(inputs)
        if inputs.dim() == 6:
            rows: Tensor = self.head(self.features(inputs.flatten(0, 1)))
            return rows.unflatten(0, inputs.shape[:2])
        outputs: Tensor = self.head(self.features(inputs))
        return outputs

    def features(self, inputs: Tensor) -> Tensor:
        """Return what stands before the head: (B, in_channels, D, H, W) -> (B, out_features)."""
        x = self.stem(inputs)
        for stage in self.stages:
            x = stage(x)
        return x.mean((2, 3, 4))

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in (5, 6) or x.shape[-4] != self.in_channels or not x.is_floating_point():
            raise ShapeError(
                f"VolumeEncoder takes floating-point (B, {self.in_channels}, D, H, W), or (B, views, "
                f"{self.in_channels}, D, H, W), got {x.dtype} {tuple(x.shape)}"
            )
        if min(x.shape[-3:]) < self.smallest:
            raise ShapeError(
                f"VolumeEncoder with this stem takes volumes of at least {self.smallest} a side, got "
                f"{tuple(x.shape[-3:])}" + ("; stem='small' takes smaller ones" if self.smallest > 8 else "")
            )


@register("model", source=SOURCE)
def resnet3d_18(in_channels: int = 1, width: int = 64, *, classes: int | None = None) -> VolumeEncoder:
    """ResNet-18 on volumes: 33.2 M parameters, 512 features; the published AnatCL encoder."""
    return VolumeEncoder(18, in_channels, width, classes=classes)


@register("model", source=SOURCE)
def resnet3d_34(in_channels: int = 1, width: int = 64, *, classes: int | None = None) -> VolumeEncoder:
    """ResNet-34 on volumes: 63.5 M parameters, 512 features."""
    return VolumeEncoder(34, in_channels, width, classes=classes)


@register("model", source=SOURCE)
def resnet3d_50(in_channels: int = 1, width: int = 64, *, classes: int | None = None) -> VolumeEncoder:
    """ResNet-50 on volumes: 46.2 M parameters, 2048 features."""
    return VolumeEncoder(50, in_channels, width, classes=classes)


@register("model", source=SOURCE)
def resnet3d_101(in_channels: int = 1, width: int = 64, *, classes: int | None = None) -> VolumeEncoder:
    """ResNet-101 on volumes: 85.2 M parameters, 2048 features."""
    return VolumeEncoder(101, in_channels, width, classes=classes)


def load_anatcl(state: Mapping[str, Tensor], model: VolumeEncoder) -> VolumeEncoder:
    """Load published AnatCL weights into an encoder of the same sizes, in place; return it.

    The projection head that stands in the file, and a head of the model, are left as they are.

    Args:
        state: what `torch.load(file, weights_only=True)["model"]` gives of a file of EIDOSLAB/AnatCL, or the state
            of any 3-D ResNet in torchvision's names.
        model: with the published stem, `resnet3d_18()`.
    Raises:
        LaminaError: weights are missing, of other sizes, or not of an encoder's.
    Example:
        >>> load_anatcl({}, VolumeEncoder(width=8))
        Traceback (most recent call last):
        lamina.errors.LaminaError: the state lacks bn1.bias and 119 more: is it of a 3-D ResNet-18?
    """
    found = {k.removeprefix("encoder."): v for k, v in state.items() if not k.startswith(("head.", "fc."))}
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    names = {official_name(k): k for k in own}
    missing, extra = sorted(names.keys() - found.keys()), sorted(found.keys() - names.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LaminaError(f"the state lacks {missing[0]}{more}: is it of a 3-D ResNet-{model.depth}?")
    if extra:
        raise LaminaError(f"the state has {extra[0]}, which the encoder has not: is it of another depth?")
    for theirs, ours in names.items():
        if found[theirs].shape != own[ours].shape:
            sizes = f"{tuple(found[theirs].shape)}, the model's {ours} {tuple(own[ours].shape)}"
            raise LaminaError(f"the state's {theirs} is {sizes}")
    with torch.no_grad():
        for theirs, ours in names.items():
            own[ours].copy_(found[theirs])
    return model


def official_name(name: str) -> str:
    """Return what torchvision calls an entry of our state: `stages.1.0.norm2.weight` -> `layer2.0.bn2.weight`."""
    name = name.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.").replace("shortcut.", "downsample.")
    name = re.sub(r"^stages\.(\d)\.", lambda found: f"layer{int(found[1]) + 1}.", name)
    return re.sub(r"\bnorm(\d)\.", r"bn\1.", name)


def _stem(channels: int, width: int, stem: str, norm: Make, activation: Make) -> nn.Sequential:
    if stem == "small":
        return nn.Sequential(convolution(nn.Conv3d, channels, width, 3), norm(width), activation())
    read = convolution(nn.Conv3d, channels, width, 7, 2)
    return nn.Sequential(read, norm(width), activation(), nn.MaxPool3d(3, stride=2, padding=1))


def _initialize(model: VolumeEncoder, zero: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if not zero:
        return
    for module in model.modules():
        if isinstance(module, (BasicBlock, BottleneckBlock)):
            last = module.norm2 if isinstance(module, BasicBlock) else module.norm3
            if not isinstance(weight := getattr(last, "weight", None), Tensor):
                raise RecipeError(f"zero_init_residual needs a norm with a weight, and {type(last).__name__} has none")
            nn.init.zeros_(weight)


def _check(depth: int, channels: int, width: int, stem: str, classes: int | None) -> None:
    if depth not in SIZES:
        raise RecipeError(f"depth must be one of {', '.join(map(str, SIZES))}, got {depth}")
    if stem not in SMALLEST:
        raise RecipeError(f"stem must be 'imagenet' or 'small', got {stem!r}")
    if min(channels, width, 1 if classes is None else classes) < 1:
        raise ShapeError(f"VolumeEncoder: sizes must be positive, got in_channels={channels}, {width=}, {classes=}")
