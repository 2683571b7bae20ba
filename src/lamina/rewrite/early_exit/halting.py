"""When to leave: the head that gives the chance of it at each layer, and the distribution that makes of them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.nn._precision import without_autocast

LambdaInput = Literal["cat", "diff", "single", "rnn"]


class LambdaHead(nn.Module):
    """Chance of leaving after each layer, given that the row came so far; one head for all layers. Logits, float32.

    h (B, n, width), the representation after layers 1..n -> logits (B, n). `step` goes layer by layer.

    Args:
        kind: what the head reads: "cat" h of this layer and of the one before (zeros before the first), "diff" their
            difference, "single" this one alone (PonderNet), "rnn" the state of a tanh network over the layers.
        layers: 1 = one linear layer; else so many hidden ones with tanh, then the linear one (as the official code).
        dropout: of what the head reads, in training; 0..1.
    Source: Balagansky, Gavrilov (2022), section 3.2.
    """

    def __init__(self, width: int, kind: LambdaInput = "cat", layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind: LambdaInput = kind
        size = 2 * width if kind == "cat" else width
        self.cell = nn.RNNCell(width, width) if kind == "rnn" else None
        self.hidden = nn.ModuleList(nn.Linear(size, size) for _ in range(layers if layers > 1 else 0))
        self.out = nn.Linear(size, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits of all layers at once; see the class for shapes."""
        with without_autocast(h.device):
            h = h.to(self.out.weight.dtype)
            before = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), dim=1)
            if self.kind == "cat":
                return self._score(torch.cat((h, before), dim=-1))
            if self.kind == "rnn":
                state, states = before[:, 0], []
                for layer in range(h.shape[1]):
                    state = self._state(h[:, layer], state)
                    states.append(state)
                return self._score(torch.stack(states, dim=1))
            return self._score(h - before if self.kind == "diff" else h)

    def step(self, h: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the logits (B,) of the next layer from h (B, width), and what to carry on to the one after."""
        with without_autocast(h.device):
            h = h.to(self.out.weight.dtype)
            before = torch.zeros_like(h) if carried is None else carried
            if self.kind == "rnn":
                state = self._state(h, before)
                return self._score(state), state
            read = torch.cat((h, before), dim=-1) if self.kind == "cat" else h - before if self.kind == "diff" else h
            return self._score(read), h

    def _state(self, h: Tensor, state: Tensor) -> Tensor:
        assert self.cell is not None
        new: Tensor = self.cell(h, state)
        return new

    def _score(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        logits: Tensor = self.out(x)
        return logits[..., 0].float()


def exit_distribution(logits: Tensor) -> Tensor:
    """Log-probability of leaving after each layer: lambda logits (B, n) -> log p (B, n), float32 or float64.

    p_i = lambda_i prod_{j<i} (1 - lambda_j), and the last layer takes the rest, so that the sum is 1 (what the last
    logit says does not matter).

    Source: Balagansky, Gavrilov (2022), section 3.1. Deviation: the official code gives the last layer
        lambda_n prod (1 - lambda_j), which sums to less than 1; see `Ponder(truncate_eps=)`.
    Example:
        >>> exit_distribution(torch.zeros(1, 3)).exp()
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    a = logits if logits.dtype == torch.float64 else logits.float()
    left = F.logsigmoid(-a[:, :-1]).cumsum(dim=1)
    before = torch.cat((torch.zeros_like(a[:, :1]), left), dim=1)
    ends = torch.cat((F.logsigmoid(a[:, :-1]), torch.zeros_like(a[:, :1])), dim=1)
    return before + ends


def q_exit(log_p: Tensor, q: float) -> Tensor:
    """Return the layer (1..n) at which each row leaves: the first whose cumulated probability exceeds q, else the last.

    log p (B, n) -> (B,) whole numbers.

    Example:
        >>> q_exit(torch.tensor([[0.5, 0.25, 0.25]]).log(), q=0.5)
        tensor([2])
    """
    count = log_p.shape[1]
    # Summed from the back: what is left of the mass keeps its digits where the sum is near 1.
    rest = log_p.exp().flip(1).cumsum(1).flip(1)
    over = 1.0 - rest[:, 1:] > q
    layers = torch.arange(1, count, device=log_p.device)
    return torch.where(over, layers, count).amin(dim=1) if count > 1 else torch.ones_like(log_p[:, 0], dtype=torch.long)
