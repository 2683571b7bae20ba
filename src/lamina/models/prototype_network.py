"""A classifier that decides by distances to prototypes, with a decoder that shows them.

Source: Li, Liu, Chen, Rudin, Deep Learning for Case-Based Reasoning through Prototypes (2018), arXiv 1710.04806.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models.prototype_explanation import Explanation, NearestTraining, explain_prototypes, nearest_training
from lamina.nn import PrototypeHead
from lamina.nn.prototype import SOURCE
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


class PrototypeOutput(NamedTuple):
    """What a `PrototypeNetwork` returns."""

    logits: Tensor
    """(B, classes)"""
    distances: Tensor
    """(B, num_prototypes) squared distances of the latent to the prototypes."""
    latent: Tensor
    """(B, q)"""
    reconstruction: Tensor | None
    """As the input; None in evaluation and without a decoder."""


@register("model", source=f"{SOURCE}, section 3 and supplement")
class PrototypeNetwork(nn.Module):
    """Autoencoder whose latent is classified by its distances to prototypes, each of which decodes to a picture.

    pixel_values (B, channels, H, W), from 0 to 1 for the decoder that is built here -> `PrototypeOutput`. Train with
    the objective `prototype`. The decoder runs in training, and for pictures: a deployed model can do without it.

    Args:
        encoder: module, or node of a layer, whose output (B, ...) is flattened to the latent (B, q); None:
            3 x 3 convolutions of stride 2 with ReLU, `widths` maps each.
        decoder: module, or node, that takes what the encoder gave, before flattening, to an image; None: the mirror of
            the convolutions; with an encoder of your own: none, and pictures are of the nearest training inputs.
        num_prototypes: m, at least `classes` for one of each (a warning).
        classes, channels: of the data. image: side of the image, or (height, width); at least 1.
        weight_std: of the convolutions' normal start, biases 0, as in the official code; None: torch's own start, with
            which training is under way sooner. Says nothing of an encoder or decoder of your own.
        seed: of the prototypes and their weights.
    Raises:
        LaminaError: a size below 1. RecipeError: a decoder option that cannot be.
        ShapeError: a decoder whose images are not as the input (when built); images of another size (at the call).
    Source: the official architecture for 28 x 28. Deviation: TensorFlow pads at the bottom and right only where sizes
        are even, we at both ends: maps are moved by one pixel. Names `image` and `channels` as in our other models.
    Example:
        >>> out = PrototypeNetwork(image=28)(torch.rand(2, 1, 28, 28))
        >>> out.logits.shape, out.latent.shape, out.reconstruction.shape
        (torch.Size([2, 10]), torch.Size([2, 40]), torch.Size([2, 1, 28, 28]))
    """

    def __init__(
        self,
        encoder: Annotated[nn.Module | Node | None, Slot("layer")] = None,
        decoder: Annotated[nn.Module | Node | None, Slot("layer")] = None,
        num_prototypes: int = 15,
        classes: int = 10,
        image: int | tuple[int, int] = 28,
        channels: int = 1,
        widths: Sequence[int] = (32, 32, 32, 10),
        *,
        weight_std: float | None = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        height, width = (image, image) if isinstance(image, int) else image
        _check(height=height, width=width, channels=channels, classes=classes, num_prototypes=num_prototypes)
        if not widths or min(widths) < 1:
            raise LaminaError(f"widths must be the maps of at least one convolution, each at least 1, got {widths}")
        if weight_std is not None and not weight_std > 0:
            raise LaminaError(f"weight_std must be above 0, or None for torch's own start, got {weight_std}")
        self.image_shape = (channels, int(height), int(width))
        sizes = [(int(height), int(width))]
        for _ in widths:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        self.encoder = _encoder((channels, *widths), weight_std) if encoder is None else _built(encoder)
        self.decoder: nn.Module | None = None if decoder is None else _built(decoder)
        if encoder is None and decoder is None:
            self.decoder = _decoder((channels, *widths)[::-1], sizes[::-1], weight_std)
        self.map_shape = self._look()
        self.head = PrototypeHead(prod(self.map_shape), classes, num_prototypes, seed=seed)

    def forward(self, pixel_values: Tensor) -> PrototypeOutput:
        """Return logits, distances, latent and, in training, the reconstruction."""
        maps = self._encode(pixel_values)
        latent = maps.flatten(1)
        distances = self.head.layer(latent)
        shown = self.decoder(maps) if self.training and self.decoder is not None else None
        return PrototypeOutput(self.head.logits(distances), distances, latent, shown)

    def explain(self, x: Tensor | Batch, top: int = 3, nearest: NearestTraining | None = None) -> Explanation:
        """Take predictions apart: the nearest prototypes, what each adds to each logit, and its picture.

        Args:
            x: images (B, channels, H, W), or a batch with them.
            top: how many prototypes an input.
            nearest: of `nearest_training`, the pictures where there is no decoder.
        """
        batch = {"pixel_values": x} if isinstance(x, Tensor) else x
        pictures = None if self.decoder is None else self.decoded_prototypes
        return explain_prototypes(self, batch, top, pictures=pictures, nearest=nearest)

    @torch.no_grad()
    def decoded_prototypes(self) -> Tensor:
        """Return what every prototype looks like, (num_prototypes, channels, H, W).

        Raises:
            LaminaError: there is no decoder.
        """
        if self.decoder is None:
            raise LaminaError("there is no decoder to show prototypes with: nearest_training shows inputs near them")
        modes = [(m, m.training) for m in self.decoder.modules()]
        try:
            self.decoder.eval()
            shown: Tensor = self.decoder(self.head.layer.prototypes.view(-1, *self.map_shape))
        finally:
            for module, mode in modes:
                module.training = mode
        return shown

    def nearest_training(self, data: Iterable[Batch]) -> NearestTraining:
        """Find the input of `data` whose latent is nearest to each prototype."""
        return nearest_training(self, data)

    def merge_prototypes(self, tolerance: float) -> list[list[int]]:
        """Put one prototype in the place of those within `tolerance` of each other, see `PrototypeHead.merge`.

        In place; the model is saved and loaded with as many prototypes as are left.
        """
        groups = self.head.merge(tolerance)
        # What `io.save` writes down (see `registry`); a subclass of somebody else's has none.
        node: dict[str, Any] | None = getattr(self, "lamina_node", None)
        if node is not None:
            node["num_prototypes"] = len(groups)
        return groups

    def _encode(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[1:] != self.image_shape:
            raise ShapeError(f"PrototypeNetwork takes (batch, {self.image_shape}), got {tuple(pixel_values.shape)}")
        maps: Tensor = self.encoder(pixel_values)
        return maps

    def _look(self) -> tuple[int, ...]:
        """Run an empty image through: what the encoder gives, (...), and whether the decoder leads back."""
        parts = [m for m in (self.encoder, self.decoder) if m is not None]
        modes = [(m, m.training) for part in parts for m in part.modules()]
        with torch.no_grad():
            for part in parts:
                part.eval()
            like = next((p for p in self.encoder.parameters()), torch.empty(0))
            maps = self.encoder(torch.zeros(1, *self.image_shape, dtype=like.dtype, device=like.device))
            shown = None if self.decoder is None else self.decoder(maps)
            for module, mode in modes:
                module.training = mode
        if not isinstance(maps, Tensor) or maps.dim() < 2 or len(maps) != 1:
            seen = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ShapeError(f"the encoder must give a tensor with a row an image, of 1 image it gave {seen}")
        if shown is not None and shown.shape[1:] != self.image_shape:
            raise ShapeError(f"the decoder must give images {self.image_shape}, it gives {tuple(shown.shape[1:])}")
        return tuple(maps.shape[1:])


def _encoder(widths: Sequence[int], std: float | None) -> nn.Sequential:
    """3 x 3 convolutions of stride 2, each with ReLU, the last one too: sides s -> ceil(s / 2)."""
    layers: list[nn.Module] = []
    for given, made in pairwise(widths):
        layers += [_started(nn.Conv2d(given, made, 3, stride=2, padding=1), std), nn.ReLU()]
    return nn.Sequential(*layers)


def _decoder(widths: Sequence[int], sizes: Sequence[tuple[int, int]], std: float | None) -> nn.Sequential:
    """The way back, size by size: 2 -> 4 -> 7 -> 14 -> 28; ReLU between, a sigmoid at the end."""
    layers: list[nn.Module] = []
    for (given, made), (small, large) in zip(pairwise(widths), pairwise(sizes), strict=True):
        extra = (large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1)
        layer = nn.ConvTranspose2d(given, made, 3, stride=2, padding=1, output_padding=extra)
        layers += [_started(layer, std), nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


def _started(layer: nn.Conv2d | nn.ConvTranspose2d, std: float | None) -> nn.Module:
    if std is not None:
        nn.init.normal_(layer.weight, std=std)
    if std is not None and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _built(part: nn.Module | Node) -> nn.Module:
    if isinstance(part, nn.Module):
        return part
    made = factory("layer", part)()
    if not isinstance(made, nn.Module):
        raise RecipeError(f"an encoder or decoder must be a module, got a {type(made).__name__}")
    return made


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise LaminaError(f"{name} must be at least 1, got {size}")
