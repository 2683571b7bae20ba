"""A content-addressable memory of vectors: store, look up by a noisy or partial copy; nothing is learned.

Source: Ramsauer et al., Hopfield Networks is All You Need (2020), arXiv 2008.02217.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.hopfield_association import BLOCK, association_weights, hopfield_energy, hopfield_update


class HopfieldMemory(nn.Module):
    """Store vectors and find the one (or the mean of those) that a state resembles. No parameters, no training.

    For completing, denoising, nearest neighbours with a soft edge. How well it works hangs on how the vectors are
    prepared: subtract the mean of what is stored and scale to length 1; and on beta: too small gives the mean of all.

    Args:
        patterns: (N, d) floats, kept as a buffer; N may be 0 until `write`.
        beta: inverse temperature, above 0. Of vectors of length 1, some 10 to 100.
    Raises:
        ShapeError: patterns are no (N, d) floats; another width or an empty memory at the call. ValueError: beta.
    Source: Ramsauer et al. (2020), section 2, theorems 4 and 5.
    Example:
        >>> memory = HopfieldMemory(torch.eye(3), beta=20.0)
        >>> memory.retrieve(torch.tensor([0.1, 0.9, 0.2])).round()
        tensor([0., 1., 0.])
    """

    patterns: Tensor

    def __init__(self, patterns: Tensor, beta: float) -> None:
        super().__init__()
        if patterns.dim() != 2 or not patterns.shape[1] or not patterns.is_floating_point():
            raise ShapeError(f"HopfieldMemory stores (N, d) floats, got {tuple(patterns.shape)} of {patterns.dtype}")
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, got {beta}")
        self.beta = float(beta)
        self.register_buffer("patterns", patterns.detach().clone())

    def write(self, x: Tensor) -> None:
        """Store one more pattern (d,) or several (n, d)."""
        x = self._rows(x).detach()
        self.patterns = torch.cat((self.patterns, x.to(self.patterns).flatten(0, -2)))

    def forward(self, state: Tensor) -> Tensor:
        """Retrieve with one update; (..., d) -> (..., d)."""
        return hopfield_update(self._rows(state), self.patterns, self.beta).view(state.shape).to(state.dtype)

    def retrieve(self, state: Tensor, steps: int = 1, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Update states (..., d) towards what is stored; with weights, also the (..., N) of the last update.

        Args:
            steps: updates, at least 1.
            return_weights: how much of each pattern was retrieved; a table of S x N, which is otherwise never made.
        """
        if steps < 1:
            raise ValueError(f"retrieval takes at least one step, got {steps}")
        rows = self._rows(state)
        if not return_weights:
            return hopfield_update(rows, self.patterns, self.beta, steps).view(state.shape).to(state.dtype)
        rows = hopfield_update(rows, self.patterns, self.beta, steps - 1)
        weights = association_weights(rows, self.patterns, self.beta)
        found = (weights @ self.patterns.to(weights.dtype)).to(state.dtype)
        return found.view(state.shape), weights.view(*state.shape[:-1], -1)

    def energy(self, state: Tensor) -> Tensor:
        """Energy of states, (..., d) -> (...); see `hopfield_energy`."""
        return hopfield_energy(self._rows(state), self.patterns, self.beta).view(state.shape[:-1])

    def separation(self) -> Tensor:
        """How far each pattern stands out, (N,): x_i . x_i less the largest x_i . x_j; infinite for one alone.

        Source: Ramsauer et al. (2020), section 2, definition of the separation of a pattern.
        """
        blocks = self._rows(self.patterns).split(BLOCK)
        return torch.cat([block.square().sum(-1) - _most_alike(i, blocks) for i, block in enumerate(blocks)])

    def retrieval_bound(self, state: Tensor) -> Tensor:
        """Bound on the distance between one update of a state and the pattern nearest to it, (..., d) -> (...).

        2 (N - 1) exp(-beta (Delta_i - 2 max(|xi - x_i|, |x_i* - x_i|) m)) m, m the norm of the longest pattern and
        x_i* the fixed point at x_i. Infinite where the theorem is silent: the state lies farther than 1 / (beta N m)
        from the pattern, or the pattern does not stand out by 2 / (beta N) + log(2 (N - 1) N beta m^2) / beta.

        Source: Ramsauer et al. (2020), theorem 5 and its conditions.
        """
        x, states = self._rows(self.patterns).double(), self._rows(state).double()
        count, beta = len(x), self.beta
        longest = x.norm(dim=-1).max()
        distance, which = _nearest(states, x)
        if count == 1:
            return torch.zeros_like(distance).to(state.dtype).view(state.shape[:-1])
        delta = self.separation().double()[which]
        fixed = hopfield_update(x[which], x, beta, steps=FIXED_POINT_STEPS)
        reach = torch.maximum(distance, (fixed - x[which]).norm(dim=-1))
        bound = 2 * (count - 1) * torch.exp(-beta * (delta - 2 * reach * longest)) * longest
        needed = 2 / (beta * count) + (2 * (count - 1) * count * beta * longest.square()).log() / beta
        told = (delta >= needed) & (distance <= 1 / (beta * count * longest))
        return torch.where(told, bound, float("inf")).to(state.dtype).view(state.shape[:-1])

    def extra_repr(self) -> str:
        """Show what is stored."""
        return f"{self.patterns.shape[0]} patterns of width {self.patterns.shape[1]}, beta={self.beta:g}"

    def _rows(self, state: Tensor) -> Tensor:
        """Return states as (S, d), of the dtype of what is stored."""
        if not len(self.patterns) and state is self.patterns:
            raise ShapeError("nothing is stored yet: write first")
        if not state.dim() or state.shape[-1] != self.patterns.shape[1] or not state.is_floating_point():
            got = f"{tuple(state.shape)} of {state.dtype}"
            raise ShapeError(f"HopfieldMemory holds float patterns of width {self.patterns.shape[1]}, got {got}")
        return state.reshape(-1, state.shape[-1]).to(self.patterns.dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # However many patterns were stored when it was saved.
        saved = state_dict.get(f"{prefix}patterns")
        if isinstance(saved, Tensor) and saved.dim() == 2 and saved.shape[1] == self.patterns.shape[1]:
            self.patterns = self.patterns.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


FIXED_POINT_STEPS = 50
"""Updates from a well separated pattern to its fixed point; each shrinks what is left many times."""


def _most_alike(which: int, blocks: tuple[Tensor, ...]) -> Tensor:
    """Return the largest product of each pattern of one block with another pattern of any."""
    most = blocks[which].new_full((len(blocks[which]),), float("-inf"))
    for i, other in enumerate(blocks):
        scores = blocks[which] @ other.T
        if i == which:
            scores.fill_diagonal_(float("-inf"))
        most = torch.maximum(most, scores.amax(-1))
    return most


def _nearest(states: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each state to the pattern nearest to it, and that pattern's number."""
    parts = [torch.cdist(states, block).min(-1) for block in patterns.split(BLOCK)]
    distances = torch.stack([p.values for p in parts])
    best, block = distances.min(0)
    rows = torch.stack([p.indices for p in parts]).gather(0, block[None])[0]
    return best, rows + block * BLOCK
