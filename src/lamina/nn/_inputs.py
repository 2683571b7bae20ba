"""What several layers refuse at the call."""

from __future__ import annotations

from torch import Tensor

from lamina.errors import ShapeError


def check_features(layer: str, x: Tensor, width: int) -> None:
    """Refuse an x that is not (..., width) of floating point.

    Raises:
        ShapeError: names the layer, the shape it takes, and what it was given.
    """
    if x.dim() < 1 or x.shape[-1] != width or not x.is_floating_point():
        raise ShapeError(f"{layer} takes floating-point (..., {width}), got {x.dtype} {tuple(x.shape)}")
