"""Losses of embeddings: a row's fields (anchor, positive, negatives; two sentences and a score), each one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.batches import Batch, call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.nn._kept_float32 import wide
from lamina.nn._precision import without_autocast
from lamina.objectives._fields import embeddings_of, fields_of, gathered_targets
from lamina.objectives._gather_rows import gather_rows, row_counts, several_processes
from lamina.objectives.objective import Losses
from lamina.objectives.supervised import Classification
from lamina.registry import register


class OfEmbeddings(nn.Module):
    """What the losses of this file share.

    Embeddings come as `{"embeddings": [e_1, e_2, ...]}`, one (B, d) a field, or as one tensor (B, fields, d); a model
    that gives embeddings is called with `batch["texts"]`, a list of batches, or with tensors (B, fields, ...).

    Args:
        gather: in training, rows are compared with those of all processes: the loss of the global batch. In
            micro-batches (`accumulate`) only rows of one are compared.
    """

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"
    fields: ClassVar[int] = 2
    """How many a row has at least."""

    def __init__(self, gather: bool = True) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Embed every field and return the losses."""
        found = fields_of(batch, model)
        outputs = [logits(call(model, c)) for c in found.calls]
        return self.loss({"embeddings": found.per_field(outputs)} if found.count > 1 else outputs[0], batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses of embeddings; those under "gathered" are of all processes already."""
        embeddings = embeddings_of(outputs)
        name, rows = type(self).__name__, len(embeddings[0])
        if len(embeddings) < self.fields or any(e.shape != embeddings[0].shape for e in embeddings):
            shapes = [tuple(e.shape) for e in embeddings]
            raise ShapeError(f"{name} takes at least {self.fields} fields of one shape, (batch, width), got {shapes}")
        together = self.gather and several_processes() and not (isinstance(outputs, dict) and "gathered" in outputs)
        with without_autocast(embeddings[0].device):
            e = torch.stack([wide(one) for one in embeddings])
            if together:
                counts = row_counts(rows, e.device)
                e = gather_rows(e.transpose(0, 1).contiguous(), counts).transpose(0, 1)
                batch = gathered_targets(batch, counts, rows)
            losses = self.of(list(e), batch)
        # The loss is that of all processes in each of them: averaged by rows it stays that.
        return {**losses, "count": e.new_tensor(float(rows))} if together else losses

    def of(self, e: list[Tensor], batch: Batch) -> Losses:
        """Return `loss` (and what is logged) of embeddings in float32."""
        raise NotImplementedError


@register(
    "objective", source="Henderson et al., Efficient Natural Language Response Suggestion (2017), arXiv 1705.00652"
)
class MultipleNegatives(OfEmbeddings):
    """Cross-entropy of an anchor's own positive among all texts of the batch, by cosine; logs `accuracy`.

    Fields: anchor, positive, and any number of negatives; the positives and negatives of other rows are negatives too.

    Args:
        scale: multiplies the cosines, above 0.
        gather: see `OfEmbeddings`.
    Raises:
        LaminaError: a scale not above 0. ShapeError: at the call, fewer than two fields.
    """

    def __init__(self, scale: float = 20.0, *, gather: bool = True) -> None:
        super().__init__(gather)
        _check_positive("scale", scale)
        self.scale = scale

    def of(self, e: list[Tensor], batch: Batch) -> Losses:
        """Return the mean over anchors."""
        return _ranked(scores([F.normalize(x, dim=-1) for x in e], self.scale))


@register("objective", source="van den Oord et al., Contrastive Predictive Coding (2018), arXiv 1807.03748")
class InfoNCE(OfEmbeddings):
    """Cross-entropy of a query's own passage among all passages of the batch, by dot product; logs `accuracy`.

    For retrieval; fields as in `MultipleNegatives`.

    Args:
        temperature: divides the products, above 0.
        gather: see `OfEmbeddings`.
    Raises:
        LaminaError: a temperature not above 0. ShapeError: at the call, fewer than two fields.
    """

    def __init__(self, temperature: float = 1.0, *, gather: bool = True) -> None:
        super().__init__(gather)
        _check_positive("temperature", temperature)
        self.temperature = temperature
        self.scale = 1.0 / temperature

    def of(self, e: list[Tensor], batch: Batch) -> Losses:
        """Return the mean over queries."""
        return _ranked(scores(e, self.scale))


@register("objective", name="cosent", source="Su, CoSENT (2022), kexue.fm/archives/8847")
class CoSENT(OfEmbeddings):
    """Cosines in the order of the scores: log(1 + sum over pairs of rows with score_i < score_j of exp(s_i - s_j)).

    For two texts and a number of how alike they are, in `label` (or `labels`), (B,); s is scale times the cosine. Only
    the order of the scores counts.

    Args:
        scale: multiplies the cosines, above 0.
        gather: see `OfEmbeddings`.
    Raises:
        LaminaError: a scale not above 0, or (at the call) no scores. ShapeError: not two fields, or a score too few.
    """

    def __init__(self, scale: float = 20.0, *, gather: bool = True) -> None:
        super().__init__(gather)
        _check_positive("scale", scale)
        self.scale = scale

    def of(self, e: list[Tensor], batch: Batch) -> Losses:
        """Return the loss of the batch as a whole."""
        label = next((batch[k] for k in ("label", "labels") if isinstance(batch.get(k), Tensor)), None)
        if label is None:
            raise LaminaError(f"cosent needs a score a row in 'label', and the batch has {sorted(batch)}")
        if len(e) != 2 or label.shape != (len(e[0]),):
            raise ShapeError(f"cosent takes two texts and a score a row, got {len(e)} and {tuple(label.shape)}")
        s = self.scale * (F.normalize(e[0], dim=-1) * F.normalize(e[1], dim=-1)).sum(-1)
        apart = (s[:, None] - s[None, :]).masked_fill(label[:, None] >= label[None, :], -torch.inf)
        loss = torch.cat([s.new_zeros(1), apart.flatten()]).logsumexp(0)
        return {"loss": loss, "count": s.new_tensor(float(len(s)))}


@register("objective")
class EmbeddingClassification(OfEmbeddings):
    """Cross-entropy of a class, each width of embedding by a linear head of its own; logs `accuracy`.

    For one field (images, single texts) and `labels` (B,). The heads are trained along and are no part of the model.

    Args:
        classes: how many there are.
        widths: of the embeddings that will come; one head each.
        label_smoothing: share of the target spread over the classes, 0..1.
        seed: of the heads' first values.
    Raises:
        LaminaError: sizes below 1, no width. ShapeError: at the call, an embedding of another width.
    """

    fields: ClassVar[int] = 1

    def __init__(self, classes: int, widths: Sequence[int], *, label_smoothing: float = 0.0, seed: int = 0) -> None:
        super().__init__(gather=False)
        if classes < 1 or not widths or min(widths) < 1:
            raise LaminaError(f"embedding_classification needs classes and widths of at least 1, got {classes} and {list(widths)}")  # fmt: skip  # noqa: E501
        self.task = Classification(label_smoothing)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict({str(width): nn.Linear(width, classes) for width in sorted(set(widths))})

    def of(self, e: list[Tensor], batch: Batch) -> Losses:
        """Return the mean over rows."""
        width = str(e[0].shape[-1])
        if width not in self.heads or len(e) > 1:
            raise ShapeError(f"heads are for one embedding of width {', '.join(self.heads)}, got {len(e)} of {width}")
        return self.task.loss(self.heads[width](e[0]), batch)


def scores(e: Sequence[Tensor], scale: float) -> Tensor:
    """Products of the first field's rows with all rows of the others, times scale: k of (B, d) -> (B, (k - 1) B).

    The positive of row i is in column i. With one field: products with the other rows, (B, B - 1).
    """
    first, others = e[0], list(e[1:])
    if others:
        return scale * first @ torch.cat(others).T
    # All but the diagonal: that of a row with itself says nothing.
    n = len(first)
    products = scale * first @ first.T
    return products.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1) if n > 1 else products[:, :0]


def _ranked(s: Tensor) -> Losses:
    place = torch.arange(len(s), device=s.device)
    right = (s.argmax(1) == place).to(s.dtype).mean()
    return {"loss": F.cross_entropy(s, place), "count": s.new_tensor(float(len(s))), "accuracy": right.detach()}


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise LaminaError(f"{name} must be above 0, got {value}")
