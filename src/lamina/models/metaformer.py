"""MetaFormer: a four-stage vision backbone with a slot for the token mixer, and PoolFormer's sizes.

Source: Yu et al., MetaFormer Is Actually What You Need for Vision (2022), arXiv 2111.11418.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models._metaformer_block import NORM, PositionEmbedding
from lamina.models._metaformer_block import DropPath as DropPath
from lamina.models._metaformer_block import MetaFormerBlock as MetaFormerBlock
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

_log = logging.getLogger(__name__)

SOURCE = "Yu et al. 2022, arXiv 2111.11418"
ATTENTION: Node = {"name": "attention", "head_width": 32, "output_bias": True}


@register("model", "metaformer", source=SOURCE)
class MetaFormer(nn.Module):
    """Stages of MetaFormer blocks with any token mixer in their slot; each stage but the first shrinks the image.

    pixel_values (B, in_channels, H, W) -> logits (B, classes), the last stage's features (B, C) where classes is 0,
    or the list of all stages' maps with `features_only` (each through a norm of its own). Any H and W that leave a
    pixel to the last stage, unless a mixer or position embedding is bound to one size.

    Args:
        depths: blocks per stage.
        widths: channels per stage.
        mixers: a mixer, or one per stage; built as mixer(width=, grid=, heads=) as far as it names them, one head per
            32 channels or per the `head_width` that the mixer's node gives.
        norm: built as norm(width); "channel_layer_norm" (the paper's) or "channel_norm_2d" (its hybrids).
        layer_scale: start of the learned factor of each branch; None = none.
        drop_path: of the last block; grows linearly from 0 at the first, over all stages.
        patch: (kernel, stride, padding) of the first convolution. downsample: the same between stages.
        image: (H, W) or side of the images, for mixers and positions that are bound to a size; None = any size.
        positions: whether a stage adds a learned position embedding at its entry; one value or one per stage.
        mlp, residual: False for the ablations "mixer only".
        conv: the two 1x1 convolutions of every feed-forward, built as conv(in, out, 1).
        head: built as head(widths[-1], classes).
    Raises:
        RecipeError: lists of other lengths than depths, or a bound mixer without `image`.
        ShapeError: sizes below their least, heads that do not divide a width, images too small for the last stage, or
            of another size than a bound part was built for.
    Example:
        >>> MetaFormer((1, 1), (8, 16), classes=5)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        widths: Sequence[int] = (64, 128, 320, 512),
        *,
        mixers: Annotated[Node | Sequence[Node], Slot("mixer")] = "pooling_mixer",
        norm: Annotated[Node, Slot("norm")] = NORM,
        classes: int = 1000,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        patch: tuple[int, int, int] = (7, 4, 2),
        downsample: tuple[int, int, int] = (3, 2, 1),
        image: int | tuple[int, int] | None = None,
        positions: bool | Sequence[bool] = False,
        mlp: bool = True,
        residual: bool = True,
        features_only: bool = False,
        conv: Annotated[Node, Slot("layer")] = "conv2d",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        each: list[Any] = list(mixers) if isinstance(mixers, (list, tuple)) else [mixers] * len(depths)
        places = list(positions) if isinstance(positions, (list, tuple)) else [bool(positions)] * len(depths)
        _check(depths, widths=widths, mixers=each, positions=places)
        if classes < 0 or channels < 1 or mlp_ratio <= 0:
            raise ShapeError(
                f"classes must not be negative, channels and mlp_ratio positive, got {classes}, {channels}, {mlp_ratio}"
            )
        DropPath(drop_path)
        grids = stage_grids(image, len(depths), patch, downsample)
        rates = _rates(drop_path, sum(depths))
        self.channels, self.features_only, self.strides = channels, features_only, (patch, downsample)
        self.smallest, self.told = _smallest_side(len(depths), patch, downsample), False
        self.embeds = nn.ModuleList()
        self.positions = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            kernel, stride, padding = patch if i == 0 else downsample
            self.embeds.append(nn.Conv2d(channels if i == 0 else widths[i - 1], width, kernel, stride, padding))
            make = factory("mixer", each[i])
            self.positions.append(_positions(width, grids[i]) if places[i] else nn.Identity())
            given = {"width": width, "heads": _heads(width, each[i]), **({"grid": grids[i]} if grids[i] else {})}
            options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "norm": norm, "layer_scale": layer_scale}
            options |= {"dropout": dropout, "mlp": mlp, "residual": residual, "conv": conv}
            blocks = [MetaFormerBlock(width, make(**given), drop_path=next(rates), **options) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        make_norm = factory("norm", norm)
        self.norms = nn.ModuleList(make_norm(w) for w in (widths if features_only else widths[-1:]))
        self.head: nn.Module = nn.Identity() if features_only or not classes else _head(head, widths[-1], classes)

    def forward(self, pixel_values: Tensor) -> Tensor | list[Tensor]:
        """Return logits, features, or the maps of all stages."""
        self._check_images(pixel_values)
        x, maps = pixel_values, []
        for embed, position, stage in zip(self.embeds, self.positions, self.stages, strict=True):
            x = stage(position(embed(x)))
            maps.append(x)
        self._tell_of_one_cell(x)
        if self.features_only:
            return [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        pooled: Tensor = self.head(self.norms[0](x).mean((2, 3)))
        return pooled

    def resize_positions(self, image: int | tuple[int, int]) -> None:
        """Resize the position embeddings to another image size, bicubically, in place (new Parameter objects)."""
        grids = stage_grids(image, len(self.embeds), *self.strides)
        for position, grid in zip(self.positions, grids, strict=True):
            if isinstance(position, PositionEmbedding) and grid is not None:
                position.resize(grid)

    def _tell_of_one_cell(self, x: Tensor) -> None:
        if not torch.compiler.is_compiling() and x.shape[2:] == (1, 1) and not self.told:
            self.told = True
            _log.warning("the last stage is left one cell of the images: its mixers have nothing to mix")

    def _check_images(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ShapeError(f"MetaFormer takes images (B, {self.channels}, H, W), got {tuple(x.shape)}")
        if min(x.shape[2], x.shape[3]) < self.smallest:
            raise ShapeError(
                f"images of {tuple(x.shape[2:])} pixels leave nothing for the last of {len(self.stages)} stages: "
                f"both sides must be at least {self.smallest}"
            )


def stage_grids(
    image: int | tuple[int, int] | None, stages: int, patch: tuple[int, int, int], downsample: tuple[int, int, int]
) -> list[tuple[int, int] | None]:
    """Return the (H, W) of every stage for an image size, by the arithmetic of convolutions; None = not known.

    Raises:
        ShapeError: nothing is left of the image at some stage.
    """
    if image is None:
        return [None] * stages
    height, width = (image, image) if isinstance(image, int) else image
    grids: list[tuple[int, int] | None] = []
    for stage in range(stages):
        kernel, stride, padding = patch if stage == 0 else downsample
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        if height < 1 or width < 1:
            raise ShapeError(f"an image of {image} leaves no pixel for stage {stage + 1} of {stages}")
        grids.append((height, width))
    return grids


def load_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of timm's `poolformer_*` to this model's names; the tensors are the same objects."""
    renamed = {}
    for name, tensor in state.items():
        new = name.replace("stem.conv.", "embeds.0.")
        if new.startswith("stages."):
            _, stage, rest = new.split(".", 2)
            new = f"embeds.{stage}.{rest[16:]}" if rest.startswith("downsample.conv.") else f"stages.{stage}.{rest}"
        for old, ours in TIMM_NAMES:
            new = new.replace(old, ours)
        renamed[new] = tensor
    return renamed


TIMM_NAMES = (
    (".blocks.", "."),
    (".layer_scale1.", ".scale1."),
    (".layer_scale2.", ".scale2."),
    (".mlp.fc1.", ".feed_forward.up."),
    (".mlp.fc2.", ".feed_forward.down."),
    ("head.norm.", "norms.0."),
    ("head.fc.", "head."),
)


def _check(depths: Sequence[int], **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != len(depths):
            raise RecipeError(f"{name} has {len(values)} entries for {len(depths)} stages (depths={list(depths)})")
    if not depths or min(*depths, *lists["widths"]) < 1:
        raise ShapeError(f"depths and widths must be at least 1, got {list(depths)} and {list(lists['widths'])}")


def _heads(width: int, mixer: Any) -> int:
    """Heads of a mixer that has some: as wide as its node says, else of 32 channels, as the paper's."""
    asked = mixer.get("head_width") if isinstance(mixer, Mapping) else None
    if isinstance(asked, int) and asked > 0 and width % asked:
        raise ShapeError(f"a width of {width} does not divide into heads of {asked} (head_width)")
    return max(width // (asked or 32), 1)


def _rates(last: float, blocks: int) -> Iterator[float]:
    return iter([last * j / max(blocks - 1, 1) for j in range(blocks)])


def _positions(width: int, grid: tuple[int, int] | None) -> PositionEmbedding:
    if grid is None:
        raise RecipeError("positions are bound to a size: give `image`")
    return PositionEmbedding(width, grid)


def _smallest_side(stages: int, patch: tuple[int, int, int], downsample: tuple[int, int, int]) -> int:
    """Return the least side that leaves a pixel to every stage: the arithmetic of convolutions, from the end."""
    side = 1
    for kernel, stride, padding in (*[downsample] * (stages - 1), patch):
        side = max((side - 1) * stride + kernel - 2 * padding, 1)
    return side


def _head(node: Node, width: int, classes: int) -> nn.Module:
    head: nn.Module = factory("layer", node)(width, classes)
    if type(head) is nn.Linear:
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    return head


Sized = Callable[..., MetaFormer]


def _size(name: str, depths: tuple[int, ...], widths: tuple[int, ...], layer_scale: float, **fixed: Any) -> Sized:
    """Register a published size; its docstring says what is in it."""

    def build(classes: int = 1000, *, drop_path: float = 0.0, features_only: bool = False) -> MetaFormer:
        given: dict[str, Any] = {"layer_scale": layer_scale, **fixed}
        return MetaFormer(depths, widths, classes=classes, drop_path=drop_path, features_only=features_only, **given)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    mixers = fixed.get("mixers", "pooling_mixer")
    kinds = mixers if isinstance(mixers, str) else "/".join(m if isinstance(m, str) else m["name"] for m in mixers)
    build.__doc__ = f"MetaFormer with depths {depths}, widths {widths}, mixers {kinds}."
    return register("model", name, source=f"{SOURCE}, table 1")(build)


_SMALL, _MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
poolformer_s12 = _size("poolformer_s12", (2, 2, 6, 2), _SMALL, 1e-5)
poolformer_s24 = _size("poolformer_s24", (4, 4, 12, 4), _SMALL, 1e-5)
poolformer_s36 = _size("poolformer_s36", (6, 6, 18, 6), _SMALL, 1e-6)
poolformer_m36 = _size("poolformer_m36", (6, 6, 18, 6), _MEDIUM, 1e-6)
poolformer_m48 = _size("poolformer_m48", (8, 8, 24, 8), _MEDIUM, 1e-6)


def _hybrid(name: str, mixer: Node, stages: int, positions: bool) -> Sized:
    """Register an S12 hybrid: the last `stages` stages have another mixer, at 224 x 224 pixels."""
    pools = ["pooling_mixer"] * (4 - stages)
    places = [False] * (4 - stages) + [positions] * stages
    mixers = [*pools, *[mixer] * stages]
    options = {"norm": "channel_norm_2d", "image": 224, "mixers": mixers, "positions": places}
    return _size(name, (2, 2, 6, 2), _SMALL, 1e-5, **options)


metaformer_pppa_s12 = _hybrid("metaformer_pppa_s12", ATTENTION, 1, True)
metaformer_ppaa_s12 = _hybrid("metaformer_ppaa_s12", ATTENTION, 2, True)
metaformer_pppf_s12 = _hybrid("metaformer_pppf_s12", "spatial_linear_mixer", 1, False)
metaformer_ppff_s12 = _hybrid("metaformer_ppff_s12", "spatial_linear_mixer", 2, False)
