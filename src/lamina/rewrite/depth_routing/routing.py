"""The pass: which blocks skip tokens, and the router that decides which tokens."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lamina.anatomy import Block, Trunk, dissect, get
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.nn.token_router import Inference, TokenRouter, TokenRouting, check_routing
from lamina.registry import register
from lamina.rewrite._drop_apply import find_trunk, lenders, refuse_shared
from lamina.rewrite._fused_layer import leave_fused_path
from lamina.rewrite.depth_routing.arguments import Masks
from lamina.rewrite.depth_routing.block import Place, Positions, Protected, Routed, Scale
from lamina.rewrite.depth_routing.decision import RouterKind
from lamina.rewrite.depth_routing.decision import RoutingDecision as RoutingDecision
from lamina.rewrite.depth_routing.entry import Entry
from lamina.rewrite.depth_routing.rank import attention_rank
from lamina.rewrite.rewriting import Pass, pass_name

Layers = Literal["rank", "every_other"]
FEW_SKIPPABLE = 500
"""Below so many tokens that may be skipped, the paper's quality breaks down at a skip of 0.5."""
ROUTER = "token_router"

_log = logging.getLogger(__name__)


@register("pass", source="Luo et al., gamma-MoD (2024), arXiv 2410.13859")
class DepthRouting:
    """Turn blocks of a trained transformer into a mixture of depths: only some of the tokens pass through them.

    A tiny router scores each token. In training the likeliest ones enter (always those that `protect` names), so train
    the model on after this pass, with `router_loss` beside its objective; afterwards a token enters where it is
    protected or its probability reaches a threshold, which a decoder can tell without knowing later tokens: generation
    with a cache of keys and values gives what one pass over all tokens gives. What does not enter is not computed, and
    leaves no key or value in that block. No weight and no name of the model changes; the router comes beside the trunk.

    Args:
        layers: which blocks: "rank" (of the lowest attention rank, measured on `data`), "every_other" (1, 3, 5, ...),
            or a list of numbers. A decoder's first attention stays as it is: its cache counts the tokens.
        count: with "rank", how many blocks. threshold: those of a rank below it (absolute: it grows with the length of
            the samples). Exactly one of the two.
        skip: share of the tokens that may be skipped that is skipped in training, 0 <= skip < 1.
        scale: what the probability to enter multiplies, so that the router learns from the task: the feed-forward
            ("mlp"), the block's whole update ("block", as in Mixture-of-Depths), or "none".
        positions: of the tokens that enter: their "original" ones, or "compact", 0..k-1 in each routed block.
        protect: name of a batch entry (B, T) bool: tokens that must enter, such as a question and its answer. The
            rewritten model's forward takes it under that name, in training and afterwards: without it a router decides
            of those tokens too, which it has seen enter whatever it said.
        skippable: instead of `protect`: ids of the tokens that may be skipped, such as an image's placeholder.
        router: one for all routed blocks ("shared"), or one for each ("per_layer").
        threshold_prefill, threshold_decode: probability from which a token enters in evaluation, 0..1: among many
            tokens at once, and of one token after cached ones.
        inference: "threshold"; or "topk", in evaluation as in training, for models that see the whole sequence and do
            not generate; None = "topk" for an encoder, "threshold" for a decoder.
        anneal: share of training over which `skip` rises from 0; 0 = at once.
        samples: rows of data whose attention is looked at.
        seed: of the routers' first weights.
        trunk: path of the stack of blocks, where the model has several; else the only one, or the only decoder.
    Raises:
        LaminaError: options out of range or that contradict, no data where ranks are asked for, a decoder's first
            block. AnatomyError: blocks without attention, with post-norm, or that need all tokens (windows,
            convolutions), or that another pass has given a forward of its own.
    Source: Luo et al. (2024), arXiv 2410.13859, sections 3.2-3.4. Deviations: original positions by default (the code
        renumbers); every entry of a batch is routed by itself; no constant lengths: what may be skipped is a mask.
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        layers: Layers | Sequence[int] = "rank",
        count: int | None = None,
        threshold: float | None = None,
        *,
        skip: float = 0.5,
        scale: Scale = "mlp",
        positions: Positions = "original",
        protect: str | None = None,
        skippable: Sequence[int] = (),
        router: RouterKind = "shared",
        threshold_prefill: float = 0.5,
        threshold_decode: float = 0.5,
        inference: Inference | None = None,
        anneal: float = 0.0,
        samples: int = 32,
        seed: int = 0,
        trunk: str | None = None,
    ) -> None:
        _check_layers(layers, count, threshold, samples)
        check_routing(skip, threshold_prefill, threshold_decode, inference or "topk", anneal)
        for name, value, known in (
            ("scale", scale, ("mlp", "block", "none")),
            ("positions", positions, ("original", "compact")),
            ("router", router, ("shared", "per_layer")),
        ):
            if value not in known:
                raise LaminaError(f"depth_routing: {name} must be one of {', '.join(known)}, got {value!r}")
        if protect is not None and skippable:
            raise LaminaError(
                "depth_routing takes protect (a mask in the batch) or skippable (ids of tokens), not both"
            )
        if protect is not None and not (isinstance(protect, str) and protect.isidentifier()):
            raise LaminaError(f"depth_routing: protect is the name of a batch entry, got {protect!r}")
        self.layers, self.count, self.threshold, self.samples = layers, count, threshold, samples
        self.skip, self.scale, self.positions, self.router = skip, scale, positions, router
        self.protect, self.skippable = protect, tuple(skippable)
        self.threshold_prefill, self.threshold_decode = threshold_prefill, threshold_decode
        self.inference, self.anneal, self.seed, self.trunk = inference, anneal, seed, trunk

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> RoutingDecision:
        """Choose the blocks; change nothing. See the class for what it raises."""
        model = bare(model)
        trunk = routable_trunk(model, self.trunk)
        able = self._candidates(model, trunk)
        batches = None if data is None else list(_first(data, self.samples))
        ranks = None
        if self.layers == "rank":
            if batches is None:
                raise LaminaError(
                    "depth_routing measures the rank of attention maps: pass data=... (--data on the command line), a "
                    "few dozen rows of what the model is for, or name the layers"
                )
            ranks = tuple(attention_rank(model, batches, self.samples, trunk=trunk))
        chosen = self._chosen(trunk, able, ranks)
        for index in chosen:
            self._check_block(model, trunk.blocks[index])
        self._warn_of_few(batches)
        return RoutingDecision(
            trunk=trunk.path,
            layers=chosen,
            ranks=ranks,
            skip=float(self.skip),
            scale=self.scale,
            positions=self.positions,
            router=self.router,
            threshold_prefill=float(self.threshold_prefill),
            threshold_decode=float(self.threshold_decode),
            inference=self.inference or ("threshold" if trunk.causal else "topk"),
            protect=self.protect,
            skippable=self.skippable,
            anneal=float(self.anneal),
            width=_norm_width(model, trunk.blocks[chosen[0]]),
            depth=trunk.depth,
            seed=self.seed,
        )

    def apply(self, model: nn.Module, decision: RoutingDecision, lineage: Lineage) -> nn.Module:
        """Route in place; return the model. Its tensors and their names stay, so the lineage has no entry."""
        inner = bare(model)
        trunk = find_trunk(inner, decision.trunk)
        if trunk.depth != decision.depth:
            raise AnatomyError(f"{trunk.path} has {trunk.depth} blocks, the decision is for {decision.depth}")
        parent = get(inner, trunk.path.rpartition(".")[0])
        like = next(p for p in get(inner, trunk.path).parameters() if p.is_floating_point())
        shared = None
        if decision.router == "shared":
            shared = _router(decision, like, decision.seed)
            parent.register_module(ROUTER, shared)
        protected = Protected()
        for position, index in enumerate(decision.layers):
            own = shared or _router(decision, like, decision.seed + position)
            routing = TokenRouting(
                own,
                skip=decision.skip,
                threshold_prefill=decision.threshold_prefill,
                threshold_decode=decision.threshold_decode,
                inference=decision.inference,
                anneal=decision.anneal,
                own=shared is None,
            )
            _route(inner, trunk, trunk.blocks[index], routing, decision, protected)
        if decision.protect is not None or decision.skippable:
            inner.forward = Entry(inner.forward, protected, decision.protect, decision.skippable)
        return model

    def conflicts(self, earlier: Pass[Any]) -> str | None:
        """Say why this pass cannot follow `earlier`; None where it can."""
        name = pass_name(earlier)
        if name == "early_exit":
            return "an exit reads all tokens of the block before it; put depth_routing first"
        return "a block is routed once" if name == pass_name(self) else None

    def fits(self, model: nn.Module) -> None:
        """Raise what `decide` would where the model has too few blocks that can be routed; looks at no data."""
        model = bare(model)
        trunk = routable_trunk(model, self.trunk)
        able = self._candidates(model, trunk)
        if self.layers != "rank" or self.count is not None:
            ranks = [0.0] * trunk.depth if self.layers == "rank" else None
            for index in self._chosen(trunk, able, ranks):
                self._check_block(model, trunk.blocks[index])

    def _candidates(self, model: nn.Module, trunk: Trunk) -> list[int]:
        """List the blocks that can be routed."""
        if trunk.repeats > 1:
            raise AnatomyError(f"{trunk.path} runs the same block {trunk.repeats} times: it cannot be routed at some")
        refuse_shared(model, trunk, range(len(trunk.blocks)))
        attending = [i for i, b in enumerate(trunk.blocks) if b.find("attention") is not None]
        if not attending:
            raise AnatomyError(f"no block of {trunk.path} has an attention that could do with fewer tokens")
        fixed = lenders(model, trunk) | ({attending[0]} if trunk.causal else set())
        return [i for i in attending if i not in fixed]

    def _chosen(self, trunk: Trunk, able: list[int], ranks: Sequence[float | None] | None) -> tuple[int, ...]:
        if self.layers == "every_other":
            chosen = [i for i in able if i % 2]
        elif self.layers == "rank":
            assert ranks is not None
            # What agrees to six digits counts as equal, and the earlier block goes first.
            order = sorted(able, key=lambda i: (round(ranks[i] or 0.0, 6), i))
            if self.count is not None and self.count > len(able):
                raise LaminaError(
                    f"depth_routing: count={self.count}, but only {len(able)} of {trunk.depth} blocks of {trunk.path} "
                    "can be routed (a decoder's first attention counts the tokens and stays)"
                )
            below = [i for i in able if self.threshold is not None and (ranks[i] or 0.0) < self.threshold]
            chosen = order[: self.count] if self.count is not None else below
        else:
            chosen = [int(i) for i in self.layers]
            wrong = [i for i in chosen if i not in able]
            if wrong:
                raise LaminaError(
                    f"depth_routing cannot route blocks {wrong} of {trunk.path}; those that can be: {able} (the "
                    "first attention of a decoder counts the tokens in its cache and stays)"
                )
        if not chosen:
            raise LaminaError(f"depth_routing would route no block of {trunk.path} (ranks: {ranks})")
        return tuple(sorted(set(chosen)))

    def _check_block(self, model: nn.Module, block: Block) -> None:
        """Refuse what cannot be run on some of its tokens."""
        module, attention = get(model, block.path), block.find("attention")
        assert attention is not None
        name = f"{block.path} ({type(module).__name__})"
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise AnatomyError(f"{name} is a list that is never called: there is no forward to route")
        if "forward" in vars(module):
            raise AnatomyError(
                f"{name} already has a forward of its own (depth_routing, early_exit): route a block once"
            )
        if not attention.norms or attention.place not in ("pre", "sandwich"):
            raise AnatomyError(f"{name} has no norm before its attention for a router to read: only pre-norm blocks")
        norm = get(model, attention.norms[0])
        if getattr(norm, "takes_mask", False) or isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise AnatomyError(f"{name} has a norm that takes statistics over tokens: it needs all of them")
        if block.find("cross_attention") is not None:
            raise AnatomyError(f"{name} has cross-attention, whose cached keys are not routed")
        for path, inner in module.named_modules():
            if _needs_all_tokens(inner):
                raise AnatomyError(f"{name} needs all tokens: {path or 'it'} is a {type(inner).__name__}")
            if getattr(inner, "batch_first", True) is False:
                raise AnatomyError(
                    f"{name} takes its stream as (tokens, batch, channels): build it with batch_first=True"
                )
        if self.scale == "mlp":
            _scaled_path(block)

    def _warn_of_few(self, batches: Sequence[Batch] | None) -> None:
        for batch in batches or ():
            mask, ids = batch.get(self.protect or ""), batch.get("input_ids")
            free = None
            if isinstance(mask, Tensor):
                free = ~mask.bool()
            elif self.skippable and isinstance(ids, Tensor):
                free = torch.isin(ids, torch.tensor(self.skippable, device=ids.device))
            if free is not None and self.skip >= 0.5 and int(free.sum(1).max()) < FEW_SKIPPABLE:
                _log.warning(
                    "at most %d tokens of a row may be skipped: below about %d the paper's quality breaks down at "
                    "skip=0.5, and holds at 0.34",
                    int(free.sum(1).max()),
                    FEW_SKIPPABLE,
                )
                return


def routable_trunk(model: nn.Module, path: str | None) -> Trunk:
    """Return the trunk at `path`, or the only one, or the only decoder (of a vision-language model).

    Raises:
        AnatomyError: none, or several.
    """
    if path is not None:
        return find_trunk(model, path)
    anatomy = dissect(model)
    causal = [t for t in anatomy.trunks if t.causal]
    return causal[0] if len(causal) == 1 else anatomy.trunk()


def _route(
    model: nn.Module,
    trunk: Trunk,
    block: Block,
    routing: TokenRouting,
    decision: RoutingDecision,
    protected: Protected,
) -> None:
    module, attention = get(model, block.path), block.find("attention")
    assert attention is not None
    scaled = _scaled_path(block).removeprefix(f"{block.path}.") if decision.scale == "mlp" else None
    norm = attention.norms[0].removeprefix(f"{block.path}.")
    place = Place(norm, decision.scale, scaled, decision.positions, trunk.causal)
    masks = Masks(module, tuple(inspect.signature(module.forward).parameters))
    leave_fused_path(model, block.path)
    routing.train(module.training)
    module.register_module("routing", routing)
    module.forward = Routed(module.forward, module, routing, place, protected, masks)


def _scaled_path(block: Block) -> str:
    """Path of the module whose output is all that the feed-forward adds."""
    mlp = block.find("mlp")
    if mlp is None:
        raise AnatomyError(f"{block.path} has no feed-forward that scale='mlp' could scale: pass scale='block'")
    if mlp.residual_inside:
        raise AnatomyError(f"the feed-forward of {block.path} adds the residual itself: pass scale='block'")
    return mlp.norms[-1] if mlp.place == "sandwich" else mlp.parts[-1]


def _router(decision: RoutingDecision, like: Tensor, seed: int) -> TokenRouter:
    with torch.device("meta"):
        router = TokenRouter(decision.width)
    router = router.to(like.dtype)
    if not like.is_meta:
        router = router.to_empty(device=like.device)
        router.reset_parameters(seed)
    return router


def _norm_width(model: nn.Module, block: Block) -> int:
    attention = block.find("attention")
    assert attention is not None
    sizes = [int(p.shape[0]) for p in get(model, attention.norms[0]).parameters() if p.dim() == 1]
    if not sizes:
        raise AnatomyError(f"cannot tell the width of {attention.norms[0]}: it has no parameters")
    return sizes[0]


def _needs_all_tokens(module: nn.Module) -> bool:
    convolves = any(k > 1 for k in getattr(module, "kernel_size", ()) or () if isinstance(k, int)) if isinstance(module, nn.modules.conv._ConvNd) else False  # fmt: skip  # noqa: E501
    windowed = isinstance(getattr(module, "window_size", None), (int, tuple, list))
    kernel = getattr(module, "masked_by_kernel", False) and getattr(module, "kernel", None) is not None
    return convolves or windowed or bool(kernel) or getattr(module, "causal_block", None) is not None


def _first(data: Iterable[Batch], samples: int) -> Iterable[Batch]:
    from lamina.rewrite.similarity import take

    return take(data, samples)


def _check_layers(layers: Any, count: int | None, threshold: float | None, samples: int) -> None:
    listed = isinstance(layers, Sequence) and not isinstance(layers, str)
    if not listed and layers not in ("rank", "every_other"):
        raise LaminaError(f"depth_routing: layers is 'rank', 'every_other' or a list of numbers, got {layers!r}")
    if listed and not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers):
        raise LaminaError(f"depth_routing: layers is a list of block numbers, not negative, got {layers!r}")
    if layers == "rank" and (count is None) == (threshold is None):
        raise LaminaError(
            "depth_routing by rank takes either count (how many blocks) or threshold (a rank), exactly one"
        )
    if layers != "rank" and (count is not None or threshold is not None):
        raise LaminaError(f"count and threshold choose by rank; with layers={layers!r} leave them out")
    for name, value in (("count", count), ("samples", samples)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise LaminaError(f"depth_routing: {name} is a whole number, at least 1, got {value!r}")
