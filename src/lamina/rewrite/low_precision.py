"""Let the blocks of a transformer train on float8 numbers and keep their activations in a byte each.

    model = rewrite(model, LowPrecision())          # the very parameters, the same names
    ...                                             # train, in bf16 or float32; `model.eval()` is the plain model

Source: Xi et al., COAT (2025), arXiv 2410.19313, section 5.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from lamina import anatomy
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError
from lamina.float8 import Format
from lamina.lineage import Lineage
from lamina.nn.float8 import (
    Float8Activation,
    Float8GatedMLP,
    Float8LayerNorm,
    Float8Linear,
    Float8RMSNorm,
    Formats,
    save_in_float8,
)
from lamina.nn.float8.activation import Function
from lamina.registry import register
from lamina.rewrite._float8_places import GatedPlan, NormKind, find_places, norm_eps
from lamina.rewrite._fused_layer import leave_fused_path


@dataclass(frozen=True)
class LowPrecisionDecision:
    """Which parts train on float8, by path, and how numbers are rounded."""

    linear: tuple[str, ...]
    norm: dict[str, NormKind]
    activation: dict[str, Function]
    gated_mlp: dict[str, GatedPlan]
    fallback: tuple[str, ...]
    """Unknown modules, of which what autograd saves is kept in float8."""
    group: int
    forward: Format
    backward: Format
    kept_input: tuple[str, ...] = ()
    """Of the linear layers, those whose input is kept as it is: attention has it anyway."""
    stays: dict[str, str] = field(default_factory=dict)
    """Why a part stays as it is, by path."""

    def table(self) -> str:
        """Word the decision for people."""
        lines = [f"  {p}: linear" + (", input kept" if p in self.kept_input else "") for p in self.linear]
        lines += [f"  {p}: {kind}" for table in (self.norm, self.activation) for p, kind in table.items()]
        lines += [f"  {p}: gated network ({plan.function})" for p, plan in self.gated_mlp.items()]
        lines += [f"  {p}: what it saves" for p in self.fallback]
        return "\n".join([*lines, *(f"  stays: {p}: {why}" for p, why in self.stays.items())])


@register("pass", source="Xi et al., COAT (2025), arXiv 2410.19313")
class LowPrecision:
    """Make a transformer's blocks train on float8: linear layers multiply it, and all activations are kept in it.

    For models whose activations do not fit: what a block of Llama's kind keeps for the backward pass shrinks to 0.6 of
    bfloat16's. Inputs of linear layers share one scale a tensor, what goes into norms, activations and gates one for
    every 16 numbers. Parameters stay the very same, under the same names, with their optimizer state; evaluation is the
    plain model. Attention between tokens, residual stream, embeddings and head stay. Branches that are not recognised
    (convolutions, experts) keep what they save in float8, if `fallback`. Memory is saved, not time: see `Float8Linear`.

    Args:
        group: numbers with one scale outside linear layers; 0: one scale for the tensor.
        forward: format of activations and weights, `e4m3` or `e5m2`.
        backward: format of gradients in products.
        skip: paths or patterns that stay; "head" is the output projection: leave it out of `skip`, and it trains on
            float8 as well.
        fallback: treat unknown branches by what they save.
    Raises:
        AnatomyError: no blocks, or nothing in them to change. LaminaError: no such format; activation checkpointing.
    Source: arXiv 2410.19313, section 5 and figure 4.
    Example:
        >>> from lamina.models import Transformer
        >>> from lamina.rewrite import rewrite
        >>> model = rewrite(Transformer(2, 16, 2, vocabulary=32, context=8, norm="rms_norm"), LowPrecision())
        >>> type(model.blocks[0].norm1).__name__
        'Float8RMSNorm'
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        group: int = 16,
        forward: Format = "e4m3",
        backward: Format = "e5m2",
        skip: Sequence[str] = ("head",),
        fallback: bool = True,
    ) -> None:
        self.formats, self.skip, self.fallback = Formats(forward, backward, group), tuple(skip), fallback

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> LowPrecisionDecision:
        """Find the blocks and their parts; modules of unknown classes are called once on random numbers."""
        model = bare(model)
        found = find_places(model, self._skips, self.fallback)
        for path, module in model.named_modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                raise LaminaError(
                    f"LowPrecision keeps activations in float8, and {path or type(model).__name__} does not keep them "
                    "at all (activation checkpointing): switch it off, or do without this pass"
                )
        head = anatomy.dissect(model).head
        if head is not None and not self._skips(head) and "head" not in self.skip:
            found.linear += [head] if type(anatomy.get(model, head)) is nn.Linear else []
        if not (found.linear or found.norm or found.activation or found.gated_mlp or found.fallback):
            why = "; ".join(f"{path}: {reason}" for path, reason in list(found.stays.items())[:3])
            raise AnatomyError(
                f"nothing in the blocks of {type(model).__name__} can train on float8 ({why or 'skipped'})"
            )
        f = self.formats
        return LowPrecisionDecision(
            tuple(dict.fromkeys(found.linear)),
            found.norm,
            found.activation,
            found.gated_mlp,
            tuple(dict.fromkeys(found.fallback)),
            f.group,
            f.forward,
            f.backward,
            tuple(dict.fromkeys(found.kept_input)),
            found.stays,
        )

    def apply(self, model: nn.Module, decision: LowPrecisionDecision, lineage: Lineage) -> nn.Module:
        """Put the float8 modules in place, round the very parameters of the old ones."""
        formats = Formats(decision.forward, decision.backward, decision.group)
        # Outer modules first: a module that is made anew shares the inner ones.
        for path in decision.fallback:
            _swap(model, path, save_in_float8(anatomy.get(model, path), formats))
        for path, plan in decision.gated_mlp.items():
            old = anatomy.get(model, path)
            names = (plan.gate, plan.up, plan.down)
            layers = {n: m for n, m in old.named_children() if n in names}
            dropout = None if plan.dropout is None else old.get_submodule(plan.dropout)
            new = Float8GatedMLP.around(layers, names, plan.function, formats, dropout, plan.dropout or "dropout")  # type: ignore[arg-type]
            _swap(model, path, new)
        for path in decision.linear:
            layer = anatomy.get(model, path)
            _swap(model, path, Float8Linear.of(layer, formats, keep_input=path in decision.kept_input))  # type: ignore[arg-type]
        for path, kind in decision.norm.items():
            _swap(model, path, _norm(anatomy.get(model, path), kind, formats))
        for path, function in decision.activation.items():
            _swap(model, path, Float8Activation(function, group=decision.group, forward=decision.forward))
        return model

    def _skips(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.skip)


def _swap(model: nn.Module, path: str, new: nn.Module) -> None:
    anatomy.swap(model, path, new.train(anatomy.get(model, path).training), all=True)
    leave_fused_path(model, path.rpartition(".")[0])


def _norm(old: nn.Module, kind: NormKind, formats: Formats) -> nn.Module:
    weight, bias, eps = getattr(old, "weight", None), getattr(old, "bias", None), norm_eps(old)
    assert eps is not None
    shape = getattr(old, "normalized_shape", None)
    width = int(shape[0]) if shape is not None else len(weight)  # type: ignore[arg-type]
    if kind == "rms_norm":
        return Float8RMSNorm.of(weight, width, eps, formats)
    return Float8LayerNorm.of(weight, bias, width, eps, formats)
