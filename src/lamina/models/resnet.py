"""ResNets: the ImageNet sizes and the small ones for small images, with slots for norm and activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

Make = Callable[..., nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the norm after each, the last activation after the sum."""

    expansion: ClassVar[int] = 1

    def __init__(self, channels: int, width: int, stride: int, norm: Make, activation: Make, conv: Make) -> None:
        super().__init__()
        self.conv1 = convolution(conv, channels, width, 3, stride)
        self.norm1 = norm(width)
        self.activation1 = activation()
        self.conv2 = convolution(conv, width, width, 3)
        self.norm2 = norm(width)
        self.shortcut = shortcut(channels, width, stride, norm, conv)
        self.activation2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, width, H / stride, W / stride)."""
        y = self.activation1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.activation2(y + self.shortcut(x))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to 4 * width; the stride is in the 3x3 one (version 1.5)."""

    expansion: ClassVar[int] = 4

    def __init__(self, channels: int, width: int, stride: int, norm: Make, activation: Make, conv: Make) -> None:
        super().__init__()
        out = self.expansion * width
        self.conv1 = convolution(conv, channels, width, 1)
        self.norm1 = norm(width)
        self.activation1 = activation()
        self.conv2 = convolution(conv, width, width, 3, stride)
        self.norm2 = norm(width)
        self.activation2 = activation()
        self.conv3 = convolution(conv, width, out, 1)
        self.norm3 = norm(out)
        self.shortcut = shortcut(channels, out, stride, norm, conv)
        self.activation3 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        y = self.activation1(self.norm1(self.conv1(x)))
        y = self.activation2(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return self.activation3(y + self.shortcut(x))


BLOCKS: dict[str, type[BasicBlock] | type[BottleneckBlock]] = {"basic": BasicBlock, "bottleneck": BottleneckBlock}


@register("model", "resnet", source="He et al. 2016")
class ResNet(nn.Module):
    """Stages of residual convolution blocks; each stage but the first halves the image.

    pixel_values (B, channels, H, W) -> logits (B, classes).

    Args:
        depths: blocks per stage.
        widths: channels per stage (inside a bottleneck; its output has four times as many).
        block: "basic" (two 3x3) or "bottleneck" (1x1, 3x3, 1x1).
        stem: "imagenet" (7x7 of stride 2 and max-pooling: a quarter of the size) or "small" (3x3, full size).
        norm: built as norm(channels), works on (B, channels, H, W).
        activation: built without arguments; "identity" where the norm brings its own.
        conv: the convolutions of the blocks and shortcuts (not the stem's, which reads the image), built as
            conv(channels, out, kernel_size, stride=, padding=, bias=False).
        head: built as head(channels, classes).
    Raises:
        RecipeError: unknown block or stem. ShapeError: depths and widths do not match, or a size is not positive.
    Source: He et al., Deep Residual Learning for Image Recognition (2016), arXiv 1512.03385, table 1 and section 4.2.
        Deviation: shortcuts that change the shape are always 1x1 convolutions (option B), in small nets too.
    Example:
        >>> import torch
        >>> ResNet((1, 1), (8, 16), stem="small", classes=5)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        block: Literal["basic", "bottleneck"] = "basic",
        stem: Literal["imagenet", "small"] = "imagenet",
        classes: int = 1000,
        channels: int = 3,
        norm: Annotated[Node, Slot("norm")] = "batch_norm_2d",
        activation: Annotated[Node, Slot("layer")] = "relu",
        conv: Annotated[Node, Slot("layer")] = "conv2d",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        _check(depths, widths, block, stem, classes, channels)
        make_norm, make_activation = factory("norm", norm), factory("layer", activation)
        make_conv = factory("layer", conv)
        make_block = BLOCKS[block]
        self.stem = make_stem(channels, widths[0], stem, make_norm, make_activation)
        self.stages = nn.ModuleList()
        channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(make_block(channels, width, stride, make_norm, make_activation, make_conv))
                channels = width * make_block.expansion
            self.stages.append(nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head: nn.Module = factory("layer", head)(channels, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.pool(x).flatten(1))


@register("model", source="He et al. 2016, table 1")
def resnet18(classes: int = 1000, channels: int = 3, *, conv: Annotated[Node, Slot("layer")] = "conv2d") -> ResNet:
    """ResNet-18: basic blocks 2-2-2-2; 11.7 M parameters."""
    return ResNet((2, 2, 2, 2), classes=classes, channels=channels, conv=conv)


@register("model", source="He et al. 2016, table 1")
def resnet34(classes: int = 1000, channels: int = 3, *, conv: Annotated[Node, Slot("layer")] = "conv2d") -> ResNet:
    """ResNet-34: basic blocks 3-4-6-3; 21.8 M parameters."""
    return ResNet((3, 4, 6, 3), classes=classes, channels=channels, conv=conv)


@register("model", source="He et al. 2016, table 1; stride: version 1.5")
def resnet50(classes: int = 1000, channels: int = 3, *, conv: Annotated[Node, Slot("layer")] = "conv2d") -> ResNet:
    """ResNet-50: bottleneck blocks 3-4-6-3; 25.6 M parameters."""
    return ResNet((3, 4, 6, 3), block="bottleneck", classes=classes, channels=channels, conv=conv)


@register("model", source="He et al. 2016, section 4.2")
def resnet20(
    classes: int = 10,
    channels: int = 3,
    *,
    norm: Annotated[Node, Slot("norm")] = "batch_norm_2d",
    activation: Annotated[Node, Slot("layer")] = "relu",
    conv: Annotated[Node, Slot("layer")] = "conv2d",
) -> ResNet:
    """ResNet-20 for images of about 32 x 32: basic blocks 3-3-3 of width 16-32-64; 0.27 M parameters."""
    options: dict[str, Any] = {"norm": norm, "activation": activation, "conv": conv}
    return ResNet((3, 3, 3), (16, 32, 64), stem="small", classes=classes, channels=channels, **options)


def make_stem(channels: int, width: int, stem: str, norm: Make, activation: Make) -> nn.Sequential:
    """Build the layers ahead of the first stage."""
    if stem == "small":
        return nn.Sequential(convolution(nn.Conv2d, channels, width, 3), norm(width), activation())
    return nn.Sequential(
        convolution(nn.Conv2d, channels, width, 7, 2), norm(width), activation(), nn.MaxPool2d(3, stride=2, padding=1)
    )


def shortcut(channels: int, out: int, stride: int, norm: Make, conv: Make) -> nn.Module:
    """Return the identity where the shape stays, else a 1x1 convolution with its norm."""
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(convolution(conv, channels, out, 1, stride), norm(out))


def convolution(make: Make, channels: int, out: int, size: int, stride: int = 1) -> nn.Module:
    """Make a convolution that keeps height and width (up to the stride), without a bias; He's start for torch's own."""
    layer = make(channels, out, size, stride=stride, padding=size // 2, bias=False)
    if type(layer) is nn.Conv2d:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _check(depths: Sequence[int], widths: Sequence[int], block: str, stem: str, classes: int, channels: int) -> None:
    if block not in BLOCKS:
        raise RecipeError(f"block must be 'basic' or 'bottleneck', got {block!r}")
    if stem not in ("imagenet", "small"):
        raise RecipeError(f"stem must be 'imagenet' or 'small', got {stem!r}")
    if len(depths) != len(widths) or not depths:
        raise ShapeError(f"ResNet takes one width per depth, got depths {tuple(depths)} and widths {tuple(widths)}")
    if min(*depths, *widths, classes, channels) < 1:
        raise ShapeError(f"ResNet: sizes must be positive, got {depths=}, {widths=}, {classes=}, {channels=}")
