"""Volumes (brain scans) with what is known of each subject: phantoms, or NIfTI files beside a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.data._files import existing
from lamina.data._standardize import standardized
from lamina.data._tables import read_columns
from lamina.data.examples import Columns, Data, Examples, split_rows
from lamina.data.phantoms import phantoms
from lamina.data.views import Augmentation, in_views
from lamina.errors import LaminaError, ShapeError, require
from lamina.registry import register

ENDINGS = (".nii", ".nii.gz")
TABLE = "subjects.csv"
KNOWN = ("file", "age", "site", "diagnosis")


@register("data", source="Barbano et al., Anatomical Foundation Models for Brain MRIs (2024), arXiv 2408.07079")
def volumes(
    source: str | Path = "phantoms",
    batch: int = 32,
    *,
    size: int | None = 32,
    subjects: int = 600,
    regions: int = 12,
    views: int = 1,
    augment: Sequence[Augmentation] = (),
    target: Literal["none", "age", "site", "diagnosis"] = "none",
    split: float = 0.1,
    seed: int = 0,
) -> Data:
    """Volumes with age, anatomy, site and diagnosis: `inputs` (B, 1, D, H, W) float32, `age` (B,), `psi` (B, R, M),
    `site` and `diagnosis` (B,) int64.

    `psi` has M measures of R regions, each column standardised over the training rows (those without NaN). A folder
    holds .nii or .nii.gz files, read when a batch asks for them, and `subjects.csv` with a line a subject: `file`, and
    as far as they are known `age`, `site`, `diagnosis`, and measurements in columns `region.measure`, such as
    `insula.thickness`. What a column leaves empty is NaN, and -1 of site and diagnosis; those two may be words, which
    are numbered in the order of the alphabet. Entries of which there is no column are not in the batch. Without a
    table: all files, `inputs` alone.

    Args:
        source: "phantoms" (see `phantoms`: no real anatomy), or a folder.
        batch: global batch size.
        size: voxels a side. Phantoms are rendered so; files are resampled by linear interpolation, which registers
            nothing. None = as the files are, all of one size (phantoms: 32).
        subjects, regions: of the phantoms.
        views: of each volume; from 2 on `inputs` are (B, views, 1, D, H, W), also in evaluation.
        augment: of the training volumes, and of evaluation's where there are several views, see `augmented_views`; the
            paper's choice is none.
        target: an entry that is also there as `labels`, for objectives with a target.
        split: evaluation's share of the subjects, drawn with `seed`.
        seed: of the split, of the phantoms and of the augmentation.
    Raises:
        LaminaError: a folder without volumes, a table that does not fit it, an option out of range, a file that is no
            3-D volume. MissingExtra: nibabel is not installed, and the source is a folder.
    """
    if source == "phantoms":
        whole, known = _phantoms(subjects, 32 if size is None else size, regions, seed)
    else:
        whole, known = _folder(existing(source, "the folder of volumes"), size)
    if target != "none":
        if target not in known:
            raise LaminaError(f"target is {target!r}, and of the subjects is known: {', '.join(known) or 'nothing'}")
        known["labels"] = known[target]
    train, held = split_rows(len(whole), split, seed)
    if "psi" in known:
        known["psi"] = standardized(known["psi"], train)
    kept = Volumes(whole, known, held) if split else None
    parts = in_views(Volumes(whole, known, train), kept, views, augment, "inputs", seed)
    shape = whole.batch(torch.tensor([0]))["inputs"].shape[2:]
    sizes: dict[str, Any] = {"in_channels": 1, "image": shape[0] if len(set(shape)) == 1 else tuple(shape)}
    if "psi" in known:
        sizes |= {"regions": known["psi"].shape[1], "measures": known["psi"].shape[2]}
    return Data(*parts, batch, sizes, "volumes")


class Volumes:
    """A part of a set of volumes, with columns of what is known of them.

    Args:
        whole: examples with `inputs`.
        known: name -> tensor, a row for each of them.
        rows: those that belong to this part.
    """

    def __init__(self, whole: Examples, known: Mapping[str, Tensor], rows: Tensor) -> None:
        self.whole, self.known, self.rows = whole, dict(known), rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows `indices` of the part."""
        rows = self.rows[indices]
        return {**self.whole.batch(rows), **{name: values[rows] for name, values in self.known.items()}}


class VolumeFiles:
    """NIfTI files as examples, read when they are asked for: `inputs` (B, 1, D, H, W).

    Args:
        paths: one a row.
        size: voxels a side; None = as they are.
    Raises:
        MissingExtra: nibabel is not installed.
    """

    def __init__(self, paths: Sequence[Path], size: int | None = None) -> None:
        require("nibabel", "volumes")
        if size is not None and size < 1:
            raise LaminaError(f"size must be at least 1, or None, got {size}")
        self.paths, self.size = list(paths), size

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Read the files `indices`."""
        found = [read_volume(self.paths[i], self.size) for i in indices.tolist()]
        shapes = {f.shape: self.paths[i].name for i, f in zip(indices.tolist(), found, strict=True)}
        if len(shapes) > 1:
            raise ShapeError(f"volumes of one batch must be of one size, got {shapes}: give one, as size=64")
        return {"inputs": torch.stack(found).unsqueeze(1)}


def read_volume(path: str | Path, size: int | None = None) -> Tensor:
    """Read one NIfTI file (or another that nibabel knows) as (D, H, W) float32, scaled as its header says.

    Args:
        path: of a 3-D volume; a fourth dimension of length 1 is dropped.
        size: resample to a cube of so many voxels by linear interpolation; None = as it is.
    Raises:
        LaminaError: no such file, or none that can be read. ShapeError: it is not 3-D. MissingExtra: no nibabel.
    """
    nibabel = require("nibabel", "volumes")
    place = existing(path, "the volume")
    try:
        image = nibabel.load(place)
        values = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise LaminaError(f"{str(place)!r} cannot be read as a volume: {error}") from error
    values = values.reshape(values.shape[:3]) if values.ndim > 3 and math.prod(values.shape[3:]) == 1 else values
    if values.ndim != 3:
        raise ShapeError(f"{str(place)!r} is {values.shape}: a volume has three dimensions (take one of its frames)")
    found = torch.from_numpy(np.ascontiguousarray(values))
    if size is None or found.shape == (size, size, size):
        return found
    # Averaging where it shrinks, or voxels between the samples would be left out.
    kept = [max(round(n / size), 1) for n in found.shape]
    pooled = F.avg_pool3d(found[None, None], kept, ceil_mode=True, count_include_pad=False)
    resampled: Tensor = F.interpolate(pooled, (size, size, size), mode="trilinear", align_corners=False)[0, 0]
    return resampled


def _phantoms(subjects: int, size: int, regions: int, seed: int) -> tuple[Examples, dict[str, Tensor]]:
    made = phantoms(subjects, size, regions, diseased=min(3, regions), seed=seed)
    known = {"age": made.age, "psi": made.measures, "site": made.site, "diagnosis": made.diagnosis}
    return Columns({"inputs": made.volumes}), known


def _folder(folder: Path, size: int | None) -> tuple[Examples, dict[str, Tensor]]:
    table = folder / TABLE
    if not table.is_file():
        found = sorted(p for p in folder.iterdir() if p.name.endswith(ENDINGS) and not p.name.startswith("."))
        if not found:
            raise LaminaError(f"{str(folder)!r} has neither {TABLE} nor a file that ends in {' or '.join(ENDINGS)}")
        return VolumeFiles(found, size), {}
    columns = read_columns(table)
    if "file" not in columns:
        raise LaminaError(f"{str(table)!r} needs a column 'file', it has {list(columns)}")
    paths = [existing(folder / name, "the volume") for name in columns["file"]]
    known: dict[str, Tensor] = {}
    if "age" in columns:
        known["age"] = _numbers(columns["age"], "age", table)
    measured = [name for name in columns if name not in KNOWN]
    if measured:
        known["psi"] = _measures({name: columns[name] for name in measured}, table)
    for name in ("site", "diagnosis"):
        if name in columns:
            known[name] = _classes(columns[name])
    return VolumeFiles(paths, size), known


def _measures(columns: Mapping[str, Sequence[str]], table: Path) -> Tensor:
    """Put columns `region.measure` in order: (N, R, M)."""
    regions = list(dict.fromkeys(name.rpartition(".")[0] for name in columns))
    measures = list(dict.fromkeys(name.rpartition(".")[2] for name in columns))
    wanted = [f"{region}.{measure}" for region in regions for measure in measures]
    if "" in regions or sorted(wanted) != sorted(columns):
        odd = sorted(set(columns) ^ set(wanted))
        raise LaminaError(
            f"{str(table)!r}: columns beside {', '.join(KNOWN)} are measurements, called region.measure, every measure "
            f"of every region; odd ones out: {odd[:4]}"
        )
    values = torch.stack([_numbers(columns[name], name, table) for name in wanted], dim=1)
    return values.unflatten(1, (len(regions), len(measures)))


def _numbers(written: Sequence[str], name: str, table: Path) -> Tensor:
    try:
        return torch.tensor([float(v) if v.strip() else math.nan for v in written], dtype=torch.float32)
    except ValueError as error:
        raise LaminaError(f"the column {name!r} of {str(table)!r} is not numeric ({error})") from error


def _classes(written: Sequence[str]) -> Tensor:
    names = sorted({v for v in written if v.strip()})
    return torch.tensor([names.index(v) if v.strip() else -1 for v in written])
