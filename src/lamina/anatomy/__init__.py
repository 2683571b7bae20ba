"""Find the parts of any transformer-like (or residual) model by looking at its module tree.

`dissect` says where the trunks, blocks, attention and feed-forward sublayers and norms are; `describe` reads the
sizes; `swap` is the one way a pass replaces a submodule.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from lamina.anatomy import _blocks as tree
from lamina.anatomy._check import Call, measured_norms, measured_repeats, trace
from lamina.anatomy._edit import attention_cores as attention_cores
from lamina.anatomy._edit import get as get
from lamina.anatomy._edit import keep_blocks as keep_blocks
from lamina.anatomy._edit import nearest_config
from lamina.anatomy._edit import swap as swap
from lamina.anatomy._look import undisturbed as undisturbed
from lamina.anatomy._projections import Projection as Projection
from lamina.anatomy._projections import Projections as Projections
from lamina.anatomy._projections import attention_projections as attention_projections
from lamina.anatomy._read import flow_of, read_block
from lamina.anatomy._shape import FEED_FORWARD, config_of, context_of, first_number, head_sizes, vocabulary_of
from lamina.anatomy._tree import channels, join, widths
from lamina.anatomy._tree import is_norm as is_norm
from lamina.anatomy._types import Anatomy as Anatomy
from lamina.anatomy._types import Block as Block
from lamina.anatomy._types import NormPlace as NormPlace
from lamina.anatomy._types import Shape as Shape
from lamina.anatomy._types import Sublayer as Sublayer
from lamina.anatomy._types import Trunk as Trunk
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError

_CAUSAL_TYPES = frozenset({
    *("bloom", "clip_text_model", "codegen", "ctrl", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama"),
    *("mistral", "mixtral", "mpt", "openai-gpt", "opt", "xglm"),
})  # fmt: skip
"""Hugging Face models whose masks are causal, whatever (if anything) their attention modules say about it."""


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


def find_head(model: nn.Module) -> str:
    """Return the path of the last projection: the one after the trunk, else the last `nn.Linear` of the module tree.

    Raises:
        AnatomyError: the model has no projection at all.
    """
    model = bare(model)
    try:
        found = dissect(model).head
    except AnatomyError:
        found = None
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if found is None and not linears:
        raise AnatomyError(f"{type(model).__name__} has no head: it has no nn.Linear at all")
    return linears[-1] if found is None else found


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
    inner = next((into for into, _ in reversed(sizes) if into != width), sizes[-1][0] if sizes else None)
    if feeding and (inner is None or inner == width):
        # Experts may be one stacked weight: then only the config tells.
        inner = first_number([config], FEED_FORWARD) or inner
    tables = [m for m in (get(model, p) for p in anatomy.embeddings) if isinstance(m, nn.Embedding)]
    projected = None if anatomy.head is None else widths(get(model, anatomy.head))
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        depth=sum(t.depth for t in anatomy.trunks if _stage(t.path) == _stage(last.path)),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        feed_forward=inner,
        vocabulary=vocabulary_of(model, tables, projected[1] if projected else None),
        context=context_of(model, config),
    )


def _stage(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _trunk(model: nn.Module, stack: tree.Stack) -> Trunk:
    blocks = tuple(read_block(path, get(model, path)) for path in stack.blocks)
    return Trunk(stack.path, blocks, stack.repeats * _sharing(model), _is_causal(model, stack.path, blocks))


def _confirmed(model: nn.Module, batch: Batch, trunks: tuple[Trunk, ...]) -> tuple[Trunk, ...]:
    """Hold the static reading against one forward pass; what the values say wins."""
    # A module that stands at several places of a list runs as often, and is watched once.
    first: dict[int, str] = {}
    placed = {b.path: first.setdefault(id(get(model, b.path)), b.path) for t in trunks for b in t.blocks}
    blocks = [b for t in trunks for b in t.blocks if placed[b.path] == b.path]
    parts = {p for b in blocks for s in b.sublayers for p in s.parts}
    norms = {join(b.path, n) for b in blocks for n, m in get(model, b.path).named_modules() if n and is_norm(m)}
    calls = trace(model, batch, {b.path for b in blocks} | parts | norms)
    found = []
    for trunk in trunks:
        repeats = measured_repeats(calls, trunk.path, tuple(placed[b.path] for b in trunk.blocks))
        if repeats is not None:
            measured = tuple(_measured(model, calls, b) if b in blocks else b for b in trunk.blocks)
            trunk = replace(trunk, repeats=repeats, blocks=measured)
        found.append(trunk)
    return tuple(found)


def _measured(model: nn.Module, calls: list[Call], block: Block) -> Block:
    sublayers: list[Sublayer] = []
    traced = flow_of(get(model, block.path)) is not None
    for sublayer in block.sublayers:
        if sublayer.residual_inside:
            # What comes out is the stream already: no sum to compare with.
            sublayers.append(sublayer)
            continue
        taken = {p for s in block.sublayers for p in s.parts if s is not sublayer}
        taken.update(n for s in sublayers if s.place == "post" for n in s.norms)
        if traced:
            # A branch's post-norm and the next one's pre-norm receive the same sum; the forward told them apart.
            taken.update(n for s in block.sublayers for n in s.norms if n not in sublayer.norms)
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


def _is_causal(model: nn.Module, stack: str, blocks: tuple[Block, ...]) -> bool:
    config = nearest_config(model, stack)
    if getattr(config, "model_type", None) in _CAUSAL_TYPES:
        return True
    found = (b.find("attention") for b in blocks)
    for module in (m for one in found if one is not None for m in get(model, one.path).modules()):
        for name in ("is_causal", "causal"):
            said = getattr(module, name, None)
            if isinstance(said, bool):
                return said
    return bool(getattr(config, "is_decoder", False))


def _width(model: nn.Module, trunk: Trunk) -> int | None:
    """Width of the residual stream: that of the norms beside the last block's branches, or what a branch reads."""
    subs = trunk.blocks[-1].sublayers if trunk.blocks else ()
    for s in subs:
        if s.norms and (s.place == "pre" or (s.place != "none" and s.kind != "branch")):
            sizes = [int(p.shape[0]) for p in get(model, s.norms[0]).parameters() if p.dim() == 1]
            if sizes:
                return sizes[0]
    for module in (m for s in subs for part in s.parts for m in get(model, part).modules()):
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim
        size = widths(module) or channels(module)
        if size is not None:
            return size[0]
    return None
