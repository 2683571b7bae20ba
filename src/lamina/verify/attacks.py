"""Faulty workers, to try a reducer on: what attackers and broken machines send in place of a gradient.

An attack is a plain function `(honest (p - f, n), f, generator) -> (f, n)` that sees every honest gradient. `Attacked`
plays one in real processes:

    gradients: {name: "lamina.verify.attacks:Attacked", base: flag_aggregator, attack: reverse, f: 1}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lamina.errors import LaminaError, nearest
from lamina.gradients.reducer import Group, Reducer, flatten, gather, size, unflatten
from lamina.recipe import Node, factory
from lamina.registry import Slot

Attack = Callable[[Tensor, int, torch.Generator], Tensor]


def random(honest: Tensor, f: int, generator: torch.Generator) -> Tensor:
    """Send uniform numbers in 0..1."""
    return torch.rand(f, honest.shape[1], generator=generator).to(honest)


def gaussian(honest: Tensor, f: int, generator: torch.Generator, *, length: float = 20.0) -> Tensor:
    """Send Gaussian noise, `length` times as long as the honest gradients are on average."""
    noise = torch.randn(f, honest.shape[1], generator=generator).to(honest)
    return noise / noise.norm(dim=1, keepdim=True) * length * honest.norm(dim=1).mean()


def reverse(honest: Tensor, f: int, generator: torch.Generator, *, factor: float = 10.0) -> Tensor:
    """Send -10 times a gradient."""
    return -factor * own(honest, f)


def sign_flip(honest: Tensor, f: int, generator: torch.Generator) -> Tensor:
    """Send a gradient with its sign turned."""
    return reverse(honest, f, generator, factor=1.0)


def scaled(honest: Tensor, f: int, generator: torch.Generator, *, factor: float = 100.0) -> Tensor:
    """Send a gradient 100 times as long."""
    return factor * own(honest, f)


def drop(honest: Tensor, f: int, generator: torch.Generator, *, share: float = 0.1) -> Tensor:
    """Send a gradient of which a share of the coordinates got lost: zeros."""
    kept = torch.rand(f, honest.shape[1], generator=generator) >= share
    return own(honest, f) * kept.to(honest)


def bit_flip(honest: Tensor, f: int, generator: torch.Generator, *, share: float = 0.01) -> Tensor:
    """Send a gradient in which one bit, any of 32, is wrong in a share of the coordinates: NaN comes about, too."""
    sent = own(honest, f).float()
    where = torch.rand(sent.shape, generator=generator) < share
    bits = torch.randint(32, sent.shape, generator=generator, dtype=torch.int32)
    flipped = torch.bitwise_xor(sent.view(torch.int32), torch.ones_like(bits).to(sent.device) << bits.to(sent.device))
    return torch.where(where.to(sent.device), flipped.view(torch.float32), sent).to(honest.dtype)


def stale(honest: Tensor, f: int, generator: torch.Generator, *, earlier: Tensor) -> Tensor:
    """Send gradients of an earlier step: (f, n)."""
    return earlier.clone()


def little_is_enough(honest: Tensor, f: int, generator: torch.Generator, *, z: float | None = None) -> Tensor:
    """Send mean - z deviations of the honest gradients, coordinate by coordinate: inside what looks honest.

    Args:
        z: None = the largest that still hides among the honest, by the paper's formula; 1.5 is a strong one.
    Source: Baruch et al., A Little Is Enough (2019), arXiv 1902.06156, algorithm 3.
    """
    n = len(honest) + f
    if z is None:
        share = (len(honest) - (n // 2 + 1 - f)) / len(honest)
        z = NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6))
    return (honest.mean(0) - z * honest.std(0, correction=0)).expand(f, -1).clone()


def fall_of_empires(honest: Tensor, f: int, generator: torch.Generator, *, epsilon: float = 0.1) -> Tensor:
    """Send -epsilon times the honest mean: its inner product with the true gradient is negative, and it is near.

    Source: Xie et al., Fall of Empires (2019), arXiv 1903.03936, section 4.
    """
    return (-epsilon * honest.mean(0)).expand(f, -1).clone()


def label_flip(labels: Tensor, classes: int) -> Tensor:
    """Return wrong labels, classes - 1 - label, for a worker that trains on them; negative ones (padding) stay."""
    return torch.where(labels >= 0, classes - 1 - labels, labels)


ATTACKS: Mapping[str, Attack] = {
    attack.__name__: attack
    for attack in (
        random,
        gaussian,
        reverse,
        sign_flip,
        scaled,
        drop,
        bit_flip,
        little_is_enough,
        fall_of_empires,
    )
}
"""By name, those that need nothing but this step's honest gradients."""


def own(honest: Tensor, f: int) -> Tensor:
    """Return what f more workers might have computed: honest gradients, from the first on."""
    return honest[torch.arange(f) % len(honest)]


class Attacked:
    """A reducer whose last `f` workers are faulty: they send what an attack says, the others their gradients.

    For experiments: everyone's gradients are gathered first, for the attack to look at (not counted in `bytes_sent`).

    Args:
        base: the reducer under attack: a node, or one that is built.
        attack: a name in `ATTACKS`, or `stale` (the gradient of the step before).
        f: how many workers are faulty, >= 0.
        seed: of the attack's random numbers.
    Raises:
        LaminaError: no such attack, or `f` is no number of workers; from `reduce`, no worker is honest.
    Example:
        >>> Attacked("median", "reverse", 1).bytes_sent()
        0
    """

    granularity: Literal["bucket", "model"] = "model"

    def __init__(
        self, base: Annotated[Node | Any, Slot("reducer")], attack: str = "reverse", f: int = 1, *, seed: int = 0
    ) -> None:
        if attack not in ATTACKS and attack != "stale":
            raise LaminaError(f"no attack is called {attack!r}{nearest(attack, [*ATTACKS, 'stale'])}")
        if isinstance(f, bool) or not isinstance(f, int) or f < 0:
            raise LaminaError(f"f, the number of faulty workers, must be a whole number >= 0, got {f!r}")
        self.base = cast(Reducer, factory("reducer", base)() if isinstance(base, (str, Mapping)) else base)
        self.attack, self.f, self.seed, self.step = attack, f, seed, 0
        self.earlier: dict[str, Tensor] = {}

    def tasks(self, step: int, rank: int, world: int) -> Sequence[int]:
        """Return the inner reducer's tasks."""
        return self.base.tasks(step, rank, world)

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Let the faulty workers change what they send, and reduce."""
        world = size(group)
        if world > 1:
            if self.f >= world:
                raise LaminaError(f"f = {self.f} of {world} workers are faulty: none is left")
            gradients = self._sent(gradients, group, world)
        self.step += 1
        return self.base.reduce(gradients, group)

    def follow(self, parameters: Mapping[str, Parameter]) -> None:
        """Hand the parameters on to the inner reducer, where it wants them."""
        if hasattr(self.base, "follow"):
            self.base.follow(parameters)

    def bytes_sent(self) -> int:
        """Return the inner reducer's bytes."""
        return self.base.bytes_sent()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, what a stale worker sends next, and the inner reducer's state."""
        return {"step": self.step, "earlier": dict(self.earlier), "base": self.base.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state back."""
        self.step, self.earlier = int(state["step"]), dict(state["earlier"])
        self.base.load_state_dict(state["base"])

    def _sent(self, gradients: Mapping[str, Tensor], group: Group, world: int) -> Mapping[str, Tensor]:
        honest, faulty = world - self.f, dist.get_rank(group) - (world - self.f)
        if self.attack == "stale":
            before = self.earlier or dict(gradients)
            self.earlier = {n: g.detach().clone() for n, g in gradients.items()}
            return before if faulty >= 0 else gradients
        flat = flatten(gradients)
        for dtype, vector in flat.items():
            everyone = gather(vector, group)
            if faulty >= 0:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
                flat[dtype] = ATTACKS[self.attack](everyone[:honest], self.f, generator)[faulty]
        return unflatten(flat, gradients) if faulty >= 0 else gradients
