"""Conversion of batch norms to EvoNorm, with gain, shift and (B variants) the running variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lamina import registry
from lamina.errors import ShapeError
from lamina.lineage import Lineage
from lamina.nn import TokenBatchNorm
from lamina.rewrite.conversion import conversion, take_over


@conversion("batch_norm", "evonorm")
def batch_norm_to_fused(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the registered layer that is norm and activation in one; whatever activation follows it stays.

    A norm that synchronises its statistics becomes one that does, too, if it takes batch statistics at all.

    Raises:
        ShapeError: the norm has its features in the last dimension.
    """
    if isinstance(old, TokenBatchNorm):
        raise ShapeError(f"a TokenBatchNorm has its features in the last dimension, {new} its channels in dimension 1")
    given = {"sync": True, **options} if isinstance(old, nn.SyncBatchNorm) and new == "evonorm" else dict(options)
    made: nn.Module = registry.find("norm", new)(old.num_features, **given)
    tensor = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), None)
    made = made if tensor is None else made.to(dtype=tensor.dtype)
    kept, running = getattr(made, "running_var", None), getattr(old, "running_var", None)
    if kept is not None and running is not None:
        with torch.no_grad():
            kept.copy_(running)
    return take_over(made, old, lineage)
