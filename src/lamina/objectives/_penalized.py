"""What objectives share that add a term to another one: the base is told everything, and the model is called once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import nn
from torch.nn import Parameter

from lamina.batches import Batch
from lamina.errors import LaminaError
from lamina.objectives.objective import Losses, WeightedSum
from lamina.recipe import build
from lamina.registry import snake_case

S = TypeVar("S")


class Penalized(nn.Module):
    """Another objective plus a term; a subclass calls `self.base` in its forward and adds what it found.

    Args:
        base: objective of the task at hand, or its recipe node; its loss is logged as `task`.
    """

    needs: ClassVar[Literal["outputs", "model"]] = "model"

    def __init__(self, base: Any) -> None:
        super().__init__()
        # A sum of one term: it names the term, shares a forward pass with what needs one, and keeps the term's state.
        self.base = WeightedSum([(1.0, build(base, "objective"))], ["task"])

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Refuse: outputs do not show what the term is about.

        Raises:
            LaminaError: always.
        """
        raise LaminaError(f"{snake_case(type(self).__name__)} needs the model: call the objective, not its loss()")

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield the base's own parameters."""
        yield from self.base.parameters()

    def before_rewrite(self, model: nn.Module) -> None:
        """Tell the base that the model is about to be rewritten."""
        self.base.before_rewrite(model)

    def set_progress(self, fraction: float) -> None:
        """Tell the base how far training is."""
        self.base.set_progress(fraction)


class PenalizedByWatching(Penalized, Generic[S]):
    """Another objective plus a term on what parts of the model compute in the base's own forward pass."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self._seen: S | None = None

    def watching(self, model: nn.Module) -> AbstractContextManager[S]:
        """Return a context under which a forward pass fills the value it yields."""
        raise NotImplementedError

    def complete(self, losses: Losses, seen: S) -> Losses:
        """Add the term to the base's losses."""
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the base's losses with the term added."""
        with self.watching(model) as seen:
            losses = self.base(model, batch)
        return self.complete(losses, seen)

    @property
    def observing(self) -> Callable[[nn.Module], AbstractContextManager[None]] | None:
        """A context under which a forward pass leaves what `loss` needs; None where the base calls the model itself."""
        return self._observe if self.base.needs == "outputs" else None

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses of outputs computed under `observing`.

        Raises:
            LaminaError: they were not.
        """
        seen, self._seen = self._seen, None
        return super().loss(outputs, batch) if seen is None else self.complete(self.base.loss(outputs, batch), seen)

    @contextmanager
    def _observe(self, model: nn.Module) -> Iterator[None]:
        with self.watching(model) as seen:
            yield
        self._seen = seen
