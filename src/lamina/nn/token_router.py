"""Route tokens: a tiny router says which of them a layer computes, the others go past it.

    index, count = choose(probability, protect, skip=0.5)          # which
    x = scatter(x, index, layer(gather(x, index)))                 # compute those alone

Source: Luo et al., gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models (2024), arXiv
2410.13859; Raposo et al., Mixture-of-Depths (2024), arXiv 2404.02258.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn._precision import without_autocast
from lamina.registry import register

Inference = Literal["threshold", "topk"]
ENTER = 1
"""The class of a token that enters; 0 is skipping."""


@register("layer", source="Luo et al. 2024, section 3.3")
class TokenRouter(nn.Module):
    """Score each token for entering a layer or skipping it: z (B, T, width) -> logits (B, T, 2), always float32.

    softmax(logits)[..., 1] is the probability to enter. One router may serve many layers, each of which hands in its
    own normalised input.

    Args:
        width: channels of a token.
        seed: of the first weights, uniform within 1 / sqrt(width); None = the global generator.
    Raises:
        ShapeError: z has another width, or is not floating-point.
    Source: Luo et al. (2024), arXiv 2410.13859, section 3.3; no bias, as in the official code.
    Example:
        >>> TokenRouter(8, seed=0)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 2])
    """

    def __init__(self, width: int, seed: int | None = None) -> None:
        super().__init__()
        if width < 1:
            raise ShapeError(f"token_router: width must be at least 1, got {width}")
        # Not an nn.Linear: who looks for a model's head or its projections must not find it.
        self.weight = nn.Parameter(torch.empty(2, width))
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw the weights anew; the same numbers on every device."""
        if self.weight.is_meta:
            return
        bound = self.weight.shape[1] ** -0.5
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        drawn = torch.empty(self.weight.shape, device="cpu").uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.weight.copy_(drawn)

    def forward(self, z: Tensor) -> Tensor:
        """Return the logits."""
        width = self.weight.shape[1]
        if z.dim() != 3 or z.shape[-1] != width or not z.is_floating_point():
            raise ShapeError(
                f"token_router takes floating-point (batch, tokens, {width}), got {z.dtype} {tuple(z.shape)}"
            )
        with without_autocast(z.device):
            return F.linear(z.float(), self.weight.float())


class Choice(NamedTuple):
    """What a router decided about the tokens of one layer."""

    logits: Tensor
    """(B, T, 2), float32."""
    probability: Tensor
    """To enter, (B, T), float32."""
    enters: Tensor
    """(B, T) bool."""
    top: Tensor | None
    """(B, k), rising, where the same number enters in every row (top-k); None where a threshold decides."""
    real: Tensor | None
    """(B, T) bool, False = padding; None = no padding."""


class TokenRouting(nn.Module):
    """Decide for one layer which tokens enter: the k likeliest in training, those above a threshold afterwards.

    Top-k looks at later tokens; a threshold looks at each token alone, so that a decoder may use it.

    Args:
        router: scores the tokens; shared with other layers unless `own`.
        skip: share of the tokens that may be skipped that is skipped in training, 0 <= skip < 1.
        threshold_prefill, threshold_decode: probability from which a token enters in evaluation, 0..1: many tokens at
            once, and one after others that are cached.
        inference: "threshold", or "topk": in evaluation as in training, for models that see whole sequences.
        anneal: share of training over which `skip` rises from 0 (`set_progress` says how far training is); 0 = at once.
        own: register the router here, with its parameters.
    """

    def __init__(
        self,
        router: TokenRouter,
        *,
        skip: float = 0.5,
        threshold_prefill: float = 0.5,
        threshold_decode: float = 0.5,
        inference: Inference = "threshold",
        anneal: float = 0.0,
        own: bool = False,
    ) -> None:
        super().__init__()
        check_routing(skip, threshold_prefill, threshold_decode, inference, anneal)
        self.skip, self.inference, self.anneal = skip, inference, anneal
        self.threshold_prefill, self.threshold_decode = threshold_prefill, threshold_decode
        self.progress = 1.0
        self.router = router if own else None
        # Elsewhere in the model under a name of its own: here it must not be a parameter a second time.
        self._shared: tuple[TokenRouter, ...] = () if own else (router,)

    @property
    def by_rank(self) -> bool:
        """Whether the k likeliest enter."""
        return self.training or self.inference == "topk"

    @property
    def skipped(self) -> float:
        """The share of tokens skipped at this point of training."""
        return self.skip * min(self.progress / self.anneal, 1.0) if self.anneal else self.skip

    def set_progress(self, fraction: float) -> None:
        """Say how far training is, 0..1."""
        self.progress = fraction

    def forward(
        self, z: Tensor, protect: Tensor | None = None, real: Tensor | None = None, decoding: bool = False
    ) -> Choice:
        """Decide about tokens z (B, T, C).

        Args:
            protect: (B, T) bool, tokens that must enter, whatever the router says.
            real: (B, T) bool, False = padding, which never enters by threshold, and last by rank.
            decoding: one new token a row, the others are cached.
        """
        router = self._shared[0] if self.router is None else self.router
        logits: Tensor = router(z)
        p = logits.softmax(-1)[..., ENTER]
        if not self.by_rank:
            enters = p >= (self.threshold_decode if decoding else self.threshold_prefill)
            if protect is not None:
                _check_mask("protect", protect, p)
                enters = enters | protect.bool()
            return Choice(logits, p, enters if real is None else enters & real, None, real)
        index, count = choose(p, protect, self.skipped, real=real)
        if count == p.shape[1]:
            return Choice(logits, p, torch.ones_like(p, dtype=torch.bool), index, real)
        return Choice(logits, p, torch.zeros_like(p, dtype=torch.bool).scatter(1, index, True), index, real)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"skip={self.skip}, inference={self.inference}, thresholds=({self.threshold_prefill}, {self.threshold_decode})"  # fmt: skip  # noqa: E501


def choose(
    p: Tensor, protect: Tensor | None = None, skip: float = 0.5, *, real: Tensor | None = None
) -> tuple[Tensor, int]:
    """Choose the tokens that enter: the likeliest, and always the protected ones; p (B, T) -> (index (B, k), k).

    k = T - floor(skip * S) for the whole batch, S = the smallest number of unprotected tokens in a row; S = T without
    `protect`, and k = T where it protects nothing at all. Of equal ones the earlier enters. index rises in each row.

    Args:
        p: probability to enter.
        protect: (B, T) bool. Padding is never protected.
        skip: share of S that is skipped, 0 <= skip < 1.
        real: (B, T) bool, False = padding, which is chosen last.
    Raises:
        ShapeError: a mask of another shape than p.
    Source: Luo et al. (2024), arXiv 2410.13859, section 3.4. Deviation: protected tokens are ranked 2 higher, not 1, so
        that one with p = 0 wins over an unprotected one with p = 1.
    """
    for name, mask in (("protect", protect), ("real", real)):
        if mask is not None:
            _check_mask(name, mask, p)
    tokens, score = p.shape[1], p.detach()
    skippable = tokens
    if real is not None:
        score = torch.where(real.bool(), score, score - 2)
    if protect is not None:
        guarded = protect.bool() if real is None else protect.bool() & real.bool()
        score = torch.where(guarded, score + 2, score)
        most = int(guarded.sum(1).max()) if len(p) else 0
        skippable = tokens - most if most else 0
    count = kept(tokens, skippable, skip)
    if count == tokens:
        return torch.arange(tokens, device=p.device).expand(len(p), -1), count
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return order.sort(dim=1).values, count


def _check_mask(name: str, mask: Tensor, p: Tensor) -> None:
    if mask.shape != p.shape:
        raise ShapeError(f"token routing got {name} {tuple(mask.shape)} for tokens {tuple(p.shape)} (batch, tokens)")


def kept(tokens: int, skippable: int, skip: float) -> int:
    """Return k = tokens - floor(skip * skippable), as in exact arithmetic."""
    return tokens - math.floor(skip * skippable + 1e-9)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens: x (B, T, ...), index (B, k) -> (B, k, ...)."""
    return x.flatten(0, 1).index_select(0, _rows(x, index)).unflatten(0, index.shape)


def scatter(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Put tokens back: x (B, T, ...) with values (B, k, ...) at index (B, k), as a copy; the others keep their bits."""
    flat = x.flatten(0, 1).index_copy(0, _rows(x, index), values.to(x.dtype).flatten(0, 1))
    return flat.unflatten(0, x.shape[:2])


def check_routing(
    skip: float, threshold_prefill: float, threshold_decode: float, inference: str, anneal: float
) -> None:
    """Refuse options that cannot be.

    Raises:
        LaminaError: names the option.
    """
    if not 0.0 <= skip < 1.0:
        raise LaminaError(f"depth routing: skip is the share of tokens that is skipped, 0 <= skip < 1, got {skip}")
    for name, value in (("threshold_prefill", threshold_prefill), ("threshold_decode", threshold_decode)):
        if not 0.0 <= value <= 1.0:
            raise LaminaError(f"depth routing: {name} is a probability, 0..1, got {value}")
    if inference not in ("threshold", "topk"):
        raise LaminaError(f"depth routing: inference is 'threshold' or 'topk', got {inference!r}")
    if not 0.0 <= anneal <= 1.0:
        raise LaminaError(f"depth routing: anneal is a share of training, 0..1, got {anneal}")


def _rows(x: Tensor, index: Tensor) -> Tensor:
    start = torch.arange(x.shape[0], device=index.device)[:, None] * x.shape[1]
    return (index + start).flatten()
