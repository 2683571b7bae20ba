"""AdamW whose two moments take a byte a number: float8 codes, spread over the whole range of float8 by groups."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lamina.errors import LaminaError
from lamina.float8 import Format
from lamina.optim import _layerwise as layerwise
from lamina.optim._float8_shards import MOMENTS, assembled, flattened, like_parameter
from lamina.optim._layerwise import local
from lamina.optim.dynamic_range import (
    Coding,
    QuantizedTensor,
    RangeBound,
    dequantize_groups,
    encode,
    quantize_groups,
    to_groups,
    zeros,
)
from lamina.registry import register

_log = logging.getLogger(__name__)

CHUNK, GPU_CHUNK = 2**16, 2**24
"""Numbers updated at a time: what is float32 on the way fits a CPU's cache, and no large tensor is float32 as a whole.
On a GPU a call costs more than a cache saves."""


@register("optimizer", "float8_adamw", source="Xi et al., COAT (2025), arXiv 2410.19313")
class Float8AdamW(Optimizer):
    """AdamW with both moments in float8: 2.2 bytes a parameter for them, where AdamW takes 8.

    For training all of a model whose optimizer state does not fit. The step itself is AdamW's in float32; what is
    carried to the next one is rounded, by groups of consecutive numbers that are first raised to a power of their own
    so that they fill the range of float8 (`lamina.optim.dynamic_range`). Small tensors keep float32 moments. A step
    whose gradients are not all finite is left out, as a gradient scaler does, and logged.

    In the state a moment is a `QuantizedTensor`, which acts as the float32 tensor it stands for; `state_dict()` has its
    parts: `exp_avg.codes` (float8, like the parameter), `.scale`, `.k`, `.center` (shards, groups). Moments of shards
    (FSDP2, rows) are grouped within each shard; read by another number of processes they are quantised anew.

    Args:
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`; lr may be a tensor.
        group_size: numbers with one scale: 32, 64, 128, ...
        expand: False: a scale alone a group, as other 8-bit optimizers have; small second moments then become 0.
        expand_min: exponents are multiples of 1 / expand_min.
        range_bound: `code`: the official code's bound, rounded down; `paper`: float8's whole range.
        formats: of the first and the second moment, `e4m3` or `e5m2`.
        min_numel: smaller tensors (gains, biases) keep float32 moments.
        compile: fuse the update of a chunk into one kernel with torch.compile: Triton on a GPU, C++ on the CPU.
    Raises:
        LaminaError: a value out of range, float16 or complex parameters, sparse gradients, `amsgrad` in a group, a
            parameter sharded other than by rows.
    Source: arXiv 2410.19313, section 4 and appendix; the official code's step (`coat/optimizer`). Deviation: exponents
        are clamped, and zeros are left out of a group's smallest magnitude exactly, see `quantize_groups`.
    Example:
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Float8AdamW(model.parameters())
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state_dict()["state"][0]["exp_avg.codes"].dtype
        torch.float8_e4m3fn
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        group_size: int = 128,
        expand: bool = True,
        expand_min: int = 16,
        range_bound: RangeBound = "code",
        formats: tuple[Format, Format] = ("e4m3", "e4m3"),
        min_numel: int = 4096,
        compile: bool = False,
    ) -> None:
        self.skipped = 0
        """Steps left out because a gradient was not finite, since this object was made."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "group_size": group_size,
            "expand": expand,
            "expand_min": expand_min,
            "range_bound": range_bound,
            "formats": tuple(formats),
            "min_numel": min_numel,
            "compile": compile,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see torch.

        Raises:
            LaminaError: an option is out of range, or a parameter cannot be taken.
        """
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except LaminaError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state; a quantised moment as its parts (`exp_avg.codes`, `exp_avg.scale`, ...)."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self._complete(parameter, group)
        found = super().state_dict()
        return {**found, "state": {number: flattened(state) for number, state in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state, code for code; see torch. Moments of plain AdamW are quantised at the next step."""
        # torch would cast float8 to the type of the parameter.
        super().load_state_dict({**state_dict, "state": {}})
        held = [(p, group) for group in self.param_groups for p in group["params"]]
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (parameter, group) in zip(saved, held, strict=True):
            if number in state_dict["state"]:
                codings = dict(zip(MOMENTS, _codings(group), strict=True))
                self.state[parameter] = assembled(state_dict["state"][number], parameter, codings)

    def state_bytes(self) -> int:
        """Return how many bytes the moments of this process take."""
        moments = [local(s[name]) for s in self.state.values() for name in MOMENTS if name in s]
        return sum(m.nbytes_stored() if isinstance(m, QuantizedTensor) else m.nbytes for m in moments)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step on every parameter that has a gradient; return what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        found = [p for _, parameters in moving for p in parameters]
        if any(p.grad.is_sparse for p in found):
            raise LaminaError("Float8AdamW does not take sparse gradients: use torch.optim.SparseAdam for that layer")
        if found and not _all_finite(found):
            self.skipped += 1
            _log.warning("Float8AdamW left a step out: its gradients are not finite (%d so far)", self.skipped)
            return loss
        for group, parameters in moving:
            for parameter in parameters:
                self._complete(parameter, group)["step"] += 1
            self._update_whole([p for p in parameters if p.numel() < group["min_numel"]], group)
            # Made once for parameters that are as old: a copy to a GPU waits.
            made: dict[tuple[float, torch.device], Tensor] = {}
            for parameter in parameters:
                if parameter.numel() >= group["min_numel"]:
                    key = (float(self.state[parameter]["step"]), parameter.device)
                    if key not in made:
                        values = [float(group["lr"]), *_corrections(self.state[parameter]["step"], group)]
                        made[key] = torch.tensor(values, device=parameter.device)
                    self._update_quantized(parameter, group, made[key])
        return loss

    def _complete(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state; moments that a rewrite or another optimizer left in other forms are converted."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
        small = parameter.numel() < group["min_numel"]
        for name, coding in zip(MOMENTS, _codings(group), strict=True):
            kept = state.get(name)
            if kept is None:
                shape, device = local(parameter).shape, parameter.device
                new = torch.zeros(shape, device=device) if small else zeros(shape, coding, device)
                state[name] = like_parameter(new, parameter)
            elif small == isinstance(local(kept), QuantizedTensor) or local(kept).dtype != torch.float32:
                wide = local(kept).float().contiguous()
                state[name] = like_parameter(wide + 0 if small else encode(wide, coding), parameter)
        return state

    def _update_whole(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None:
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        first, second = ([local(s[name]) for s in states] for name in MOMENTS)
        gradients = [local(p.grad).float() for p in parameters]  # type: ignore[arg-type]
        corrections = [_corrections(s["step"], group) for s in states]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        divisors = list(torch._foreach_sqrt(second))
        torch._foreach_div_(divisors, [root for _, root in corrections])
        torch._foreach_add_(divisors, group["eps"])
        rate = float(group["lr"])
        values = [local(p) for p in parameters]
        wide = [layerwise.wide(x) for x in values]
        torch._foreach_mul_(wide, 1 - rate * group["weight_decay"])
        torch._foreach_addcdiv_(wide, first, divisors, [-rate / one for one, _ in corrections])
        for value, x in zip(values, wide, strict=True):
            if x is not value:
                value.copy_(x)

    def _update_quantized(self, parameter: Tensor, group: Mapping[str, Any], numbers: Tensor) -> None:
        state, value = self.state[parameter], local(parameter)
        if not value.numel():
            return
        moments: list[QuantizedTensor] = [local(state[name]) for name in MOMENTS]  # type: ignore[misc]
        size = group["group_size"]
        x, gradient = to_groups(value, size), to_groups(local(parameter.grad), size)  # type: ignore[arg-type]
        parts = [m.groups() for m in moments]
        fixed = (*group["betas"], group["eps"], group["weight_decay"], *_codings(group))
        update = _compiled_update if group["compile"] else update_groups_
        rows = (CHUNK if value.device.type == "cpu" else GPU_CHUNK) // size
        for begin in range(0, len(x), rows):
            cut = slice(begin, begin + rows)
            first, second = ([p[cut] for p in part] for part in parts)
            update(x[cut], gradient[cut], first, second, numbers, *fixed)
        if x.data_ptr() != value.data_ptr():
            value.copy_(x.view(-1)[: value.numel()].view(value.shape))
        for moment, part in zip(moments, parts, strict=True):
            if part[0].data_ptr() != moment.codes.data_ptr():
                moment.store(part)


def update_groups_(
    x: Tensor,
    gradient: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    numbers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    first_coding: Coding,
    second_coding: Coding,
) -> None:
    """Do one AdamW step on whole groups (groups, n), in place; the moments are as `quantize_groups` has them.

    The update uses the new moments before they are rounded.

    Args:
        numbers: (3,) float32: learning rate, 1 - beta1^t, and sqrt(1 - beta2^t).
    Source: arXiv 2410.19313, algorithm of the optimizer; Loshchilov, Hutter (2019), arXiv 1711.05101.
    """
    rate, correction, root = numbers[0], numbers[1], numbers[2]
    g, value = gradient.float(), x.float()
    m = dequantize_groups(*first) * beta1 + (1 - beta1) * g
    v = dequantize_groups(*second) * beta2 + (1 - beta2) * g * g
    divisor = (v.sqrt() / root + eps) * correction
    x.copy_(value - rate * (m / divisor + weight_decay * value))
    for moment, new, coding in ((first, m, first_coding), (second, v, second_coding)):
        for kept, part in zip(moment, quantize_groups(new, coding), strict=True):
            kept.copy_(part)


def _compiled_update(
    x: Tensor, gradient: Tensor, first: Sequence[Tensor], second: Sequence[Tensor], *rest: Any
) -> None:
    # Of one shape for any number of groups, but of a fixed size of a group.
    for tensor in (x, gradient, *first, *second):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    _compiled()(x, gradient, first, second, *rest)


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(update_groups_, fullgraph=True)


def _codings(group: Mapping[str, Any]) -> tuple[Coding, Coding]:
    options = (group["group_size"], group["expand"], group["expand_min"], group["range_bound"])
    first, second = group["formats"]
    return Coding(first, *options), Coding(second, *options)


def _corrections(step: Tensor, group: Mapping[str, Any]) -> tuple[float, float]:
    """Return 1 - beta1^t and sqrt(1 - beta2^t)."""
    count, (beta1, beta2) = float(step), group["betas"]
    return 1 - beta1**count, (1 - beta2**count) ** 0.5


def _all_finite(parameters: Sequence[Tensor]) -> bool:
    """Say whether all gradients are finite, in all processes that hold shards of them."""
    gradients = [local(p.grad) for p in parameters]  # type: ignore[arg-type]
    # The largest magnitude: a sum of squares might itself overflow.
    norms = [g.new_zeros(()) if not g.numel() else torch.linalg.vector_norm(g, torch.inf) for g in gradients]
    bad = torch.stack([(~n.isfinite()).float().to(norms[0].device) for n in norms])
    return not bool(layerwise.over_shards(bad, parameters).any())


def _check(group: dict[str, Any]) -> None:
    layerwise.not_negative("Float8AdamW", group, "lr", "eps", "weight_decay", "min_numel")
    layerwise.check_betas("Float8AdamW", group["betas"])
    if not isinstance(group["formats"], (tuple, list)) or len(group["formats"]) != 2:
        raise LaminaError(f"Float8AdamW: formats are two, of the first and second moment, got {group['formats']!r}")
    try:
        _codings(group)
    except LaminaError as error:
        raise LaminaError(f"Float8AdamW: {error}") from error
    for option in ("amsgrad", "maximize"):
        if group.get(option):
            raise LaminaError(f"Float8AdamW has no {option}: its moments are two, and it minimises")
    for parameter in group["params"]:
        if parameter.is_complex() or parameter.dtype == torch.float16:
            instead = "bfloat16 or float32" if parameter.dtype == torch.float16 else "torch.view_as_real of them"
            raise LaminaError(f"Float8AdamW does not take {parameter.dtype} parameters: use {instead}")
        if isinstance(parameter, DTensor):
            like_parameter(torch.empty(0), parameter, check_only=True)
