"""Finding, reading and caching the files a data set is made of."""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lamina.errors import LaminaError, nearest


def existing(path: str | Path, what: str) -> Path:
    """Return `path`, or say what is missing and the nearest name that does stand in its folder.

    Raises:
        LaminaError: nothing stands at the path.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found
    folder = next(p for p in found.absolute().parents if p.is_dir())
    missing = found.absolute().relative_to(folder).parts[0]
    hint = nearest(missing, [p.name for p in folder.iterdir()])
    raise LaminaError(f"{what} {str(found)!r} does not exist: there is no {missing!r} in {str(folder)!r}{hint}")


def read(path: Path) -> bytes:
    """Read a file, decompressed where its name ends in .gz.

    Raises:
        LaminaError: the compressed file is damaged.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path, "rb") as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LaminaError(f"{str(path)!r} is not a whole gzip file: {error}") from error


def cached(name: str, write: Callable[[IO[bytes]], None]) -> Path:
    """Return the cache file `name`, written by `write` where it does not stand yet.

    It is written aside and renamed, so that a reader or a second process never sees half a file. The folder is
    LAMINA_CACHE, else `lamina` below XDG_CACHE_HOME or ~/.cache.

    Raises:
        LaminaError: the folder cannot be written.
    """
    place = cache_folder() / name
    if place.exists():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}-")
    except OSError as error:
        raise LaminaError(f"cannot write the cache {str(place)!r} ({error}); LAMINA_CACHE names another") from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(aside, place)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return place


def cache_folder() -> Path:
    """Return the folder for files made from data sets."""
    if own := os.environ.get("LAMINA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lamina"
