"""Drop whole sublayers or blocks of a trained model in one shot: those that change the residual stream least.

    model = rewrite(model, DropAttention(count=2), data=batches)      # now, without training
    print(DropAttention(count=2).decide(model, batches).table())      # only look

Source: He, Sun, Shen, Li, What Matters in Transformers? Not All Attention is Needed (2024), arXiv 2406.15786.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lamina.anatomy import Trunk, describe
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.registry import register
from lamina.rewrite._drop_apply import DropDecision as DropDecision
from lamina.rewrite._drop_apply import Saving as Saving
from lamina.rewrite._drop_apply import carry_out, find_trunk, lenders, refuse_shared, shared_weights
from lamina.rewrite._drop_official import import_official as import_official
from lamina.rewrite._drop_official import load_official as load_official
from lamina.rewrite.rewriting import Pass, pass_name
from lamina.rewrite.similarity import Similarity, channel_dim, similarity, take

Order = Literal["similarity", "iterative", "consecutive", "first", "last", "random"]
Kind = Literal["attention", "mlp", "block"]
Candidate = tuple[Kind, int]

_SOURCE = "He et al. 2024"
_COUNTS_BLOCKS = frozenset({"depth_routing", "early_exit", "truncate"})
_NEED_DATA = frozenset({"similarity", "iterative", "consecutive"})


class Drop:
    """What the four passes share; they differ in what goes (`kinds`).

    Args:
        count: how many go. keep: ratio that stays, 0..1 (then round((1 - keep) * all) go). Give exactly one.
        order: "similarity" scores everything once and takes the highest; "iterative" scores again after each drop (as
            many passes over the data as go); "consecutive" (blocks) takes the run of `count` blocks that changes the
            stream least; "first", "last" and "random" need no data.
        keep_norm: leave the norm of a dropped post-norm sublayer (BERT): x becomes norm(x) instead of x.
        protect: indices of blocks that stay whole.
        samples: rows of data that are scored; a few dozen suffice.
        seed: of "random".
        trunk: path of the stack of blocks, where the model has several (encoder and decoder).
    Raises:
        LaminaError: options that contradict, no data where the order needs it, more asked for than can go, a score
            that is not finite. AnatomyError: no trunk, or weights that blocks share.
    Source: He et al. (2024), arXiv 2406.15786, section 3. Deviation: indices are of the blocks as the pass finds them,
        not of the original model; a model's history replays its passes in order, so both mean the same.
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"
    kinds: ClassVar[tuple[Kind, ...]]
    orders: ClassVar[tuple[Order, ...]] = ("similarity", "iterative", "first", "last", "random")

    def __init__(
        self,
        count: int | None = None,
        *,
        keep: float | None = None,
        order: Order = "similarity",
        keep_norm: bool = False,
        protect: Sequence[int] = (),
        samples: int = 256,
        seed: int = 0,
        trunk: str | None = None,
    ) -> None:
        name = type(self).__name__
        if (count is None) == (keep is None):
            raise LaminaError(f"{name} takes either count (how many go) or keep (ratio that stays), exactly one")
        if count is not None and not _is_whole(count, 0):
            raise LaminaError(f"{name}: count must be a whole number, not negative, got {count!r}")
        if keep is not None and not (isinstance(keep, (int, float)) and 0.0 < keep <= 1.0):
            raise LaminaError(f"{name}: keep is the ratio that stays and must be in 0 < keep <= 1, got {keep!r}")
        if order not in self.orders:
            raise LaminaError(f"{name}: order must be one of {', '.join(self.orders)}, got {order!r}")
        if not _is_whole(samples, 1):
            raise LaminaError(f"{name}: samples must be a whole number, at least 1, got {samples!r}")
        if not isinstance(protect, Sequence) or not all(_is_whole(i, 0) for i in protect):
            raise LaminaError(f"{name}: protect is a list of block indices, not negative, got {protect!r}")
        self.count, self.keep, self.order, self.keep_norm = count, keep, order, keep_norm
        self.protect, self.samples, self.seed, self.trunk = tuple(protect), samples, seed, trunk

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> DropDecision:
        """Choose what goes; change nothing. See the class for what it raises."""
        model = bare(model)
        trunk = self._found(model)
        if trunk.repeats > 1:
            return self._finished(model, trunk, self._iterations(trunk), None)
        candidates = self._candidates(model, trunk)
        number = self._number(trunk, candidates)
        if not number:
            return self._finished(model, trunk, [], None)
        images = any(channel_dim(model, block) == 1 for block in trunk.blocks)
        if data is None and (self.order in _NEED_DATA or images):
            raise LaminaError(
                f"{type(self).__name__} looks at calibration data ({'convolutions' if images else self.order}): pass "
                "data=... (--data on the command line), a few dozen batches of what the model is for, or order='last', "
                "which needs none on a transformer"
            )
        if self.order == "iterative":
            return self._iterate(model, trunk, list(take(data or (), self.samples)), number)
        scored = None
        if data is not None and (self.order in _NEED_DATA or images):
            span = number if self.order == "consecutive" else None
            scored = similarity(model, trunk, data, samples=self.samples, keep_norm=self.keep_norm, span=span)
            candidates = [c for c in candidates if _score(scored, c) is not None]
            number = self._number(trunk, candidates)
        return self._finished(model, trunk, self._choose(candidates, number, scored), scored)

    def apply(self, model: nn.Module, decision: DropDecision, lineage: Lineage) -> nn.Module:
        """Take out what the decision names, in place. Survivors keep their tensors, so the lineage has no entry."""
        return carry_out(model, decision)

    def conflicts(self, earlier: Pass[Any]) -> str | None:
        """Say why this pass cannot follow `earlier`; None where it can."""
        name = pass_name(earlier)
        return f"{name} counts the blocks it saw; drop first" if name in _COUNTS_BLOCKS else None

    def fits(self, model: nn.Module) -> None:
        """Raise what `decide` would where the model has too little to drop; looks at no data."""
        model = bare(model)
        trunk = self._found(model)
        if trunk.repeats > 1:
            self._iterations(trunk)
        else:
            self._number(trunk, self._candidates(model, trunk))

    def _found(self, model: nn.Module) -> Trunk:
        trunk = find_trunk(model, self.trunk)
        outside = [i for i in self.protect if i >= trunk.depth]
        if outside:
            raise LaminaError(
                f"{type(self).__name__}: cannot protect {outside}: {trunk.path} has blocks 0..{trunk.depth - 1}"
            )
        if trunk.repeats == 1 and self.kinds != ("block",):
            refuse_shared(model, trunk, range(len(trunk.blocks)))
        return trunk

    def _candidates(self, model: nn.Module, trunk: Trunk) -> list[Candidate]:
        """List what could go, in the order that breaks ties."""
        needed = lenders(model, trunk)
        found: list[Candidate] = []
        for kind in self.kinds:
            for index, block in enumerate(trunk.blocks):
                there = kind == "block" or block.find(kind) is not None
                if there and not (index in needed and kind != "mlp"):
                    found.append((kind, index))
        if not found:
            raise AnatomyError(f"{trunk.path} of {type(model).__name__} has no {' or '.join(self.kinds)} to drop")
        return [c for c in found if c[1] not in self.protect]

    def _number(self, trunk: Trunk, candidates: Sequence[Candidate]) -> int:
        total = sum(k == "block" or b.find(k) is not None for k in self.kinds for b in trunk.blocks)
        return self._asked(trunk, total, len(candidates))

    def _asked(self, trunk: Trunk, total: int, available: int) -> int:
        number = self.count if self.count is not None else round((1.0 - (self.keep or 0.0)) * total)
        what = " and ".join(self.kinds)
        if number >= total and number:
            raise LaminaError(f"cannot drop {number} of the {total} {what} parts of {trunk.path}: one must stay")
        if number > available:
            raise LaminaError(
                f"cannot drop {number} {what} parts of {trunk.path}: only {available} of {total} can go "
                f"(protected: {list(self.protect)}; others hold tables that all blocks use, or change the shape)"
            )
        return number

    def _iterations(self, trunk: Trunk) -> list[Candidate]:
        if self.kinds != ("block",):
            raise AnatomyError(shared_weights(trunk, " or ".join(self.kinds)))
        number = self._asked(trunk, trunk.repeats, trunk.repeats)
        return [("block", i) for i in range(trunk.repeats - number, trunk.repeats)]

    def _choose(self, candidates: list[Candidate], number: int, scored: Similarity | None) -> list[Candidate]:
        if self.order == "consecutive" and scored is not None:
            return _best_run(candidates, number, scored)
        if self.order == "similarity" and scored is not None:
            return ranked(candidates, scored)[:number]
        if self.order == "random":
            drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(self.seed))
            return [candidates[i] for i in drawn[:number].tolist()]
        return sorted(candidates, key=lambda c: c[1], reverse=self.order == "last")[:number]

    def _iterate(self, model: nn.Module, trunk: Trunk, data: list[Batch], number: int) -> DropDecision:
        """Score, drop one, score again: on a copy of the tree that shares the weights."""
        trial = _copy_of_tree(model)
        standing = list(range(len(trunk.blocks)))
        chosen: list[Candidate] = []
        first: Similarity | None = None
        for _ in range(number):
            now = find_trunk(trial, trunk.path)
            scored = similarity(trial, now, data, samples=self.samples, keep_norm=self.keep_norm)
            first = first or scored
            moved = {old: new for new, old in enumerate(standing)}
            left = [(k, moved[i]) for k, i in self._candidates(model, trunk) if i in moved and (k, i) not in chosen]
            kind, index = ranked([c for c in left if _score(scored, c) is not None], scored)[0]
            chosen.append((kind, standing[index]))
            carry_out(trial, _decision(trunk, [(kind, index)], self.keep_norm))
            if kind == "block":
                standing.pop(index)
        return self._finished(model, trunk, chosen, first)

    def _finished(
        self, model: nn.Module, trunk: Trunk, chosen: list[Candidate], scored: Similarity | None
    ) -> DropDecision:
        decision = _decision(trunk, chosen, self.keep_norm)
        scores = None
        if scored is not None:
            scores = {"attention": scored.attention, "mlp": scored.mlp, "block": scored.block}
        depth = trunk.repeats if trunk.repeats > 1 else len(trunk.blocks)
        return replace(decision, scores=scores, depth=depth, saving=_saving(model, trunk, decision))


@register("pass", source=_SOURCE)
class DropAttention(Drop):
    """Drop the attention sublayers that change the residual stream least: weights, compute and cache go.

    Options and errors: see `Drop`.
    """

    kinds = ("attention",)


@register("pass", source=_SOURCE)
class DropMLP(Drop):
    """Drop the feed-forward sublayers that change the residual stream least. Options and errors: see `Drop`."""

    kinds = ("mlp",)


@register("pass", source=_SOURCE)
class DropBlock(Drop):
    """Drop the whole blocks that change the residual stream least; a shared block (ALBERT) runs fewer times.

    Options and errors: see `Drop`.
    """

    kinds = ("block",)
    orders = ("similarity", "iterative", "consecutive", "first", "last", "random")


@register("pass", source=_SOURCE)
class DropSublayers(Drop):
    """Drop the sublayers, attention or feed-forward, that change the residual stream least, ranked together.

    Options and errors: see `Drop`.
    """

    kinds = ("attention", "mlp")
    orders = ("similarity", "iterative", "random")


def ranked(candidates: Iterable[Candidate], scored: Similarity) -> list[Candidate]:
    """Sort by falling score; what agrees to six digits counts as equal, and the earlier candidate wins."""
    return sorted(candidates, key=lambda c: -round(_score(scored, c) or 0.0, 6))


def _best_run(candidates: list[Candidate], number: int, scored: Similarity) -> list[Candidate]:
    free = {index for _, index in candidates}
    runs = [
        (-round(score, 6), start)
        for start, score in enumerate(scored.runs)
        if score is not None and free.issuperset(range(start, start + number))
    ]
    if not runs:
        raise LaminaError(
            f"no {number} blocks in a row can go: protected ones, or ones that change the shape, split them"
        )
    return [("block", i) for i in range(min(runs)[1], min(runs)[1] + number)]


def _score(scored: Similarity, candidate: Candidate) -> float | None:
    kind, index = candidate
    scores = {"attention": scored.attention, "mlp": scored.mlp, "block": scored.block}[kind]
    return scores[index]


def _decision(trunk: Trunk, chosen: Iterable[Candidate], keep_norm: bool) -> DropDecision:
    by_kind: dict[str, list[int]] = {"attention": [], "mlp": [], "block": []}
    for kind, index in chosen:
        by_kind[kind].append(index)
    attention, mlp, blocks = (tuple(sorted(by_kind[k])) for k in ("attention", "mlp", "block"))
    return DropDecision(trunk.path, attention, mlp, blocks, keep_norm)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _copy_of_tree(model: nn.Module) -> nn.Module:
    """Copy modules and config, not the weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


def _saving(model: nn.Module, trunk: Trunk, decision: DropDecision) -> Saving:
    """Count on a copy that shares the weights; this also proves that the decision can be carried out."""
    left = carry_out(_copy_of_tree(model), decision, trunk)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, left))
    lost = {
        *decision.attention,
        *(i for i in decision.blocks if trunk.repeats > 1 or trunk.blocks[i].find("attention")),
    }
    cache = _cache_bytes(model) * len(lost) if trunk.causal and lost else None
    return Saving(before - after, before, cache)


def _cache_bytes(model: nn.Module) -> int:
    """Bytes of keys and values of one token in one block."""
    shape = describe(model)
    size = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
    return 2 * (shape.kv_heads or 0) * (shape.head_width or 0) * size
