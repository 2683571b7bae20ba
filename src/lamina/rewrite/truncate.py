"""Keep the first blocks of a model and the first numbers of its embedding; what comes out is the embedding.

    small = rewrite(copy.deepcopy(model), Truncate(layers=2, width=32))      # small(**batch) -> (B, 32)
    print(sizes(model, batches, metric, [(2, 32), (4, 64), (6, 384)]).table())
    export_sentence_transformers(small, "folder", tokenizer)

Source: Zhuang et al., Starbucks: Improved Training for 2D Matryoshka Embeddings (2024), arXiv 2410.13230.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from lamina.anatomy import dissect, swap
from lamina.anatomy.exits import Exits, find_exits
from lamina.batches import Batch, bare
from lamina.errors import LaminaError
from lamina.lineage import Lineage
from lamina.nn.token_pooling import check_pooling
from lamina.registry import register
from lamina.rewrite._drop_apply import DropDecision, carry_out
from lamina.rewrite._embedding_output import EmbeddingOutput
from lamina.rewrite._export_sentence_transformers import export_sentence_transformers as export_sentence_transformers
from lamina.rewrite._sizes_table import Metric, measured
from lamina.rewrite._sizes_table import Size as Size
from lamina.rewrite._sizes_table import Sizes as Sizes
from lamina.rewrite.rewriting import Pass, history, pass_name

_MADE_FOR_ALL_BLOCKS = frozenset({"early_exit"})
"""Passes after which no block may leave."""

PoolingName = Literal["mean", "cls", "last"]


@dataclass(frozen=True)
class TruncateDecision:
    """What is left of a model."""

    trunk: str
    """Path of the stack of blocks."""
    layers: int
    """Blocks that stay, the first ones; of a block that runs many times: how often it runs."""
    width: int | None = None
    """Numbers of the embedding that stay, the first ones; None = all."""
    pool: PoolingName | None = None
    """How tokens become one embedding; None: the model's output stays what it is."""
    normalize: bool = True
    """Whether embeddings are brought to length one."""
    drop: tuple[str, ...] = ()
    """Paths of what only the old output needed: its head, its pooler."""
    depth: int = 0
    """How many blocks there were."""

    def table(self) -> str:
        """Word the decision for people."""
        end = "its output stays" if self.pool is None else f"output: {self.pool} of the tokens"
        end += "" if self.width is None else f", its first {self.width} numbers"
        end += ", of length one" if self.pool is not None and self.normalize else ""
        gone = f"; without {', '.join(self.drop)}" if self.drop else ""
        return f"{self.trunk}: {self.layers} of {self.depth} blocks; {end}{gone}"


@register("pass", source="Zhuang et al., Starbucks (2024), arXiv 2410.13230, section 3")
class Truncate:
    """Keep the first `layers` blocks and make the model's output its embedding: pool, cut, bring to length 1.

    For models trained by `matryoshka`; the result equals what the whole model gives at that size. Head and pooler go,
    what stays keeps its tensors and their names. The stream passes the model's own final norm, if it has one.

    Args:
        layers: how many blocks stay, 1..depth.
        width: how many numbers of the embedding stay; None = all of the stream.
        pool: the mean of the real tokens (`attention_mask`), "cls" (the first), "last" (the last real one); None, with
            width None: only blocks go, and the output keeps its meaning.
        normalize: bring embeddings to length one.
        trunk: path of the stack of blocks, where the model has several.
    Raises:
        LaminaError: layers or width out of range, a width without a pooling. AnatomyError: no trunk, or several.
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "nothing"

    def __init__(
        self,
        layers: int,
        width: int | None = None,
        pool: PoolingName | None = "mean",
        *,
        normalize: bool = True,
        trunk: str | None = None,
    ) -> None:
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise LaminaError(f"truncate: layers is how many blocks stay, at least 1, got {layers!r}")
        if width is not None and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
            raise LaminaError(f"truncate: width is how many numbers of the embedding stay, at least 1, got {width!r}")
        if pool is None and width is not None:
            raise LaminaError(f"truncate: only an embedding can be cut to width={width}, and pool=None makes none")
        if pool is not None:
            check_pooling(pool)
        if callable(pool):
            raise LaminaError("truncate: pool must be a name, which a file can hold, not a function")
        self.layers, self.width, self.pool, self.normalize, self.trunk = layers, width, pool, normalize, trunk

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> TruncateDecision:
        """Look where the blocks are and what stands behind them; the data is not looked at."""
        model = bare(model)
        _check_history(r.name for r in history(model))
        exits = find_exits(model, self.trunk)
        if self.layers > exits.depth:
            raise LaminaError(f"truncate: cannot keep {self.layers} blocks, {exits.trunk} has {exits.depth}")
        earlier = _ending(model)
        widest = exits.width if earlier is None else earlier.width or exits.width
        if self.width is not None and self.width > widest:
            raise LaminaError(f"truncate: cannot keep {self.width} numbers of an embedding of {widest}")
        drop = () if self.pool is None else _needless(model, exits)
        return TruncateDecision(
            exits.trunk, self.layers, self.width, self.pool, self.normalize, drop, depth=exits.depth
        )

    def conflicts(self, earlier: Pass[Any]) -> str | None:
        """Say why this pass cannot follow `earlier`; None where it can."""
        name = pass_name(earlier)
        return f"{name} was made for all blocks; truncate first" if name in _MADE_FOR_ALL_BLOCKS else None

    def apply(self, model: nn.Module, decision: TruncateDecision, lineage: Lineage) -> nn.Module:
        """Cut in place; return the model. Survivors keep their tensors, so the lineage has no entry."""
        exits = find_exits(model, decision.trunk)
        if decision.layers < exits.depth:
            gone = tuple(range(decision.layers, exits.depth))
            model = carry_out(model, DropDecision(decision.trunk, blocks=gone))
        if decision.pool is None:
            return model
        earlier = _ending(model)
        if earlier is not None:
            earlier.detach(model)
        ending = EmbeddingOutput(
            find_exits(model, decision.trunk), decision.width, decision.pool, normalize=decision.normalize
        )
        for path in decision.drop:
            swap(model, path, nn.Identity(), all=True)
        ending.attach(model)
        return model


def sizes(
    model: nn.Module,
    data: Iterable[Batch],
    metric: Metric,
    pairs: Iterable[tuple[int, int]],
    *,
    pool: PoolingName = "mean",
    rounds: int = 5,
) -> Sizes:
    """Measure a model at several sizes, each cut out as it would be deployed; the model stays as it is.

    Args:
        data: batches; the first one is timed, all are handed to the metric.
        metric: from a model that gives embeddings, and the batches, to a number.
        pairs: (layers, width) of each size.
        pool: see `Truncate`.
        rounds: passes that are timed; the median counts.
    """
    batches = list(data)
    if not batches:
        raise LaminaError("sizes needs a batch to measure with")
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    found = []
    for layers, width in pairs:
        # Modules are copied, weights are not.
        small = copy.deepcopy(bare(model), dict(tensors)).eval()
        one = Truncate(layers, width, pool)
        small = one.apply(small, one.decide(small), Lineage())
        found.append(measured(small, batches, metric, layers, width, rounds))
    return Sizes(tuple(found))


def _check_history(names: Iterable[str]) -> None:
    for name in names:
        if name in _MADE_FOR_ALL_BLOCKS:
            raise LaminaError(f"truncate: {name} was made for all blocks of this model, none can leave: truncate first")


def _ending(model: nn.Module) -> EmbeddingOutput | None:
    """Return how the model ends, where it was truncated before."""
    return next((m for m in model.children() if isinstance(m, EmbeddingOutput)), None)


def _needless(model: nn.Module, exits: Exits) -> tuple[str, ...]:
    """Paths of head and pooler: the largest modules around them without anything that the embedding needs."""
    anatomy = dissect(model)
    needed = [*exits.blocks, *anatomy.embeddings, *([exits.norm] if exits.norm else [])]
    poolers = [p for p, m in model.named_modules() if p.rpartition(".")[2] == "pooler" and any(True for _ in m.parameters())]  # fmt: skip  # noqa: E501
    found = []
    for path in (*([anatomy.head] if anatomy.head else []), *poolers):
        if any(n == path or n.startswith(f"{path}.") for n in needed):
            continue
        while (above := path.rpartition(".")[0]) and not any(n.startswith(f"{above}.") for n in needed):
            path = above
        if path not in found:
            found.append(path)
    return tuple(found)
