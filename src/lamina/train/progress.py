"""What a user sees while a model trains: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 10.0
"""Between two plain lines."""


class Display(Protocol):
    """What the trainer tells about its progress."""

    def update(self, step: int, loss: float, rate: float) -> None:
        """Show the number of steps done, the loss, and the rate in tokens (or rows) a second."""
        ...

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display(steps: int, *, start: int = 0, unit: str = "rows", shown: bool = True) -> Display:
    """Return what fits standard error: a bar in a terminal, plain lines otherwise, nothing where not `shown`."""
    if not shown:
        return Silent()
    return Bar(steps, start, unit) if sys.stderr.isatty() else Lines(steps, start, unit)


class Silent:
    """Shows nothing."""

    def update(self, step: int, loss: float, rate: float) -> None:
        """Do nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""


class Lines(Silent):
    """One line every `SECONDS` seconds, and one at the end."""

    def __init__(self, steps: int, start: int, unit: str) -> None:
        self.steps, self.unit, self.first = steps, unit, start
        self.begun = self.last = time.monotonic()

    def update(self, step: int, loss: float, rate: float) -> None:
        """Print, unless the last line is too fresh."""
        now = time.monotonic()
        if now - self.last < SECONDS and step < self.steps:
            return
        self.last = now
        left = (now - self.begun) / max(1, step - self.first) * (self.steps - step)
        line = f"step {step}/{self.steps}  loss {loss:.4f}  {rate:,.0f} {self.unit}/s  {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


class Bar(Silent):
    """A rich progress bar."""

    def __init__(self, steps: int, start: int, unit: str) -> None:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.unit = unit
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task("train", total=steps, completed=start, loss="-", rate="")

    def update(self, step: int, loss: float, rate: float) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=step, loss=f"{loss:.4f}", rate=f"{rate:,.0f} {self.unit}/s")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar on the screen as it stands."""
        self.progress.stop()
