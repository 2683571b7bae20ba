"""Put another token mixer where a model has attention: what `Replace("attention", ...)` decides and does.

A mixer of sequences (`layout` "sequence") takes attention's place as it is. A mixer of images ("grid") gets the tokens
as rows and columns; class and register tokens in front have no place there: the mixer leaves zero for them, and the
residual carries them on. So a class token learns nothing of the image in these blocks: where all attentions go, a head
that reads the class token alone answers the same to every image (this is logged); keep one attention by `match`, or
read the mean of the cells. A mixer that has query, key, value and output projections of the same sizes takes over
those of the attention, with the optimizer's state. A mixer of sequences that names `grid` (and `prefix`) is told the
rows and columns, and how many tokens stand before them. What a mixer further needs to compute what the attention did
(no norms of its own, say), it tells by a static method `instead_of_attention(offered) -> options`.
Source: Yu et al., MetaFormer Is Actually What You Need for Vision (2022), arXiv 2111.11418.
"""

from __future__ import annotations

import fnmatch
import inspect
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lamina import anatomy, probe, registry
from lamina.anatomy import Block, Sublayer, Trunk
from lamina.batches import Batch, call
from lamina.errors import AnatomyError, RecipeError
from lamina.lineage import Lineage
from lamina.nn.layout import GridAsSequence
from lamina.recipe import factory
from lamina.rewrite._carry_attention import carry_projections, offered
from lamina.rewrite._fused_layer import leave_fused_path
from lamina.rewrite._replaced_attention import ReplacedAttention, masks_of, stream_of
from lamina.rewrite._skip import returned_rest
from lamina.rewrite.replace import ReplaceDecision

_log = logging.getLogger(__name__)

MOST_PREFIX = 16
"""More tokens than this beside the cells are not taken for class and register tokens."""


@dataclass(frozen=True)
class Place:
    """One attention to be replaced, and what its successor must fit."""

    trunk: Trunk
    block: Block
    sublayer: Sublayer
    width: int
    heads: int | None
    context: int | None


def decide_attention(
    model: nn.Module,
    data: Iterable[Batch] | None,
    *,
    new: str,
    match: str | None,
    options: Mapping[str, Any],
    grid: tuple[int, int] | None,
) -> ReplaceDecision:
    """Find the attention sublayers, and for a mixer of images the grid of their tokens; build one of each on meta.

    Args:
        data: the first batch is run to count the tokens; without it, an empty image of the size the model names.
        match: pattern of the paths, such as `vit.layers.1*`; None = all.
        grid: (rows, columns) of the tokens where they cannot be told from the images.
    Raises:
        AnatomyError: no attention (at such a path); causal blocks and a mixer that is not; a grid that cannot be told,
            or masked tokens; an attention that is not one module.
        RecipeError: an option the mixer does not have, or `grid` for a mixer of sequences.
    """
    layout, on_grid = _layout(new), _is_of_images(new)
    if grid is not None and not on_grid:
        raise RecipeError(f"grid is for mixers of images; {new} mixes sequences")
    grid = tuple(options["grid"]) if grid is None and "grid" in options else grid
    places = _places(model, match)
    causal = next((p.trunk.path for p in places if p.trunk.causal), None)
    if on_grid and causal is not None:
        raise AnatomyError(f"{new} mixes whole images, but the attention below {causal!r} sees earlier tokens only")
    cells, prefix = grid_of(model, places, data, grid) if on_grid else (None, 0)
    if prefix and layout == "grid" and len(places) == len(_places(model, None)):
        _log.warning(
            "every attention of %s becomes %s: its %d class or register tokens will see nothing of the image; "
            "keep one attention by match=, or read the mean of the cells",
            *(type(model).__name__, new, prefix),
        )
    decision = ReplaceDecision(tuple(p.sublayer.path for p in places), "attention", new, dict(options), cells, prefix)
    with torch.device("meta"):
        for place in places:
            _shim(model, place, decision)
    return decision


def apply_attention(model: nn.Module, decision: ReplaceDecision, lineage: Lineage) -> nn.Module:
    """Put the mixers in place: projections are taken over where they fit, the rest is drawn by the decision's seed."""
    chosen = {p.sublayer.path: p for p in _places(model, None)}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(decision.seed)
        for path in decision.paths:
            if path not in chosen:
                raise AnatomyError(f"{type(model).__name__} has no attention at {path!r}; it has {', '.join(chosen)}")
            old, like = anatomy.get(model, path), _example(model, path)
            with torch.device(like.device):
                new = _shim(model, chosen[path], decision)
            carry_projections(old, new.to(like.dtype), chosen[path].heads, lineage)
            anatomy.swap(model, path, new.train(old.training), all=True)
            leave_fused_path(model, chosen[path].block.path)
    if any(chosen[path].trunk.causal for path in decision.paths):
        _forget_caches(model)
    return model


def grid_of(
    model: nn.Module, places: list[Place], data: Iterable[Batch] | None, grid: tuple[int, int] | None
) -> tuple[tuple[int, int], int]:
    """Return the (rows, columns) of the image's cells among the tokens, and how many tokens stand before them.

    Raises:
        AnatomyError: the tokens are masked, of several lengths, or their grid cannot be told and is not given.
    """
    batch = next(iter(data), None) if data is not None else _blank(model)
    name = type(model).__name__
    if batch is None:
        if grid is None:
            raise AnatomyError(f"nothing tells the grid of {name}'s tokens: give data, or grid=(rows, columns)")
        return grid, 0
    length, maps, masks = _measure(model, places, batch)
    if masks:
        raise AnatomyError(f"{name}'s attention is given {', '.join(masks)}: a grid has no place for padding")
    image = any(isinstance(v, Tensor) and v.dim() == 4 for v in batch.values())
    found = [grid] if grid is not None else [*reversed(maps), *_squares(length)] if image else []
    for rows, columns in found:
        if 0 <= length - rows * columns <= MOST_PREFIX:
            return (rows, columns), length - rows * columns
    raise AnatomyError(
        f"{name}'s attention has {length} tokens, which are not "
        + (f"the {grid[0]} x {grid[1]} given" if grid else "the cells of an image: give grid=(rows, columns)")
    )


def _places(model: nn.Module, match: str | None) -> list[Place]:
    found = [(t, b, s) for t in anatomy.dissect(model).trunks for b in t.blocks for s in b.sublayers]
    attentions = [(t, b, s) for t, b, s in found if s.kind == "attention"]
    if not attentions:
        raise AnatomyError(f"{type(model).__name__} has no attention to replace")
    kept = [(t, b, s) for t, b, s in attentions if match is None or fnmatch.fnmatchcase(s.path, match)]
    if not kept:
        paths = ", ".join(s.path for _, _, s in attentions)
        raise AnatomyError(f"no attention of {type(model).__name__} stands at a path like {match!r}; it has {paths}")
    for one in {t.path for t, _, _ in kept}:
        chosen, whole = ([s.path for t, _, s in many if t.path == one] for many in (kept, attentions))
        if len(chosen) < len(whole):
            _refuse_lenders(model, chosen)
    shape = anatomy.describe(model)
    places = []
    for trunk, block, sublayer in kept:
        _check_whole(model, sublayer)
        width = _width(anatomy.get(model, sublayer.path)) or shape.width
        if width is None:
            raise AnatomyError(f"the width of the attention at {sublayer.path!r} cannot be told")
        heads = shape.heads if width == shape.width else None
        places.append(Place(trunk, block, sublayer, width, heads, shape.context))
    return places


def _check_whole(model: nn.Module, sublayer: Sublayer) -> None:
    for part in sublayer.parts[1:]:
        if any(p.dim() > 1 for p in anatomy.get(model, part).parameters()):
            raise AnatomyError(
                f"attention at {sublayer.path!r} is computed by several modules ({', '.join(sublayer.parts)}): "
                "there is no one place for a mixer"
            )
    if len(_own_norms(sublayer)) > 1:
        raise AnatomyError(f"attention at {sublayer.path!r} has several norms inside: {', '.join(sublayer.norms)}")


def _refuse_lenders(model: nn.Module, paths: list[str]) -> None:
    """T5's first attention makes the position bias of all: it cannot go alone."""
    for path in paths:
        if any(isinstance(m, nn.Embedding) for m in anatomy.get(model, path).modules()):
            raise AnatomyError(
                f"the attention at {path!r} holds position biases that others use: replace all or others"
            )


def _own_norms(sublayer: Sublayer) -> tuple[str, ...]:
    return tuple(n for n in sublayer.norms if n.startswith(f"{sublayer.path}."))


def _shim(model: nn.Module, place: Place, decision: ReplaceDecision) -> ReplacedAttention:
    old, sublayer = anatomy.get(model, place.sublayer.path), place.sublayer
    mixer = _mixer(old, place, decision)
    own = _own_norms(sublayer)
    before = old if isinstance(old, ReplacedAttention) else None
    return ReplacedAttention(
        mixer,
        names=before.names if before else tuple(inspect.signature(old.forward).parameters),
        rest=before.rest if before else returned_rest(old) if sublayer.returns == "tuple" else None,
        batch_first=bool(getattr(old, "batch_first", True)),
        norm=anatomy.get(model, own[0]) if own else None,
        norm_at=sublayer.place if own else "none",
        residual=sublayer.residual_inside,
    )


def _mixer(old: nn.Module, place: Place, decision: ReplaceDecision) -> nn.Module:
    given: dict[str, Any] = {"width": place.width, "causal": place.trunk.causal}
    if "heads" not in decision.options:
        given |= offered(old, place.heads)
    given |= {} if place.heads is None else {"heads": place.heads}
    context = _context(old, place.context)
    if decision.grid is not None:
        given |= {"grid": decision.grid, "prefix": decision.prefix}
        context = decision.prefix + math.prod(decision.grid)
    given |= {} if context is None else {"context": context}
    like_attention = getattr(registry.find("mixer", decision.new), "instead_of_attention", None)
    given |= {} if like_attention is None else like_attention(given)
    mixer: nn.Module = factory("mixer", {"name": decision.new, **decision.options})(**given)
    if place.trunk.causal and not getattr(mixer, "causal", False):
        raise AnatomyError(
            f"{decision.new} is not known to be causal (no true attribute `causal`), but the attention at "
            f"{place.sublayer.path!r} is"
        )
    if decision.grid is None or _layout(decision.new) != "grid":
        return mixer
    return GridAsSequence(mixer, decision.grid, decision.prefix)


def _context(old: nn.Module, context: int | None) -> int | None:
    """Return the longest sequence: of the model, or of the attention where that says more (class tokens in front)."""
    own = [c for m in old.modules() if isinstance(c := getattr(m, "context", None), int)]
    return context if context is None else max([context, *own])


def _layout(new: str) -> str:
    return getattr(registry.find("mixer", new), "layout", "sequence")


def _is_of_images(new: str) -> bool:
    """Whether a mixer must know the grid of its tokens, whichever layout it takes them in."""
    mixer = registry.find("mixer", new)
    return _layout(new) == "grid" or "grid" in inspect.signature(mixer).parameters


def _width(attention: nn.Module) -> int | None:
    """Channels that the first projection reads."""
    for module in attention.modules():
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim
        into = getattr(module, "in_features", None)
        if isinstance(into, int):
            return into
    return None


def _example(model: nn.Module, path: str) -> Tensor:
    """Return a tensor of the dtype and on the device that the successor must have."""
    tensors = (*anatomy.get(model, path).parameters(), *model.parameters())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def _measure(model: nn.Module, places: list[Place], batch: Batch) -> tuple[int, list[tuple[int, int]], tuple[str, ...]]:
    """Run one batch; return the tokens at the attentions, the maps of convolutions before them, the masks given."""
    lengths: dict[str, int] = {}
    masks: dict[str, None] = {}
    maps: list[tuple[int, int]] = []

    def attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, path: str) -> None:
        names = module.names if isinstance(module, ReplacedAttention) else inspect.signature(module.forward).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        lengths[path] = stream_of(given).shape[1 if getattr(module, "batch_first", True) else 0]
        masks.update(dict.fromkeys(masks_of(given)))

    def convolution(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        maps.append((int(output.shape[-2]), int(output.shape[-1])))

    blocks = tuple(f"{b.path}." for t in {p.trunk.path: p.trunk for p in places}.values() for b in t.blocks)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not n.startswith(blocks)]
    watched: dict[str, probe.Callback] = dict.fromkeys(convolutions, convolution)
    watched |= {p.sublayer.path: partial(attention, path=p.sublayer.path) for p in places}
    like = next(model.parameters())
    moved = {k: v.to(like.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with torch.no_grad(), anatomy.undisturbed(model), probe.observe(model, watched):
        call(model, moved)
    if len(set(lengths.values())) != 1:
        seen = ", ".join(f"{p}: {n}" for p, n in lengths.items()) or "none ran"
        raise AnatomyError(f"the attentions must have one number of tokens ({seen}): choose some by match=")
    return next(iter(lengths.values())), maps, tuple(masks)


def _blank(model: nn.Module) -> Batch | None:
    """Make an empty image of the size that the model says it takes; None where it does not say."""
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    shape = getattr(model, "image_shape", None)
    if shape is None and isinstance(size, (int, tuple, list)):
        height, width = (size, size) if isinstance(size, int) else size
        shape = (getattr(config, "num_channels", 3), height, width)
    if shape is None:
        return None
    like = next(model.parameters())
    return {"pixel_values": torch.zeros(1, *shape, dtype=like.dtype, device=like.device)}


def _squares(length: int) -> list[tuple[int, int]]:
    """Return the largest square that leaves some tokens over, if those may be class and register tokens."""
    side = math.isqrt(length)
    return [(side, side)] if side > 1 else []


def _forget_caches(model: nn.Module) -> None:
    """Turn off the key-value cache that Hugging Face decoders keep by default: the new mixers cannot fill it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
