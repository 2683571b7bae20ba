"""What a reducer is: how the gradients of data-parallel workers become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor


@runtime_checkable
class Reducer(Protocol):
    """Combines per-worker gradients; every rank gets the same result."""

    granularity: ClassVar[Literal["bucket", "model"]]
    """`bucket`: may be called per bucket inside DDP's communication hook; `model`: once, after backward."""

    def tasks(self, step: int, rank: int, world: int) -> Sequence[int]:
        """Name the data shards this rank computes in this step (gradient coding); by default its own."""
        ...

    def reduce(self, gradients: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """Combine the named gradients over the group; the arguments are not changed."""
        ...

    def bytes_sent(self) -> int:
        """Return the bytes this rank handed to the network so far (measured, not estimated)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state across steps, keyed by parameter name."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state back."""
        ...
