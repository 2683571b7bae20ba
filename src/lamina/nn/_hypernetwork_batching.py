"""One module with many sets of weights at once, by `torch.func.vmap` where torch has the rules for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map


def mapped(run: Callable[..., Any], places: Sequence[int | None], one_by_one: bool) -> Callable[..., Any]:
    """Return what calls run(weights, *leaves) for every row of the weights and of the leaves with a place.

    Args:
        places: of each leaf: 0 = it has a row for every set of weights; None = all share it.
        one_by_one: a loop in place of vmap.
    """

    def loop(weights: dict[str, Tensor], *leaves: Any) -> Any:
        rows = len(next(iter(weights.values())))
        each = [
            run({n: w[i] for n, w in weights.items()}, *(x if p is None else x[i] for p, x in _pairs(places, leaves)))
            for i in range(rows)
        ]
        return tree_map(lambda *found: torch.stack(found), *each)

    def at_once(weights: dict[str, Tensor], *leaves: Any) -> Any:
        every = vmap(run, in_dims=(0, *places), randomness="different")
        if next(iter(weights.values())).device.type != "cpu":
            return every(weights, *leaves)
        # On a CPU vmap has no rule for the fused attention kernels: it would run them row by row, and warn.
        if torch.compiler.is_compiling():
            with sdpa_kernel(SDPBackend.MATH):
                return every(weights, *leaves)
        with sdpa_kernel(SDPBackend.MATH), _no_fast_path():
            return every(weights, *leaves)

    return loop if one_by_one else at_once


def _pairs(places: Sequence[int | None], leaves: Sequence[Any]) -> Iterator[tuple[int | None, Any]]:
    return zip(places, leaves, strict=True)


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Switch off the fused inference path of `nn.MultiheadAttention`."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
