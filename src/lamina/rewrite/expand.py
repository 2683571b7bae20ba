"""Train two blocks that stand for a stack of any depth, and make models of any depth out of them.

    gene = rewrite(model, LinearExpansion())       # layer l of L: base + (l / L) * slope, of every tensor of the block
    ...                                            # train it, as a rule by distillation
    model = rewrite(gene, Expand(8))               # an ordinary model again, of any depth
    models = descendants(gene, range(2, 13))       # or one of each

Source: Xia et al., Transformer as Linear Expansion of Learngene (AAAI 2024), arXiv 2312.05614.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina import anatomy
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.registry import register
from lamina.rewrite._drop_apply import find_trunk
from lamina.rewrite._expand_blocks import blocks_at, check_trunk, drawn, expanded, put, renumbered
from lamina.rewrite._expanded_stack import ExpandedStack as ExpandedStack
from lamina.rewrite._expanded_stack import interpolate as interpolate
from lamina.rewrite._expanded_stack import named_buffers, without_tensors
from lamina.rewrite.rewriting import Pass, history, pass_name, rewrite

SOURCE = "Xia et al. 2024, arXiv 2312.05614"

_WATCH_BLOCKS = frozenset({"depth_routing", "early_exit", "truncate"})

Init = Literal["random", "fit"]

NEAR_LINEAR = 0.5
"""Below this share of explained variance a fitted stack has little left of the old one."""


@dataclass(frozen=True)
class ExpansionDecision:
    """Which stack becomes base and slope, and where their values come from."""

    trunk: str
    """Path of the stack of blocks."""
    depth: int
    """How many layers run."""
    init: Init = "random"
    slope_std: float = 0.02
    """Deviation of the slope's projections at the start; of "random" only."""
    seed: int = 0
    """Each tensor draws from a generator seeded by this and its path."""
    r2: dict[str, float] | None = None
    """Of "fit": which share of a tensor's variance over depth the line explains, by path in the block, at most 1."""

    def table(self) -> str:
        """Word the decision for people; of a fit the tensors that follow their line least come first."""
        lines = [f"{self.trunk or 'the model'}: base and slope of one block, {self.depth} layers, init={self.init}"]
        worst = sorted((self.r2 or {}).items(), key=lambda item: item[1])
        return "\n".join([*lines, *(f"  R2 {value:6.3f}  {name}" for name, value in worst)])


@dataclass(frozen=True)
class ExpandDecision:
    """Which expanded stack becomes how many blocks."""

    trunk: str
    """Path of the stack."""
    depth: int
    """Blocks that there will be."""
    source_depth: int = 0
    """Layers that it ran before."""

    def table(self) -> str:
        """Word the decision for people."""
        return f"{self.trunk}: base and slope, {self.source_depth} layers -> {self.depth} blocks"


@register("pass", source=SOURCE)
class LinearExpansion:
    """Replace a stack of equal blocks by two sets of a block's tensors: layer l runs base + (l / depth) * slope.

    Embeddings, final norm and head stay what they are. The model trains, caches, compiles and saves as before, with the
    parameters of two blocks at any depth; `Expand` turns it into an ordinary model of any depth.

    Args:
        depth: layers that run; None = as many as there are blocks.
        init: "random" starts anew; "fit" takes the line of least squares through the blocks there are, a
            diagnosis more than a compression: real stacks are only roughly linear (see the decision's `r2`).
        slope_std: deviation of the slope's projections; 0 = all layers equal at the start.
        seed: of "random".
        trunk: path of the stack of blocks, where the model has several (encoder and decoder, stages).
    Raises:
        LaminaError: options out of range, or sharded weights. AnatomyError: no trunk, fewer than two blocks, or blocks
            that differ in class, shapes, types or buffers, or share tensors with each other or the rest of the model.
    Source: Xia et al. (2024), section 3.2; initialisation: the authors' code. Deviations: a norm whose gain is 1 + its
        weight starts at 0; vectors that are neither a norm's nor a bias (layer scale) keep the first block's
        values, their slope is 0.
    Example:
        >>> from lamina.models import Transformer
        >>> from lamina.rewrite import rewrite
        >>> model = Transformer(6, 16, 2, vocabulary=32, context=8)
        >>> gene = rewrite(model, LinearExpansion())
        >>> (len(gene.blocks), len(rewrite(gene, Expand(3)).blocks))
        (6, 3)
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "nothing"

    def __init__(
        self,
        depth: int | None = None,
        *,
        init: Init = "random",
        slope_std: float = 0.02,
        seed: int = 0,
        trunk: str | None = None,
    ) -> None:
        _check_depth("LinearExpansion", depth)
        if init not in ("random", "fit"):
            raise LaminaError(f"LinearExpansion: init must be 'random' or 'fit', got {init!r}")
        if not 0.0 <= slope_std < float("inf"):
            raise LaminaError(f"LinearExpansion: slope_std must not be negative, got {slope_std}")
        self.depth, self.init, self.slope_std, self.seed, self.trunk = depth, init, slope_std, seed, trunk

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ExpansionDecision:
        """Check that the blocks are alike and, for a fit, how near to a line they are; change nothing."""
        model = bare(model)
        path, blocks = self._found(model)
        r2 = None
        if self.init == "fit":
            r2 = fit_linear([_detached(block) for block in blocks])[2]
            _warn_of_curves(r2, blocks[0])
        depth = len(blocks) if self.depth is None else self.depth
        return ExpansionDecision(path, depth, self.init, self.slope_std, self.seed, r2)

    def apply(self, model: nn.Module, decision: ExpansionDecision, lineage: Lineage) -> nn.Module:
        """Put base and slope where the blocks are, in place; of "fit" the state of the first block follows."""
        blocks = blocks_at(model, decision.trunk)
        first = dict(blocks[0].named_parameters())
        if decision.init == "fit":
            base, slope, _ = fit_linear([_detached(b) for b in blocks])
        else:
            base, slope = drawn(blocks[0], decision.slope_std, decision.seed)
        trained = {n: (_parameter(base[n], old), _parameter(slope[n], old)) for n, old in first.items()}
        if decision.init == "fit":
            for name, old in first.items():
                lineage.derive(trained[name][0], old)
        sources = [place % len(blocks) for place in range(decision.depth)]
        buffers = [
            {n: (t if place < len(blocks) else t.clone(), saved) for n, (t, saved) in named_buffers(blocks[i]).items()}
            for place, i in enumerate(sources)
        ]
        container = anatomy.get(model, decision.trunk)
        assert isinstance(container, (nn.ModuleList, nn.Sequential))
        stack = ExpandedStack(
            {n: pair[0] for n, pair in trained.items()},
            {n: pair[1] for n, pair in trained.items()},
            renumbered([without_tensors(blocks[i]) for i in sources], blocks),
            buffers,
            container,
        )
        put(model, decision.trunk, stack, len(blocks), sources)
        return model

    def conflicts(self, earlier: Pass[Any]) -> str | None:
        """Say why this pass cannot follow `earlier`; None where it can."""
        name = pass_name(earlier)
        return f"{name} watches the blocks it saw; expand first" if name in _WATCH_BLOCKS else None

    def fits(self, model: nn.Module) -> None:
        """Raise what `decide` would where the blocks are not alike; looks at no data."""
        self._found(bare(model))

    def _found(self, model: nn.Module) -> tuple[str, list[nn.Module]]:
        watching = next((r.name for r in history(model) if r.name in _WATCH_BLOCKS), None)
        if watching:
            raise AnatomyError(
                f"{type(model).__name__} went through {watching}, which watches its blocks: expand first"
            )
        trunk = find_trunk(model, self.trunk)
        check_trunk(model, trunk)
        return trunk.path, blocks_at(model, trunk.path)


@register("pass", source=SOURCE)
class Expand:
    """Turn what `LinearExpansion` made into an ordinary model: `depth` blocks of their own, base + (l / depth) * slope.

    The model is of the class it was before the expansion, its configuration says the new depth, and nothing is tied.
    With the depth that the expanded stack runs, the outputs stay the same to the bit.

    Args:
        depth: number of blocks, also more than the stack ran; None = as many.
        trunk: path of the stack, where the model has several expanded ones.
    Raises:
        LaminaError: a depth below 1, or sharded weights. AnatomyError: there is nothing to expand.
    Source: Xia et al. (2024), section 3.3. The moments of an optimizer that is rewritten along are copied from base to
        each block: its gradient was the sum over the layers', a factor that Adam's step does not feel.
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(self, depth: int | None = None, *, trunk: str | None = None) -> None:
        _check_depth("Expand", depth)
        self.depth, self.trunk = depth, trunk

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ExpandDecision:
        """Find the stack; change nothing."""
        path, stack = find_stack(model, self.trunk)
        return ExpandDecision(path, stack.depth if self.depth is None else self.depth, stack.depth)

    def apply(self, model: nn.Module, decision: ExpandDecision, lineage: Lineage) -> nn.Module:
        """Put the blocks where the stack is, in place; each block's optimizer state follows base's."""
        path, stack = find_stack(model, decision.trunk)
        blocks, sources = expanded(stack, decision.depth)
        base = dict(stack.base.named_parameters())
        for block in blocks:
            for name, new in block.named_parameters():
                lineage.derive(new, base[name])
        put(model, path, stack.holding(blocks), stack.depth, sources)
        return model


def descendants(model: nn.Module, depths: Iterable[int], *, trunk: str | None = None) -> dict[int, nn.Module]:
    """Make one ordinary model of each depth from an expanded one, which stays as it is.

    No two share a tensor: each can be trained, saved and cut on its own.

    Raises:
        LaminaError, AnatomyError: see `Expand`.
    """
    passes = {depth: Expand(depth, trunk=trunk) for depth in depths}
    return {depth: rewrite(copy.deepcopy(bare(model)), one) for depth, one in passes.items()}


def find_stack(model: nn.Module, trunk: str | None = None) -> tuple[str, ExpandedStack]:
    """Return the path and module of the only expanded stack, or of the one at `trunk`.

    Raises:
        AnatomyError: none, none there, or several and no path.
    """
    model = bare(model)
    found = {path: m for path, m in model.named_modules() if isinstance(m, ExpandedStack)}
    if not found:
        raise AnatomyError(
            f"{type(model).__name__} has no linearly expanded stack to make blocks of: rewrite it first, by "
            "{name: linear_expansion}, and train it"
        )
    listed = ", ".join(map(repr, found))
    if trunk is None and len(found) > 1:
        raise AnatomyError(f"{type(model).__name__} has several expanded stacks: name one of {listed} as trunk")
    path = next(iter(found)) if trunk is None else trunk
    if path not in found:
        raise AnatomyError(f"{type(model).__name__} has no expanded stack at {path!r}; it is at {listed}")
    return path, found[path]


def fit_linear(
    stack: Sequence[Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Fit base + (l / L) * slope through L sets of tensors by least squares; return base, slope and R2 by name.

    Each tensor comes back in its own dtype, fitted in float64. R2 = 1 for one that is the same in all; on the meta
    device it is nan.

    Raises:
        LaminaError: fewer than two sets, which many lines go through.
    """
    if len(stack) < 2:
        raise LaminaError(f"a line needs at least two blocks to be fitted to, got {len(stack)}")
    base: dict[str, Tensor] = {}
    slope: dict[str, Tensor] = {}
    r2: dict[str, float] = {}
    places = [place / len(stack) for place in range(len(stack))]
    middle = sum(places) / len(places)
    spread = sum((x - middle) ** 2 for x in places)
    for name, like in stack[0].items():
        values = [tensors[name].detach().double() for tensors in stack]
        mean = torch.stack(values).mean(0)
        tilt = sum(((x - middle) * (v - mean) for x, v in zip(places, values, strict=True)), 0 * mean) / spread
        start = mean - tilt * middle
        base[name], slope[name] = start.to(like.dtype), tilt.to(like.dtype)
        total = sum(((v - mean).square().sum() for v in values), 0 * mean.sum())
        left = sum(((v - start - x * tilt).square().sum() for x, v in zip(places, values, strict=True)), 0 * mean.sum())
        r2[name] = float("nan") if like.is_meta else 1.0 if float(total) == 0.0 else 1.0 - float(left / total)
    return base, slope, r2


def _warn_of_curves(r2: Mapping[str, float], block: nn.Module) -> None:
    sizes = {name: p.numel() for name, p in block.named_parameters()}
    overall = sum(r2[n] * size for n, size in sizes.items()) / sum(sizes.values())
    if overall < NEAR_LINEAR:
        warnings.warn(
            f"a line over depth explains {overall:.2f} of these blocks' variance: this model is not near-linear, "
            "expect to train it again",
            stacklevel=3,
        )


def _detached(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


def _parameter(value: Tensor, old: Parameter) -> Parameter:
    return Parameter(value, requires_grad=old.requires_grad)


def _check_depth(name: str, depth: Any) -> None:
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
        raise LaminaError(f"{name}: depth is a number of layers, at least 1, got {depth!r}")
