"""Gradient coding matrices: who computes which chunks, what is sent, and the sum from whoever answered."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import LaminaError

Kind = Literal["auto", "cyclic", "repetition"]

TOLERANCE, CONDITION = 1e-6, 1e8
"""Of a^T B = 1, and of the systems that are solved for B."""

DRAWS, PATTERNS, LEAN = 8, 64, 0.7
"""Codes drawn, patterns of stragglers by which they are compared, and how random a column of H is."""

AMPLIFIED = 5.0
"""Errors of one message in the sum from which on messages are float64."""

KEPT = 1024
"""Decoding vectors that are remembered."""


class NotDecodable(LaminaError):
    """The messages at hand do not determine the sum of all gradients."""


class CodingMatrix:
    """(n, s) gradient coding: any n - s of n workers' messages give the sum of all n chunks' gradients.

    `cyclic`: worker i holds chunks i, i+1, ..., i+s (modulo n) and sends their sum weighted by row i of B.
    `repetition`: n / (s + 1) groups, every member of a group holds the same chunks and sends their plain sum, so that
    one answer a group suffices: better conditioned, and it tolerates more patterns. float64 throughout.

    Args:
        n: workers, and chunks.
        s: stragglers that any pattern may have, 0..n-1.
        kind: `auto` takes repetition where s + 1 divides n.
        seed: of the random matrix of `cyclic`.
    Raises:
        LaminaError: s out of its range, repetition where s + 1 does not divide n, or no well-conditioned matrix was
            drawn.
    Source: Tandon, Lei, Dimakis, Karampatziakis, Gradient Coding (ICML 2017), arXiv 1612.03301, algorithms 1 and 2,
        section 3. Deviation: the decoding vector (of least norm) is found in the s-dimensional space of vectors that
        B maps to 0, not by least squares over n - s rows: the same vector, a hundred times as fast. The columns of
        the random matrix behind B are not independent but lean away from their neighbours, and of several draws the
        best is kept: for n = 256 and s = 15 a hundredth of the rounding error.
    Example:
        >>> code = CodingMatrix(5, 2)
        >>> gradients = torch.arange(5.0)
        >>> sent = {i: code.encode(i, gradients[code.assignment()[i]]) for i in (0, 2, 3)}
        >>> round(code.decode(sent).item(), 4)
        10.0
    """

    def __init__(self, n: int, s: int, kind: Kind = "auto", seed: int = 0) -> None:
        if not 0 <= s < n:
            raise LaminaError(
                f"a code for s stragglers takes at least s + 1 workers: s must be in 0..n-1, got s={s}, n={n}"
            )
        if kind not in ("auto", "cyclic", "repetition"):
            raise LaminaError(f"kind must be 'auto', 'cyclic' or 'repetition', got {kind!r}")
        if kind == "repetition" and n % (s + 1):
            raise LaminaError(
                f"repetition takes s + 1 that divides n, got s + 1 = {s + 1} and n = {n}: use kind='cyclic'"
            )
        self.n, self.s = n, s
        self.kind: Literal["cyclic", "repetition"] = (
            "repetition" if kind == "repetition" or (kind == "auto" and n % (s + 1) == 0) else "cyclic"
        )
        self._vectors: OrderedDict[frozenset[int], NDArray[np.float64]] = OrderedDict()
        self.amplification = 1.0
        """Error of the sum in rounding errors of one message, for nine of ten patterns of s stragglers."""
        if self.kind == "repetition":
            self.matrix = np.kron(np.eye(n // (s + 1)), np.ones((s + 1, s + 1)))
        else:
            self._cyclic, self.amplification = _cyclic(n, s, seed)
            self.matrix = self._cyclic.matrix

    def assignment(self) -> list[list[int]]:
        """Return the chunks of every worker, in the order in which `encode` wants their gradients."""
        span, n = self.s + 1, self.n
        if self.kind == "repetition":
            return [list(range(i // span * span, i // span * span + span)) for i in range(n)]
        return [[(i + k) % n for k in range(span)] for i in range(n)]

    def encode(self, worker: int, gradients: Tensor) -> Tensor:
        """Combine a worker's gradients into its message: (s + 1, ...) -> (...); float64 where the code amplifies."""
        if self.exact:
            gradients = gradients.double()
        row = self.matrix[worker, self.assignment()[worker]]
        return torch.tensordot(torch.from_numpy(row).to(gradients), gradients, dims=1)

    @property
    def exact(self) -> bool:
        """Whether messages are float64: a sum of float32 ones would be off by more than about 1e-6."""
        return self.amplification > AMPLIFIED

    def decodes(self, workers: Collection[int]) -> bool:
        """Say whether these workers' messages suffice, by their number alone (a group each, for repetition)."""
        if self.kind == "repetition":
            return len({w // (self.s + 1) for w in workers}) == self.n // (self.s + 1)
        return len(set(workers)) >= self.n - self.s

    def weights(self, workers: Collection[int]) -> NDArray[np.float64]:
        """Return the weight of every worker's message in the sum, 0 for those that are not among `workers`: (n,).

        Raises:
            NotDecodable: too few of them.
        """
        answered = frozenset(workers)
        if not self.decodes(answered):
            missing = sorted(set(range(self.n)) - answered)
            raise NotDecodable(f"{_needs(self)}; no message came from {missing}")
        if answered in self._vectors:
            self._vectors.move_to_end(answered)
            return self._vectors[answered]
        found = self._first(answered) if self.kind == "repetition" else self._solved(answered)
        self._vectors[answered] = found
        if len(self._vectors) > KEPT:
            self._vectors.popitem(last=False)
        return found

    def decode(self, messages: Mapping[int, Tensor]) -> Tensor:
        """Return the sum of all chunks' gradients from the messages, by worker.

        Raises:
            NotDecodable: too few of them.
        """
        weights = self.weights(messages)
        used = [w for w in sorted(messages) if weights[w] != 0]
        total = weights[used[0]].item() * messages[used[0]]
        for worker in used[1:]:
            total.add_(messages[worker], alpha=weights[worker].item())
        return total

    def _first(self, answered: frozenset[int]) -> NDArray[np.float64]:
        found = np.zeros(self.n)
        seen: set[int] = set()
        for worker in sorted(answered):
            if worker // (self.s + 1) not in seen:
                seen.add(worker // (self.s + 1))
                found[worker] = 1.0
        return found

    def _solved(self, answered: frozenset[int]) -> NDArray[np.float64]:
        absent = [w for w in range(self.n) if w not in answered]
        found = self._cyclic.solve(absent)
        error = np.abs(found @ self.matrix - 1).max()
        if not error < TOLERANCE:
            raise NotDecodable(f"the messages of all but {absent} give the sum only up to {error:.1e} of a gradient")
        return found


@dataclass(frozen=True)
class _Cyclic:
    matrix: NDArray[np.float64]
    whole: NDArray[np.float64]
    """The least a with a^T B = 1: (n,)."""
    free: NDArray[np.float64]
    """A basis of the a with a^T B = 0: (n, s)."""

    def solve(self, absent: list[int]) -> NDArray[np.float64]:
        """Return whole + free z, with the z of least norm that makes it vanish on those who are absent."""
        found = self.whole.copy()
        if absent:
            shift, *_ = np.linalg.lstsq(self.free[absent], -self.whole[absent], rcond=None)
            found += self.free @ shift
            found[absent] = 0.0
        return found

    def amplification(self, patterns: list[list[int]]) -> float:
        """Return the error of the sum in errors of one message (root mean square): 90 % of patterns are below."""
        lengths = np.linalg.norm(self.matrix, axis=1)
        errors = [np.linalg.norm(self.solve(absent) * lengths) for absent in patterns]
        return float(np.quantile(errors, 0.9) / np.sqrt(len(lengths)))


def _cyclic(n: int, s: int, seed: int) -> tuple[_Cyclic, float]:
    """Draw codes, and return the one that amplifies rounding least, with its amplification."""
    generator = np.random.default_rng(seed)
    if math.comb(n, s) <= PATTERNS:
        patterns = [list(c) for c in itertools.combinations(range(n), s)]
    else:
        patterns = [sorted(generator.permutation(n)[:s].tolist()) for _ in range(PATTERNS)]
    best, least = None, np.inf
    for _ in range(DRAWS if 0 < s < n - 1 else 1):
        found = _drawn(n, s, generator)
        if found is not None and (amplified := found.amplification(patterns)) < least:
            best, least = found, amplified
    if best is None:
        raise LaminaError(f"no well-conditioned code for n={n}, s={s} in {DRAWS} draws: try another seed")
    return best, least


def _drawn(n: int, s: int, generator: np.random.Generator) -> _Cyclic | None:
    """Draw H (s, n) with H 1 = 0, and B whose rows are orthogonal to its rows; None where a condition is missed."""
    h = _spread(n, s, generator)
    matrix = np.eye(n)
    for i in range(n if s else 0):
        held = [(i + k) % n for k in range(1, s + 1)]
        if not np.linalg.cond(h[:, held]) < CONDITION:
            return None
        matrix[i, held] = -np.linalg.solve(h[:, held], h[:, i])
    # Its rank is n - s.
    left, values, right = np.linalg.svd(matrix)
    rank = n - s
    found = _Cyclic(matrix, left[:, :rank] @ ((right[:rank] @ np.ones(n)) / values[:rank]), left[:, rank:])
    return found if np.abs(found.whole @ matrix - 1).max() < TOLERANCE else None


def _spread(n: int, s: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw the columns of H one after another, each leaning towards what the s - 1 before it do not span.

    The s neighbouring columns that B is solved from are then far from dependent, and any other s nearly so.
    """
    h = generator.standard_normal((s, n))
    if s > 1:
        h[:, :s] = np.linalg.qr(h[:, :s])[0]
        for i in range(s, n):
            new = np.linalg.svd(h[:, i - s + 1 : i].T)[2][-1] * generator.choice((-1.0, 1.0))
            new += LEAN * h[:, i] / np.linalg.norm(h[:, i])
            h[:, i] = new / np.linalg.norm(new)
    # The nearest lengths of the columns for which H 1 = 0.
    return h * (1 - np.linalg.lstsq(h, h.sum(1), rcond=None)[0]) if s else h


def _needs(code: CodingMatrix) -> str:
    if code.kind == "repetition":
        return f"the sum needs a message from each of {code.n // (code.s + 1)} groups of {code.s + 1} workers"
    return f"the sum needs messages from {code.n - code.s} of {code.n} workers"
