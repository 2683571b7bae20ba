"""Another reducer over a slower link: what a training step would take there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor
from torch.nn import Parameter

from lamina.errors import LaminaError
from lamina.gradients.reducer import Group, Reducer
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("reducer")
class Throttled:
    """The reducer inside, no faster than a link of so many bytes a second would let it be.

    After the real exchange of each bucket a worker sleeps for what is left of (bytes it handed to collectives) /
    `bytes_per_second`: a link that is busy while nothing else happens, as in torch's default all-reduce without
    overlap. The sums are the inner reducer's, bit by bit. For measurements on one machine.

    Args:
        base: the reducer inside: a node, or one that is built.
        bytes_per_second: of the link, above 0; 1.25e8 is one gigabit.
    Raises:
        LaminaError: a rate that is not above 0.
    Example:
        >>> Throttled("mean", bytes_per_second=1.25e8).bytes_sent()
        0
    """

    granularity: ClassVar[Literal["bucket", "model"]] = "bucket"

    def __init__(
        self, base: Annotated[Node | Any, Slot("reducer")] = "mean", *, bytes_per_second: float = 1.25e8
    ) -> None:
        if not bytes_per_second > 0:
            raise LaminaError(f"bytes_per_second must be above 0, got {bytes_per_second!r}")
        self.base: Reducer = built(base)
        # The inner one's, in place of the class's own.
        vars(self)["granularity"] = self.base.granularity
        self.bytes_per_second = bytes_per_second

    def tasks(self, step: int, rank: int, world: int) -> Sequence[int]:
        """Return the inner reducer's tasks."""
        return self.base.tasks(step, rank, world)

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Reduce, and wait until the link would be done."""
        before, begun = self.base.bytes_sent(), time.perf_counter()
        result = self.base.reduce(gradients, group)
        due = begun + (self.base.bytes_sent() - before) / self.bytes_per_second
        time.sleep(max(0.0, due - time.perf_counter()))
        return result

    def follow(self, parameters: Mapping[str, Parameter]) -> None:
        """Hand the parameters on to the inner reducer, where it wants them."""
        if hasattr(self.base, "follow"):
            self.base.follow(parameters)

    def bytes_sent(self) -> int:
        """Return the inner reducer's bytes."""
        return self.base.bytes_sent()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner reducer's state."""
        return self.base.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the inner reducer's state back."""
        self.base.load_state_dict(state)


def built(base: Any) -> Any:
    """Return a reducer that a node names, or that is built already."""
    return factory("reducer", base)() if isinstance(base, (str, Mapping)) else base
