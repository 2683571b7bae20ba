"""LARS: SGD with momentum whose step on each weight tensor is as long as the tensor's own norm says."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lamina.errors import LaminaError
from lamina.optim import _layerwise as layerwise
from lamina.optim._layerwise import Bounds, LayerwiseOptimizer, local, wide
from lamina.registry import register

VARIANTS = ("2017", "lamb-paper")


@register("optimizer", "lars", source="You et al. 2017, arXiv 1708.03888; algorithm 1 of arXiv 1904.00962")
class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling, for convolutional networks with very large batches.

    A layer is one parameter tensor; of a DTensor (FSDP2) the norms are those of the whole tensor. The momentum and the
    norms are float32 for narrower parameters. No step waits for the device.

    Args:
        lr: base rate, >= 0.
        momentum: 0..1 (1 excluded); `lamb-paper` calls it b1.
        dampening: of the gradient in the momentum, 0..1; the first buffer is the plain gradient.
        weight_decay: >= 0, added to the gradient, inside the ratio.
        trust_coefficient: c of `ratio = c ||x|| / (||g|| + weight_decay ||x|| + eps)`.
        variant: `2017`: the ratio scales the gradient before the momentum. `lamb-paper`: it scales the step and is
            ||x|| / ||m||, m the running mean of the gradients with decay (trust_coefficient, dampening, nesterov and
            eps do not enter it).
        nesterov: needs momentum, and no dampening.
        trust_clip: `2017`: ratio at most lr (LARC); `lamb-paper`: at most 1.
        always_adapt: `2017`: also groups without decay. Tensors of one dimension have ratio 1 and no decay, unless
            their group says `adapt: True`. (`lamb-paper` adapts all tensors of groups that do not say otherwise.)
        phi: `lamb-paper`: ||x|| is clamped to (low, high).
        foreach: False: one tensor at a time, as the formulas are written.
    Raises:
        LaminaError: a value out of range, options that exclude each other, complex parameters, sparse gradients, a
            state of another variant.
    Example:
        >>> x = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> x.grad = torch.tensor([[0.0, 1.0]])
        >>> LARS([x], lr=0.1, always_adapt=True, trust_coefficient=0.1).step()
        >>> x.data
        tensor([[3.0000, 3.9500]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        variant: Literal["2017", "lamb-paper"] = "2017",
        nesterov: bool = False,
        trust_clip: bool = False,
        always_adapt: bool = False,
        phi: Bounds | None = None,
        foreach: bool | None = None,
    ) -> None:
        layerwise.choose("LARS", "variant", variant, VARIANTS)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "variant": variant,
            "nesterov": nesterov,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "phi": phi,
            "foreach": foreach,
            "adapt": None,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        layerwise.choose("LARS", "variant", group["variant"], VARIANTS)
        layerwise.not_negative("LARS", group, "lr", "eps", "weight_decay", "trust_coefficient")
        layerwise.check_bounds("LARS", group["phi"])
        layerwise.check_adapt("LARS", group)
        if not 0 <= group["momentum"] < 1 or not 0 <= group["dampening"] <= 1:
            raise LaminaError(
                "LARS: momentum must be in [0, 1) and dampening in [0, 1], got "
                f"{group['momentum']} and {group['dampening']}"
            )
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise LaminaError("LARS: nesterov needs a momentum > 0 and no dampening")
        if group["variant"] == "lamb-paper" and (group["nesterov"] or group["dampening"]):
            raise LaminaError("LARS: the variant 'lamb-paper' has neither nesterov nor dampening")
        if group["variant"] == "2017" and group["phi"] is not None:
            raise LaminaError("LARS: phi belongs to the variant 'lamb-paper'; '2017' has trust_coefficient")

    def _update(self) -> None:
        for group in self.param_groups:
            layers = self._trainable(group)
            for chunk in layerwise.chunks(layers, 0 if group["foreach"] is False else layerwise.chunk_limit(layers)):
                adapting = [p for p in chunk if adapts(p, group)]
                plain = [p for p in chunk if not adapts(p, group)]
                for found, ratio in ((adapting, True), (plain, False)):
                    if found and group["variant"] == "2017":
                        self._update_2017(found, group, ratio)
                    elif found:
                        self._update_lamb_paper(found, group, ratio)

    def _update_2017(self, layers: list[Tensor], group: dict[str, Any], adapting: bool) -> None:
        values, gradients = _values_and_gradients(layers)
        decays = [group["weight_decay"] if adapting or p.ndim > 1 else 0.0 for p in layers]
        updates = [g.add(x, alpha=decay) for g, x, decay in zip(gradients, values, decays, strict=True)]
        if adapting:
            for update, ratio in zip(updates, self._ratios_2017(layers, values, gradients, group), strict=True):
                update.mul_(ratio)
        if group["momentum"]:
            updates = self._with_momentum(layers, updates, group)
        _descend(layers, values, updates, [group["lr"]] * len(layers))

    def _ratios_2017(
        self, layers: list[Tensor], values: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        squares = [torch.stack(layerwise.squared_norms(t)) for t in (values, gradients)]
        x_norms, g_norms = layerwise.over_shards(torch.stack(squares), layers).sqrt().unbind()
        divisor = g_norms + group["weight_decay"] * x_norms + group["eps"]
        ratios = torch.where((x_norms > 0) & (g_norms > 0), group["trust_coefficient"] * x_norms / divisor, 1.0)
        if group["trust_clip"]:
            ratios = (ratios / group["lr"]).clamp(max=1.0)
        if self.record:
            self._recorded.append((layers, torch.stack([ratios, x_norms, g_norms], dim=1)))
        return ratios.unbind()

    def _with_momentum(self, layers: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        results = []
        for layer, update in zip(layers, updates, strict=True):
            state = self.state[layer]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = _zeros(layer)
                buffer = local(state["momentum_buffer"]).copy_(update)
            else:
                buffer = local(state["momentum_buffer"])
                buffer.mul_(group["momentum"]).add_(update, alpha=1 - group["dampening"])
            results.append(update.add_(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer)
        return results

    def _update_lamb_paper(self, layers: list[Tensor], group: dict[str, Any], adapting: bool) -> None:
        values, gradients = _values_and_gradients(layers)
        for layer in layers:
            if "momentum_buffer" not in self.state[layer]:
                self.state[layer]["momentum_buffer"] = _zeros(layer)
        means = [local(self.state[p]["momentum_buffer"]) for p in layers]
        decayed = torch._foreach_add(gradients, values, alpha=group["weight_decay"])
        torch._foreach_lerp_(means, decayed, 1 - group["momentum"])
        rates: list[Any] = [group["lr"]] * len(layers)
        if adapting:
            squares = layerwise.squared_norms(values), layerwise.squared_norms(means)
            ratios = self._ratios(*squares, layers, group["phi"], group["trust_clip"])
            rates = list((ratios * group["lr"]).unbind())
        _descend(layers, values, means, rates)


def adapts(layer: Tensor, group: dict[str, Any]) -> bool:
    """Say whether a tensor gets the trust ratio."""
    if group["adapt"] is not None:
        return bool(group["adapt"])
    if group["variant"] == "lamb-paper":
        return True
    return layer.ndim > 1 and (group["always_adapt"] or group["weight_decay"] != 0)


def _values_and_gradients(layers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [wide(local(p)) for p in layers], [wide(local(p.grad)) for p in layers]  # type: ignore[arg-type]


def _zeros(layer: Tensor) -> Tensor:
    return torch.zeros_like(layer, dtype=torch.float32 if layerwise.is_narrow(layer) else None)


def _descend(layers: list[Tensor], values: list[Tensor], updates: list[Tensor], rates: list[Any]) -> None:
    for layer, x, update, rate in zip(layers, values, updates, rates, strict=True):
        local(layer).copy_(x - rate * update)
