"""Turn the flow through a block into its sublayers: what kind each branch is, its parts, its norms."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lamina.anatomy._flow import Branch, Flow, follow, outermost
from lamina.anatomy._tree import (
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
from lamina.anatomy._types import Block, NormPlace, Sublayer


def read_block(path: str, block: nn.Module) -> Block:
    """Find the sublayers of one block: by its flow, or by what it lists where it cannot be traced."""
    flow = flow_of(block)
    if flow is None:
        return Block(path, _listed_sublayers(path, block))
    found = [(b.strand.base, _sublayer(path, block, b, flow)) for b in flow.branches]
    found.sort(key=lambda item: (item[0], item[1].kind != "attention"))
    bases = [base for base, _ in found]
    return Block(path, tuple(s for _, s in found), parallel=len(set(bases)) < len(bases))


def flow_of(block: nn.Module) -> Flow | None:
    """Follow the stream through a block; None where it has no forward, cannot be traced, or shows no branch."""
    if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        return None
    flow = follow(block)
    return flow if flow is not None and flow.branches else None


def _sublayer(path: str, block: nn.Module, branch: Branch, flow: Flow) -> Sublayer:
    strand = branch.strand
    norms, place = _norms(block, branch)
    parts = outermost(block, strand.units, {m for b in flow.branches if b is not branch for m in b.modules})
    kind = _kind(block, strand.units, parts, strand.crosses)
    return Sublayer(
        kind="branch" if kind == "mlp" and not _reads_channels(block, strand.units[0], norms) else kind,
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
    # The class of a lone projection says how it projects (Pattention), not what the branch is.
    named = [type(m).__name__ for m in map(block.get_submodule, parts) if widths(m) is None]
    said = hint(*named) or hint(*(p.rpartition(".")[2] for p in parts))
    if any(is_attention(m) for m in modules) or (said != "mlp" and reads_like_attention(sizes)):
        return "cross_attention" if crosses else "attention"
    mixes = any(channels(m) for m in modules) and said != "mlp"
    if len(sizes) >= 2 and sizes[0][0] == sizes[-1][1] and not mixes and said != "attention":
        return "mlp"
    if any(_is_feed_forward(m) for m in modules) or (said == "mlp" and len(sizes) < 2):
        return "mlp"
    if said == "attention":
        return "cross_attention" if crosses else "attention"
    return "branch"


def _reads_channels(block: nn.Module, unit: str, norms: tuple[str, ...]) -> bool:
    """Tell a feed-forward of channels from one of positions (MLP-Mixer), which reads another width than its norm."""
    size = widths(block.get_submodule(unit))
    normed = {int(p.shape[0]) for n in norms for p in block.get_submodule(n).parameters() if p.dim() == 1}
    return size is None or not normed or size[0] in normed


def _is_feed_forward(module: nn.Module) -> bool:
    """Tell an opaque module with a d -> f, f -> d pair of projections somewhere inside, and nothing that mixes."""
    inside = [m for m in module.modules() if m is not module]
    sizes = [w for w in (widths(m) for m in inside) if w is not None]
    if len(sizes) < 2 or any(channels(m) for m in inside) or any(True for _ in attentions(module)):
        return False
    return sizes[0][0] == sizes[-1][1] != sizes[0][1] and sizes[-1][0] in (sizes[0][1], sizes[0][1] // 2)


def _adding(block: nn.Module, part: str) -> Branch | None:
    """Return the one branch of a part that adds its own input to it, else None."""
    flow = flow_of(block.get_submodule(part))
    return flow.branches[0] if flow is not None and flow.residual and len(flow.branches) == 1 else None


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
        alone = _adding(block, parts[0])
        if alone is not None:
            inside, place = _norms(block.get_submodule(parts[0]), alone)
            mine = [join(parts[0], n) for n in inside]
        sublayers.append(
            Sublayer(
                kind="attention" if is_attention(found[name]) else "mlp",
                path=join(path, parts[0]),
                parts=tuple(join(path, p) for p in parts),
                norms=tuple(join(path, n) for n in mine),
                place=place,
                returns="tuple" if isinstance(found[name], nn.MultiheadAttention) else "tensor",
                residual_inside=alone is not None,
            )
        )
    return tuple(sublayers)
