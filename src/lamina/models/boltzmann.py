"""Deep Boltzmann machines whose mean field has one answer: complete, classify and generate with the same weights.

Source: Feng, Winston, Kolter, Monotone deep Boltzmann machines (2023), arXiv 2307.04990.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError, nearest
from lamina.nn.equilibrium import MeanFieldEquilibrium
from lamina.nn.monotone_coupling import SOURCE, MonotoneCoupling, MonotoneHollow
from lamina.nn.monotone_coupling_conv import MonotoneHollowConv, Tier
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

EQUILIBRIUM: Node = {"name": "mean_field_equilibrium", "tol": 1e-4}
TEMPERATURE = math.sqrt(10.0)
"""Start of the factor whose square multiplies the scores of inputs and target."""

MNIST_TIERS: tuple[Tier, ...] = ((20, 28, 28, 1), (40, 14, 14, 10), (80, 7, 7, 20))
"""The paper's net: 20 grey levels at 28 x 28, and two tiers of hidden variables with 4 states each."""


class BoltzmannMachine(nn.Module):
    """What the dense and the convolutional machine share: inference of any part given any other, and training's view.

    Args:
        coupling: between all states of all variables.
        names: of the groups of variables, one a run of the coupling.
        inputs: group that `forward` is given, in part. target: group that is never given in training.
    """

    def __init__(
        self,
        coupling: MonotoneCoupling,
        names: Sequence[str],
        *,
        inputs: str,
        target: str,
        observed_fraction: float,
        temperature: float,
        equilibrium: Node,
    ) -> None:
        super().__init__()
        runs = coupling.blocks.runs
        if len(set(names)) != len(names):
            raise LaminaError(f"every group of variables needs a name of its own, got {list(names)}")
        for role, name in (("inputs", inputs), ("target", target)):
            if name not in names:
                raise LaminaError(f"{role} names no group of variables: {name!r}{nearest(name, names)}")
        if not 0.0 <= observed_fraction <= 1.0 or not temperature > 0:
            raise LaminaError(
                f"observed_fraction must be in 0..1 and temperature above 0, got {observed_fraction} and {temperature}"
            )
        self.groups = dict(zip(names, runs, strict=True))
        self.inputs, self.target, self.observed_fraction = inputs, target, observed_fraction
        self.coupling = coupling
        self.bias = nn.Parameter(torch.zeros(coupling.blocks.dim))
        self.equilibrium: MeanFieldEquilibrium = factory("layer", equilibrium)(coupling)
        self.temperature = nn.ParameterDict(
            {
                n: nn.Parameter(torch.full((self.groups[n].count, 1), temperature))
                for n in dict.fromkeys((inputs, target))
            }
        )

    def forward(
        self,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Any]:
        """Infer everything from a part of the inputs.

        Args:
            inputs: (B, ...) states of the input group, whole numbers; or `pixel_values`, floats from 0 to 1, which are
                cut into as many bins of equal width as a variable has states.
            mask: (B, ...) bool, True = observed; None: in training each is observed with probability
                `observed_fraction`, else all are.
            generator: of that draw; None = torch's own.
        Returns:
            `logits` of the target, (B, states) where it is one variable; the logits of every group by its name,
            (B, count, states); `states` and `mask`: what the inputs were, and which were observed, by the group's name.
        """
        states = self._states(self.inputs, _given(inputs, pixel_values, self.groups[self.inputs].states))
        if mask is None:
            drawn = self.training
            chance = torch.rand(states.shape, generator=generator, device=states.device) if drawn else None
            seen = torch.ones_like(states, dtype=torch.bool) if chance is None else chance < self.observed_fraction
        else:
            seen = self._values(self.inputs, mask).bool()
        logits = self.logits({self.inputs: states}, {self.inputs: seen})
        target = logits[self.target]
        first = target[:, 0] if target.shape[1] == 1 else target
        return {"logits": first, **logits, "states": {self.inputs: states}, "mask": {self.inputs: seen}}

    def infer(
        self,
        observed: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the marginals of every group, (B, count, states), given states of some variables.

        Args:
            observed: name -> (B, count) whole numbers (or another shape with as many a row).
            mask: name -> bool of the same shape, True = observed; a group without one is observed as a whole.
            start: an earlier answer to start from; the answer does not depend on it.
        Raises:
            LaminaError: no such group, or states out of range. ShapeError: another number of variables.
        """
        return self._named(self._solve(observed, mask, start)[0])

    def logits(self, observed: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the scores Phi q + bias at equilibrium of every group, (B, count, states).

        Those of inputs and target are multiplied by the square of their learned temperature, for training; what an
        observed variable gets is what the others say of it.
        """
        scores = self._named(self._solve(observed, mask, None)[1])
        for name, factor in self.temperature.items():
            scores[name] = scores[name] * factor.square()
        return scores

    def classify(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return the likeliest state of the target, (B,) or (B, count), from the seen inputs (None = all)."""
        found = self.infer({self.inputs: x}, None if seen is None else {self.inputs: seen})[self.target].argmax(-1)
        return found[:, 0] if found.shape[1] == 1 else found

    def complete(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return the inputs with what was not seen at its likeliest state; (B, count)."""
        states, mask = self._states(self.inputs, x), self._values(self.inputs, seen).bool()
        found = self.infer({self.inputs: states}, {self.inputs: mask})[self.inputs].argmax(-1)
        return torch.where(mask, states, found)

    def energy(self, x: Mapping[str, Tensor]) -> Tensor:
        """Return -log of the unnormalised probability of whole configurations, (B,).

        Raises:
            LaminaError: a group is missing.
        """
        missing = [n for n in self.groups if n not in x]
        if missing:
            raise LaminaError(f"an energy needs the states of every variable; missing: {', '.join(missing)}")
        vector, _ = self.observation(x, None)
        return -self._agreement(vector)

    def elbo(self, q: Mapping[str, Tensor]) -> Tensor:
        """Return the lower bound on the log partition function that marginals (name -> (B, count, states)) give."""
        vector = self._vector(q)
        return self._agreement(vector) + torch.special.entr(vector).sum(1)

    def _agreement(self, vector: Tensor) -> Tensor:
        """Return x . Phi x / 2 + bias . x, in which each pair counts once."""
        return (vector * (0.5 * self.coupling(vector) + self.bias)).sum(1)

    def _solve(
        self, observed: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None, start: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        vector, seen = self.observation(observed, mask)
        bias = self.bias.expand(len(vector), -1)
        return self.equilibrium.solve(bias, vector, seen, None if start is None else self._vector(start))

    def observation(self, observed: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Lay observations out as the coupling has them: (B, dim) one-hot or zero, and which of its (B, variables)."""
        for name in (*observed, *(mask or ())):
            if name not in self.groups:
                raise LaminaError(f"no group of variables is called {name!r}{nearest(name, self.groups)}")
        if not observed:
            raise LaminaError("nothing is observed: give the states of a group, with a mask that is False if need be")
        rows = len(next(iter(observed.values())))
        pieces, flags = [], []
        for name, run in self.groups.items():
            if name in observed:
                states = self._states(name, observed[name])
                given = (mask or {}).get(name)
                seen = torch.ones_like(states, dtype=torch.bool) if given is None else self._values(name, given).bool()
                one_hot = F.one_hot(states, run.states).to(self.bias.dtype) * seen[..., None]
            else:
                seen = torch.zeros(rows, run.count, dtype=torch.bool, device=self.bias.device)
                one_hot = self.bias.new_zeros(rows, run.count, run.states)
            pieces.append(one_hot)
            flags.append(seen)
        return self._vector(dict(zip(self.groups, pieces, strict=True))), torch.cat(flags, dim=1)

    def _vector(self, named: Mapping[str, Tensor]) -> Tensor:
        """(B, count, states) of every group -> (B, dim)."""
        return self.coupling.blocks.join(
            [named[n].unflatten(1, (r.outer, r.inner)).transpose(2, 3) for n, r in self.groups.items()]
        )

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        """Undo `_vector`."""
        pieces = self.coupling.blocks.split(vector)
        return {n: p.transpose(2, 3).flatten(1, 2) for n, p in zip(self.groups, pieces, strict=True)}

    def _states(self, name: str, x: Tensor) -> Tensor:
        states, limit = self._values(name, x), self.groups[name].states
        if states.is_floating_point():
            raise LaminaError(f"{name} must be states, whole numbers from 0 to {limit - 1}, got {states.dtype}")
        states = states.long()
        if states.numel() and not bool(((states >= 0) & (states < limit)).all()):
            low, high = int(states.min()), int(states.max())
            raise LaminaError(f"{name} has {limit} states, 0..{limit - 1}, got values from {low} to {high}")
        return states

    def _values(self, name: str, x: Tensor) -> Tensor:
        """View (B, ...) as (B, count)."""
        count = self.groups[name].count
        if x.dim() == 0 or (len(x) and x[0].numel() != count):
            raise ShapeError(f"{name} is {count} variables a row, got {tuple(x.shape)}")
        return x.reshape(len(x), count)


@register("model", "monotone_dbm", source=f"{SOURCE}, sections 3 and 4")
class MonotoneDBM(BoltzmannMachine):
    """Deep Boltzmann machine with arbitrary dense connections, whose mean-field inference always has one answer.

    One model of all variables (pixels, hidden ones, the class): classify from a part of an image, fill in the rest, or
    draw what a class looks like. See `forward`, `infer`, `classify`, `complete`.

    Args:
        variables: (name, count, states) of each group; the groups named by neither `inputs` nor `target` are hidden.
        rank: of the coupling, see `MonotoneHollow`.
        m: margin of monotonicity, strictly between 0 and 1.
        observed_fraction: probability with which an input is observed in training.
        inputs: the group that is observed in part; target: the one that is to be told.
        temperature: start of the learned factor whose square multiplies logits of inputs and target; a mean field is
            too unsure of itself.
        equilibrium: built as equilibrium(coupling).
    Raises:
        LaminaError: options out of range. ShapeError: fewer than 2 states.
    Example:
        >>> model = MonotoneDBM([("pixel", 64, 2), ("hidden", 24, 8), ("label", 1, 10)], rank=192)
        >>> model.infer({"label": torch.tensor([3])})["pixel"].shape
        torch.Size([1, 64, 2])
    """

    def __init__(
        self,
        variables: Sequence[tuple[str, int, int]],
        rank: int,
        m: float = 0.1,
        observed_fraction: float = 0.4,
        *,
        inputs: str = "pixel",
        target: str = "label",
        temperature: float = TEMPERATURE,
        equilibrium: Annotated[Node, Slot("layer")] = EQUILIBRIUM,
    ) -> None:
        groups = [(name, int(count), int(states)) for name, count, states in variables]
        coupling = MonotoneHollow.of_groups([(count, states) for _, count, states in groups], rank, m)
        super().__init__(
            coupling,
            [name for name, _, _ in groups],
            inputs=inputs,
            target=target,
            observed_fraction=observed_fraction,
            temperature=temperature,
            equilibrium=equilibrium,
        )


@register("model", "conv_monotone_dbm", source=f"{SOURCE}, section 5")
class ConvMonotoneDBM(BoltzmannMachine):
    """Convolutional deep Boltzmann machine of images, whose mean-field inference always has one answer.

    Groups: `pixel` (the first tier, a variable a pixel), `hidden1`, `hidden2`, ... and `label`. Images as
    `pixel_values` from 0 to 1 are cut into as many grey levels as the first tier has channels.

    Args:
        tiers: (channels, height, width, groups), see `MonotoneHollowConv`; the first has one group. Default: the
            paper's for MNIST.
        classes: states of the label.
        m, observed_fraction, temperature, equilibrium: see `MonotoneDBM`; the paper trains MNIST with m = 0.01.
        kernel_size: side of the kernels between grids.
    Raises:
        LaminaError, ShapeError: as `MonotoneDBM` and `MonotoneHollowConv`.
    Example:
        >>> model = ConvMonotoneDBM([(2, 8, 8, 1), (8, 4, 4, 2)], classes=10)
        >>> model.classify(torch.zeros(1, 8, 8, dtype=torch.long)).shape
        torch.Size([1])
    """

    def __init__(
        self,
        tiers: Sequence[Tier] = MNIST_TIERS,
        classes: int = 10,
        m: float = 0.1,
        observed_fraction: float = 0.4,
        *,
        kernel_size: int = 3,
        temperature: float = TEMPERATURE,
        equilibrium: Annotated[Node, Slot("layer")] = EQUILIBRIUM,
    ) -> None:
        if not tiers or tiers[0][3] != 1:
            raise ShapeError(
                f"the first tier holds the pixels: one group whose channels are the grey levels, got {tiers}"
            )
        names = ["pixel", *(f"hidden{i}" for i in range(1, len(tiers))), "label"]
        super().__init__(
            MonotoneHollowConv([*tiers, (classes, 1, 1, 1)], m, kernel_size),
            names,
            inputs="pixel",
            target="label",
            observed_fraction=observed_fraction,
            temperature=temperature,
            equilibrium=equilibrium,
        )


def grey_levels(images: Tensor, states: int) -> Tensor:
    """Cut values from 0 to 1 into `states` bins of equal width: floats -> whole numbers of the same shape.

    Raises:
        LaminaError: values outside 0..1, or NaN.
    """
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise LaminaError(
            f"images must have values from 0 to 1 to be cut into {states} levels, got {float(images.min()):.3g} to "
            f"{float(images.max()):.3g}"
        )
    return (images.float() * states).long().clamp_(max=states - 1)


def _given(inputs: Tensor | None, pixel_values: Tensor | None, states: int) -> Tensor:
    if inputs is not None and pixel_values is None:
        return inputs
    if pixel_values is not None and inputs is None:
        return grey_levels(pixel_values, states)
    raise LaminaError("a Boltzmann machine takes either inputs (states) or pixel_values (0 to 1)")
