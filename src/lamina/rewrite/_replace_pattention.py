"""Conversion of a linear layer to attention over learned pairs: the old function where its inputs are normed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.lineage import Lineage
from lamina.nn.parameter_attention import Pattention
from lamina.rewrite.conversion import conversion, take_over


@conversion("linear", "pattention")
def linear_to_pattention(old: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the layer; the bias is the old one, with its optimizer state.

    GELU(a) - GELU(-a) = a, so keys B and -B with values C and -C give C^T B x / rms(B x), with B the directions that
    the old weight C^T B acts on most. With 2 * in_features pairs that is the old layer on every x of root mean square
    1, as a norm gives them, whatever `scale` is asked for. Other scores than "l2_gelu" start fresh.

    Raises:
        LaminaError: the old layer is no plain `nn.Linear`. ShapeError, RecipeError: options that do not fit.
    """
    if not isinstance(old, nn.Linear):
        raise LaminaError(f"only an nn.Linear becomes {new!r}, and this is a {type(old).__name__}")
    chosen = {"bias": old.bias is not None, **options}
    made = Pattention(old.in_features, old.out_features, **chosen).to(dtype=old.weight.dtype)
    rank = min(made.pairs // 2, old.in_features)
    if made.score == "l2_gelu" and rank and not old.weight.is_meta and not made.key.is_meta:
        _take_linear(made, old.weight.detach(), rank, keep_scale=options.get("scale") is not None)
    for parameter in made.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    return take_over(made, old, lineage)


@torch.no_grad()
def _take_linear(made: Pattention, weight: Tensor, rank: int, *, keep_scale: bool) -> None:
    """Fill the pairs; those that are left over score nothing and have fresh values, as grown ones."""
    directions = _directions(weight.double(), rank)  # (r, in), orthonormal
    rank = len(directions)
    if not keep_scale:
        made.scale.fill_(math.sqrt(2 * rank))
    # Scores are scale / sqrt(2 * rank) times B x / rms(B x), and GELU(a) - GELU(-a) = a whatever the size of a.
    values = directions @ weight.double().T * (math.sqrt(2 * rank) / float(made.scale))
    made.key.zero_()
    made.key[: 2 * rank] = torch.cat((directions, -directions)).to(made.key.dtype)
    made.value[: 2 * rank] = torch.cat((values, -values)).to(made.value.dtype)


def _directions(weight: Tensor, rank: int) -> Tensor:
    """Return the directions of inputs that a weight (out, in) acts on most."""
    if rank == weight.shape[1]:
        return torch.eye(rank, dtype=weight.dtype, device=weight.device)
    return torch.linalg.svd(weight, full_matrices=False).Vh[:rank]
