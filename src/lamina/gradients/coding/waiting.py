"""The master's waiting rule: as long as the code needs, and no longer than (1 + wait) times the fastest worker."""

from __future__ import annotations

import time
from collections.abc import Collection

from lamina.errors import LaminaError
from lamina.gradients.coding.scheme import Progress
from lamina.gradients.lost_worker import named


class Waiting:
    """One round of waiting.

    Args:
        progress: whose rule says who may be missing.
        begun: `time.monotonic()` when the workers began.
        wait: patience, in times of the fastest worker.
        timeout: seconds from now after which a round fails that cannot end.
    """

    def __init__(self, progress: Progress, begun: float, wait: float, timeout: float) -> None:
        self.progress, self.begun, self.wait, self.timeout = progress, begun, wait, timeout
        self.seconds: dict[int, float] = {}
        """What each worker took whose messages are in."""
        self.waited = False
        """Whether the time was up before the code bore those who were missing."""
        self._end = time.monotonic() + timeout

    def arrived(self, worker: int, when: float) -> None:
        """Note that a worker's messages are in."""
        self.seconds[worker] = when - self.begun

    def over(self, missing: Collection[int]) -> bool:
        """Say whether the round may end without these workers.

        Raises:
            LaminaError: the timeout passed, and it may not.
        """
        if not missing:
            return True
        now = time.monotonic()
        if now >= self._due:
            if self.progress.tolerates(missing):
                return True
            self.waited = True
        if now >= self._end:
            raise LaminaError(
                f"{named(sorted(missing))} did not answer within {self.timeout} s in round {self.progress.round}, and "
                "the code does not bear that they are missing; nothing was combined"
            )
        return False

    def left(self) -> float:
        """Return how many seconds to listen before asking again."""
        now = time.monotonic()
        return max(1e-4, (self._due if now < self._due < self._end else self._end) - now)

    @property
    def _due(self) -> float:
        return self.begun + (1 + self.wait) * min(self.seconds.values(), default=float("inf"))
