"""Fold norms with fixed statistics into the layers around them, for deployment: same outputs, fewer layers.

    model = rewrite(model.eval(), Fold())                     # a batch norm goes into the convolution before it
    model = rewrite(model.eval(), Fold(), data=batches)       # RepBN and PRepBN go into the layers that read them

Source: You et al. (2024), arXiv 2305.11624, section 2 (deploy mode); Guo et al., SLAB (2024), arXiv 2405.11582 (norms
before linear layers).
"""

from __future__ import annotations

import copy
import fnmatch
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from lamina import anatomy
from lamina.batches import Batch, bare, call, to_device
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.nn import PRepBN
from lamina.registry import register
from lamina.rewrite._conv_bn_block import HeldConv, is_transposed, plain
from lamina.rewrite._conv_bn_pairs import Pairs, find_pairs, first_batch
from lamina.rewrite._folding import ChannelAffine as ChannelAffine
from lamina.rewrite._folding import fold_into_consumer, fold_into_producer, norm_scale_and_shift
from lamina.rewrite._links import tensors_in
from lamina.rewrite._token_norms import HUGGING_FACE_LINEAR, destinations, token_norm_reason, token_norms

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NormFold:
    """Where one norm goes."""

    into: Literal["consumers", "producer", "affine"]
    """"affine": into no layer; a scale and shift stay in its place."""
    modules: tuple[str, ...]
    """Paths of the layers whose weights change."""
    why: str


@dataclass(frozen=True)
class FoldDecision:
    """Where each norm goes, and which stay."""

    norms: dict[str, NormFold]
    """By the norm's path."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a norm stays, by its path."""

    def table(self) -> str:
        """Word the decision for people."""
        folded = [
            f"  {path} -> {', '.join(n.modules) or 'scale and shift'} ({n.why})" for path, n in self.norms.items()
        ]
        return "\n".join([*folded, *(f"  stays: {path}: {why}" for path, why in self.skipped.items())])


@register("pass", source="You et al. 2024; Guo et al. 2024")
class Fold:
    """Fold norms with running statistics into the layers around them; the model must be in evaluation mode.

    A batch norm goes into the convolution or linear layer before it. A norm of tokens (`RepBN`, `PRepBN`,
    `TokenBatchNorm`) goes into all the layers that read it, through reshapes, a choice of tokens and their mean; else
    into the layer it alone reads; where neither is exact (its output enters a residual, a convolution pads it with
    zeros, a weight is tied) two numbers a feature stay in its place. No norm of tokens is left.

    One way, and for inference: a folded weight trained on takes steps 1 / k^2 as large (k = gamma / sigma). A layer
    gets a bias if it has none; the norm's place is taken by an identity. Folds in float64 and casts back: fold before
    casting to half precision. Blocks of `ConvBN` become ordinary layers. Given data, norms of tokens are folded in a
    copy first, which must give the model's outputs.

    Args:
        match: pattern of the norms' paths; default all.
    Raises:
        AnatomyError: no such norm, or none that can be folded; the message says why.
        LaminaError: the model, or one of the norms, is in training mode; a progressive norm has not turned yet (its lam
            is above 0); the folded copy gives other outputs.
    Source: You et al. (2024), arXiv 2305.11624, section 2; Guo et al. (2024), arXiv 2405.11582.
    Example:
        >>> from lamina.rewrite import rewrite
        >>> rewrite(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval(), Fold())
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "function"

    def __init__(self, match: str | None = None) -> None:
        self.match = match

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> FoldDecision:
        """Find what each norm can go into (torch.fx, else one batch of data); change nothing."""
        model = bare(model)
        batch = None if data is None else first_batch(data)
        seen = None if batch is None else [batch]
        tokens = {p: m for p, m in token_norms(model).items() if self._matches(p)}
        pairs = self._pairs(model, seen, bool(tokens))
        skipped = pairs.skipped | {p: why for p, m in tokens.items() if (why := token_norm_reason(m))}
        rest = {p: m for p, m in tokens.items() if p not in pairs.found and not token_norm_reason(m)}
        _check_ready(model, [*pairs.found, *rest])
        norms = {p: NormFold("producer", (layer,), f"alone reads {layer}") for p, layer in pairs.found.items()}
        norms |= (
            {p: NormFold(d.into, d.modules, d.why) for p, d in destinations(model, rest, seen).items()} if rest else {}
        )
        if not norms:
            why = "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3])
            raise AnatomyError(f"no norm of {type(model).__name__} can be folded: {why}")
        decision = FoldDecision(norms, {p: why for p, why in skipped.items() if p not in norms})
        if batch is not None and rest:
            _verify(model, decision, batch)
        return decision

    def apply(self, model: nn.Module, decision: FoldDecision, lineage: Lineage) -> nn.Module:
        """Fold; the new weights are new Parameters, for which no optimizer state would be right."""
        for path, chosen in decision.norms.items():
            if chosen.into == "producer":
                into_producer(model, path, chosen.modules[0])
            elif chosen.into == "consumers":
                into_consumers(model, path, chosen.modules)
            else:
                into_affine(model, path)
        kept = [path for path, chosen in decision.norms.items() if chosen.into == "affine"]
        if kept:
            _log.info("%d of %d norms stay as a scale and shift: %s", len(kept), len(decision.norms), ", ".join(kept))
        return model

    def _matches(self, path: str) -> bool:
        return bool(path) and (self.match is None or fnmatch.fnmatchcase(path, self.match))

    def _pairs(self, model: nn.Module, data: list[Batch] | None, others: bool) -> Pairs:
        """Find the batch norms behind a layer; that there is none is no error where there are other norms."""
        maps = any(isinstance(m, _BatchNorm) and self._matches(p) for p, m in model.named_modules())
        return find_pairs(model, data, self.match) if maps or not others else Pairs({}, {})


def _check_ready(model: nn.Module, paths: list[str]) -> None:
    inside = {path: anatomy.get(model, path) for path in paths}
    training = [p for p, norm in inside.items() if any(m.training for m in norm.modules())]
    if model.training or training:
        where = f"its norm {training[0]} is" if training and not model.training else "it is"
        raise LaminaError(f"{type(model).__name__} cannot be folded while {where} in training mode: model.eval()")
    for path, norm in inside.items():
        if isinstance(norm, PRepBN) and not norm.lam.is_meta and float(norm.lam) > 0:
            raise LaminaError(
                f"{path} still blends in {float(norm.lam):.3g} of the norm it began as, which evaluation and folding "
                "leave out: train until lam is 0 (decay_fraction of the training), or call set_progress(1.0)"
            )


def _verify(model: nn.Module, decision: FoldDecision, batch: Batch) -> None:
    """Run a folded copy beside the model.

    Raises:
        LaminaError: their outputs differ by more than rounding.
    """
    tensor = next(iter(model.parameters()))
    batch = to_device(batch, tensor.device)
    folded = Fold().apply(copy.deepcopy(model), decision, Lineage())
    unseeded = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with unseeded, torch.no_grad(), anatomy.undisturbed(model):
        state = torch.random.get_rng_state()
        expected = [*tensors_in((call(model, batch),))]
        torch.random.set_rng_state(state)
        found = [*tensors_in((call(folded, batch),))]
    # Folding rounds once more than the model does; a mistake is off by a share of the output.
    tolerance = min(1e4 * torch.finfo(tensor.dtype).eps, 0.2)
    for a, b in zip(expected, found, strict=True):
        if not a.is_floating_point() or torch.equal(a, b):
            continue
        finite = a[a.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        # What is equal may be infinite: the logits of forbidden words.
        off = float((a - b)[a != b].abs().max())
        if not off <= tolerance * max(largest, 1e-3):
            raise LaminaError(
                f"a folded copy of {type(model).__name__} is off by {off:.2g} of outputs up to {largest:.2g} on this "
                "batch: its forward must be random, or depend on values"
            )


def into_consumers(model: nn.Module, norm_path: str, layer_paths: Iterable[str]) -> None:
    """Fold a norm into all the layers that read it, in place, in float64; the norm becomes an identity."""
    norm = anatomy.get(model, norm_path)
    with torch.no_grad():
        scale, shift = norm_scale_and_shift(norm, torch.float64)
        for path in layer_paths:
            layer: Any = anatomy.get(model, path)
            names = (
                ("in_proj_weight", "in_proj_bias") if isinstance(layer, nn.MultiheadAttention) else ("weight", "bias")
            )
            weight, bias = getattr(layer, names[0]), getattr(layer, names[1])
            transposed = type(layer).__name__ == HUGGING_FACE_LINEAR
            groups = getattr(layer, "groups", 1)
            made = fold_into_consumer(weight, bias, scale, shift, transposed=transposed, groups=groups)
            _set(layer, names, made, weight)
    anatomy.swap(model, norm_path, nn.Identity().train(norm.training), all=True)


def into_affine(model: nn.Module, norm_path: str) -> None:
    """Put a scale and shift in the place of a norm."""
    norm = anatomy.get(model, norm_path)
    like = next(p for p in norm.parameters())
    with torch.no_grad():
        scale, shift = (t.to(like.dtype) for t in norm_scale_and_shift(norm, torch.float64))
    anatomy.swap(model, norm_path, ChannelAffine(scale, shift).train(norm.training), all=True)


def into_producer(model: nn.Module, norm_path: str, layer_path: str) -> None:
    """Fold a norm into the layer before it, in place, in float64; the norm becomes an identity."""
    norm, layer = anatomy.get(model, norm_path), anatomy.get(model, layer_path)
    if isinstance(layer, HeldConv):
        layer = plain(layer)
        anatomy.swap(model, layer_path, layer, all=True)
    old, bias = layer.weight, layer.bias
    assert isinstance(old, Parameter)
    assert bias is None or isinstance(bias, Parameter)
    with torch.no_grad():
        scale, shift = norm_scale_and_shift(norm, torch.float64)
        groups = getattr(layer, "groups", 1)
        made = fold_into_producer(old, bias, scale, shift, transposed=is_transposed(layer), groups=groups)
    _set(layer, ("weight", "bias"), made, old)
    anatomy.swap(model, norm_path, nn.Identity().train(norm.training), all=True)


def _set(layer: nn.Module, names: tuple[str, str], values: tuple[Tensor, Tensor], old: Parameter) -> None:
    for name, value in zip(names, values, strict=True):
        setattr(layer, name, Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))
