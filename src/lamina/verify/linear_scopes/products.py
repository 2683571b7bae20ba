"""Scopes of what is linear in each of several arguments: one, the gate, stays as at x0, the other is the probe's.

The gate is the operand that broadcasts; of equals the one that came straight out of a pointwise unit, else the first.
Denominators, the queries and keys of attention, weights and sampling grids are part 0's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lamina.verify.linear_scopes.call import Call, NoRuleError, Scope


def _size(x: Tensor) -> int:
    return x.numel()


def _batches(x: Tensor) -> int:
    return math.prod(x.shape[:-2])


def _alike(x: Tensor) -> int:
    return 0


def product(size: Callable[[Tensor], int], factors: slice = slice(None)) -> Scope:
    """Make the scope of a product; `factors`: which of the tensors are multiplied, the others are added."""

    def scope(call: Call) -> Any:
        multiplied = call.tensors()[factors]
        moving = [i for i in multiplied if i in call.probes]
        added = [i for i in call.probes if i not in multiplied]
        if len(moving) > 1:
            # max takes the first of equals: the largest, not a unit's own output, the last.
            kept = max(reversed(moving), key=lambda i: (size(call.leaves[i]), i not in call.straight))
            moving = [kept]
        return _sum(call, moving, added)

    return scope


def _sum(call: Call, moving: list[int], added: list[int]) -> Any:
    if moving or len(added) == len(call.probes):
        return call.linear([*moving, *added])
    raise NoRuleError("no factor depends on the input")


def weighted(call: Call) -> Any:
    """Layers whose weight may itself depend on the input: input or, with a constant input, weight and bias."""
    x, weight = call.position(0, "input"), call.position(1, "weight")
    return call.linear([i for i in call.probes if not (i == weight and x in call.probes)])


def quotient(call: Call) -> Any:
    """Divide by part 0's denominator."""
    if call.kwargs.get("rounding_mode") is not None:
        raise NoRuleError("it rounds")
    return call.linear([0]) if 0 in call.probes else None


def linear_in(names: Sequence[tuple[int, str]], pick: Callable[[Any], Any] | None = None) -> Scope:
    """Make a scope that moves these arguments (place, name) only, and leaves all others at x0."""

    def scope(call: Call) -> Any:
        moving = [i for i in (call.position(*n) for n in names) if i in call.probes]
        return call.linear(moving, pick) if moving else None

    return scope


def attention(call: Call) -> Any:
    """Read the probe's values with part 0's weights."""
    if call.at(4, "dropout_p", 0.0):
        raise NoRuleError("it drops at random")
    value = call.position(2, "value")
    if value not in call.probes:
        return None
    # One matrix of weights for all probes: they lie beside each other in the last dimension of the values.
    moving, several = call.probes[value], call.settings.count is not None
    read = moving.movedim(0, -1).flatten(-2) if several else moving
    # With a graph, the kernels whose gradient knows batches of cotangents.
    with sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else nullcontext():
        found = call.run({value: read})
    return found.unflatten(-1, (moving.shape[-1], -1)).movedim(-1, 0) if several else found


def multi_head_attention(call: Call) -> Any:
    """Read the probe's values with part 0's weights; the weights returned are part 0's."""
    value = call.position(2, "value")
    if value not in call.probes:
        return None, None
    with sdpa_kernel(SDPBackend.MATH):
        return call.linear([value], lambda r: r[0]), None


SCOPES: dict[str, Scope] = {
    **dict.fromkeys("mul multiply __mul__ __rmul__ __imul__".split(), product(_size)),
    **dict.fromkeys("matmul bmm mm mv __matmul__ __rmatmul__".split(), product(_batches)),
    **dict.fromkeys("einsum tensordot dot vdot inner outer ger kron bilinear cross".split(), product(_alike)),
    **dict.fromkeys("addmm addbmm baddbmm addmv addr".split(), product(_batches, slice(1, 3))),
    "addcmul": product(_size, slice(1, 3)),
    **dict.fromkeys("linear grouped_mm".split(), weighted),
    **dict.fromkeys("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(), weighted),
    **dict.fromkeys("div divide true_divide __div__ __truediv__ __idiv__ __itruediv__".split(), quotient),
    # A constant over x0.
    **dict.fromkeys("reciprocal __rdiv__ __rtruediv__".split(), lambda call: None),
    "addcdiv": linear_in([(0, "input"), (1, "tensor1")]),
    "lerp": linear_in([(0, "input"), (1, "end")]),
    "embedding": linear_in([(1, "weight")]),
    "grid_sample": linear_in([(0, "input")]),
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head_attention,
}
