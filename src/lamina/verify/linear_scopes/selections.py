"""Scopes of what selects (pools, maxima, sorting) and of what is taken by its tangent at x0.

The positions that won at x0 are read from the probe; ties go as PyTorch's forward, or backward, has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lamina.verify.linear_scopes.call import Call, NoRuleError, Scope

CURVED = frozenset(
    "norm linalg_norm linalg_vector_norm frobenius_norm std var std_mean var_mean logsumexp logcumsumexp prod cumprod "
    "cosine_similarity pairwise_distance dist cdist".split()
)
"""Reductions that are neither linear nor pointwise."""

SELECTING = frozenset(
    "amax amin maximum minimum fmax fmin max min topk sort msort kthvalue median nanmedian mode cummax cummin".split()
)
"""Piecewise linear: their tangent is the selection that x0 made."""


def pool(dims: int, indexed: Callable[..., tuple[Tensor, Tensor]], both: bool) -> Scope:
    """Make the scope of a max-pool over the last dimensions; `both`: it returns the winners as well."""

    def scope(call: Call) -> Any:
        options = {k: v for k, v in call.kwargs.items() if k not in ("return_indices", "input")}
        # The last of the seven is return_indices.
        places = call.args[1:6] if indexed in _POOLS.values() else call.args[1:2]
        won = call.result[1] if both else indexed(call.leaves[0], *places, **options)[1]
        part1 = call.probes[0].flatten(-dims)
        lead = part1.shape[: part1.dim() - won.dim() + dims - 1]
        read = part1.gather(-1, won.flatten(-dims).expand(*lead, *won.shape[:-dims], -1))
        read = read.unflatten(-1, won.shape[-dims:])
        return (read, None) if both else read

    return scope


def tangent(call: Call) -> Any:
    """Return J part1 + (value - J x0), J the derivative at x0 in all that depends on the probe."""
    positions = list(call.probes)
    at = tuple(call.leaves[i].detach() for i in positions)
    whole = pytree.tree_leaves(call.result)
    smooth = [i for i, r in enumerate(whole) if isinstance(r, Tensor) and (r.is_floating_point() or r.is_complex())]

    def unit(*values: Tensor) -> tuple[Tensor, ...]:
        found = pytree.tree_leaves(call.run(dict(zip(positions, values, strict=True))))
        return tuple(found[i] for i in smooth)

    def moved(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(unit, at, values)[1]

    try:
        part1 = call.over(moved, *(call.probes[i] for i in positions))
        there = moved(*at)
    except (RuntimeError, NotImplementedError) as error:
        raise NoRuleError(f"and no forward derivative: {error}") from error
    leaves: list[Any] = [None] * len(whole)
    for i, moving, value in zip(smooth, part1, there, strict=True):
        leaves[i] = moving + (whole[i] - value)
    return pytree.tree_unflatten(leaves, pytree.tree_structure(call.result))


_POOLS = {n: getattr(F, f"max_pool{n}d_with_indices") for n in (1, 2, 3)}
_ADAPTIVE = {n: getattr(F, f"adaptive_max_pool{n}d_with_indices") for n in (1, 2, 3)}

SCOPES: dict[str, Scope] = {
    **dict.fromkeys(CURVED | SELECTING, tangent),
    **{f"max_pool{n}d": pool(n, f, False) for n, f in _POOLS.items()},
    **{f"max_pool{n}d_with_indices": pool(n, f, True) for n, f in _POOLS.items()},
    **{f"adaptive_max_pool{n}d": pool(n, f, False) for n, f in _ADAPTIVE.items()},
    **{f"adaptive_max_pool{n}d_with_indices": pool(n, f, True) for n, f in _ADAPTIVE.items()},
}
