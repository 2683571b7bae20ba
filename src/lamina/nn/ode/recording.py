"""Ask the continuous blocks of a model for one more point of their solves, or for all their steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lamina import probe
from lamina.batches import bare
from lamina.errors import LaminaError
from lamina.nn.ode.block import ContinuousBlock
from lamina.nn.ode.solve import Request, Solution


class Solve(NamedTuple):
    """One solve of one block."""

    path: str
    block: ContinuousBlock
    solution: Solution


@dataclass
class Recorded:
    """What was recorded; the list fills as the model runs."""

    blocks: dict[str, ContinuousBlock]
    """Every block of the model, by path."""
    solves: list[Solve] = field(default_factory=list)
    """In the order in which they ended; a block that runs twice is there twice."""
    errors: list[Tensor] = field(default_factory=list)
    """Of every accepted step: |h| times its error over the tolerance, with its gradient; only with `keep_errors`."""


@contextmanager
def recording(
    model: nn.Module, fraction: float | None, keep_steps: bool = False, *, keep_errors: bool = False
) -> Iterator[Recorded]:
    """Have every neural ODE and SDE of a model note one more point of its solves while the block runs.

    What the model returns, its gradients and the number of evaluations of a solve stay the same.

    Args:
        fraction: of the interval, 0..1: where to keep the state, as `solution.state_at_save`; None = nowhere.
        keep_steps: keep the states at all accepted steps, as `solution.states`.
        keep_errors: keep the errors of all accepted steps, with gradients; adjoint="discrete" only.
    Raises:
        LaminaError: a fraction outside 0..1, a block that is being recorded already, or errors of a block whose adjoint
            has no gradient for them.
    Example:
        >>> import torch
        >>> from lamina.nn import NeuralODE
        >>> block = NeuralODE(nn.Linear(3, 3))
        >>> with recording(block, 0.5) as seen:
        ...     _ = block(torch.ones(2, 3))
        >>> seen.solves[0].solution.state_at_save.shape
        torch.Size([2, 3])
    """
    if fraction is not None and not 0.0 <= fraction <= 1.0:
        raise LaminaError(f"fraction must be within 0..1, got {fraction}")
    root = bare(model)
    blocks = {path: m for path, m in root.named_modules() if isinstance(m, ContinuousBlock)}
    for path, block in blocks.items():
        if block.request is not None:
            raise LaminaError(f"{path or 'the block'} is being recorded already: one recording at a time")
        if keep_errors and not (block.step_errors and block.adjoint == "discrete"):
            raise LaminaError(
                f"the errors of all steps have a gradient only in a NeuralODE with adjoint='discrete': {path!r} is a "
                f"{type(block).__name__} with {block.adjoint!r}"
            )
    seen = Recorded(blocks)
    request = Request(fraction, keep_steps, keep_errors, seen.errors)

    def note(path: str) -> probe.Callback:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            block = blocks[path]
            if block.solution is not None:
                seen.solves.append(Solve(path, block, block.solution))

        return after

    with ExitStack() as undo:
        if blocks:
            undo.enter_context(probe.observe(model, {path: note(path) for path in blocks}))
        for block in blocks.values():
            block.request = request
            undo.callback(setattr, block, "request", None)
        yield seen
