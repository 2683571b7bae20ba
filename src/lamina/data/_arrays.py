"""Arrays from .npy, .npz and idx files: never unpickled, memory-mapped where the format allows."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lamina.data._files import existing, read
from lamina.errors import LaminaError, nearest

Array = npt.NDArray[Any]

# Type codes of the idx format; its numbers are big-endian.
_IDX = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def npy(path: str | Path) -> Array:
    """Memory-map a .npy file.

    Raises:
        LaminaError: it is missing, cut short, not a .npy file, or holds Python objects.
    """
    found = existing(path, "the array file")
    try:
        return np.load(found, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise LaminaError(f"{str(found)!r} cannot be read as a .npy array: {error}") from error


def npz(path: str | Path, names: Sequence[str]) -> list[Array]:
    """Read the named arrays of a .npz file, in that order.

    Raises:
        LaminaError: it is missing, damaged, has no such array, or the array holds Python objects.
    """
    found = existing(path, "the array file")
    name = names[0]
    try:
        # Opened here: np.load leaves the file open where it is no whole archive.
        with found.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise LaminaError(f"{str(found)!r} is one array, not a .npz archive of several")
            result = []
            for name in names:
                if name not in archive.files:
                    hint = nearest(name, archive.files)
                    raise LaminaError(f"{str(found)!r} has no array {name!r}, only {sorted(archive.files)}{hint}")
                result.append(archive[name])
            return result
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise LaminaError(f"the array {name!r} of {str(found)!r} cannot be read: {error}") from error


def idx(path: str | Path) -> Array:
    """Read an idx file (MNIST's format), memory-mapped unless its name ends in .gz.

    Raises:
        LaminaError: the magic number, the type code or the length is wrong.
    """
    found = existing(path, "the idx file")
    content: Array
    if found.suffix == ".gz":
        content = np.frombuffer(read(found), dtype=np.uint8)
    else:
        content = np.memmap(found, dtype=np.uint8, mode="r") if found.stat().st_size else np.empty(0, np.uint8)
    magic = content[:4].tolist()
    if len(magic) < 4 or magic[:2] != [0, 0] or magic[2] not in _IDX:
        raise LaminaError(f"{str(found)!r} is not an idx file: it starts with bytes {magic}, expected 0, 0, type, rank")
    dtype, start = np.dtype(_IDX[magic[2]]), 4 + 4 * magic[3]
    if len(content) < start:
        raise LaminaError(f"{str(found)!r} has {len(content)} bytes, but its header alone promises {start}")
    shape = np.frombuffer(content[4:start].tobytes(), dtype=">u4").tolist()
    promised = start + dtype.itemsize * math.prod(shape)
    if len(content) != promised:
        raise LaminaError(f"{str(found)!r} has {len(content)} bytes, but its header promises {promised} for {shape}")
    return content[start:].view(dtype).reshape(shape)


def is_idx(path: str | Path) -> bool:
    """Tell idx files by their name: `...-idx3-ubyte`, `.idx`, `.idx3`, compressed or not."""
    return re.search(r"[-.]idx[1-4]?(-\w+)?(\.idx)?(\.gz)?$", Path(path).name) is not None
