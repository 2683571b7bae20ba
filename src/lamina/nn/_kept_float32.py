"""What half precision must leave alone: modules that stay float32, values widened before arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class KeptFloat32(nn.Module):
    """A module whose parameters and buffers stay float32 where the model around it is made bfloat16 or half."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as torch does, but never below float32."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrows = tensor.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device) if narrows else moved

        return super()._apply(kept, recurse)


def wide(x: Tensor) -> Tensor:
    """Return x in at least float32; whole numbers too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
