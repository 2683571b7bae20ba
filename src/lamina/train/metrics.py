"""The numbers of a run, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Metrics:
    """Writer of `metrics.jsonl`; keeps nothing in memory.

    Args:
        path: the file; None = rows go nowhere (another rank, or a run without a folder).
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is in the file when this returns."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def length(self) -> int:
        """Force the rows to disk and return the length of the file in bytes (a checkpoint remembers it)."""
        if self.path is None or not self.path.exists():
            return 0
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def drop_torn(self) -> None:
        """Cut off a last row that a kill left half written: the next one would be glued to it."""
        if self.path is not None and self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def truncate(self, length: int) -> None:
        """Cut off the rows that a killed run wrote after its last checkpoint."""
        if self.path is not None and self.path.exists():
            os.truncate(self.path, length)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows; a last line that a kill left half written is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
