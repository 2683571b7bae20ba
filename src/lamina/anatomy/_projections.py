"""Find the query, key, value and output projections of an attention, fused or apart, in any module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.anatomy._tree import widths

_NAMES = {
    "query": re.compile(r"^(to_?|w_?|linear_)?(q|query)(_(proj|lin|linear))?$", re.IGNORECASE),
    "key": re.compile(r"^(to_?|w_?|linear_)?(k|key)(_(proj|lin|linear))?$", re.IGNORECASE),
    "value": re.compile(r"^(to_?|w_?|linear_)?(v|value)(_(proj|lin|linear))?$", re.IGNORECASE),
}
_FUSED = re.compile(r"qkv|c_attn|query_key_value|in_proj", re.IGNORECASE)
_BY_HEAD = re.compile(r"query_key_value", re.IGNORECASE)
"""Fused weights whose rows go head by head: each head's query, key and value together (GPT-NeoX, BLOOM)."""


@dataclass(frozen=True)
class Projection:
    """One projection of an attention: some outputs of a weight that may hold others too."""

    weight: Parameter
    bias: Parameter | None
    rows: tuple[int, ...]
    """Which outputs of the weight, in order."""
    bias_rows: tuple[int, ...]
    """Which entries of the bias."""
    transposed: bool = False
    """The weight is (in, out), as in GPT-2's Conv1D."""

    def matrix(self) -> Tensor:
        """Return a copy of the (out, in) matrix."""
        weight = self.weight.detach()
        return (weight.T if self.transposed else weight)[list(self.rows)]

    def vector(self) -> Tensor | None:
        """Return a copy of the (out,) bias, or None."""
        return None if self.bias is None else self.bias.detach()[list(self.bias_rows)]


@dataclass(frozen=True)
class Projections:
    """The four projections of one attention."""

    query: Projection
    key: Projection
    value: Projection
    out: Projection

    def named(self) -> dict[str, Projection]:
        """Return them by name."""
        return {"query": self.query, "key": self.key, "value": self.value, "out": self.out}


def attention_projections(attention: nn.Module, heads: int | None = None) -> Projections | None:
    """Return the projections at or below a module; None where it does not have exactly one of each, with a weight.

    Args:
        heads: of the query, which a weight that is fused head by head needs.
    """
    for module in attention.modules():
        if isinstance(module, nn.MultiheadAttention):
            return _of_torch(module)
    leaves = {path: m for path, m in attention.named_modules() if path and widths(m) is not None}
    if not all(isinstance(getattr(m, "weight", None), Parameter) for m in leaves.values()):
        # Formed from other numbers (hypercomplex, quantised layers): there is no weight to hand over.
        return None
    fused = [p for p in leaves if _FUSED.search(_last(p))]
    if len(fused) == 1 and len(leaves) == 2:
        out = next(p for p in leaves if p != fused[0])
        parts = _split(leaves[fused[0]], _last(fused[0]), leaves[out], heads)
        return None if parts is None else Projections(parts[0], parts[1], parts[2], _whole(leaves[out]))
    found = {kind: [p for p in leaves if name.match(_last(p))] for kind, name in _NAMES.items()}
    rest = [p for p in leaves if all(p not in paths for paths in found.values())]
    if len(rest) != 1 or any(len(paths) != 1 for paths in found.values()):
        return None
    query, key, value = (_whole(leaves[found[kind][0]]) for kind in _NAMES)
    return Projections(query, key, value, _whole(leaves[rest[0]]))


def _last(path: str) -> str:
    """Return the name that says what a projection is: of `to_out.0` that is `to_out`."""
    steps = path.split(".")
    return steps[-2] if steps[-1].isdigit() and len(steps) > 1 else steps[-1]


def _whole(module: nn.Module) -> Projection:
    size = widths(module)
    assert size is not None
    return _part(module, range(size[1]))


def _part(module: nn.Module, rows: Sequence[int]) -> Projection:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Parameter)
    return Projection(weight, bias, tuple(rows), tuple(rows), transposed=type(module).__name__ == "Conv1D")


def _split(fused: nn.Module, name: str, out: nn.Module, heads: int | None) -> list[Projection] | None:
    """Take a fused weight apart: [query; key; value], keys and values perhaps narrower; or head by head."""
    total, queries = (widths(fused) or (0, 0))[1], (widths(out) or (0, 0))[0]
    others, odd = divmod(total - queries, 2)
    if odd or others <= 0:
        return None
    if not _BY_HEAD.search(name):
        edges = (0, queries, queries + others, total)
        return [_part(fused, range(edges[i], edges[i + 1])) for i in range(3)]
    if heads is None or others != queries or queries % heads:
        return None
    rows = torch.arange(total).view(heads, 3, queries // heads)
    return [_part(fused, rows[:, i].flatten().tolist()) for i in range(3)]


def _of_torch(module: nn.MultiheadAttention) -> Projections | None:
    if module.bias_k is not None or module.add_zero_attn:
        # Keys and values that come from no token.
        return None
    E, apart = module.embed_dim, (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    parts = []
    for i, own in enumerate(apart):
        rows = tuple(range(i * E, (i + 1) * E))
        if module.in_proj_weight is not None:
            parts.append(Projection(module.in_proj_weight, module.in_proj_bias, rows, rows))
        else:
            parts.append(Projection(own, module.in_proj_bias, tuple(range(E)), rows))
    return Projections(parts[0], parts[1], parts[2], _whole(module.out_proj))
