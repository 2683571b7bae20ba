"""Terminator: an image network without attention and without residuals, of slow kernels and fast activations.

Source: Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction (2024), arXiv 2401.17948.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.nn.hyper_convolution.block import BRANCHES, SFNEBlock
from lamina.nn.hyper_convolution.global_product import check_square
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SKIPS: dict[int, tuple[int, ...]] = {2: (0,), 3: (1,), 4: (2, 1)}
"""The paper's: which blocks' outputs a block reads besides the one before it."""


@register("model", source="Zhang 2024, arXiv 2401.17948")
class Terminator(nn.Module):
    """Blocks of global and local products of activations with kernels that small networks compute from coordinates.

    pixel_values (B, channels, S, S) -> logits (B, classes). Square images of any size: kernels and biases are asked
    for on the image's own grid; the local kernels keep their sides in pixels. As published, batch statistics and batch
    means are used in evaluation too: an answer depends on the images beside it (see track_stats and per_sample).

    Args:
        classes: how many. image: S it is trained on, at least 2. channels: of the images.
        bottlenecks: by how much each block widens; block i has channels * bottlenecks[0] * ... * bottlenecks[i - 1]
            channels.
        slow_layers: products in the global slow net of each block; one number for all, or one a block.
        local_kernels, groups, branches, omega0: see `SFNEBlock`.
        dropout: of whole channels after each block, in training; one number for all, or one a block.
        skips: block -> earlier blocks whose outputs it reads too; None = the paper's (2: 0; 3: 1; 4: 2 and 1). Entries
            of blocks that do not exist are not read.
        track_stats, per_sample: both True: an answer in evaluation depends on its image alone.
        sync: batch statistics and means over all data-parallel processes.
        head: built as head(width, classes).
    Raises:
        RecipeError: lists of another length than bottlenecks, a skip that is not from an earlier block, an unknown
            branch. ShapeError: sizes, groups or even kernels that do not fit; at the call, images that are not square
            or have other channels.
    Source: the released CIFAR-10 definitions: 1,336,855 parameters, of which 25 are the scalar biases.
    Example:
        >>> Terminator(5, 8, 1, bottlenecks=(12, 2))(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        classes: int = 10,
        image: int = 32,
        channels: int = 3,
        *,
        bottlenecks: Sequence[int] = (4, 3, 2, 2, 2),
        slow_layers: int | Sequence[int] | None = None,
        local_kernels: Sequence[int] = (3, 9, 5, 7),
        groups: int = 12,
        dropout: float | Sequence[float] | None = None,
        skips: Mapping[int, Sequence[int]] | None = None,
        branches: Sequence[str] = BRANCHES,
        omega0: float = 10.0,
        track_stats: bool = False,
        per_sample: bool = False,
        sync: bool = False,
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        if classes < 1 or channels < 1 or not bottlenecks:
            what = f"classes={classes}, channels={channels} and bottlenecks={list(bottlenecks)}"
            raise ShapeError(f"Terminator: classes, channels and the number of blocks must be at least 1, got {what}")
        depth = len(bottlenecks)
        layers = _each("slow_layers", (3, *[2] * (depth - 1)) if slow_layers is None else slow_layers, depth)
        rates = _each("dropout", (0.0, *[0.05] * (depth - 1)) if dropout is None else dropout, depth)
        self.channels = channels
        self.skips = [tuple((SKIPS if skips is None else skips).get(i, ())) for i in range(depth)]
        shared: dict[str, Any] = {"local_kernels": local_kernels, "groups": groups, "branches": branches}
        shared |= {"omega0": omega0, "track_stats": track_stats, "per_sample": per_sample, "sync": sync}
        self.blocks = nn.ModuleList()
        widths = [channels]
        for i, bottleneck in enumerate(bottlenecks):
            early = [j for j in self.skips[i] if not 0 <= j < i]
            if early:
                raise RecipeError(f"skips: block {i} cannot read the output of block {early[0]}, only of earlier ones")
            read = [widths[j + 1] for j in self.skips[i]]
            own = {"slow_layers": layers[i], "dropout": rates[i], "skips": read}
            self.blocks.append(SFNEBlock(widths[i], bottleneck, image, **own, **shared))
            widths.append(widths[i] * bottleneck)
        self.head: nn.Module = factory("layer", head)(widths[-1], classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        check_square("Terminator", pixel_values, self.channels)
        x = pixel_values
        outputs: list[Tensor] = []
        for block, skips in zip(self.blocks, self.skips, strict=True):
            x = block(x, *(outputs[j] for j in skips))
            outputs.append(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def slow_kernels(self) -> list[tuple[Tensor, int]]:
        """Return every block's global slow kernel (1, C_i, S, S), with gradients, and by how much it widens."""
        blocks = [b for b in self.blocks if isinstance(b, SFNEBlock)]
        return [(b.slow(), b.join.out_channels // b.width) for b in blocks]


def _each(name: str, value: Any, depth: int) -> list[Any]:
    found = list(value) if isinstance(value, (list, tuple)) else [value] * depth
    if len(found) != depth:
        raise RecipeError(f"{name} has {len(found)} entries for {depth} blocks")
    return found
