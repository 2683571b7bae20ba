"""A field in the weights of a multi-layer perceptron on sines of the coordinates (NeRF)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.fields.field import FieldWithNetworks, bias_free
from lamina.registry import register


@register("field", source="Mildenhall et al., NeRF (2020), arXiv 2003.08934; sizes of Fang et al., arXiv 2211.15977")
class MLPField(FieldWithNetworks):
    """Coordinates and their sines through a deep network: few weights, smooth, slow.

    x (N, 3) in the box, unit d (N, 3) -> sigma (N,), rgb (N, 3), float32; safe under autocast.

    Args:
        depth: linear layers of the trunk, ReLU between them; the last gives 28 numbers for the 28-64-16 network.
        width: of the layers between.
        frequencies: octaves of the sines: sin and cos of 2^k x, k = 0..frequencies-1, in front of them x itself.
        skip: after the ReLU of this layer (from 0) the encoded coordinates are put in front again; None = never.
        bound: half the side of the box; coordinates are divided by it.
        dim: 3, or 2 for pictures: x (N, 2) -> rgb (N, 3).
        soft_clip: let gradients through the clip of the log-density where they point inwards.
    Raises:
        ShapeError: sizes below 1, a skip that is no layer before the last; at the call, another shape.
    Source: as registered, section 5.1 and figure 7. Deviation from NeRF: the networks after the trunk are those of
        the hash field, so that they can be handed over.
    Example:
        >>> MLPField(depth=3, width=16, frequencies=4, skip=None)(torch.zeros(5, 3), torch.eye(3)[[2] * 5])[1].shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        depth: int = 8,
        width: int = 256,
        frequencies: int = 10,
        skip: int | None = 3,
        *,
        bound: float = 1.0,
        dim: int = 3,
        soft_clip: bool = False,
    ) -> None:
        super().__init__({"depth": depth, "width": width, "frequencies": frequencies, "skip": skip}, bound, dim, soft_clip)  # fmt: skip  # noqa: E501
        if depth < 2 or width < 1 or frequencies < 1 or (skip is not None and not 0 <= skip < depth - 1):
            raise ShapeError(
                "an MLP field needs depth 2, width 1, a frequency and a skip below depth - 1, got "
                f"{depth=}, {width=}, {frequencies=}, {skip=}"
            )
        self.frequencies, self.skip = frequencies, skip
        encoded = dim * (1 + 2 * frequencies)
        before = [encoded, *(width + encoded * (i == skip) for i in range(depth - 1))]
        after = [*(width,) * (depth - 1), 28]
        self.trunk = nn.ModuleList(nn.Linear(b, a) for b, a in zip(before, after, strict=True))
        self.geometry_net = bias_free(28, 64, 16 if dim == 3 else 15)

    def geometry(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return s (N,) and g (N, 15)."""
        encoded = h = sines(x / self.bound, self.frequencies)
        for i, layer in enumerate(self.trunk):
            h = layer(h)
            if i < len(self.trunk) - 1:
                h = torch.relu(h)
            if i == self.skip:
                h = torch.cat([encoded.to(h.dtype), h], dim=-1)
        numbers: Tensor = self.geometry_net(h)
        return self.split(numbers)


def sines(x: Tensor, frequencies: int) -> Tensor:
    """Return x, then sin and cos of 2^k x for each k: (N, dim) -> (N, dim * (1 + 2 * frequencies)), float32."""
    x = x.float()
    octaves = 2.0 ** torch.arange(frequencies, device=x.device)
    waves = x[:, None] * octaves[:, None]
    return torch.cat([x, torch.stack([waves.sin(), waves.cos()], dim=2).flatten(1)], dim=-1)
