"""Attention of a query over a set with frozen random query-key matrices and trained values: linear in what it learns.

Source: Fu, Guo, Bai, Mei, What can a Single Attention Layer Learn? A Study Through the Random Features Lens (2023),
arXiv 2307.11353. Not the approximation of softmax attention by random features, which has a similar name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn.random_feature_mlp import expected_product
from lamina.nn.random_feature_readout import Penalty, RandomFeatureReadout, refuse_non_finite
from lamina.registry import register

SOURCE = "Fu, Guo, Bai, Mei, What can a Single Attention Layer Learn? (2023), arXiv 2307.11353"

NUMBERS_AT_ONCE = 2**18
"""Scores, or projected queries, that exist at a time where no gradient is wanted: they stay in the cache."""

FITTED_AT_ONCE = 2**26
"""Features that are handed to the fit at a time."""

Activation = Literal["relu", "softmax"]
Pair = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""(query, keys), or (query, keys, mask)."""


class AttentionFeatures(nn.Module):
    """What every frozen head attends to: query (B, d), keys (B, N, d) -> (B, num_heads * (d + 1)).

    `weight` (num_heads, d + 1, d + 1) is the frozen product of query and key matrix of each head, x_0 from the left.
    """

    weight: Tensor

    def __init__(
        self,
        width: int,
        num_heads: int,
        weight_std: float,
        bias_scale: float,
        activation: Activation,
        append_bias: bool,
        normalize: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.width, self.activation, self.append_bias, self.normalize = width, activation, append_bias, normalize
        # The same numbers on every device and in every dtype; under torch.device("meta") a generator has none to give.
        here, generator, size = torch.empty(0).device, torch.Generator("cpu").manual_seed(seed), width + append_bias
        drawn = torch.randn(num_heads, size, size, generator=generator, dtype=torch.float64, device="cpu") * weight_std
        drawn[:, range(width), range(width)] += bias_scale
        self.register_buffer("weight", drawn.to(here, torch.get_default_dtype()))

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features, a head after the other."""
        query, keys, mask = self.prepared(query, keys, mask)
        return attention_features(query, keys, self.weight, mask, activation=self.activation).flatten(1)

    def prepared(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Check a pair; normalise it and append the constant where asked."""
        _check_pair(query, keys, mask, self.width, self.weight.dtype)
        if mask is not None:
            mask = mask.bool()
            # Not a product: what stands in padding may be anything, also NaN.
            keys = keys.masked_fill(~mask[..., None], 0.0)
            _refuse_empty(mask)
        refuse_non_finite("RandomFeatureAttention", query, keys)
        if self.normalize:
            query, keys = F.normalize(query, dim=-1), F.normalize(keys, dim=-1)
        if self.append_bias:
            query, keys = F.pad(query, (0, 1), value=1.0), F.pad(keys, (0, 1), value=1.0)
        return query, keys, mask


@register("layer", source=f"{SOURCE}, RFA and biased RFA")
class RandomFeatureAttention(RandomFeatureReadout):
    """A function of a query and a set, learned in closed form: random attention heads of which only the values learn.

    f = sum over heads m of mean_i relu(x_0' W_m x_i) <v_m, x_i>, x with a constant 1 appended. For sets and short
    sequences with a query (a class token and the tokens, an item and a basket), as a strong convex baseline, and as a
    head on a frozen trunk that has tokens to give. query (B, d), keys (B, N, d), mask (B, N), True = keep ->
    (B, out_features), in the dtype of the values; zero until `fit`, or until trained by gradients. The order of the
    keys does not matter. Inputs should have norms near 1: scores grow with the square.

    Args:
        width: d.
        num_heads: M. There are M (d + 1) values an output and M (d + 1)^2 frozen numbers.
        weight_std: deviation of the frozen matrices' entries.
        bias_scale: c, added to their diagonal, so that scores are c <query, key> and noise: for targets that hang on
            that product take c above 0 (4 for unit norms), for others 0.
        activation: relu over the number of keys, as in the paper; "softmax" is an extension.
        append_bias: append the constant.
        normalize: divide query and keys by their norms first.
        seed: of the frozen matrices.
    Raises:
        LaminaError: an option out of range, (at the call) NaN or infinity, a row whose keys are all masked.
        ShapeError: (at the call) another width, no keys, another dtype than the frozen matrices have.
    Source: arXiv 2307.11353, random-feature attention, and the biased one for bias_scale.
    Example:
        >>> layer = RandomFeatureAttention(8, num_heads=64, out_features=2)
        >>> query, keys = torch.randn(100, 8), torch.randn(100, 5, 8)
        >>> penalty = layer.fit(query / 3, keys / 3, keys.mean(1)[:, :2])
        >>> layer(query / 3, keys / 3).shape
        torch.Size([100, 2])
    """

    features: AttentionFeatures

    def __init__(
        self,
        width: int,
        num_heads: int,
        out_features: int = 1,
        *,
        weight_std: float = 0.5,
        bias_scale: float = 0.0,
        activation: Activation = "relu",
        append_bias: bool = True,
        normalize: bool = False,
        seed: int = 0,
    ) -> None:
        if width < 1 or num_heads < 1:
            raise LaminaError(
                f"RandomFeatureAttention needs width and num_heads of at least 1, got {width} and {num_heads}"
            )
        if not (0 < weight_std < math.inf and 0 <= bias_scale < math.inf):
            raise LaminaError(
                f"weight_std must be above 0 and bias_scale at least 0, both finite, got {weight_std} and {bias_scale}"
            )
        if activation not in ("relu", "softmax"):
            raise LaminaError(f"activation must be 'relu' or 'softmax', got {activation!r}")
        features = AttentionFeatures(width, num_heads, weight_std, bias_scale, activation, append_bias, normalize, seed)
        super().__init__(features, (num_heads, width + append_bias), out_features)
        self.width, self.num_heads = width, num_heads
        self.weight_std, self.bias_scale = weight_std, bias_scale

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the outputs of queries and their sets."""
        return self.read(self.features(query, keys, mask))

    @torch.no_grad()
    def fit(
        self, query: Tensor, keys: Tensor, targets: Tensor, penalty: Penalty = "validate", mask: Tensor | None = None
    ) -> float:
        """Solve for values and intercept in place; return the penalty.

        Args:
            targets: (n, out_features), (n,) for one output, or class numbers (n,) for several.
            penalty: above 0, or "validate", see `fit_ridge`.
        Raises:
            LaminaError: see `fit_ridge`.
        Warns:
            UserWarning: the inputs' norms are far from 1.
        """
        _check_pair(query, keys, mask, self.width, self.features.weight.dtype)
        if not self.features.normalize:
            _warn_of_norms(query, keys, mask)
        return self.fit_features(self._blocks(query, keys, mask, targets), penalty)

    @torch.no_grad()
    def kernel(self, first: Pair, second: Pair) -> Tensor:
        """Return features(first) @ features(second).T / M for M without end: (B1, B2); no gradient.

        Raises:
            LaminaError: bias_scale is not 0, or the activation is not relu: then it has no closed form.
        Source: the arc-cosine kernel of order 1, of the products of scores.
        """
        if self.bias_scale != 0 or self.features.activation != "relu":
            raise LaminaError(
                "the kernel has a closed form for activation='relu' and bias_scale=0 only, here they are "
                f"{self.features.activation!r} and {self.bias_scale}"
            )
        (q, k, w), (other_q, other_k, other_w) = self._weighed(first), self._weighed(second)
        other_norms = other_q.norm(dim=-1)[:, None] * other_k.norm(dim=-1)
        step, rows = max(1, NUMBERS_AT_ONCE // max(1, other_w.numel() * w.shape[1])), []
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            products = torch.einsum("and,bmd->anbm", k[part], other_k)
            norms = (q[part].norm(dim=-1)[:, None] * k[part].norm(dim=-1))[..., None, None] * other_norms
            scores = expected_product((q[part] @ other_q.t())[:, None, :, None] * products, norms)
            rows.append(torch.einsum("anbm,an,bm->ab", scores * products, w[part], other_w))
        return torch.cat(rows) * self.weight_std**2 if rows else q.new_zeros(0, len(other_q))

    def extra_repr(self) -> str:
        """Show the options."""
        text = f"{self.width}, num_heads={self.num_heads}, out_features={self.out_features}"
        return text + (f", bias_scale={self.bias_scale}" if self.bias_scale else "")

    def _weighed(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """Return prepared query and keys, and the weight of every key in its mean (0 where masked)."""
        query, keys, mask = self.features.prepared(*pair)
        return query, keys, _share(keys, mask)

    def _blocks(
        self, query: Tensor, keys: Tensor, mask: Tensor | None, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if len(targets) != len(query):
            raise ShapeError(f"{len(query)} queries have {len(targets)} targets")
        step = max(1, FITTED_AT_ONCE // self.features.weight[..., 0].numel())
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            masked = None if mask is None else mask[part]
            yield self.features(query[part], keys[part], masked), targets[part]


def attention_features(
    query: Tensor, keys: Tensor, weight: Tensor, mask: Tensor | None = None, *, activation: Activation = "relu"
) -> Tensor:
    """Return mean_i relu(query' W_m key_i) key_i: (B, p), (B, N, p), (M, p, p) -> (B, M, p).

    One product of the queries with all heads, then two batched ones; where no gradient is wanted, of a few rows at a
    time, so that no tensor of B M N numbers is made.

    Args:
        mask: (B, N) bool, True = keep; masked keys must be finite.
        activation: "softmax": softmax weights in place of relu over the number of keys.
    Source: arXiv 2307.11353, definition of random-feature attention.
    """
    share = _share(keys, mask)
    flat = weight.transpose(0, 1).flatten(1)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, keys, weight))
    # In a graph a loop over rows would fix their number.
    if needs_grad or torch.compiler.is_compiling():
        return _attend(query, keys, flat, share, mask, activation)
    rows, (heads, size), made = len(query), weight.shape[:2], None
    step = max(1, NUMBERS_AT_ONCE // (heads * max(keys.shape[1], size)))
    if rows <= step:
        return _attend(query, keys, flat, share, mask, activation)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        block = _attend(query[part], keys[part], flat, share[part], None if mask is None else mask[part], activation)
        made = block.new_empty(rows, heads, size) if made is None else made
        made[part] = block
    assert made is not None
    return made


def _attend(
    query: Tensor, keys: Tensor, flat: Tensor, share: Tensor, mask: Tensor | None, activation: Activation
) -> Tensor:
    projected = (query @ flat).unflatten(1, (-1, keys.shape[2]))  # (B, M, p)
    scores = torch.bmm(projected, keys.transpose(1, 2))  # (B, M, N)
    if activation == "softmax":
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        return torch.bmm(scores.softmax(-1).to(scores.dtype), keys)
    # The product does not keep its output for the backward pass, so relu may take its place.
    return torch.bmm(scores.relu_(), keys * share[..., None])


def _share(keys: Tensor, mask: Tensor | None) -> Tensor:
    """Weigh every key by one over the number of keys that are kept, (B, N); 0 where masked."""
    if mask is None:
        return keys.new_full(keys.shape[:2], 1 / keys.shape[1])
    kept = mask.to(keys.dtype)
    return kept / kept.sum(1, keepdim=True).clamp(min=1)


def _check_pair(query: Tensor, keys: Tensor, mask: Tensor | None, width: int, dtype: torch.dtype) -> None:
    shapes = f"got {tuple(query.shape)} and {tuple(keys.shape)}"
    if query.dim() != 2 or keys.dim() != 3 or query.shape[1] != width or keys.shape[2] != width:
        raise ShapeError(f"RandomFeatureAttention takes query (B, {width}) and keys (B, N, {width}), {shapes}")
    # Not len(), which fixes the number of rows of an exported graph.
    if query.shape[0] != keys.shape[0] or not keys.shape[1]:
        raise ShapeError(f"RandomFeatureAttention takes a set of at least one key for every query, {shapes}")
    if mask is not None and (mask.shape != keys.shape[:2] or mask.is_floating_point()):
        raise ShapeError(f"the mask of keys {tuple(keys.shape)} is {tuple(keys.shape[:2])} bool, True = keep, got "
                         f"{mask.dtype} {tuple(mask.shape)}")  # fmt: skip
    mixed = torch.is_autocast_enabled(keys.device.type) if not keys.is_meta else False
    right = query.is_floating_point() and keys.is_floating_point() if mixed else query.dtype == keys.dtype == dtype
    if not right:
        raise ShapeError(f"RandomFeatureAttention in {dtype} takes inputs in {dtype}, got {query.dtype}, {keys.dtype}")


def _refuse_empty(mask: Tensor) -> None:
    if torch.compiler.is_compiling() or mask.is_meta:
        return
    try:
        empty = (~mask.any(1)).nonzero().flatten().tolist()
    except RuntimeError:
        return
    if empty:
        raise LaminaError(
            f"the keys of row {empty[0]} are all masked ({len(empty)} such rows): a set has a key at least"
        )


def _warn_of_norms(query: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    kept = keys.flatten(0, 1) if mask is None else keys[mask.bool()]
    norms = [float(x.float().square().sum(-1).mean().sqrt()) for x in (query, kept) if len(x)]
    if norms and not all(0.25 <= n <= 4.0 for n in norms):
        shown = " and ".join(f"{n:.3g}" for n in norms)
        warnings.warn(
            f"query and keys have norms of about {shown}, and random-feature attention is made for norms near 1 "
            "(scores grow with the square): pass normalize=True, or scale them",
            stacklevel=4,
        )
