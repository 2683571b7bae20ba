"""Networks of infinite width that can be trained exactly, and the kernels they are compared with.

A linear network of one hidden layer in muP, CBOW embeddings, and ReLU kernels (NTK, GP) under gradient descent.
Source: Yang & Hu, Feature Learning in Infinite-Width Neural Networks (2021), arXiv 2011.14522, sections 6 and D.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError


class LinearNetwork(nn.Module):
    """f(x) = alpha (V (U x + beta1 b1) + beta2 b2); x (..., d) -> (..., o)."""

    def __init__(self, u: Tensor, v: Tensor, alpha: float = 1.0, biases: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)
        self.alpha, self.biases = alpha, biases
        self.b1 = nn.Parameter(u.new_zeros(len(u))) if biases[0] else None
        self.b2 = nn.Parameter(u.new_zeros(len(v))) if biases[1] else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        hidden = x @ self.u.T
        hidden = hidden if self.b1 is None else hidden + self.biases[0] * self.b1
        out = hidden @ self.v.T
        return self.alpha * (out if self.b2 is None else out + self.biases[1] * self.b2)


class LinearLimit(LinearNetwork):
    """The infinitely wide linear network of one hidden layer in muP: a network of width d + o, started as no sample is.

    Trained by SGD (clipped or not) it is at every step what samples of any width, trained alike, tend to.

    Args:
        d, o: inputs and outputs.
        s1, s2: deviations of first and second layer.
        alpha: factor of the output.
        biases: coefficients of the two biases, which start at zero; 0 = none.
    Raises:
        ShapeError: a size below 1.
    Source: Yang & Hu (2021), arXiv 2011.14522, section 6.1 and appendix D.1.
    """

    def __init__(
        self,
        d: int,
        o: int,
        s1: float = 1.0,
        s2: float = 1.0,
        *,
        alpha: float = 1.0,
        biases: tuple[float, float] = (0.0, 0.0),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if min(d, o) < 1:
            raise ShapeError(f"LinearLimit: sizes must be at least 1, got d={d}, o={o}")
        u, v = torch.zeros(d + o, d, dtype=dtype), torch.zeros(o, d + o, dtype=dtype)
        u[:d], v[:, d:] = s1 * torch.eye(d, dtype=dtype), s2 * torch.eye(o, dtype=dtype)
        super().__init__(u, v, alpha, biases)

    def sample(self, width: int, seed: int = 0) -> LinearNetwork:
        """Draw a network of finite width that starts (and trains) towards this one, before it is trained."""
        omega = torch.randn(width, len(self.u), generator=torch.Generator().manual_seed(seed), dtype=self.u.dtype)
        u, v = (omega @ self.u.detach()) / width**0.5, (self.v.detach() @ omega.T) / width**0.5
        return LinearNetwork(u, v, self.alpha, self.biases)


class CBOWLimit:
    """CBOW with negative sampling at infinite width: width |V|, input embeddings I, output embeddings 0.

    Args:
        vocabulary: number of words.
        width: None = the limit; a number = a sample of that width.
    Source: Yang & Hu (2021), arXiv 2011.14522, section 6.2 and appendix D.2; Mikolov et al. (2013).
    """

    def __init__(
        self, vocabulary: int, width: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        if vocabulary < 1 or (width is not None and width < 1):
            raise ShapeError(f"CBOWLimit: sizes must be at least 1, got {vocabulary=}, {width=}")
        if width is None:
            self.words = torch.eye(vocabulary, dtype=dtype)
        else:
            drawn = torch.rand(vocabulary, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            self.words = (2 * drawn - 1) * math.sqrt(3 / width)
        self.targets = torch.zeros_like(self.words)

    def step(self, context: Tensor, mask: Tensor, target: Tensor, label: Tensor, lr: float, decay: float) -> float:
        """Learn from a batch, in place, and return its mean loss.

        Rows touched are multiplied by 1 - lr decay for every position that touches them.

        Args:
            context, mask: (B, C) words around each position, and which of them count (one at least).
            target, label: (B, 1 + negatives) the word and the drawn ones, 1 for the word and 0 for them.
        """
        share = mask.to(self.words.dtype) / mask.sum(1, keepdim=True)
        hidden = torch.einsum("bc,bcn->bn", share, self.words[context])
        rows = self.targets[target]
        score = torch.einsum("bn,bkn->bk", hidden, rows)
        error = torch.sigmoid(score) - label
        to_hidden = torch.einsum("bk,bkn->bn", error, rows)
        to_rows = error[..., None] * hidden[:, None]
        keep = 1 - lr * decay
        for table, index, touched, change in (
            (self.words, context, mask, share[..., None] * to_hidden[:, None]),
            (self.targets, target, torch.ones_like(target, dtype=torch.bool), to_rows),
        ):
            counts = torch.bincount(index[touched], minlength=len(table)).to(table.dtype)
            table.mul_((keep**counts)[:, None])
            table.index_add_(0, index.flatten(), change.flatten(0, 1), alpha=-lr)
        return float(F.binary_cross_entropy_with_logits(score, label.to(score.dtype)))


class ReLUKernel:
    """The kernel of an infinitely wide ReLU network of one hidden layer; x (N, d), y (M, d) -> (N, M).

    Args:
        kind: "gp": of the network at its start (read-out trained alone); "ntk": of its gradients, first layer and
            read-out trained, biases fixed.
        weight, bias: variances of the first layer's weights and biases.
        readout: variance of the read-out.
    Raises:
        LaminaError: another kind.
    Source: Cho & Saul (2009), Kernel Methods for Deep Learning, equation 6; Yang & Hu (2021), appendix D.1.
    """

    def __init__(
        self, kind: Literal["gp", "ntk"], weight: float = 1.0, bias: float = 0.0, readout: float = 1.0
    ) -> None:
        if kind not in ("gp", "ntk"):
            raise LaminaError(f"ReLUKernel: kind is 'gp' or 'ntk', got {kind!r}")
        self.kind, self.weight, self.bias, self.readout = kind, weight, bias, readout

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the kernel of every pair."""
        product = self.weight * x @ y.T + self.bias
        s = (self.weight * x.square().sum(1) + self.bias).sqrt()[:, None]
        t = (self.weight * y.square().sum(1) + self.bias).sqrt()[None]
        c = (product / (s * t).clamp(min=1e-30)).clamp(-1.0, 1.0)
        left = math.pi - c.acos()
        gp = s * t * ((1 - c.square()).clamp(min=0.0).sqrt() + left * c) / (2 * math.pi)
        if self.kind == "gp":
            return gp
        return gp + self.readout * (x @ y.T) * left / (2 * math.pi)
