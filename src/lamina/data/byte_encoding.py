"""Write an image or a sound as the bytes of a file, in memory; and read the sounds of files.

Source: the encodings of Horton et al., Bytes Are All You Need (2023), arXiv 2306.00238, section 4.
"""

from __future__ import annotations

import io
import struct
import wave
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lamina.errors import LaminaError, ShapeError, nearest, require

Array = npt.NDArray[Any]
Encoding = Literal["raw", "fhwc", "fchw", "tiff", "png", "jpeg", "wav"]
Sample = Literal["int16", "int32", "uint8", "float32"]

PIXELS = ("fhwc", "fchw", "tiff", "png", "jpeg")
"""The encodings of images."""

_WIDTHS: dict[str, int] = {"int16": 2, "int32": 4, "uint8": 1, "float32": 4}
_FLOAT_FORMAT = 3


def encode(
    array: Array | Tensor,
    encoding: Encoding,
    *,
    quality: int | None = None,
    rate: int = 8000,
    sample: Sample = "int16",
) -> bytes:
    """Return what a file with this image or sound holds.

    Args:
        array: an image (H, W) or (H, W, C) with 1 or 3 channels, uint8 or from 0 to 1 (then times 255, cut off to whole
            numbers), or a mono sound (T,) from -1 to 1.
        encoding: "fhwc" and "fchw" (pixels alone, channels last or first), "tiff" (uncompressed), "png" (level 0: not
            compressed), "jpeg", or "wav".
        quality: of a JPEG, 1..100; None = 75.
        rate: of a WAV, samples a second. sample: how its numbers are stored.
    Raises:
        LaminaError: an unknown encoding, a quality out of range or of another encoding, numbers out of range.
        ShapeError: no image, or no sound. MissingExtra: Pillow is not installed, and the encoding needs it.
    Example:
        >>> encode(np.full((2, 3), 65, np.uint8), "fhwc")
        b'AAAAAA'
    """
    check_encoding(encoding, quality, sample)
    values = array.numpy() if isinstance(array, Tensor) else np.asarray(array)
    if encoding == "wav":
        return _wav(values, rate, sample)
    pixels = _pixels(values)
    if encoding == "fhwc":
        return pixels.tobytes()
    if encoding == "fchw":
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels).tobytes()
    options: dict[str, dict[str, Any]] = {"png": {"compress_level": 0}, "jpeg": {"quality": quality or 75}}
    file = io.BytesIO()
    picture = require("PIL.Image", "images").fromarray(pixels)
    picture.save(file, format=encoding.upper(), **options.get(encoding, {}))
    return file.getvalue()


def check_encoding(encoding: str, quality: int | None = None, sample: str = "int16") -> None:
    """Refuse an encoding that there is not, and options of another one."""
    known = [n for n in get_args(Encoding) if n != "raw"]
    if encoding not in known:
        raise LaminaError(f"no encoding is called {encoding!r}{nearest(encoding, known)}; there are {', '.join(known)}")
    if quality is not None and (encoding != "jpeg" or not 1 <= quality <= 100):
        raise LaminaError(f"quality is 1..100 and of JPEG alone, got quality={quality} for {encoding!r}")
    if sample not in _WIDTHS:
        raise LaminaError(f"sample must be one of {', '.join(_WIDTHS)}, got {sample!r}")


def read_sound(content: bytes, name: str = "the file") -> tuple[Array, int]:
    """Decode an uncompressed WAV: (T,) float32 from -1 to 1, channels averaged, and its rate in samples a second.

    Raises:
        LaminaError: it is no WAV, or a compressed one.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise LaminaError(f"{name!r} cannot be read as an uncompressed WAV: {error}") from error
    if width not in (1, 2, 4):
        raise LaminaError(f"{name!r} has samples of {8 * width} bits; 8, 16 and 32 are read")
    if width == 1:
        values = np.frombuffer(frames, np.uint8).astype(np.float32) / 127.5 - 1
    else:
        values = (np.frombuffer(frames, f"<i{width}").astype(np.float64) / (2 ** (8 * width - 1) - 1)).astype(
            np.float32
        )
    return values.reshape(-1, channels).mean(1).clip(-1, 1), rate


def _pixels(values: Array) -> Array:
    if values.ndim not in (2, 3) or not values.size or (values.ndim == 3 and values.shape[-1] not in (1, 3)):
        raise ShapeError(f"an image is (H, W) or (H, W, C) with 1 or 3 channels, got {values.shape}")
    if values.dtype != np.uint8:
        if values.dtype.kind != "f" or not (values.min() >= 0 and values.max() <= 1):
            raise LaminaError(f"pixels are uint8 or from 0 to 1, got {values.dtype} {values.min()}..{values.max()}")
        # The official code cuts off as well.
        values = (values * 255).astype(np.uint8)
    return np.ascontiguousarray(values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values)


def _wav(values: Array, rate: int, sample: Sample) -> bytes:
    if values.ndim != 1 or values.dtype.kind != "f":
        raise ShapeError(f"a sound is floating-point (T,), got {values.dtype} {values.shape}")
    if rate < 1 or (values.size and not np.abs(values).max() <= 1):
        raise LaminaError(f"a sound lies from -1 to 1 and has a rate above 0, got up to {np.abs(values).max()}, {rate}")
    wide = values.astype(np.float64)
    stored = {
        "float32": lambda: values.astype("<f4"),
        "int32": lambda: (wide * (2**31 - 1)).astype("<i4"),
        "int16": lambda: (wide * (2**15 - 1)).astype("<i2"),
        "uint8": lambda: ((wide + 1) * 255 / 2).astype(np.uint8),
    }[sample]()
    if sample == "float32":
        return _float_wav(stored.tobytes(), rate)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(_WIDTHS[sample])
        out.setframerate(rate)
        out.writeframes(stored.tobytes())
    return file.getvalue()


def _float_wav(frames: bytes, rate: int) -> bytes:
    """Write the header that the standard library cannot: mono, 32-bit floating point."""
    form = struct.pack("<HHIIHH", _FLOAT_FORMAT, 1, rate, 4 * rate, 4, 32)
    chunks = ((b"fmt ", form), (b"fact", struct.pack("<I", len(frames) // 4)), (b"data", frames))
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(c)) + c for name, c in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body
