"""Fold norms with fixed statistics into the layers around them, for deployment: same outputs, fewer layers.

    model = rewrite(model.eval(), Fold())                     # a batch norm goes into the convolution before it

Source: You et al. (2024), arXiv 2305.11624, section 2 (deploy mode).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from lamina import anatomy
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.registry import register
from lamina.rewrite._conv_bn_block import ConvBNBlock, HeldConv, is_transposed, plain
from lamina.rewrite._conv_bn_pairs import find_pairs
from lamina.rewrite._folding import fold_into_producer, norm_scale_and_shift


@dataclass(frozen=True)
class NormFold:
    """Where one norm goes."""

    into: Literal["producer"]
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
        folded = [f"  {path} -> {', '.join(n.modules)} ({n.why})" for path, n in self.norms.items()]
        return "\n".join([*folded, *(f"  stays: {path}: {why}" for path, why in self.skipped.items())])


@register("pass", source="You et al. 2024")
class Fold:
    """Fold each batch norm into the convolution or linear layer before it; the model must be in evaluation mode.

    One way, and for inference: a folded weight trained on takes steps 1 / k^2 as large (k = gamma / sigma). The layer
    gets a bias if it has none; the norm's place is taken by an identity. Folds in float64 and casts back. Blocks of
    `ConvBN` become ordinary layers.

    Args:
        match: pattern of the norms' paths; default all.
    Raises:
        AnatomyError: no batch norm, or none that can be folded; the message says why.
        LaminaError: the model, or one of the norms, is in training mode.
    Source: You et al. (2024), arXiv 2305.11624, section 2.
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
        pairs = find_pairs(model, data, self.match)
        training = [path for path in pairs.found if anatomy.get(model, path).training]
        if model.training or training:
            where = f"its norm {training[0]} is" if training and not model.training else "it is"
            raise LaminaError(f"{type(model).__name__} cannot be folded while {where} in training mode: model.eval()")
        if not pairs.found:
            why = "; ".join(f"{path}: {reason}" for path, reason in list(pairs.skipped.items())[:3])
            raise AnatomyError(f"no norm of {type(model).__name__} can be folded: {why}")
        norms = {p: NormFold("producer", (layer,), f"alone reads {layer}") for p, layer in pairs.found.items()}
        return FoldDecision(norms, pairs.skipped)

    def apply(self, model: nn.Module, decision: FoldDecision, lineage: Lineage) -> nn.Module:
        """Fold; the new weights are new Parameters, for which no optimizer state would be right."""
        for path, chosen in decision.norms.items():
            into_producer(model, path, chosen.modules[0])
        return model


def into_producer(model: nn.Module, norm_path: str, layer_path: str) -> None:
    """Fold a batch norm into the layer before it, in place, in float64; the norm becomes an identity."""
    norm, layer = anatomy.get(model, norm_path), anatomy.get(model, layer_path)
    if isinstance(layer, HeldConv):
        layer = plain(layer)
        anatomy.swap(model, layer_path, layer, all=True)
    assert isinstance(norm, (_BatchNorm, ConvBNBlock))
    old, bias = layer.weight, layer.bias
    assert isinstance(old, Parameter)
    assert bias is None or isinstance(bias, Parameter)
    with torch.no_grad():
        scale, shift = norm_scale_and_shift(norm, torch.float64)  # type: ignore[arg-type]
        groups = getattr(layer, "groups", 1)
        new, moved = fold_into_producer(old, bias, scale, shift, transposed=is_transposed(layer), groups=groups)
    layer.weight = Parameter(new.to(old.dtype), requires_grad=old.requires_grad)
    layer.bias = Parameter(moved.to(old.dtype), requires_grad=old.requires_grad)
    anatomy.swap(model, norm_path, nn.Identity().train(norm.training), all=True)
