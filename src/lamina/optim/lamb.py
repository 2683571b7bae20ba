"""LAMB: Adam whose step on each weight tensor is as long as the tensor's own norm says, for very large batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lamina.errors import LaminaError
from lamina.optim import _layerwise as layerwise
from lamina.optim._layerwise import Bounds, LayerwiseOptimizer, local, wide
from lamina.registry import register

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"bias_correction": True, "phi": None, "always_adapt": True, "max_grad_norm": None},
    "nvlamb": {"bias_correction": True, "phi": None, "always_adapt": False, "max_grad_norm": 1.0},
    "v3": {"bias_correction": False, "phi": (0.0, 10.0), "always_adapt": True, "max_grad_norm": None},
}
"""What an option that is None means under each variant."""


@register("optimizer", "lamb", source="You et al. 2020, arXiv 1904.00962")
class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments for batch training: one learning-rate rule from small batches to 32k.

    For when data-parallel width forces a huge batch: each tensor's step is `lr * ||x|| / ||u|| * u`, u being
    Adam's update with its decay. No free win at ordinary batch sizes: tuned Adam matches it there. Give norm gains
    and biases a group of their own without decay and ratio: `LAMB(parameter_groups(model, 0.01))`.

    A layer is one parameter tensor; of a DTensor (FSDP2) the norms are those of the whole tensor. Moments and norms
    are float32 for narrower parameters (which want float32 masters all the same). No step waits for the device.
    Memory beside Adam's: one buffer as large as the largest tensor (CPU) or all of them (CUDA, shards).

    Args:
        lr: base rate, >= 0; see `sqrt_batch_rule` and `warmup_polynomial`.
        eps: added outside the root, >= 0; at 0, elements that never had a gradient stand still.
        weight_decay: >= 0, inside the normalised update.
        variant: `paper` (TF addons), `nvlamb` (Apex, timm: gradients clipped to norm 1 over all groups, only decayed
            groups adapt), `v3` (older arXiv and pytorch-optimizer: no bias correction, ||x|| clamped to 0..10).
        bias_correction, phi, always_adapt, max_grad_norm: None = what the variant says. phi (low, high) clamps ||x||;
            (0, inf) is the identity under `v3`. always_adapt False: groups without decay get ratio 1, that is Adam.
            max_grad_norm inf: no clipping. A group's own `adapt: bool` wins.
        trust_clip: ratio at most 1 (LAMBC).
        grad_averaging: False multiplies the first moment by 1 / (1 - b1) (state stays the average).
        decoupled: False adds the decay to the gradient instead of the update.
        foreach: False: one tensor at a time, as the formulas are written. None or True: torch's fused Adam kernel
            works out the update of many tensors in a cache-sized buffer.
        capturable: keep the rate in a tensor, so that a captured CUDA graph sees it change (`lr.fill_`, as torch's
            schedulers do). Everything else can always be captured.
    Raises:
        LaminaError: a value out of range, complex parameters, sparse gradients, a state of another variant.
    Source: arXiv 1904.00962v5, algorithm 2; NVLAMB as in Apex's kernel (eps outside the root).
    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> x.grad = torch.tensor([0.1, 0.1])
        >>> LAMB([x], lr=1e-3, weight_decay=0.0).step()
        >>> x.data
        tensor([0.9984, 1.9984])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        variant: Literal["paper", "nvlamb", "v3"] = "paper",
        bias_correction: bool | None = None,
        phi: Bounds | None = None,
        trust_clip: bool = False,
        always_adapt: bool | None = None,
        max_grad_norm: float | None = None,
        grad_averaging: bool = True,
        decoupled: bool = True,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        layerwise.choose("LAMB", "variant", variant, tuple(VARIANTS))
        given = {
            "bias_correction": bias_correction,
            "phi": phi,
            "always_adapt": always_adapt,
            "max_grad_norm": max_grad_norm,
        }
        resolved = {k: VARIANTS[variant][k] if v is None else v for k, v in given.items()}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "variant": variant,
            **resolved,
            "trust_clip": trust_clip,
            "grad_averaging": grad_averaging,
            "decoupled": decoupled,
            "foreach": foreach,
            "capturable": capturable,
            "adapt": None,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        layerwise.choose("LAMB", "variant", group["variant"], tuple(VARIANTS))
        layerwise.not_negative("LAMB", group, "lr", "eps", "weight_decay")
        layerwise.check_bounds("LAMB", group["phi"])
        layerwise.check_betas("LAMB", group["betas"])
        layerwise.check_adapt("LAMB", group)
        if group["max_grad_norm"] is not None and not group["max_grad_norm"] > 0:
            raise LaminaError(f"LAMB: max_grad_norm must be > 0 (inf: no clipping), got {group['max_grad_norm']}")
        if group["capturable"] and group["params"]:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
        if any(getattr(p, "_is_flat_param", False) for p in group["params"]):
            warnings.warn(
                "LAMB got a FlatParameter (FSDP1 without use_orig_params): the whole of it counts as one layer",
                stacklevel=4,
            )

    def _update(self) -> None:
        groups = [(group, self._trainable(group)) for group in self.param_groups]
        norm = self._gradient_norm(groups)
        for group, layers in groups:
            divisor = None
            if norm is not None and math.isfinite(group["max_grad_norm"] or math.inf):
                divisor = (norm / group["max_grad_norm"]).clamp(min=1.0)
            if layers:
                torch._foreach_add_([self._state(p)["step"] for p in layers], 1)
            one_by_one = group["foreach"] is False
            for chunk in layerwise.chunks(layers, 0 if one_by_one else layerwise.chunk_limit(layers)):
                work = _Layers(self, chunk, group, divisor)
                (work.update_literally if one_by_one or not work.contiguous() else work.update)()

    def _gradient_norm(self, groups: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> Tensor | None:
        """Return the L2 norm of all gradients of all groups; None where no group clips."""
        layers = [p for _, found in groups for p in found]
        if not layers or not any(math.isfinite(g["max_grad_norm"] or math.inf) for g, _ in groups):
            return None
        squares: list[Tensor] = []
        for chunk in layerwise.chunks(layers, None):
            squares += layerwise.squared_norms([local(p.grad) for p in chunk])  # type: ignore[arg-type]
        home = squares[0]
        stacked = torch.stack([s.to(home.device, torch.promote_types(home.dtype, s.dtype)) for s in squares])
        return layerwise.over_shards(stacked, layers).sum().sqrt()

    def _state(self, layer: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[layer]
        if "exp_avg" not in state:
            dtype = torch.float32 if layerwise.is_narrow(layer) else None
            state["step"] = torch.zeros((), dtype=torch.float32, device=layer.device)
            state["exp_avg"] = torch.zeros_like(layer, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(layer, dtype=dtype)
        return state


def lamb_update(
    x: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    decoupled: bool = True,
) -> Tensor:
    """Return LAMB's update u of one tensor before its ratio; the moments are updated in place.

    Args:
        step: counts from 1 (this step).
    Source: arXiv 1904.00962v5, algorithm 2, the lines up to r + lambda x. Deviation: with `grad_averaging=False`
        the moment stays an average and the factor 1 / (1 - b1) is applied here; the product is the same.
    """
    beta1, beta2 = betas
    if not decoupled:
        gradient = gradient + weight_decay * x
    exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first, second = exp_avg, exp_avg_sq
    if bias_correction:
        count = step.double()
        first = first / (1 - beta1**count)
        second = second / (1 - beta2**count)
    if not grad_averaging:
        first = first / (1 - beta1)
    direction = first / (second.sqrt() + _at_least_tiny(eps, x))
    return direction + weight_decay * x if decoupled else direction


class _Layers:
    """A few tensors of one device and dtype, their state, and the two ways to update them."""

    def __init__(
        self, optimizer: LAMB, layers: list[Tensor], group: dict[str, Any], gradient_divisor: Tensor | None
    ) -> None:
        self.optimizer, self.layers, self.group = optimizer, layers, group
        states = [optimizer._state(p) for p in layers]
        self.values = [local(p) for p in layers]
        self.gradients = [wide(local(p.grad)) for p in layers]  # type: ignore[arg-type]
        self.exp_avgs = [local(s["exp_avg"]) for s in states]
        self.exp_avg_sqs = [local(s["exp_avg_sq"]) for s in states]
        self.steps = [s["step"] for s in states]
        if gradient_divisor is not None:
            divisor = gradient_divisor.to(self.gradients[0])
            self.gradients = [g / divisor for g in self.gradients]

    def contiguous(self) -> bool:
        """Say whether flat kernels may run over the tensors (gradients are made so)."""
        return all(t.is_contiguous() for t in (*self.values, *self.exp_avgs, *self.exp_avg_sqs))

    def update_literally(self) -> None:
        """Update as the formulas are written: the truth that the fast way is held to."""
        names = ("betas", "eps", "weight_decay", "bias_correction", "grad_averaging", "decoupled")
        options = {n: self.group[n] for n in names}
        for i, value in enumerate(self.values):
            x = wide(value)
            u = lamb_update(x, self.gradients[i], self.exp_avgs[i], self.exp_avg_sqs[i], self.steps[i], **options)
            rate: Any = self.group["lr"]
            if self._adapts():
                x_square, u_square = x.double().square().sum(), u.double().square().sum()
                rate = self._ratios([x_square], [u_square], self.layers[i : i + 1])[0].to(x.dtype) * rate
            value.copy_(x - rate * u)

    def update(self) -> None:
        """Update by torch's fused Adam: started from -decay * x at rate 1, it leaves -u in one pass over memory."""
        values = [wide(x) for x in self.values]
        buffers = self.optimizer._buffers(values)
        decay = self.group["weight_decay"]
        if decay and self.group["decoupled"]:
            for x, u in zip(values, buffers, strict=True):
                torch.mul(x, -decay, out=u)
        else:
            torch._foreach_zero_(buffers)
        x_squares = layerwise.squared_norms(values) if self._adapts() else []
        self._fused_adam(values, buffers)
        u_squares = layerwise.squared_norms(buffers) if self._adapts() else []
        for x, u, rate, value in zip(values, buffers, self._rates(x_squares, u_squares), self.values, strict=True):
            if isinstance(rate, Tensor):
                x.addcmul_(u, rate)
            else:
                x.add_(u, alpha=rate)
            if x is not value:
                value.copy_(x)

    def _fused_adam(self, values: list[Tensor], buffers: list[Tensor]) -> None:
        gradients = [g.contiguous() for g in self.gradients]
        if self.group["weight_decay"] and not self.group["decoupled"]:
            gradients = list(torch._foreach_add(gradients, values, alpha=self.group["weight_decay"]))
        beta1, beta2 = self.group["betas"]
        # beta**inf is 0: an endless count switches the kernel's bias correction off.
        steps = self.steps if self.group["bias_correction"] else [torch.full_like(s, math.inf) for s in self.steps]
        torch._fused_adam_(
            buffers,
            gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            steps,
            lr=1.0 if self.group["grad_averaging"] else 1 / (1 - beta1),
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=_at_least_tiny(self.group["eps"], buffers[0]),
            amsgrad=False,
            maximize=False,
        )

    def _rates(self, x_squares: list[Tensor], u_squares: list[Tensor]) -> Sequence[Tensor | float]:
        """Return each layer's rate; as numbers where the host has them anyway: a dozen small operations fewer."""
        rate, count = self.group["lr"], len(self.layers)
        on_host = layerwise.chunk_limit(self.layers) is not None and not torch.compiler.is_compiling()
        if not on_host or isinstance(rate, Tensor):
            ratios = self._ratios(x_squares, u_squares, self.layers) if x_squares else self.exp_avgs[0].new_ones(count)
            return (ratios * rate).unbind()
        if not x_squares:
            return [rate] * count
        if self.optimizer.record:
            self._ratios(x_squares, u_squares, self.layers)
        return [
            rate * layerwise.trust_ratio_of_numbers(x, u, self.group["phi"], self.group["trust_clip"])
            for x, u in zip(torch.stack(x_squares).tolist(), torch.stack(u_squares).tolist(), strict=True)
        ]

    def _adapts(self) -> bool:
        adapt = self.group["adapt"]
        return bool((self.group["always_adapt"] or self.group["weight_decay"] != 0) if adapt is None else adapt)

    def _ratios(self, x_squares: list[Tensor], u_squares: list[Tensor], layers: list[Tensor]) -> Tensor:
        return self.optimizer._ratios(x_squares, u_squares, layers, self.group["phi"], self.group["trust_clip"])


def _at_least_tiny(eps: float, like: Tensor) -> float:
    # With eps = 0 an element without any gradient so far would be 0 / 0; the smallest number changes no other.
    return eps or float(torch.finfo(wide(like).dtype).tiny)
