"""One call of a torch function in a frozen pass: its arguments at x0, the probes beside them, how to run it on both.

The value at x0 is *part 0*, what a probe became of it on the way *part 1*. Several probes lie along a first dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Rule = Literal["secant", "tangent"]


@dataclass(frozen=True)
class Settings:
    """What a whole frozen pass has in common."""

    rule: Rule = "secant"
    eps: float = 1e-6
    """Below this |x0| a secant becomes a tangent."""
    strict: bool = True
    """False: a function without a rule is taken by its tangent, with a warning."""
    count: int | None = None
    """Probes along a first dimension; None = one, without that dimension."""
    watch: bool = False
    """Keep the largest gain of every unit."""

    def spread(self, value: Tensor) -> Tensor:
        """Return a constant as the part 1 of every probe, a copy."""
        value = value.detach()
        return value.clone() if self.count is None else value.repeat(self.count, *[1] * value.dim())


@dataclass
class Call:
    """A call with at least one argument that depends on the probe."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    """Values at x0; what the function changes in place is a copy from before."""
    kwargs: dict[str, Any]
    leaves: list[Any]
    """The arguments, nested ones taken apart."""
    spec: Any
    probes: dict[int, Tensor]
    """Position in `leaves` -> part 1."""
    straight: set[int]
    """Positions of tensors that came straight out of a pointwise unit."""
    settings: Settings
    target: int | None = None
    """Position of the tensor that is changed in place."""
    result: Any = None
    """What the function gave at x0."""
    gains: list[Tensor] = field(default_factory=list)
    """Of this unit, where the pass watches."""

    def at(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by place or by name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    def position(self, place: int, name: str) -> int:
        """Return where an argument that is no list stands in `leaves`, -1 if it was not given."""
        if place < len(self.args):
            return len(pytree.tree_leaves(self.args[:place]))
        before = 0
        for key, value in self.kwargs.items():
            if key == name:
                return len(pytree.tree_leaves(self.args)) + before
            before += len(pytree.tree_leaves(value))
        return -1

    def tensors(self) -> list[int]:
        """Return the positions of all tensors."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def unit(self, x: Tensor) -> Any:
        """Run the function with another first argument, which is not changed."""
        return self.run({0: x})

    def linear(self, positions: Sequence[int] | None = None, pick: Callable[[Any], Any] | None = None) -> Any:
        """Run the function on part 1 at these positions (default: all that depend on it), on part 0 at the others.

        Args:
            pick: takes what is wanted out of the result.
        """
        chosen = list(self.probes if positions is None else positions)
        given = [self.probes[i] for i in chosen]
        if self.target is not None and self.target not in chosen:
            # What is written into must have room for every probe.
            chosen.append(self.target)
            given.append(self.settings.spread(self.leaves[self.target]))
        return self.over(lambda *probes: self.run(dict(zip(chosen, probes, strict=True)), pick), *given)

    def over(self, run: Callable[..., Any], *probes: Tensor) -> Any:
        """Run something once for every probe."""
        if self.settings.count is None:
            return run(*probes)
        try:
            with warnings.catch_warnings():
                # A kernel without a batched form runs one by one, and torch says so.
                warnings.filterwarnings("ignore", "There is a performance drop")
                return torch.func.vmap(run)(*probes)
        except RuntimeError:
            # What cannot be batched at all (an index by a mask) goes probe by probe.
            each = [pytree.tree_flatten(run(*one)) for one in zip(*probes, strict=True)]
            stacked = [torch.stack(values) for values in zip(*(leaves for leaves, _ in each), strict=True)]
            return pytree.tree_unflatten(stacked, each[0][1])

    def affine(self, gain: Tensor, constant: Tensor | None = None, position: int = 0) -> Tensor:
        """Return gain * part1 + constant."""
        self.watched(gain)
        scaled = self.probes[position] * gain
        return scaled if constant is None else scaled + constant

    def watched(self, gain: Tensor) -> None:
        """Keep a gain where the pass watches."""
        if self.settings.watch:
            self.gains.append(gain)

    def kept(self, position: int) -> Tensor:
        """Return a value at x0 that the graph of the probe may hold on to: the model may write into its own."""
        value: Tensor = self.leaves[position].detach()
        return value.clone() if torch.is_grad_enabled() else value

    def run(self, instead: dict[int, Tensor], pick: Callable[[Any], Any] | None = None) -> Any:
        """Run the function with other values at these positions; nothing it was given is changed."""
        # Weights are constants here: no gradient of theirs is wanted, and none of their inputs is to be kept for one.
        leaves = [x.detach() if isinstance(x, Tensor) and x.requires_grad else x for x in self.leaves]
        for i in self.probes.keys() - instead.keys() if instead else ():
            leaves[i] = self.kept(i)
        for i, value in instead.items():
            leaves[i] = value.clone() if i == self.target else value
        args, kwargs = put_together(leaves, self.spec)
        result = self.function(*args, **kwargs)
        if self.target is not None:
            return leaves[self.target]
        return result if pick is None else pick(result)


def take_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the leaves of a call's arguments, and what puts them together again."""
    given = [*args, *kwargs.values()]
    if any(isinstance(value, (list, tuple, dict)) for value in given):
        return pytree.tree_flatten((args, kwargs))
    return given, (len(args), tuple(kwargs))


def put_together(leaves: list[Any], spec: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments again."""
    if not isinstance(spec, tuple):
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs
    return tuple(leaves[: spec[0]]), dict(zip(spec[1], leaves[spec[0] :], strict=True))


Scope = Callable[[Call], Any]
"""Returns part 1 of the result, in the result's structure; None for what no longer depends on the probe."""


class NoRuleError(Exception):
    """A scope meets a case of its function that it does not know."""
