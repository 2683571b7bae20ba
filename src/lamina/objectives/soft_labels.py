"""Teachers' answers to crops of images, asked once and stored: what is trained on them has no teacher to run.

A folder holds `soft_labels.json` (of which teachers, how the crops were drawn) and, as memory-mapped arrays with a line
for every row and crop: `boxes`, `flips`, the classes and probabilities of the most likely classes, and a fingerprint of
each row, written last, so that a recording that was killed goes on and another data set is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from lamina.batches import Batch, to_device
from lamina.data.crops import Crops, Resized, crop, images_of, sides_of
from lamina.data.examples import Data, Examples
from lamina.errors import LaminaError, ShapeError
from lamina.objectives._opinion import LabelMap, Precision, Teachers
from lamina.objectives.distillation.teachers import Average
from lamina.objectives.ensemble_distillation import SOFT_LABEL
from lamina.objectives.teacher_cache import digest_of, fingerprints
from lamina.recipe import Node, build
from lamina.registry import Slot

FORMAT = 1
MANIFEST = "soft_labels.json"


class SoftLabelStore:
    """Stored crops of a data set, each with what teachers say of it.

    With `top_k` the largest probabilities are kept, in half precision, and the rest is spread evenly over the other
    classes when it is read ("marginal smoothing"): 1000 classes and 5 kept take 30 bytes a crop.

    Args:
        path: folder; is made at the first recording.
        top_k: classes kept a crop, >= 1; None = all, in float32: then a label is what the teachers said, exactly.
        crops: how they are drawn; None = one a row, the image as it is.
        count: crops of each row.
        entry: of the batch, images (B, C, H, W).
        seed: of the draws.
    Raises:
        LaminaError: a count or top_k below 1, several crops of images as they are.
    Source: Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition (2021), arXiv 2112.01528,
        section 3, marginal smoothing with top-k.
    Example:
        >>> import tempfile
        >>> from lamina.data import Columns
        >>> rows = Columns({"pixel_values": torch.rand(4, 1, 6, 6)})
        >>> store = SoftLabelStore(tempfile.mkdtemp(), top_k=2, crops=Crops(), count=3)
        >>> store.record(rows, nn.Sequential(nn.Flatten(), nn.Linear(36, 5)))
        4
        >>> store.wrap(rows, per_image=2).batch(torch.arange(2))["soft_label"].shape
        torch.Size([4, 5])
    """

    def __init__(
        self,
        path: str | Path,
        top_k: int | None = 5,
        crops: Crops | None = None,
        *,
        count: int | None = None,
        entry: str = "pixel_values",
        seed: int = 0,
    ) -> None:
        count = (1 if crops is None else 8) if count is None else count
        if count < 1 or (top_k is not None and top_k < 1):
            raise LaminaError(f"count and top_k must be at least 1, got {count} and {top_k}")
        if crops is None and count > 1:
            raise LaminaError(f"{count} crops of each image need `crops`: how they are drawn")
        self.path, self.top_k, self.crops, self.count = Path(path), top_k, crops, count
        self.entry, self.seed = entry, seed
        self._manifest: dict[str, Any] | None = None
        self._arrays: dict[str, Any] = {}

    def record(
        self,
        data: Data | Examples,
        teachers: nn.Module | Node | Sequence[nn.Module | Node],
        *,
        average: Average = "probabilities",
        temperature: float = 1.0,
        input_transforms: Any = None,
        label_map: LabelMap = None,
        teacher_precision: Precision = "same",
        batch: int = 64,
    ) -> int:
        """Ask the teachers for every row that is not there yet; return how many were.

        Several processes may fill one folder: what is written for a row depends on nothing else.

        Args:
            data: its training rows; they must look the same each time (augmentation is what the crops are).
            teachers, average, temperature, input_transforms, label_map, teacher_precision: as in
                `EnsembleDistillation`.
            batch: crops that are asked for together.
        Raises:
            LaminaError: the folder is of other teachers, other crops or another number of rows.
        """
        rows = data.train if isinstance(data, Data) else data
        asked = Teachers(
            teachers,
            average=average,
            temperature=temperature,
            transforms=input_transforms,
            label_map=label_map,
            precision=teacher_precision,
        )
        how = {
            "teachers": digest_of(nn.ModuleList(asked.modules())),
            "names": asked.names(),
            "average": average,
            "temperature": temperature,
            "label_map": None if label_map is None else json.loads(json.dumps(label_map)),
        }
        written, chunk = 0, max(batch // self.count, 1)
        for start in range(0, len(rows), chunk):
            index = torch.arange(start, min(start + chunk, len(rows)))
            if self._open(how, len(rows)):
                index = index[self._array("fingerprints")[index.numpy()] == 0]
            if len(index):
                self._write(index, rows.batch(index), asked, how, len(rows))
                written += len(index)
        return written

    def wrap(self, dataset: Data | Examples, *, per_image: int = 1) -> Any:
        """Return the data set (or its rows) with each image's stored crops in place of it, and their `soft_label`.

        Args:
            per_image: crops of each image in a batch, in turns; a batch of B rows becomes one of B * per_image.
        Raises:
            LaminaError: nothing is stored, rows are missing or others, or there are fewer crops than `per_image`.
        """
        if isinstance(dataset, Data):
            sizes = dict(dataset.sizes)
            if self.crops is not None and self.crops.size is not None:
                sizes["image"] = self.crops.size
            return replace(dataset, train=self.wrap(dataset.train, per_image=per_image), sizes=sizes)
        if not self._open(None, len(dataset)):
            raise LaminaError(f"{self.path} holds no soft labels: record() asks the teachers")
        missing = int((self._array("fingerprints") == 0).sum())
        if missing:
            raise LaminaError(f"{self.path} lacks {missing} of {len(dataset)} rows: record() goes on where it stopped")
        if not 1 <= per_image <= self.count:
            raise LaminaError(f"per_image must be in 1..{self.count}, the crops stored of each image, got {per_image}")
        return StoredCrops(self, dataset, per_image)

    def replay(self, index: Tensor, turn: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cut the stored crops `turn` (M,) out of the rows `index` (B,); every entry becomes (B * M, ...).

        Raises:
            LaminaError: a row that looks different than when the teachers saw it.
        """
        kept = torch.from_numpy(self._array("fingerprints")[index.numpy()])
        other = kept != fingerprints(batch).cpu()
        if bool(other.any()):
            raise LaminaError(
                f"row {int(index[other][0])} looks different than when the teachers saw it: {self.path} is of another "
                "data set, or the rows are augmented at random, which the stored crops are there for"
            )
        place = (index.numpy()[:, None], turn.numpy()[None])
        found = {n: v.repeat_interleave(len(turn), 0) if _per_row(v, len(index)) else v for n, v in batch.items()}
        if self.crops is not None:
            boxes = torch.from_numpy(self._array("boxes")[place]).flatten(0, 1)
            flips = torch.from_numpy(self._array("flips")[place]).flatten().bool()
            found[self.entry] = crop(found[self.entry], boxes, flips, self.crops.size)
        chances = torch.from_numpy(self._array("probabilities")[place].astype(np.float32)).flatten(0, 1)
        if self._kept(self._known["classes"]) is not None:
            chosen = torch.from_numpy(self._array("classes")[place].astype(np.int64)).flatten(0, 1)
            chances = spread(chosen, chances, self._known["classes"])
        found[SOFT_LABEL] = chances.to(found[self.entry].device)
        return found

    def _write(self, index: Tensor, batch: Batch, asked: Teachers, how: Mapping[str, Any], rows: int) -> None:
        images = images_of(dict(batch), self.entry, "a store of soft labels")
        many = {n: v.repeat_interleave(self.count, 0) if _per_row(v, len(index)) else v for n, v in batch.items()}
        lines: dict[str, Any] = {}
        if self.crops is not None:
            boxes, flips = self.crops.draw(index.tolist(), sides_of(images), self.count, str(self.seed))
            many[self.entry] = crop(many[self.entry], boxes.flatten(0, 1), flips.flatten(), self.crops.size)
            lines |= {"boxes": boxes.numpy(), "flips": flips.numpy().astype(np.uint8)}
        device = next((p.device for p in asked.models[0].parameters()), images.device)
        many = to_device(many, device)
        said = asked.opinion(asked.logits(many)).probabilities.float().cpu()
        if said.dim() != 2:
            raise ShapeError(f"soft labels are stored of one answer an image, (B, classes), got {tuple(said.shape)}")
        classes = said.shape[1]
        if not self._open(how, rows):
            self._create({**how, "rows": rows, "classes": classes})
        kept = self._kept(classes)
        if kept is not None:
            said, chosen = said.topk(kept, dim=1)
            lines["classes"] = chosen.reshape(len(index), self.count, kept).numpy()
        lines["probabilities"] = said.reshape(len(index), self.count, -1).numpy()
        for name, values in lines.items():
            self._array(name)[index.numpy()] = values
            self._array(name).flush()
        # Last, so that a row with a fingerprint is whole.
        self._array("fingerprints")[index.numpy()] = fingerprints(batch).cpu().numpy()
        self._array("fingerprints").flush()

    def _kept(self, classes: int) -> int | None:
        return self.top_k if self.top_k is not None and self.top_k < classes else None

    def _own(self) -> dict[str, Any]:
        drawn = None if self.crops is None else asdict(self.crops)
        own = {"crops": drawn, "count": self.count, "top_k": self.top_k, "entry": self.entry, "seed": self.seed}
        known: dict[str, Any] = json.loads(json.dumps(own))
        return known

    def _open(self, how: Mapping[str, Any] | None, rows: int) -> bool:
        """Read the manifest, if there is one, and refuse what it is not of; `how` None = any teachers."""
        if self._manifest is None:
            path = self.path / MANIFEST
            if not path.exists():
                return False
            self._manifest = json.loads(path.read_text(encoding="utf-8"))
        known = self._known
        if known.get("format") != FORMAT:
            raise LaminaError(f"{self.path} has format {known.get('format')}; this version of lamina reads format {FORMAT}")  # fmt: skip  # noqa: E501
        for key, value in {**(how or {}), **self._own(), "rows": rows}.items():
            if known[key] != value:
                what = f"{known[key]}, not {value}" if key not in ("teachers", "names") else "others"
                raise LaminaError(f"{self.path} holds soft labels of {key}: {what}; name another folder, or delete it")
        return True

    @property
    def _known(self) -> dict[str, Any]:
        assert self._manifest is not None
        return self._manifest

    def _create(self, how: Mapping[str, Any]) -> None:
        """Make the folder aside and rename it; where another process was faster, its folder is taken."""
        content = {"format": FORMAT, **self._own(), **how}
        rows, kept = content["rows"], self._kept(content["classes"])
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "fingerprints": ("<i8", (rows,)),
            "probabilities": ("<f4" if kept is None else "<f2", (rows, self.count, kept or content["classes"])),
        }
        if kept is not None:
            shapes["classes"] = ("<i4", (rows, self.count, kept))
        if self.crops is not None:
            shapes |= {"boxes": ("<i2", (rows, self.count, 4)), "flips": ("|u1", (rows, self.count))}
        aside = self.path.with_name(f".{self.path.name}-{os.getpid()}.part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, (kind, shape) in shapes.items():
            np.lib.format.open_memmap(aside / f"{name}.npy", "w+", np.dtype(kind), shape).flush()
        (aside / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        try:
            aside.rename(self.path)
        except OSError:
            # An empty folder is in the way on some systems, a whole one of another process on all.
            if not (self.path / MANIFEST).exists():
                self.path.rmdir()
                aside.rename(self.path)
            shutil.rmtree(aside, ignore_errors=True)
        self._manifest = None
        self._open({k: v for k, v in how.items() if k not in ("rows", "classes")}, rows)

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            file = self.path / f"{name}.npy"
            self._arrays[name] = np.load(file, mmap_mode="r+" if os.access(file, os.W_OK) else "r", allow_pickle=False)
        return self._arrays[name]


class StoredCrops:
    """Rows of other examples as their stored crops; see `SoftLabelStore.wrap`."""

    def __init__(self, store: SoftLabelStore, examples: Examples, per_image: int = 1) -> None:
        self.store, self.examples, self.per_image, self.epoch = store, examples, per_image, 0

    def __len__(self) -> int:
        return len(self.examples)

    def set_epoch(self, epoch: int) -> None:
        """Take the next crops from here on; a loader says it."""
        self.epoch = epoch

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the crops of this epoch's turn, with `soft_label` (B * per_image, classes)."""
        turn = (self.epoch * self.per_image + torch.arange(self.per_image)) % self.store.count
        return self.store.replay(indices, turn, self.examples.batch(indices))


def soft_labels(
    data: Annotated[Node | Data, Slot("data")],
    path: str,
    *,
    teachers: Annotated[nn.Module | Node | Sequence[nn.Module | Node] | None, Slot("model")] = None,
    top_k: int | None = 5,
    count: int | None = None,
    crops: Mapping[str, Any] | None = None,
    per_image: int = 1,
    entry: str = "pixel_values",
    seed: int = 0,
) -> Data:
    """Another data set, whose images are stored crops with what teachers say of each: `lamina.objectives:soft_labels`.

    The evaluation's images stay whole, with soft labels too. What is not stored yet the teachers are asked for when the
    data set is built.

    Args:
        data: of images, or its recipe node.
        path: folder of the store.
        teachers: models or their nodes; None = all must be stored.
        crops: options of `Crops`; None = images as they are.
        top_k, count, entry, seed: see `SoftLabelStore`; per_image: see its `wrap`.
    Raises:
        LaminaError: as `SoftLabelStore` does.
    """
    given: Data = data if isinstance(data, Data) else build(data, "data")
    drawn = None if crops is None else Crops.of(crops)
    train = SoftLabelStore(Path(path) / "train", top_k, drawn, count=count, entry=entry, seed=seed)
    held = SoftLabelStore(Path(path) / "evaluation", top_k, entry=entry)
    evaluation = given.evaluation
    if evaluation is not None and drawn is not None and drawn.size is not None:
        evaluation = Resized(evaluation, drawn.size, entry)
    if teachers is not None:
        made = [build(t, "model") for t in (teachers if isinstance(teachers, (list, tuple)) else [teachers])]
        train.record(given.train, made)
        if evaluation is not None:
            held.record(evaluation, made)
    found: Data = train.wrap(given, per_image=per_image)
    return found if evaluation is None else replace(found, evaluation=held.wrap(evaluation))


def spread(classes: Tensor, probabilities: Tensor, count: int) -> Tensor:
    """Return (B, count) probabilities that sum to 1: those of the kept classes, the rest evenly over the others.

    Args:
        classes: (B, k), below `count`, k < count.
        probabilities: (B, k).
    Source: Shen and Xing (2021), arXiv 2112.01528, marginal smoothing.
    Example:
        >>> spread(torch.tensor([[2]]), torch.tensor([[0.5]]), 3).tolist()
        [[0.25, 0.25, 0.5]]
    """
    kept = probabilities.float()
    rest = (1 - kept.sum(1, keepdim=True)).clamp(min=0) / (count - classes.shape[1])
    return rest.expand(-1, count).scatter(1, classes, kept)


def _per_row(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
