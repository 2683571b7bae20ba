"""Gradient coding as reducers: in every step by itself, or over several."""

from __future__ import annotations

from lamina.errors import LaminaError
from lamina.gradients.coding.coded_reducer import CodedReducer
from lamina.gradients.coding.matrix import Kind
from lamina.gradients.coding.scheme import GradientCodingScheme, Scheme
from lamina.gradients.coding.sequential import MultiplexedScheme, SelectiveRepetitionScheme
from lamina.registry import register

SOURCE = "Krishnan, Ebrahimi, Khisti, Sequential Gradient Coding For Straggler Mitigation (ICLR 2023), arXiv 2211.13802"


@register("reducer", source="Tandon, Lei, Dimakis, Karampatziakis, Gradient Coding (ICML 2017), arXiv 1612.03301")
class GradientCoding(CodedReducer):
    """Exact gradients without waiting for any `s` stragglers a step: every worker computes s + 1 of n chunks.

    No delay, so it works under any trainer that takes its tasks. A step costs s + 1 times the work of plain data
    parallelism. See `CodedReducer` for what `tasks` and `reduce` do.

    Args:
        s: stragglers that a step bears, 0 <= s < workers; workers that ended count.
        kind: of the code: `repetition` (groups of s + 1 workers with the same chunks; s + 1 divides the workers),
            `cyclic`, or `auto`, repetition where it goes.
        seed: of the code, and of what random layers draw for each chunk.
        wait: patience: the master waits for (1 + wait) times the fastest worker's time.
        timeout: seconds after which a round that cannot be decoded fails.
    Raises:
        LaminaError: an option out of its range; from `tasks` and `reduce`, s + 1 workers are more than there are.
    Example:
        >>> GradientCoding(s=1).tasks(step=2, rank=3, world=4)
        [10, 11]
    """

    def __init__(
        self, s: int, *, kind: Kind = "auto", seed: int = 0, wait: float = 1.0, timeout: float = 600.0
    ) -> None:
        super().__init__(kind, seed, wait, timeout)
        if s < 0:
            raise LaminaError(f"s must be at least 0 stragglers, got {s}")
        self.s = s

    @property
    def delay(self) -> int:
        """None."""
        return 0

    def scheme(self, workers: int) -> Scheme:
        """Return the scheme among so many workers."""
        return GradientCodingScheme(workers, self.s, self.kind, self.seed)


class _Bursts(CodedReducer):
    """Both codes over time take a (B, W, lam) model of stragglers."""

    def __init__(
        self,
        B: int,
        W: int,
        lam: int,
        *,
        kind: Kind = "auto",
        seed: int = 0,
        wait: float = 1.0,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(kind, seed, wait, timeout)
        self.B, self.W, self.lam = B, W, lam
        # Whatever is wrong for every number of workers is said at once.
        self._delay = self.scheme(max(1, lam)).delay

    @property
    def delay(self) -> int:
        """Steps from a job's first round to the one in which it is decoded."""
        return self._delay


@register("reducer", source=f"{SOURCE}, algorithm 1")
class SelectiveRepetition(_Bursts):
    """SR-SGC: a code for few stragglers a step; where there were more, some repeat that task B steps later.

    A gradient is decoded B steps late, so B + 1 models are trained in turns (`interleave`). See `CodedReducer`.

    Args:
        B: longest burst of one worker, in steps, >= 1.
        W: steps of a window; B divides W - 1.
        lam: distinct stragglers that a window may have, 0..workers.
        kind: of the code inside, see `GradientCoding`.
        seed: of the code, and of what random layers draw for each chunk.
        wait: patience: the master waits for (1 + wait) times the fastest worker's time.
        timeout: seconds after which a round that cannot be decoded fails.
    Raises:
        LaminaError: an option out of its range; from `tasks` and `reduce`, too few workers.
    Example:
        >>> SelectiveRepetition(B=2, W=3, lam=4).tasks(step=0, rank=7, world=8)
        [7, 0, 1]
    """

    def scheme(self, workers: int) -> Scheme:
        """Return the scheme among so many workers."""
        return SelectiveRepetitionScheme(workers, self.B, self.W, self.lam, self.kind, self.seed)


@register("reducer", source=f"{SOURCE}, algorithm 2")
class MultiplexedCoding(_Bursts):
    """M-SGC: lost pieces are sent again in later steps and only the rest is coded: hardly more work than without.

    A worker computes W - 1 + B pieces a step for as many jobs and sends each, so W - 1 + B times the bytes of a
    gradient. A gradient is decoded W - 2 + B steps late: W - 1 + B models are trained in turns (`interleave`).

    Args:
        B: longest burst of one worker, in steps, 1..W-1.
        W: steps of a window.
        lam: distinct stragglers that a window may have, 0..workers.
        kind: of the code inside, see `GradientCoding`.
        seed: of the code, and of what random layers draw for each chunk.
        wait: patience: the master waits for (1 + wait) times the fastest worker's time.
        timeout: seconds after which a round that cannot be decoded fails.
    Raises:
        LaminaError: an option out of its range; from `tasks` and `reduce`, too few workers.
    Example:
        >>> MultiplexedCoding(B=1, W=2, lam=2).tasks(step=0, rank=3, world=4)
        [3]
    """

    def scheme(self, workers: int) -> Scheme:
        """Return the scheme among so many workers."""
        return MultiplexedScheme(workers, self.B, self.W, self.lam, self.kind, self.seed)
