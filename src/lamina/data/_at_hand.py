"""Where a well-known data set stands: below a folder, on the hub, or nowhere yet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.data._files import existing
from lamina.data.hugging_face import load_dataset
from lamina.errors import LaminaError

_notes: list[dict[str, Path]] = []


@contextmanager
def noting_files() -> Iterator[dict[str, Path]]:
    """Note, while it is open, which files of named sets are read, by their name below the data folder."""
    noted: dict[str, Path] = {}
    _notes.append(noted)
    try:
        yield noted
    finally:
        _notes.remove(noted)


def places(name: str, files: Sequence[str], folder: str | Path | None, *, hub: str | None) -> list[Path] | None:
    """Return where the files of a set stand below `folder` (default: what LAMINA_DATA names).

    None = not there, but the hub has the set.

    Raises:
        LaminaError: the folder is missing, or the files are and the hub has no such set.
    """
    root = folder or os.environ.get("LAMINA_DATA")
    if root:
        found = [existing(root, "the data folder") / file for file in files]
        if all(path.is_file() for path in found):
            for noted in _notes:
                noted.update(zip(files, found, strict=True))
            return found
    if hub and not folder:
        return None
    at = f"{str(root)!r} has not all of" if root else "LAMINA_DATA names no folder; it should hold"
    raise LaminaError(f"the data set {name!r} is not at hand: {at} {', '.join(files)}")


def from_hub(name: str, files: Sequence[str], path: str, config: str | None = None) -> Any:
    """Load the set from the hub, or say both ways to get it."""
    try:
        return load_dataset(path, config)
    except LaminaError as error:
        raise LaminaError(
            f"the data set {name!r} is not at hand: let LAMINA_DATA name a folder with {', '.join(files)}, "
            f"or install lamina[hf] and go online ({error})"
        ) from error
