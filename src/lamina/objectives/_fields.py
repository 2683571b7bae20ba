"""Batches of several sequences a row (anchor, positive, negatives; two sentences and a score), field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.batches import TARGETS, Batch, to_device
from lamina.errors import LaminaError, ShapeError
from lamina.objectives._gather_rows import gather_rows

SINGLE = {"input_ids": 2, "pixel_values": 4}
"""Dimensions of a batch with one field; one more, and the second is the field."""


@dataclass(frozen=True)
class Fields:
    """What to call a model with, and how many fields of a row each call covers."""

    calls: tuple[Batch, ...]
    count: int
    """Fields a row."""

    def per_field(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Take what the calls gave, (rows, ...) each, apart into one (B, ...) a field."""
        if len(self.calls) == self.count:
            return list(pooled)
        return list(pooled[0].unflatten(0, (-1, self.count)).unbind(1))


def fields_of(batch: Batch, model: nn.Module) -> Fields:
    """Find the fields: `texts` (a list of batches), tensors (B, fields, ...), which make one call, or just one field.

    Raises:
        LaminaError: `texts` holds something else than batches. ShapeError: fields of different numbers of rows.
    """
    texts = batch.get("texts")
    if texts is not None:
        return _listed(texts, model)
    for name, single in SINGLE.items():
        values = batch.get(name)
        if isinstance(values, Tensor) and values.dim() == single + 1:
            rows = values.shape[:2]
            inputs = {k: v for k, v in batch.items() if k not in TARGETS}
            cut = {
                k: v.flatten(0, 1) if isinstance(v, Tensor) and v.shape[:2] == rows else v for k, v in inputs.items()
            }
            return Fields((cut,), rows[1])
    return Fields((batch,), 1)


def gathered_targets(batch: Batch, counts: list[int], rows: int) -> dict[str, object]:
    """Return the batch with the targets of the rows of all processes."""
    return {
        k: gather_rows(v, counts) if k in TARGETS and isinstance(v, Tensor) and v.shape[:1] == (rows,) else v
        for k, v in batch.items()
    }


def embeddings_of(outputs: object) -> list[Tensor]:
    """Read embeddings, one (B, d) a field: of `{"embeddings": [...]}`, or of a tensor (B, fields, d) or (B, d).

    Raises:
        ShapeError: none of these, or fields of different numbers of rows.
    """
    found = outputs.get("embeddings") if isinstance(outputs, Mapping) else outputs
    if isinstance(found, Tensor):
        if found.dim() not in (2, 3):
            raise ShapeError(f"embeddings are (batch, width) or (batch, fields, width), got {tuple(found.shape)}")
        found = found.unbind(1) if found.dim() == 3 else (found,)
    if not isinstance(found, Sequence) or not all(isinstance(e, Tensor) and e.dim() == 2 for e in found):
        raise ShapeError(f"expected embeddings, one (batch, width) a field, got a {type(outputs).__name__}")
    return list(found)


def _listed(texts: object, model: nn.Module) -> Fields:
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, Mapping) for t in texts):
        raise LaminaError("batch['texts'] must be a list of batches, one a field, each with its own input_ids")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = [next((len(v) for v in t.values() if isinstance(v, Tensor)), 0) for t in texts]
    if len(set(rows)) > 1:
        raise ShapeError(f"the fields of batch['texts'] have different numbers of rows: {rows}")
    return Fields(tuple(to_device(t, device) for t in texts), len(texts))
