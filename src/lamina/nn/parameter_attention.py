"""Attention from tokens to learned pairs of keys and values (Pattention): a layer whose number of weights is free.

It stands where an `nn.Linear` stands. More pairs can be added to a trained layer without a change of its function: see
`lamina.rewrite.GrowParameterTokens`.
Source: Wang et al., TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters (2025), arXiv
2410.23168.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError, nearest
from lamina.nn._inputs import check_features
from lamina.registry import register

SOURCE = "Wang et al., TokenFormer (2025), arXiv 2410.23168"

Score = Literal["l2_gelu", "gelu_l2", "softmax"]
"""How products of tokens and keys become weights of the values."""

KEY_STD = 0.02


@register("layer", source=f"{SOURCE}, equations 5-8")
class Pattention(nn.Module):
    """Tokens attend to learned pairs of keys and values: a projection that can grow, called like `nn.Linear`.

    x (..., in_features) -> (..., out_features). Multiply-adds a token: pairs * (in_features + out_features). With
    "l2_gelu" the length of x does not matter, only its direction: put a norm or nothing before it. The scores' norm is
    float32 under autocast and in low precision.

    Args:
        pairs: keys and values, at least 1; None = in_features.
        bias: add a learned offset to the outputs (the paper has none, and without one x = 0 gives 0).
        score: "l2_gelu": scores are divided by their norm over the pairs, times `scale`, then GELU (exact); "gelu_l2":
            GELU first; "softmax".
        scale: factor of the normalised scores, a float32 buffer of the state dict; None = sqrt(pairs), for "softmax"
            pairs. It stays what it is when pairs are added: that keeps the function.
        eps: added to the squared norm.
    Raises:
        ShapeError: a size below 1, a scale or eps that is not positive; at the call, another width, a mask that does
            not fit. RecipeError: an unknown score.
    Source: Wang et al., TokenFormer (2025), arXiv 2410.23168, section 3.1. Deviations: eps (the official code has none,
        and a token of zeros gives NaN there); values start with a deviation of 1 / sqrt(pairs), since a layer does not
        know the depth of the network that the paper's start depends on (`TokenFormer` does).
    Example:
        >>> Pattention(8, 4, pairs=16)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 4])
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pairs: int | None = None,
        bias: bool = False,
        *,
        score: Score = "l2_gelu",
        scale: float | None = None,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        pairs = in_features if pairs is None else pairs
        if min(in_features, out_features, pairs) < 1:
            raise ShapeError(f"Pattention: sizes must be at least 1, got {in_features=}, {out_features=}, {pairs=}")
        if score not in get_args(Score):
            raise RecipeError(
                f"score is one of {', '.join(get_args(Score))}, got {score!r}{nearest(score, get_args(Score))}"
            )
        scale = default_scale(score, pairs) if scale is None else scale
        if not (0.0 < scale < math.inf) or not (0.0 < eps < math.inf):
            raise ShapeError(f"Pattention: scale and eps must be positive and finite, got {scale} and {eps}")
        self.in_features, self.out_features, self.score, self.eps = in_features, out_features, score, eps
        self.key = nn.Parameter(torch.empty(pairs, in_features))
        self.value = nn.Parameter(torch.empty(pairs, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.initial_scale = scale
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.reset_parameters()

    @property
    def pairs(self) -> int:
        """How many keys and values there are."""
        return self.key.shape[0]

    def forward(self, x: Tensor, pair_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            pair_mask: bool, (pairs,) or (..., pairs) like the tokens; False = the pair is as if it were not there.
        """
        check_features("Pattention", x, self.in_features)
        if pair_mask is not None and (pair_mask.dtype != torch.bool or pair_mask.shape[-1:] != (self.pairs,)):
            raise ShapeError(
                f"Pattention: pair_mask must be bool (..., {self.pairs}), "
                f"got {pair_mask.dtype} {tuple(pair_mask.shape)}"
            )
        y = parameter_attention(
            x, self.key, self.value, self.scale, score=self.score, pair_mask=pair_mask, eps=self.eps
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def reset_parameters(self, value_std: float | None = None) -> None:
        """Draw keys (deviation 0.02) and values anew (None = 1 / sqrt(pairs)); zero the bias, and `scale` as given."""
        if not self.key.is_meta:
            # There it would only take time: the largest network has 400 such tensors.
            nn.init.normal_(self.key, std=KEY_STD)
            nn.init.normal_(self.value, std=1 / math.sqrt(self.pairs) if value_std is None else value_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.scale.fill_(self.initial_scale)

    def initialise(self, std: float) -> None:
        """Draw the pairs anew, with about the outputs of a linear layer whose weights have that deviation."""
        self.reset_parameters(std * math.sqrt(self.in_features / self.pairs))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_features}, {self.out_features}, pairs={self.pairs}, score={self.score}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pattention:
        # The scale moves with the layer but stays float32: bfloat16 would be off by up to 0.4 %, and the function too.
        scale = self.scale
        super()._apply(fn, recurse)
        moved = self.scale.device != scale.device
        self.scale = (
            torch.empty_like(self.scale, dtype=torch.float32)
            if scale.is_meta and moved
            else scale.to(self.scale.device)
        )
        return self


def parameter_attention(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor | float,
    *,
    score: Score = "l2_gelu",
    pair_mask: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Weigh the values (n, d2) by how the tokens x (..., d1) score the keys (n, d1); (..., d2).

    A subset of the pairs, such as a router chooses, is `key[index], value[index]` with the same scale. The product of
    token and key is not divided by sqrt(d1), as the normalisation undoes any factor.
    """
    scores = F.linear(x, key)  # (..., n)
    if score == "softmax":
        return _softmax(scores, scale, pair_mask) @ value
    if pair_mask is not None:
        # GELU(0) = 0 and zeros add nothing to the norm.
        scores = scores * pair_mask
    if score == "gelu_l2":
        return _normalised(F.gelu(scores), scale, eps) @ value
    return F.gelu(_normalised(scores, scale, eps)) @ value


def default_scale(score: Score, pairs: int) -> float:
    """Return the factor that keeps normalised scores at a mean square (softmax: a mean) of 1."""
    return float(pairs) if score == "softmax" else math.sqrt(pairs)


def _normalised(scores: Tensor, scale: Tensor | float, eps: float) -> Tensor:
    """Return scores * scale / sqrt(sum of squares over the pairs + eps); the factor in float32 or wider."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=wide)
    return (scores * (scale * (norm.square() + eps).rsqrt())).to(scores.dtype)


def _softmax(scores: Tensor, scale: Tensor | float, pair_mask: Tensor | None) -> Tensor:
    if pair_mask is not None:
        scores = scores.masked_fill(~pair_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)) * scale
    if pair_mask is not None:
        # A token that sees no pair at all.
        weights = weights * pair_mask
    return weights.to(scores.dtype)
