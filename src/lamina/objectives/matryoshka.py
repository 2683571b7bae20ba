"""Train an embedding model for several sizes at once: the first n layers and the first d numbers are a model as well.

    objective = Matryoshka("multiple_negatives", pairs=[(2, 32), (4, 64), (6, 384)])
    objective(model, {"texts": [anchors, positives]})["loss"].backward()
    small = rewrite(copy.deepcopy(model), Truncate(layers=2, width=32))         # model(**batch) -> (B, 32)

Source: Zhuang et al., Starbucks: Improved Training for 2D Matryoshka Embeddings (2024), arXiv 2410.13230.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.errors import LaminaError
from lamina.nn._precision import without_autocast
from lamina.nn.token_pooling import Pooling, check_pooling, cut_embedding
from lamina.objectives._exit_vectors import cut_of, exit_vectors, exits_of
from lamina.objectives._fields import fields_of, gathered_targets
from lamina.objectives._gather_rows import gather_rows, row_counts, several_processes
from lamina.objectives._penalized import Penalized
from lamina.objectives._sizes import Pair, check_pairs, fitting_pairs
from lamina.objectives.embedding_losses import scores
from lamina.objectives.objective import Losses
from lamina.registry import Slot, register

Alignment = Literal["scores", "coordinates"]
Vectors = Mapping[int, list[Tensor]]
"""Pooled stream by layer: one (B, C) a field."""

COORDINATES = 0.3
"""What the official code calls the temperature of its divergence over coordinates, and multiplies it by."""


@register("objective", source="Zhuang et al., Starbucks (2024), arXiv 2410.13230, section 3.1")
class Matryoshka(Penalized):
    """A loss of embeddings at every size of a list, and the divergence of each size from the largest.

    The embedding of a size (n, d): the stream after block n through the model's final norm, pooled over the real
    tokens, cut to its first d numbers, of length one. One forward pass a text; nothing of the model's interface
    changes, and nothing is added to it. loss = sum over sizes of base + kl_weight * sum over all but the largest of KL.
    Logs `loss/2x32`, `kl/2x32`, ... A model that `Truncate` has cut is measured at the sizes it still has.

    Batches: `texts`, a list of batches, one a field (anchor, positive, ...), or tensors (B, fields, T), or one field
    alone; and what the base wants (`label`). A model's head is run and not used: give the model without it.

    Args:
        base: objective of embeddings, given `{"embeddings": [one (B, d) a field]}`: multiple_negatives, cosent,
            info_nce, embedding_classification, or any whose `loss` takes that.
        pairs: sizes (layers, width) in any order; None: six, layers in equal steps, widths halved.
        pool: the mean of the real tokens, "cls" (the first), "last" (the last real one), or a function of (B, T, C) and
            the mask.
        kl: "scores": KL(largest || size) of the softmax of each row's products with the texts of the batch;
            "coordinates": of the softmax of the pooled vectors themselves, times 0.3, as the official code for
            similarity; None: without.
        kl_weight: of the divergence, at least 0.
        weights: of the base loss at each pair, in the order of `pairs`; None = 1 each.
        detach: the largest size learns nothing from the divergence.
        normalize: bring embeddings to length one.
        select: "random" is 2D Matryoshka (Li et al. 2024, arXiv 2402.14776): the last layer and one other, drawn each
            step, each at the widths of all pairs; the divergence of "coordinates" is then softened by 0.3 as well.
        temperature: divides the products of "scores"; None: 1 / the base's `scale`, 1 where it has none.
        trunk: path of the stack of blocks, where the model has several.
        gather: in training, compare rows with those of all processes: the loss of the global batch.
        seed: of the layers drawn; their state is saved. In evaluation it is the same layer every time.
    Raises:
        LaminaError: a base that needs the model, sizes that do not grow in both or occur twice, weights that do not
            fit; (at the call) a size the model has not, padding without a mask. AnatomyError: no single trunk.
    Source: Zhuang et al. (2024), arXiv 2410.13230, section 3.1 and its code. Deviation: that code draws pairs by
        position where it samples layers, and trains all 768 numbers of the last one; here pairs stay pairs.
    """

    def __init__(
        self,
        base: Annotated[Any, Slot("objective")] = "multiple_negatives",
        pairs: Sequence[tuple[int, int]] | None = None,
        pool: Pooling = "mean",
        *,
        kl: Alignment | None = "scores",
        kl_weight: float = 1.0,
        weights: Sequence[float] | None = None,
        detach: bool = True,
        normalize: bool = True,
        select: Literal["all", "random"] = "all",
        temperature: float | None = None,
        trunk: str | None = None,
        gather: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        if self.base.needs == "model":
            raise LaminaError(
                f"the base {type(self.base.terms[0]).__name__} calls the model itself; matryoshka hands it embeddings"
            )
        check_pooling(pool)
        if kl not in ("scores", "coordinates", None) or select not in ("all", "random"):
            raise LaminaError(f"kl is 'scores', 'coordinates' or None and select 'all' or 'random', got {kl!r}, {select!r}")  # fmt: skip  # noqa: E501
        if not kl_weight >= 0 or (temperature is not None and not temperature > 0):
            raise LaminaError(
                f"kl_weight must be at least 0 and temperature above 0, got {kl_weight} and {temperature}"
            )
        self.pairs = None if pairs is None else check_pairs(pairs)
        self.weights = _by_pair(weights, pairs)
        self.pool, self.kl, self.kl_weight, self.detach, self.normalize = pool, kl, kl_weight, detach, normalize
        self.select, self.trunk, self.gather, self.seed = select, trunk, gather, seed
        self.scale = 1.0 / temperature if temperature else float(getattr(self.base.terms[0], "scale", 1.0))
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model once a text and return the losses."""
        exits = exits_of(model, self.trunk)
        pairs = fitting_pairs(self.pairs, exits, cut_of(model))
        layers = [n for n, _ in pairs] if self.select == "all" else self._drawn(exits.depth, model.training)
        fields = fields_of(batch, model)
        found = [exit_vectors(model, c, exits, layers, self.pool) for c in fields.calls]
        vectors: Vectors = {n: fields.per_field([f[n] for f in found]) for n in layers}
        rows = len(vectors[layers[0]][0])
        with without_autocast(vectors[layers[0]][0].device):
            counts = [rows]
            if self.gather and several_processes():
                counts = row_counts(rows, vectors[layers[0]][0].device)
                vectors = _gathered(vectors, counts)
                batch = gathered_targets(batch, counts, rows)
            losses = self._all(vectors, pairs, batch) if self.select == "all" else self._random(vectors, pairs, batch)
        if len(counts) > 1:
            # The loss is of all rows in each process: by its own share of them it stays that when averaged.
            losses["count"] = losses["count"] * (rows / max(sum(counts), 1))
        return losses

    def _all(self, vectors: Vectors, pairs: Sequence[Pair], batch: Batch) -> Losses:
        whole = pairs[-1]
        losses: Losses = {}
        total: list[Tensor] = []
        for n, d in pairs:
            found = self._base(vectors[n], d, batch)
            total.append(self.weights.get((n, d), 1.0) * found["loss"])
            losses[f"loss/{n}x{d}"], losses["count"] = found["loss"].detach(), found["count"]
            if self.kl is not None and (n, d) != whole:
                term = self._divergence(vectors[n], vectors[whole[0]], d, whole[1])
                total.append(self.kl_weight * term)
                losses[f"kl/{n}x{d}"] = term.detach()
        return {"loss": torch.stack(total).sum(), **losses}

    def _random(self, vectors: Vectors, pairs: Sequence[Pair], batch: Batch) -> Losses:
        last = max(vectors)
        losses: Losses = {}
        total: list[Tensor] = []
        for n, held in sorted(vectors.items()):
            for layer, d in pairs:
                found = self._base(held, d, batch)
                total.append(self.weights.get((layer, d), 1.0) * found["loss"])
                losses["count"] = found["count"]
                if n == last:
                    losses[f"loss/{n}x{d}"] = found["loss"].detach()
        if self.kl is not None and len(vectors) > 1:
            width = vectors[last][0].shape[-1]
            term = self._divergence(vectors[min(vectors)], vectors[last], width, width)
            total.append(self.kl_weight * term)
            losses["kl"] = term.detach()
        return {"loss": torch.stack(total).sum(), **losses}

    def _base(self, held: Sequence[Tensor], width: int, batch: Batch) -> Losses:
        cut = [cut_embedding(p, width, normalize=self.normalize) for p in held]
        return self.base.loss({"embeddings": cut, "gathered": True}, batch)

    def _divergence(self, held: Sequence[Tensor], whole: Sequence[Tensor], width: int, full: int) -> Tensor:
        goal = [p.detach() for p in whole] if self.detach else whole
        if self.kl == "coordinates":
            soften = COORDINATES if self.select == "random" else 1.0
            return COORDINATES * coordinate_divergence(torch.cat(list(goal)), torch.cat(list(held)), width, soften)
        ours = scores([cut_embedding(p, width, normalize=self.normalize) for p in held], self.scale)
        theirs = scores([cut_embedding(p, full, normalize=self.normalize) for p in goal], self.scale)
        return score_divergence(theirs, ours)

    def _drawn(self, depth: int, training: bool) -> list[int]:
        generator = self.generator if training else torch.Generator().manual_seed(self.seed)
        earlier = [] if depth == 1 else [1 + int(torch.randint(depth - 1, (), generator=generator))]
        return [*earlier, depth]

    def get_extra_state(self) -> Tensor:
        """Return the generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where the saved generator stood."""
        self.generator.set_state(state)


def score_divergence(whole: Tensor, size: Tensor) -> Tensor:
    """Return the mean over rows of KL(softmax(whole) || softmax(size)), 0-dim; (B, n) each, 0 where there is no row.

    Source: Zhuang et al. (2024), arXiv 2410.13230, the loss of the retrieval models.
    """
    goal, guess = F.log_softmax(whole, dim=-1), F.log_softmax(size, dim=-1)
    return F.kl_div(guess, goal, reduction="sum", log_target=True) / max(len(size), 1)


def coordinate_divergence(whole: Tensor, size: Tensor, width: int, soften: float = 1.0) -> Tensor:
    """Return the mean over rows of KL(softmax(whole) || softmax(size)), over the first `width` numbers of vectors.

    Args:
        soften: divides both.
    """
    guess = F.log_softmax(size[:, :width] / soften, dim=-1)
    return F.kl_div(guess, F.softmax(whole[:, :width] / soften, dim=-1), reduction="batchmean")


def _gathered(vectors: Vectors, counts: list[int]) -> Vectors:
    """Gather all layers and fields at once, so that processes speak once."""
    stacked = torch.stack([torch.stack(list(v), 1) for v in vectors.values()], 1)
    layers = gather_rows(stacked, counts).unbind(1)
    return {n: list(held.unbind(1)) for n, held in zip(vectors, layers, strict=True)}


def _by_pair(weights: Sequence[float] | None, pairs: Sequence[tuple[int, int]] | None) -> dict[Pair, float]:
    if weights is None:
        return {}
    if pairs is None or len(weights) != len(pairs) or not all(w >= 0 for w in weights):
        raise LaminaError(f"weights are numbers from 0 on, one a pair, got {list(weights)} for pairs {pairs}")
    return {(n, d): float(w) for (n, d), w in zip(pairs, weights, strict=True)}
