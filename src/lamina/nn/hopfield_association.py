"""The mathematics of continuous Hopfield networks: update, energy, association weights and what regime they are in.

States are queries and stored patterns are keys: one update is softmax attention whose values are the keys.
Shapes: states (..., S, d), stored patterns (N, d) or (..., N, d) with the states' leading dimensions.
Source: Ramsauer et al., Hopfield Networks is All You Need (2020), arXiv 2008.02217.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import ShapeError

_log = logging.getLogger(__name__)

SOURCE = "Ramsauer et al., Hopfield Networks is All You Need (2020), arXiv 2008.02217"
BLOCK = 2048
"""Stored patterns that are compared with the states at a time where a whole table of scores would be too large."""
MOST_STEPS = 1000
"""Updates after which states that never come to rest are taken as they are."""


def hopfield_update(
    state: Tensor, stored: Tensor, beta: float | Tensor, steps: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Move states towards the stored patterns they resemble: xi <- X softmax(beta X^T xi), `steps` times.

    (..., S, d) -> the same. Runs on torch's fused attention: memory grows with S + N, not with S * N.

    Args:
        beta: inverse temperature, above 0; or a tensor that broadcasts against the states, as (heads, 1, 1).
        steps: how often; one is normally enough. 0 returns the states.
        mask: broadcasts to (..., S, N); bool True = not to be found, or a float that is added to beta X^T xi. A state
            that may find nothing becomes zero.
    Raises:
        ShapeError: widths differ, nothing is stored, or the tensors are no floats. ValueError: beta not positive.
    Source: Ramsauer et al. (2020), equation 3.
    Example:
        >>> hopfield_update(torch.tensor([[0.9, 0.2]]), torch.eye(2), beta=100.0).round()
        tensor([[1., 0.]])
    """
    _check(state, stored, beta)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    mask = ~mask if mask is not None and mask.dtype is torch.bool else mask
    for _ in range(steps):
        state = _look_up((state * beta).to(stored.dtype), stored, mask)
    return state


def hopfield_energy(state: Tensor, stored: Tensor, beta: float | Tensor) -> Tensor:
    """Energy of each state, (..., S, d) -> (..., S): -lse(beta, X^T xi) + xi^T xi / 2 + log(N) / beta + m^2 / 2.

    m is the norm of the longest pattern. No update raises it; inside the patterns' convex hull it lies in [0, 2 m^2].
    Its gradient is xi - X softmax(beta X^T xi). In float32 at least; blocks of patterns at a time, of which a graph for
    gradients keeps all.

    Raises:
        ShapeError, ValueError: as `hopfield_update`.
    Source: Ramsauer et al. (2020), equation 2.
    Example:
        >>> hopfield_energy(torch.zeros(1, 2), torch.eye(2), beta=1.0)
        tensor([0.5000])
    """
    _check(state, stored, beta)
    precise = torch.promote_types(state.dtype, torch.float32)
    state, stored = state.to(precise), stored.to(precise)
    beta = torch.as_tensor(beta, dtype=precise, device=state.device)
    parts = [torch.logsumexp(beta * (state @ block.mT), dim=-1) for block in stored.split(BLOCK, dim=-2)]
    one = beta[..., 0] if beta.dim() else beta
    found = torch.logsumexp(torch.stack(parts), dim=0) / one
    longest = stored.square().sum(-1).amax(-1, keepdim=True)
    count = torch.tensor(float(stored.shape[-2]), dtype=precise, device=state.device)
    return -found + state.square().sum(-1) / 2 + count.log() / one + longest / 2


def association_weights(state: Tensor, stored: Tensor, beta: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights with which each state finds each pattern, softmax(beta X^T xi): (..., S, N), the whole table of them.

    In float32 at least. The mask is as in `hopfield_update`; a state that may find nothing has weights of zero.
    """
    _check(state, stored, beta)
    mask = ~mask if mask is not None and mask.dtype is torch.bool else mask
    return masked_softmax((state * beta) @ stored.mT, mask)


def association_regimes(weights: Tensor, threshold: float = 0.9) -> Tensor:
    """How many patterns a head's states draw on: (B, heads, S, N) weights -> (heads,) median counts.

    The count of one state is the smallest number of its weights, largest first, whose sum exceeds the threshold. Near 1
    a head looks single patterns up; above N / 2 it averages; between, it finds clusters. States without any weight (a
    masked row) do not count; a head that has no others is NaN.

    Raises:
        ShapeError: not four dimensions. ValueError: threshold outside 0..1.
    Source: Ramsauer et al. (2020), analysis of BERT's heads (k is the size of a metastable state).
    """
    if weights.dim() != 4 or not weights.shape[-1]:
        raise ShapeError(f"association_regimes takes weights (B, heads, S, N), got {tuple(weights.shape)}")
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
    covered = weights.double().sort(-1, descending=True).values.cumsum(-1)
    counts = (covered <= threshold).sum(-1).double() + 1
    counts = counts.masked_fill(covered[..., -1] <= threshold, float("nan"))
    return counts.transpose(0, 1).flatten(1).nanmedian(-1).values


def associate(
    state: Tensor,
    stored: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T + mask) v on (B, H, S, d), (B, G, N, d), (B, G, N, d_v); G divides H. -> (B, H, S, d_v).

    The mask is torch's: bool True = seen, or a float. A row that sees nothing gives zeros.
    """
    wide, narrow = stored.shape[-1], values.shape[-1]
    if wide != narrow:
        # The fused kernels want one width; zeros change no score, and are cut off the values again.
        width = max(wide, narrow)
        state, stored, values = (F.pad(t, (0, width - t.shape[-1])) for t in (state, stored, values))
    grouped = stored.shape[1] != state.shape[1]
    found = F.scaled_dot_product_attention(
        state, stored, values, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return found if wide == narrow else found[..., :narrow]


def update_by_head(state: Tensor, step: Callable[[Tensor], Tensor], counts: Sequence[int]) -> Tensor:
    """Apply `step` to states (B, H, S, d), to each head as often as its count says."""
    for done in range(max(counts, default=0)):
        new = step(state)
        going = [count > done for count in counts]
        state = new if all(going) else torch.where(_column(going, state), new, state)
    return state


def update_until_rest(
    state: Tensor, step: Callable[[Tensor], Tensor], counts: Sequence[int] | None, eps: Sequence[float]
) -> Tensor:
    """Apply `step` to each head until none of its states (of any example) moves farther than its eps, or by count."""
    most = [MOST_STEPS] * len(eps) if counts is None else list(counts)
    limits, going = torch.tensor(eps, device=state.device), [m > 0 for m in most]
    for done in range(1, max(most) + 1):
        if not any(going) or not state.shape[0]:
            return state
        new = step(state)
        with torch.no_grad():
            farthest = (new - state).float().norm(dim=-1).amax((0, 2))
            moves = (farthest > limits).tolist()
        state = torch.where(_column(going, state), new, state)
        going = [g and moved and m > done for g, moved, m in zip(going, moves, most, strict=True)]
    if counts is None and any(moves):
        _log.warning("Hopfield: after %d updates there are states that still move farther than the eps", MOST_STEPS)
    return state


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last dimension, in float32 at least; torch's mask; a row that sees nothing gives zeros."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _column(values: Sequence[bool], like: Tensor) -> Tensor:
    """One value a head, to broadcast against (B, H, S, d)."""
    return torch.tensor(values, device=like.device)[:, None, None]


def _look_up(state: Tensor, stored: Tensor, mask: Tensor | None) -> Tensor:
    """One update of states that beta is already in."""
    lead, size = state.shape[:-2], state.shape[-2:]
    if mask is not None:
        mask = mask if mask.dim() >= 2 else mask[None]
        mask = mask if mask.dtype is torch.bool else mask.to(state.dtype)
    if stored.dim() == 2:
        # All states look into one memory: a single long row of them, and no copies of the memory.
        shared = mask is None or mask.numel() == mask.shape[-1]
        rows = mask if mask is None or shared else mask.expand(*lead, size[0], -1)
        rows = None if rows is None else rows.reshape(1, 1, -1, rows.shape[-1])
        found = associate(state.reshape(1, 1, -1, size[1]), stored[None, None], stored[None, None], 1.0, rows)
        return found.reshape(state.shape)
    if mask is not None:
        mask = mask.expand(*lead, *mask.shape[-2:]).reshape(-1, 1, *mask.shape[-2:])
    keys = stored.reshape(-1, 1, *stored.shape[-2:])
    return associate(state.reshape(-1, 1, *size), keys, keys, 1.0, mask).reshape(state.shape)


def _check(state: Tensor, stored: Tensor, beta: float | Tensor) -> None:
    if not state.is_floating_point() or state.dtype is not stored.dtype:
        raise ShapeError(f"states and stored patterns must be floats of one kind, got {state.dtype} and {stored.dtype}")
    if state.dim() < 2 or stored.dim() < 2 or state.shape[-1] != stored.shape[-1]:
        raise ShapeError(
            f"states (..., S, d) and stored patterns (N, d) must have one width d, got {tuple(state.shape)} and "
            f"{tuple(stored.shape)}"
        )
    if stored.dim() > 2 and stored.shape[:-2] != state.shape[:-2]:
        raise ShapeError(
            f"stored patterns are (N, d) or have the states' leading dimensions {tuple(state.shape[:-2])}, got "
            f"{tuple(stored.shape)}"
        )
    if not stored.shape[-2]:
        raise ShapeError("nothing is stored: there must be at least one pattern")
    if not isinstance(beta, Tensor) and not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
