"""Kar2 and Kar3: steps made of signs, of the gradient and of one or two running means of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lamina.errors import LaminaError
from lamina.optim import _layerwise as layerwise
from lamina.registry import register

SOURCE = "Zhang, HyperZ.Z.W Operator (2024), arXiv 2401.17948"


class SignedMeans(Optimizer):
    """p -= lr * (sign(g) + sign(m_1) + ... ), then m_k <- beta_k m_k + (1 - beta_k) g; not an optimizer by itself."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see torch.

        Raises:
            LaminaError: an option is out of range, or a parameter is complex.
        """
        super().add_param_group(param_group)
        try:
            group, name = self.param_groups[-1], type(self).__name__
            layerwise.not_negative(name, group, "lr")
            self._check(group)
            if any(p.is_complex() for p in group["params"]):
                raise LaminaError(f"{name} does not take complex parameters: pass torch.view_as_real of them")
        except LaminaError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state; see torch. Means of narrower parameters stay float32."""
        super().load_state_dict(state_dict)
        layerwise.widen_state(self, state_dict)

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _decays(self, group: dict[str, Any]) -> tuple[float, ...]:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step on every parameter that has a gradient; return what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in moving):
                raise LaminaError(f"{type(self).__name__} does not take sparse gradients")
            for alike in layerwise.chunks(moving, layerwise.chunk_limit(moving)):
                self._move(alike, group["lr"], self._decays(group))
        return loss

    def _move(self, parameters: list[Tensor], lr: float | Tensor, decays: tuple[float, ...]) -> None:
        gradients = [layerwise.wide(layerwise.local(p.grad)) for p in parameters]  # type: ignore[arg-type]
        means = [[self._mean(p, k) for p in parameters] for k in range(len(decays))]
        signs = torch._foreach_sign(gradients)
        for mean, decay in zip(means, decays, strict=True):
            torch._foreach_add_(signs, torch._foreach_sign(mean))
            torch._foreach_lerp_(mean, gradients, 1 - decay)
        torch._foreach_mul_(signs, lr)
        torch._foreach_sub_([layerwise.local(p) for p in parameters], signs)

    def _mean(self, parameter: Tensor, k: int) -> Tensor:
        state, name = self.state[parameter], f"mean_{k + 1}"
        if name not in state:
            narrow = torch.float32 if layerwise.is_narrow(parameter) else None
            state[name] = torch.zeros_like(parameter, dtype=narrow, memory_format=torch.preserve_format)
        return layerwise.local(state[name])


@register("optimizer", "kar2", source=SOURCE)
class Kar2(SignedMeans):
    """Signs of the gradient and of one running mean: p -= lr * (sign(g) + sign(m)), then m moves towards g.

    Every number moves by 0, lr or 2 lr a step: the size of gradients does not matter, and no weight decay is needed to
    bound what one batch can do. Means are float32 for narrower parameters; DTensors are moved shard by shard.

    Args:
        lr: >= 0; the first step is lr * sign(g), for the mean is 0.
        beta: decay of the mean, 0..1 (1 excluded). The source gives it for two means only.
    Raises:
        LaminaError: a value out of range, complex parameters, sparse gradients.
    Source: arXiv 2401.17948; lr is that of its CIFAR-10 run (the class's own default there is 1e-4).
    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0]))
        >>> x.grad = torch.tensor([-3.0])
        >>> Kar2([x], lr=0.1).step()
        >>> x.data
        tensor([1.1000])
    """

    def __init__(self, params: ParamsT, lr: float | Tensor = 1.215e-3, beta: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    def _check(self, group: dict[str, Any]) -> None:
        if not (isinstance(group["beta"], float | int) and 0 <= group["beta"] < 1):
            raise LaminaError(f"Kar2: beta must be a number in [0, 1), got {group['beta']!r}")

    def _decays(self, group: dict[str, Any]) -> tuple[float, ...]:
        return (group["beta"],)


@register("optimizer", "kar3", source=SOURCE)
class Kar3(SignedMeans):
    """Signs of the gradient and of a fast and a slow mean: p -= lr * (sign(g) + sign(m1) + sign(m2)).

    Every number moves by at most 3 lr a step, and by that while gradient and both means agree. Means are float32 for
    narrower parameters; DTensors are moved shard by shard.

    Args:
        lr: >= 0; the first step is lr * sign(g), for the means are 0.
        betas: decay of the two means, 0..1 (1 excluded).
    Raises:
        LaminaError: a value out of range, complex parameters, sparse gradients.
    Source: arXiv 2401.17948; lr is that of its CIFAR-10 run (the class's own default there is 1e-4).
    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Kar3([x], lr=0.1)
        >>> for _ in range(2):
        ...     x.grad = torch.tensor([-3.0])
        ...     optimizer.step()
        >>> x.data
        tensor([1.4000])
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1.215e-3, betas: tuple[float, float] = (0.5, 0.95)
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    def _check(self, group: dict[str, Any]) -> None:
        layerwise.check_betas("Kar3", group["betas"])

    def _decays(self, group: dict[str, Any]) -> tuple[float, ...]:
        return tuple(group["betas"])
