"""Find the parts of any transformer-like (or residual) model by looking at its module tree.

`dissect` says where the trunks, blocks, attention and feed-forward sublayers and norms are; `describe` reads the
sizes; `swap` is the one way a pass replaces a submodule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from lamina import _anatomy_blocks as tree
from lamina._anatomy_check import Call, measured_norms, measured_repeats, trace
from lamina._anatomy_edit import attention_cores as attention_cores
from lamina._anatomy_edit import get as get
from lamina._anatomy_edit import keep_blocks as keep_blocks
from lamina._anatomy_edit import swap as swap
from lamina._anatomy_flow import Branch, Flow, follow, outermost
from lamina._anatomy_shape import config_of, context_of, head_sizes, vocabulary_of
from lamina._anatomy_tree import (
    attentions,
    channels,
    hint,
    is_attention,
    is_head_norm,
    is_inside,
    is_norm,
    join,
    projections,
    reads_like_attention,
    widths,
)
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, nearest

NormPlace = Literal["pre", "post", "sandwich", "none"]
"""Where a sublayer's norm sits: x + F(norm x) | norm(x + F x) | x + norm(F(norm x)) | no norm found."""


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a block."""

    kind: Literal["attention", "cross_attention", "mlp", "branch"]
    """`branch` is a residual branch of another sort (a convolution, a mixer)."""
    path: str
    """Dotted path, from the model, of the module that computes the branch (of the first one, where there are two)."""
    parts: tuple[str, ...]
    """Paths of every module of the branch without its norms; BERT's feed-forward is a pair."""
    norms: tuple[str, ...]
    """Paths of the norm modules that belong to the branch, in the order they run; may lie inside a part."""
    place: NormPlace
    returns: Literal["tensor", "tuple"]
    """What the module at `path` returns: the branch's output itself, or a tuple that begins with it."""
    residual_inside: bool
    """True where the last part adds the residual (and, post-norm, normalises) itself, as BERT's do."""


@dataclass(frozen=True)
class Block:
    """One repeated unit of a trunk."""

    path: str
    sublayers: tuple[Sublayer, ...]
    """In the order they run (parallel branches: attention first)."""
    parallel: bool = False
    """True where attention and feed-forward read the same input (GPT-NeoX, GPT-J)."""

    def find(self, kind: str) -> Sublayer | None:
        """Return the block's sublayer of that kind, or None."""
        return next((s for s in self.sublayers if s.kind == kind), None)


@dataclass(frozen=True)
class Trunk:
    """A stack of blocks that run one after the other on a residual stream."""

    path: str
    """Path of the ModuleList (or of the shared block)."""
    blocks: tuple[Block, ...]
    repeats: int = 1
    """How often the whole stack runs with the same weights (ALBERT: 12 with one block)."""
    causal: bool = False

    @property
    def depth(self) -> int:
        """Number of blocks that run in one forward pass."""
        return len(self.blocks) * self.repeats


@dataclass(frozen=True)
class Anatomy:
    """Where everything is in one model; all paths are `named_modules` names."""

    model: str
    """Class name, for messages."""
    trunks: tuple[Trunk, ...]
    embeddings: tuple[str, ...]
    """Modules that feed the first trunk (token, position, patch embeddings)."""
    final_norm: str | None
    head: str | None
    """The output projection after the last trunk."""

    def trunk(self, path: str | None = None) -> Trunk:
        """Return the only trunk, or the one at `path`.

        Raises:
            AnatomyError: several trunks and no path given, or no trunk at that path.
        """
        paths = [t.path for t in self.trunks]
        if path is None:
            if len(self.trunks) == 1:
                return self.trunks[0]
            raise AnatomyError(f"{self.model} has several trunks: name one of {', '.join(paths)}")
        if path not in paths:
            raise AnatomyError(
                f"{self.model} has no trunk at {path!r}{nearest(path, paths)} (trunks: {', '.join(paths)})"
            )
        return self.trunks[paths.index(path)]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that planning and reports need; None = not found."""

    parameters: int
    depth: int | None
    width: int | None
    heads: int | None
    kv_heads: int | None
    head_width: int | None
    feed_forward: int | None
    vocabulary: int | None
    context: int | None


def dissect(model: nn.Module, batch: Batch | None = None, *, blocks: str | None = None) -> Anatomy:
    """Find the trunks of a model by its module tree; runs nothing but the blocks' own forwards on symbols.

    Args:
        batch: one traced forward confirms the order of the blocks and where the norms sit.
        blocks: path of the ModuleList or Sequential of blocks, where the model has none that can be recognised.
    Raises:
        AnatomyError: no repeated blocks, or `blocks` names none; with `batch`, blocks that do not run in sequence.
    """
    model = bare(model)
    stacks = tree.find_stacks(model) if blocks is None else [tree.stack_at(model, blocks, get(model, blocks))]
    if not stacks:
        raise tree.none_found(model)
    trunks = tuple(_trunk(model, stack) for stack in stacks)
    if batch is not None:
        trunks = _confirmed(model, batch, trunks)
    width = _width(model, trunks[-1])
    return Anatomy(
        model=type(model).__name__,
        trunks=trunks,
        embeddings=tree.embeddings(model, stacks),
        final_norm=tree.final_norm(model, stacks[-1], stacks, width),
        head=tree.head(model, stacks[-1], stacks, width),
    )


def describe(model: nn.Module) -> Shape:
    """Read the sizes of a model from its dissection, its weights and, where it has one, its config.

    Of several trunks the last one counts (the language model, the decoder); stages of one trunk (Swin) are added up
    in depth, and the sizes are the last stage's.

    Raises:
        AnatomyError: no repeated blocks.
    """
    model = bare(model)
    anatomy = dissect(model)
    last, config = anatomy.trunks[-1], config_of(model)
    subs = [s for block in last.blocks for s in block.sublayers]
    width = _width(model, last)
    attention = next((get(model, s.path) for s in subs if s.kind == "attention"), None)
    heads, kv_heads, head_width = (None, None, None) if attention is None else head_sizes(attention, width, config)
    feeding = next(([m for p in s.parts for m in get(model, p).modules()] for s in subs if s.kind == "mlp"), [])
    sizes = [w for w in (widths(m) for m in feeding) if w is not None]
    tables = [m for m in (get(model, p) for p in anatomy.embeddings) if isinstance(m, nn.Embedding)]
    projected = None if anatomy.head is None else widths(get(model, anatomy.head))
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        depth=sum(t.depth for t in anatomy.trunks if _stage(t.path) == _stage(last.path)),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        feed_forward=next((into for into, _ in reversed(sizes) if into != width), sizes[-1][0] if sizes else None),
        vocabulary=vocabulary_of(model, tables, projected[1] if projected else None),
        context=context_of(model, config),
    )


def _stage(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _trunk(model: nn.Module, stack: tree.Stack) -> Trunk:
    blocks = tuple(_block(path, get(model, path)) for path in stack.blocks)
    return Trunk(stack.path, blocks, stack.repeats * _sharing(model), _is_causal(model, blocks))


def _confirmed(model: nn.Module, batch: Batch, trunks: tuple[Trunk, ...]) -> tuple[Trunk, ...]:
    """Hold the static reading against one forward pass; what the values say wins."""
    blocks = [b for t in trunks for b in t.blocks]
    parts = {p for b in blocks for s in b.sublayers for p in s.parts}
    norms = {join(b.path, n) for b in blocks for n, m in get(model, b.path).named_modules() if n and is_norm(m)}
    calls = trace(model, batch, {b.path for b in blocks} | parts | norms)
    found = []
    for trunk in trunks:
        repeats = measured_repeats(calls, trunk.path, tuple(b.path for b in trunk.blocks))
        if repeats is not None:
            trunk = replace(trunk, repeats=repeats, blocks=tuple(_measured(model, calls, b) for b in trunk.blocks))
        found.append(trunk)
    return tuple(found)


def _measured(model: nn.Module, calls: list[Call], block: Block) -> Block:
    sublayers: list[Sublayer] = []
    for sublayer in block.sublayers:
        taken = {p for s in block.sublayers for p in s.parts if s is not sublayer}
        taken.update(n for s in sublayers if s.place == "post" for n in s.norms)
        norms, place = measured_norms(model, calls, block.path, sublayer.parts, taken)
        # Values cannot show norms deep inside a branch: the static reading stands unless they contradict it.
        agree = set(norms) <= set(sublayer.norms) and (place == sublayer.place or not norms)
        sublayers.append(sublayer if agree else replace(sublayer, norms=norms, place=place))
    return replace(block, sublayers=tuple(sublayers))


def _sharing(model: nn.Module) -> int:
    """ALBERT's config tells how many of its layers one group of weights stands for; nothing in the tree does."""
    config = getattr(model, "config", None)
    groups, layers = getattr(config, "num_hidden_groups", None), getattr(config, "num_hidden_layers", None)
    return layers // groups if isinstance(groups, int) and isinstance(layers, int) else 1


def _is_causal(model: nn.Module, blocks: tuple[Block, ...]) -> bool:
    for block in blocks:
        one = block.find("attention")
        if one is None:
            continue
        for module in get(model, one.path).modules():
            for name in ("is_causal", "causal"):
                said = getattr(module, name, None)
                if isinstance(said, bool):
                    return said
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_decoder", False))


def _block(path: str, block: nn.Module) -> Block:
    flow = None if isinstance(block, (nn.ModuleList, nn.ModuleDict)) else follow(block)
    if flow is None or not flow.branches:
        return Block(path, _listed_sublayers(path, block))
    found = [(b.strand.base, _sublayer(path, block, b, flow)) for b in flow.branches]
    found.sort(key=lambda item: (item[0], item[1].kind != "attention"))
    bases = [base for base, _ in found]
    return Block(path, tuple(s for _, s in found), parallel=len(set(bases)) < len(bases))


def _sublayer(path: str, block: nn.Module, branch: Branch, flow: Flow) -> Sublayer:
    strand = branch.strand
    norms, place = _norms(block, branch)
    own = {*strand.units, *strand.before, *strand.inner, *strand.after, *branch.closing}
    parts = outermost(block, strand.units, {c for c in flow.called if c not in own})
    return Sublayer(
        kind=_kind(block, strand.units, parts, strand.crosses),
        path=join(path, parts[0]),
        parts=tuple(join(path, p) for p in parts),
        norms=tuple(join(path, n) for n in norms),
        place=place,
        returns="tuple" if parts[0] in flow.tuples else "tensor",
        residual_inside=branch.hidden or (branch.scope != "" and is_inside(branch.scope, parts[-1])),
    )


def _norms(block: nn.Module, branch: Branch) -> tuple[tuple[str, ...], NormPlace]:
    strand = branch.strand
    inner = tuple(n for n in strand.inner if not is_head_norm(n))
    norms = (*strand.before, *inner, *strand.after, *branch.closing)
    if branch.closing:
        return norms, "post"
    if strand.after:
        return norms, "sandwich"
    if strand.before:
        return norms, "pre"
    hidden = _norms_within(block, strand.units[0])
    if not hidden:
        return norms, "none"
    if branch.hidden:
        return (*hidden, *norms), "post"
    names = list(dict(block.get_submodule(strand.units[0]).named_children()))
    first = next((names.index(n.partition(".")[0]) for n in projections(block.get_submodule(strand.units[0]))), 0)
    early = names.index(hidden[0].rpartition(".")[2]) < first
    return (*hidden, *norms), "pre" if early else "sandwich"


def _norms_within(block: nn.Module, unit: str) -> tuple[str, ...]:
    """Norms of the branch's width that an opaque unit keeps to itself."""
    children = block.get_submodule(unit).named_children()
    return tuple(join(unit, n) for n, m in children if is_norm(m) and not is_head_norm(n))


def _kind(
    block: nn.Module, units: tuple[str, ...], parts: tuple[str, ...], crosses: bool
) -> Literal["attention", "cross_attention", "mlp", "branch"]:
    modules = [block.get_submodule(u) for u in units]
    sizes = [w for w in (widths(m) for m in modules) if w is not None]
    said = hint(*(type(block.get_submodule(p)).__name__ for p in parts)) or hint(*(p.rpartition(".")[2] for p in parts))
    if any(is_attention(m) for m in modules) or (said != "mlp" and reads_like_attention(sizes)):
        return "cross_attention" if crosses else "attention"
    if len(sizes) >= 2 and sizes[0][0] == sizes[-1][1] and not any(channels(m) for m in modules):
        return "mlp"
    if any(_is_feed_forward(m) for m in modules) or (said == "mlp" and not sizes):
        return "mlp"
    if said == "attention":
        return "cross_attention" if crosses else "attention"
    return "branch"


def _is_feed_forward(module: nn.Module) -> bool:
    """Tell an opaque module with a d -> f, f -> d pair of projections somewhere inside and no attention."""
    sizes = [w for w in (widths(m) for m in module.modules() if m is not module) if w is not None]
    return len(sizes) >= 2 and sizes[0][0] == sizes[-1][1] != sizes[0][1] and not list(attentions(module))


def _listed_sublayers(path: str, block: nn.Module) -> tuple[Sublayer, ...]:
    """Read a block that cannot run on symbols by what it lists: attentions, feed-forwards, and a norm for each."""
    found = dict(attentions(block))
    for name, module in block.named_modules():
        if name and not any(is_inside(name, f) or is_inside(f, name) for f in found) and _is_feed_forward(module):
            found[name] = module
    names = [name for name, _ in block.named_modules() if name in found]
    norms = [n for n, m in block.named_modules() if is_norm(m) and not is_head_norm(n)]
    sublayers = []
    for index, name in enumerate(names):
        parts = outermost(block, (name,), {n for n in names if n != name})
        within = [n for n in norms if is_inside(n, parts[0])]
        outside = [n for n in norms if not any(is_inside(n, p) for p in names)]
        mine = within or (outside[index : index + 1] if len(outside) == len(names) else [])
        place: NormPlace = ("pre" if getattr(block, "norm_first", True) else "post") if mine else "none"
        sublayers.append(
            Sublayer(
                kind="attention" if is_attention(found[name]) else "mlp",
                path=join(path, parts[0]),
                parts=tuple(join(path, p) for p in parts),
                norms=tuple(join(path, n) for n in mine),
                place=place,
                returns="tuple" if isinstance(found[name], nn.MultiheadAttention) else "tensor",
                residual_inside=False,
            )
        )
    return tuple(sublayers)


def _width(model: nn.Module, trunk: Trunk) -> int | None:
    """Width of the residual stream: what the first projection of the last block reads."""
    for sublayer in trunk.blocks[-1].sublayers if trunk.blocks else ():
        for part in sublayer.parts:
            for module in get(model, part).modules():
                if isinstance(module, nn.MultiheadAttention):
                    return module.embed_dim
                size = widths(module) or channels(module)
                if size is not None:
                    return size[0]
    return None
