"""Files as the bytes they are, for models that read these: from a folder, or encoded from a set of images or sounds.

Source: Horton et al., Bytes Are All You Need (2023), arXiv 2306.00238.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.data._arrays import npz
from lamina.data._files import existing
from lamina.data.byte_encoding import PIXELS, Array, Encoding, Sample, check_encoding, encode, read_sound
from lamina.data.byte_transforms import Transform, make_transform
from lamina.data.examples import Columns, Data, Examples, split_rows
from lamina.data.images import Images, whole_labels
from lamina.data.loader import permutation
from lamina.errors import LaminaError, ShapeError
from lamina.recipe import build
from lamina.registry import register

PADDING = -1


@register("data", source="Horton et al. 2023, arXiv 2306.00238, section 4")
def file_bytes(
    source: str | Path | Sequence[str | Path] | Mapping[str, Any] | Data,
    encoding: Encoding = "raw",
    batch: int = 32,
    *,
    transforms: Sequence[str | Mapping[str, Any] | Transform] = (),
    quality: int | None = None,
    sample: Sample = "int16",
    rate: int = 8000,
    pad: int | None = PADDING,
    pool: int = 16,
    split: float = 0.1,
    seed: int = 0,
) -> Data:
    """Files and their classes: `inputs` (B, S) int64, the bytes, padded with -1 to the longest; `labels` (B,) int64.

    Files of a folder are read when a batch asks for them. To keep padding low, training files are sorted by length
    within pools of a few batches; every epoch still has each file once, in an order that depends on the seed alone.

    Args:
        source: a folder with a sub-folder a class; a list of files (the folder a file stands in is its class); a .npz
            that holds files back to back: `data` uint8, `offsets` (N + 1), `labels` (N); or a data set of images
            (`pixel_values`) or sounds (`inputs` (B, T) from -1 to 1) to encode, or its recipe node, such as
            `{name: images, source: photos, size: 64, mean: 0, std: 1}`.
        encoding: "raw" (files as they are); of images "fhwc", "fchw", "tiff", "png" or "jpeg"; of sounds "wav" (WAV
            files of a folder are stored anew as `sample` says). See `encode`.
        batch: global batch size.
        transforms: of the bytes, in this order: `byte_permutation`, `byte_noise`, `byte_shuffle`, `position_mask`, with
            options such as `{name: position_mask, keep: 0.25, size: 784}`. What they draw depends on the seed, the
            epoch and the file: resuming gives the very same bytes.
        quality: of a JPEG, 1..100; None = 75.
        sample, rate: of a WAV that is encoded: how numbers are stored, samples a second.
        pad: -1, or None = refuse files of differing lengths.
        pool: batches whose files are sorted by length before they are dealt out; 1 = batches as they are drawn.
        split: evaluation's share of the files, drawn with `seed`; a data set has its own.
        seed: of the split and of the transforms.
    Raises:
        LaminaError: a folder without classes or files, an empty file, an encoding that does not fit the source, an
            option out of range. ShapeError: at the batch, files of differing lengths without `pad`.
        MissingExtra: Pillow (extra `images`) is not installed, and the encoding needs it.
    """
    if pool < 1:
        raise LaminaError(f"pool must be at least 1, got {pool}")
    if pad not in (None, PADDING):
        raise LaminaError(f"pad is -1, which no byte is, or None for none, got {pad}")
    if encoding != "raw":
        check_encoding(encoding, quality, sample)
    elif quality is not None:
        raise LaminaError(f"quality={quality} is for JPEG, and raw files stay as they are")
    made = [make_transform(t) for t in transforms]
    options: dict[str, Any] = {"transforms": made, "seed": seed, "pad": pad, "pool": pool}

    def encoded(values: Array | Tensor) -> bytes:
        return encode(values, encoding, quality=quality, rate=rate, sample=sample)

    if isinstance(source, (Mapping, Data)):
        given: Data = source if isinstance(source, Data) else build(source, "data")
        if encoding == "raw":
            raise LaminaError(f"{given.name} has no files: choose an encoding, such as tiff or wav")
        train, *held = (
            FileBytes(*_encoded(part, encoding, encoded), **options)
            for part in (given.train, given.evaluation)
            if part is not None
        )
        evaluation = held[0].bucketed(batch) if held else None
        return Data(train, evaluation, batch, _classes(given, train), f"file_bytes of {given.name}")
    if encoding in PIXELS:
        raise LaminaError(
            f"files become {encoding} by way of pixels: as source give a set of images, such as "
            "{name: images, source: FOLDER, size: 64, mean: 0, std: 1}"
        )
    stored, labels, classes = _stored(source)
    if encoding == "wav":
        stored = KeptFiles([_again(c, sample) for c in stored.contents(torch.arange(len(stored)))[0]])
    whole = FileBytes(stored, labels, **options)
    mine, rest = split_rows(len(whole), split, seed)
    evaluation = whole.select(rest).bucketed(batch) if split else None
    return Data(whole.select(mine), evaluation, batch, {"classes": classes}, "file_bytes")


class Files(Protocol):
    """Files by number, whose lengths may be known before they are read."""

    lengths: Tensor | None
    """(N,) int64, bytes; None = not known."""

    def __len__(self) -> int:
        """Return the number of files."""
        ...

    def contents(self, rows: Tensor) -> tuple[list[bytes], Tensor | None]:
        """Return what the files `rows` hold, and their classes where only reading tells."""
        ...


class FileBytes:
    """Files as examples: `inputs` (B, S) int64, padded with -1, and `labels` (B,); see `file_bytes`.

    The loader asks it to `arrange` the order of an epoch, and tells it the epoch before each batch.

    Args:
        files: what is read.
        labels: (N,) int64; None = reading tells, or there are none.
        rows: those of the files that belong to this part; None = all.
    """

    def __init__(
        self,
        files: Files,
        labels: Tensor | None,
        *,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
        pad: int | None = PADDING,
        pool: int = 16,
        rows: Tensor | None = None,
    ) -> None:
        self.files, self.labels, self.transforms = files, labels, list(transforms)
        self.seed, self.pad, self.pool, self.epoch = seed, pad, pool, 0
        self.rows = torch.arange(len(files)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Tensor) -> FileBytes:
        """Return the part with these of its rows."""
        options = {"transforms": self.transforms, "seed": self.seed, "pad": self.pad, "pool": self.pool}
        return FileBytes(self.files, self.labels, rows=self.rows[rows], **options)  # type: ignore[arg-type]

    def bucketed(self, batch: int) -> FileBytes:
        """Return the same files in an order whose batches have files of like lengths; as it is where all are equal."""
        if self.files.lengths is None or len(self.files.lengths[self.rows].unique()) < 2:
            return self
        return self.select(self.arrange(permutation(len(self), self.seed, 0).long(), batch))

    def set_epoch(self, epoch: int) -> None:
        """Hear which epoch the next batch belongs to: transforms that draw draw anew."""
        self.epoch = epoch

    def arrange(self, order: Tensor, batch: int) -> Tensor:
        """Return the rows of an epoch so that batches have files of like lengths: a permutation of `order`.

        The files of `pool` batches are sorted by length and dealt out; batches stand in the order in which the first of
        their files was drawn. What fills no batch stays at the end.
        """
        if self.files.lengths is None or self.pool == 1:
            return order
        lengths, whole = self.files.lengths[self.rows[order.long()]], len(order) - len(order) % batch
        place = torch.arange(whole)
        chunks = [c[lengths[c].argsort(stable=True)] for c in place.split(self.pool * batch)]
        batches = torch.cat(chunks).view(-1, batch) if chunks else place.view(-1, batch)
        batches = batches[batches.amin(1).argsort()] if whole else batches
        return torch.cat((order[batches.flatten()], order[whole:]))

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Read the files `indices`, transform their bytes, pad them."""
        rows = self.rows[indices]
        contents, labels = self.files.contents(rows)
        found = [self._transformed(content, int(row)) for content, row in zip(contents, rows.tolist(), strict=True)]
        lengths = {len(f) for f in found}
        if self.pad is None and len(lengths) > 1:
            raise ShapeError(f"files of one batch have {min(lengths)} to {max(lengths)} bytes: give pad=-1")
        inputs = torch.full((len(found), max(lengths, default=0)), PADDING)
        for i, content in enumerate(found):
            inputs[i, : len(content)] = content
        labels = self.labels[rows] if self.labels is not None else labels
        return {"inputs": inputs} if labels is None else {"inputs": inputs, "labels": labels}

    def _transformed(self, content: bytes, row: int) -> Tensor:
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if self.transforms:
            digest = hashlib.blake2b(f"{self.seed}:{self.epoch}:{row}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            for transform in self.transforms:
                values = transform(values, generator)
        return values


class DiskFiles:
    """Files where they stand, read when they are asked for.

    Raises:
        LaminaError: one of them is missing or empty.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [existing(p, "the file") for p in paths]
        self.lengths: Tensor | None = torch.tensor([p.stat().st_size for p in self.paths])
        if not bool((self.lengths > 0).all()):
            raise LaminaError(f"{str(self.paths[int(self.lengths.argmin())])!r} is empty")

    def __len__(self) -> int:
        return len(self.paths)

    def contents(self, rows: Tensor) -> tuple[list[bytes], Tensor | None]:
        """Read them."""
        return [self.paths[i].read_bytes() for i in rows.tolist()], None


class KeptFiles:
    """Contents of files, kept in memory.

    Raises:
        LaminaError: one of them is empty.
    """

    def __init__(self, kept: Sequence[bytes]) -> None:
        self.kept = list(kept)
        self.lengths: Tensor | None = torch.tensor([len(k) for k in self.kept])
        if not all(self.kept):
            raise LaminaError(f"file {self.kept.index(b'')} of {len(self.kept)} is empty")

    def __len__(self) -> int:
        return len(self.kept)

    def contents(self, rows: Tensor) -> tuple[list[bytes], Tensor | None]:
        """Hand them out."""
        return [self.kept[i] for i in rows.tolist()], None


class EncodedExamples:
    """Rows of another data set, encoded each time they are asked for: they may be other ones every time (crops)."""

    lengths: Tensor | None = None

    def __init__(self, examples: Examples, entry: str, encoded: Callable[[Tensor], bytes]) -> None:
        self.examples, self.entry, self.encoded = examples, entry, encoded

    def __len__(self) -> int:
        return len(self.examples)

    def contents(self, rows: Tensor) -> tuple[list[bytes], Tensor | None]:
        """Fetch and encode them."""
        found = self.examples.batch(rows)
        if self.entry not in found:
            raise LaminaError(f"there is nothing to encode: the batch has {sorted(found)}, and no {self.entry!r}")
        values = found[self.entry].float()
        if self.entry == "pixel_values":
            if bool((values < 0).any() | (values > 1).any()):
                raise LaminaError("pixels to encode lie from 0 to 1: give the set of images mean=0 and std=1")
            values = values.permute(0, 2, 3, 1)
        elif values.dim() == 3 and values.shape[1] == 1:
            values = values[:, 0]
        return [self.encoded(v) for v in values], found.get("labels")


def _encoded(part: Examples, encoding: Encoding, encoded: Callable[..., bytes]) -> tuple[Files, Tensor | None]:
    """Encode once what is the same every time; the rest when it is asked for."""
    if encoding in PIXELS and isinstance(part, Images):
        # As they are stored, whatever a batch is normalised to.
        axes = (0, 1, 2) if part.pixels.ndim == 4 and not part.channels_last else None
        pixels = (part.pixels[i] if axes is None else np.moveaxis(part.pixels[i], 0, -1) for i in part.rows.tolist())
        return KeptFiles([encoded(np.asarray(p)) for p in pixels]), part.labels[part.rows]
    live = EncodedExamples(part, "pixel_values" if encoding in PIXELS else "inputs", encoded)
    if not isinstance(part, Columns):
        return live, None
    contents, labels = live.contents(torch.arange(len(part)))
    return KeptFiles(contents), labels


def _classes(given: Data, part: FileBytes) -> dict[str, Any]:
    if "classes" in given.sizes:
        return {"classes": given.sizes["classes"]}
    return {} if part.labels is None else {"classes": int(part.labels.max()) + 1}


def _stored(source: str | Path | Sequence[str | Path]) -> tuple[Files, Tensor, int]:
    """Return files, the class of each, and how many classes there are."""
    if isinstance(source, (str, Path)) and Path(source).suffix == ".npz":
        data, offsets, labels = npz(source, ["data", "offsets", "labels"])
        classes = whole_labels(labels)
        if data.dtype != np.uint8 or offsets.shape != (len(labels) + 1,) or offsets[-1] > len(data):
            raise ShapeError(
                f"{str(source)!r} must hold data (uint8), a label a file and one offset more than that, got data "
                f"{data.dtype} {data.shape}, {len(labels)} labels, offsets {offsets.shape}"
            )
        ends = offsets.astype(np.int64).tolist()
        kept = [data[a:b].tobytes() for a, b in pairwise(ends)]
        return KeptFiles(kept), classes, int(classes.max()) + 1
    paths, names = _paths(source)
    known = sorted(set(names))
    return DiskFiles(paths), torch.tensor([known.index(n) for n in names]), len(known)


def _paths(source: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Return files and the name of the class of each."""
    if isinstance(source, (str, Path)):
        folder = existing(source, "the folder of files")
        if not folder.is_dir():
            raise LaminaError(
                f"{str(folder)!r} is one file: give a folder with a sub-folder a class, or a list of files"
            )
        found = sorted(p for p in folder.glob("*/**/*") if p.is_file() and _visible(p.relative_to(folder)))
        names = [p.relative_to(folder).parts[0] for p in found]
        if not found:
            raise LaminaError(f"{str(folder)!r} must have one sub-folder of files a class; it has no file in one")
    else:
        found = [Path(p) for p in source]
        names = [p.absolute().parent.name for p in found]
        if not found:
            raise LaminaError("the list of files is empty")
    return found, names


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _again(content: bytes, sample: Sample) -> bytes:
    """Store the sound of a WAV file anew."""
    values, rate = read_sound(content)
    return encode(values, "wav", rate=rate, sample=sample)
