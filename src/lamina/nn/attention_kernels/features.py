"""Attention as a product of features, in time linear in the tokens: ELU + 1, and positive random features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._precision import without_autocast
from lamina.nn.attention_kernels._blocks import at_least_float32, check_sequence, count, into_blocks, keys_seen

CHUNK = 64
"""Tokens of a causal chunk, inside which the pairs are written out."""


class LinearKernel(nn.Module):
    """Attention with the features elu(x) + 1 in place of the softmax; O(T), causal too.

    q (B, H, T, D), k, v (B, H, S, D), mask of keys (B or 1, 1, 1, S) -> (B, H, T, D); float32 inside.

    Args:
        causal: see earlier tokens only; as many keys as queries.
    Raises:
        ShapeError: at the call, a mask of pairs; causal with another number of keys than queries.
    Source: Katharopoulos et al., Transformers are RNNs (2020), arXiv 2006.16236, equations 7 (all) and 9 (causal).
    """

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend by features."""
        seen = keys_seen("linear", mask, k.shape[2])
        if self.causal:
            check_sequence("linear", q, k)
        with without_autocast(q.device):
            q, k, values = (at_least_float32(t) for t in (q, k, v))
            return by_features(F.elu(q) + 1, F.elu(k) + 1, values, seen, causal=self.causal).to(v.dtype)


class PerformerKernel(nn.Module):
    """Softmax attention estimated without bias by positive random features; O(T), causal too.

    q (B, H, T, D), k, v (B, H, S, D), mask of keys (B or 1, 1, 1, S) -> (B, H, T, D); float32 inside. The estimate's
    error falls with the square root of the number of features, and grows with the size of queries and keys.

    Args:
        head_width: channels of a head.
        features: random features; None = head_width * ln(head_width), as in the official code.
        causal: see earlier tokens only; as many keys as queries.
        seed: of the features; None = drawn from torch's generator, so that every layer has its own.
    Raises:
        ShapeError: a number below 1; at the call, a mask of pairs.
    Source: Choromanski et al., Rethinking Attention with Performers (2020), arXiv 2009.14794, lemma 1 and section 2.4
        (orthogonal features). The features are drawn once: no redrawing.
    """

    projection: Tensor

    def __init__(
        self, head_width: int, features: int | None = None, *, causal: bool = False, seed: int | None = None
    ) -> None:
        super().__init__()
        features = max(1, int(head_width * math.log(head_width))) if features is None else features
        count("performer", head_width=head_width, features=features)
        self.causal = causal
        self.register_buffer("projection", orthogonal(features, head_width, seed).to(torch.get_default_device()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend by random features."""
        if q.shape[-1] != self.projection.shape[1]:
            raise ShapeError(
                f"the kernel 'performer' was made for heads of {self.projection.shape[1]} channels, got {q.shape[-1]}"
            )
        seen = keys_seen("performer", mask, k.shape[2])
        if self.causal:
            check_sequence("performer", q, k)
        with without_autocast(q.device):
            # A factor common to all keys, or to all features of one query, leaves the quotient: it keeps exp in range.
            of_queries, of_keys = self._exponents(q), self._exponents(k)
            if seen is not None:
                # Padding must not set the factor; the lowest number, not -inf, for rows of padding alone.
                of_keys = of_keys.masked_fill(~seen[:, None, :, None], torch.finfo(of_keys.dtype).min)
            features = (
                (of_queries - of_queries.amax(-1, keepdim=True)).exp(),
                (of_keys - of_keys.amax((-1, -2), keepdim=True)).exp(),
            )
            return by_features(*features, at_least_float32(v), seen, causal=self.causal).to(v.dtype)

    def _exponents(self, x: Tensor) -> Tensor:
        x = at_least_float32(x) * x.shape[-1] ** -0.25
        return x @ self.projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


def by_features(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, causal: bool, chunk: int = CHUNK) -> Tensor:
    """Return sum_s (q_t . k_s) v_s / sum_s (q_t . k_s), over all keys or (causal) those up to t; q, k not negative.

    Args:
        seen: (B or 1, S), the real keys; None = all. A query that sees no key with weight gets zeros.
        chunk: of the causal sum: tokens whose pairs are written out.
    """
    if seen is not None:
        k = k * seen[:, None, :, None]
    # The sum of the weights is one more channel of the values.
    v = F.pad(v, (0, 1), value=1.0)
    out = _sums_so_far(q, k, v, chunk) if causal else q @ (k.transpose(-1, -2) @ v)
    total = out[..., -1:]
    # Not the smallest number: its reciprocal squared, in the gradient, is infinite.
    return out[..., :-1] / torch.where(total > 0, total, 1.0)


def _sums_so_far(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    tokens = q.shape[2]
    q, k, v = (into_blocks(t, chunk) for t in (q, k, v))  # (B, H, n, chunk, ...)
    # What stood before a chunk, never a difference of sums: a large key would leave its rounding to earlier tokens.
    before = F.pad((k.transpose(-1, -2) @ v)[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))
    inside = (q @ k.transpose(-1, -2)).tril() @ v
    return (q @ before + inside).flatten(2, 3)[:, :, :tokens]


def orthogonal(features: int, width: int, seed: int | None) -> Tensor:
    """Draw directions (features, width), orthogonal by groups of `width`, each as long as a normal vector would be."""
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(-(-features // width), 2, width, width, generator=generator, device="cpu")
    # LAPACK chooses the signs by the matrix; with a positive diagonal of R the directions are uniform.
    bases, triangles = torch.linalg.qr(drawn[:, 0])
    bases = bases * triangles.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    directions = bases.transpose(1, 2).flatten(0, 1)
    return (directions * drawn[:, 1].flatten(0, 1).norm(dim=1, keepdim=True))[:features]
