"""Conversions of norms: any norm to a registered one, batch norm to layer norm."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lamina import registry
from lamina.errors import LaminaError, ShapeError
from lamina.lineage import Lineage
from lamina.nn import ChannelLayerNorm, PRepBN, TokenBatchNorm
from lamina.rewrite.conversion import conversion, take_over

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def norm_to_norm(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the registered norm `new` for the same width; eps, gain and shift follow where both have them.

    Raises:
        ShapeError: the width cannot be told, or the two normalise different dimensions.
        LaminaError: the new norm is made of two, and has a pass of its own.
    """
    if registry.find("norm", new) is PRepBN:
        raise LaminaError(f"{new} begins as the norm it replaces: that is the pass progressive_norm, ProgressiveNorm()")
    return take_over(_build(registry.find("norm", new), old, options), old, lineage)


@conversion("batch_norm", "layer_norm")
def batch_norm_to_layer_norm(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the layer norm that fits a batch norm's inputs, with its gain and shift.

    That is the norm over channels and positions for torch's batch norms, whose channels are dimension 1.
    """
    target = nn.LayerNorm if isinstance(old, TokenBatchNorm) else ChannelLayerNorm
    return take_over(_build(target, old, options), old, lineage)


def _build(target: Any, old: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    eps = getattr(old, "eps", getattr(old, "variance_epsilon", None))
    given = {"eps": eps} if eps is not None and "eps" in inspect.signature(target).parameters else {}
    made: nn.Module = target(_width(old), **(given | dict(options)))
    if _channels_first(old) != _channels_first(made):
        where = {True: "dimension 1", False: "the last dimension"}
        raise ShapeError(
            f"a {type(old).__name__} has its features in {where[_channels_first(old)]}, a {type(made).__name__} in "
            f"{where[_channels_first(made)]}: one cannot stand for the other"
        )
    tensor = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), None)
    return made if tensor is None else made.to(dtype=tensor.dtype)


def _width(old: nn.Module) -> int:
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(old, name, None), int):
            return int(getattr(old, name))
    shape = getattr(old, "normalized_shape", None)
    if shape is None:
        weight = getattr(old, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if not isinstance(shape, (tuple, list)) or len(shape) != 1:
        raise ShapeError(f"cannot tell one width of the {type(old).__name__}: it normalises over {shape}")
    return int(shape[0])


def _channels_first(norm: nn.Module) -> bool:
    if isinstance(norm, TokenBatchNorm):
        return False
    return isinstance(norm, (nn.GroupNorm, *_BATCH_NORMS))
