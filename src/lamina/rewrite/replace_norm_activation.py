"""Replace every batch norm and the activation after it by one layer that is both.

    model = rewrite(model, ReplaceNormActivation(options={"variant": "b0"}))
    print(ReplaceNormActivation().decide(model).table())          # only look: pairs, lone norms, what stays and why

Source: Liu, Brock, Simonyan, Le, Evolving Normalization-Activation Layers (2020), arXiv 2004.02967, section 5.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lamina import anatomy, registry
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError, RecipeError, nearest
from lamina.lineage import Lineage
from lamina.registry import register
from lamina.rewrite._norm_activation_edit import check, leave_out
from lamina.rewrite._norm_activation_pairs import (
    ACTIVATIONS,
    FUNCTIONAL,
    ActivationCall,
    NormCall,
    Seen,
    candidates,
    joint_activation,
    kind_reason,
    look,
    name_of,
)
from lamina.rewrite._replace_evonorm import batch_norm_to_fused


@dataclass(frozen=True)
class ReplaceNormActivationDecision:
    """Which norms become what, and where an activation goes."""

    pairs: tuple[tuple[str, str], ...]
    """(path of the norm, path of the activation after it or "functional")."""
    lone: tuple[str, ...]
    """Norms that no activation follows: gain and shift are left of them."""
    refused: dict[str, str]
    """Why a norm stays as it is, by its path."""
    new: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of the new module's constructor, besides its width and `nonlinearity`."""
    removed: tuple[str, ...] = ()
    """Activation modules all of whose calls are paired: they become identities."""
    edited: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By block, which activation calls of its forward (counted from 0) are left out: functions, shared modules."""
    before_sum: tuple[str, ...] = ()
    """Lone norms at the end of a branch whose sum is activated: the mark of a post-activation net."""

    def table(self) -> str:
        """Word the decision for people."""
        lines = [f"{len(self.pairs)} pairs become {self.new}, {len(self.lone)} norms a gain and a shift"]
        lines += [f"  {norm} + {activation}" for norm, activation in self.pairs]
        lines += [f"  {norm}: no activation follows" for norm in self.lone]
        lines += [f"  forward of {path or 'the model'} is re-traced" for path in self.edited]
        lines += [f"  stays: {path}: {why}" for path, why in self.refused.items()]
        if self.before_sum:
            lines.append(
                f"post-activation net ({', '.join(self.before_sum)}): the activation after each sum stays; the paper "
                "did not test this"
            )
        return "\n".join(lines)


@register("pass", source="Liu et al. 2020, arXiv 2004.02967")
class ReplaceNormActivation:
    """Fuse each batch norm and the activation that alone reads it into one layer; other norms lose their statistics.

    For nets with the norm before the convolution (pre-activation). In others the last norm of a branch becomes a gain
    and a shift, and the activation after the sum stays, which the paper did not test. Gain and shift follow with their
    optimizer state, the running variance where the new layer has one; outputs change, so train afterwards.

    Pairs are found by torch.fx, in the whole model or else in those of its parts that can be traced. An activation that
    is a function, or a module that is used elsewhere as well, is left out of the forward of the block that calls it;
    such a block is re-traced, keeps its names, and cannot be pickled (saving and copying work).

    Args:
        new: registered norm that takes `nonlinearity`, built as new(num_features, nonlinearity=, **options).
        options: for it; by default the S0 variant.
        activations: names of those that may be fused; the new layer does not imitate them.
        match: pattern of the norms' paths, such as `layer4.*`; default all.
    Raises:
        RecipeError: an unknown activation, a norm without `nonlinearity`, or an option that it does not have.
        AnatomyError: no batch norm, or none that an activation follows; the message says why.
    Source: Liu et al. (2020), arXiv 2004.02967, section 5. Deviation: eps and momentum are the new layer's own.
    Example:
        >>> from lamina.rewrite import rewrite
        >>> rewrite(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)), ReplaceNormActivation())[:2]
        Sequential(
          (0): EvoNorm(8, variant='s0', eps=1e-05, groups=8)
          (1): Identity()
        )
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        new: str = "evonorm",
        *,
        options: Mapping[str, Any] | None = None,
        activations: Sequence[str] = ("relu", "silu", "hardswish"),
        match: str | None = None,
    ) -> None:
        for name in activations:
            if name not in ACTIVATIONS:
                raise RecipeError(f"no activation is called {name!r}{nearest(name, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}")  # fmt: skip  # noqa: E501
        if not activations:
            raise RecipeError("activations names none: there would be no pair to fuse")
        self.new, self.options, self.activations, self.match = new, dict(options or {}), tuple(activations), match

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ReplaceNormActivationDecision:
        """Trace the model and say of every batch norm what becomes of it; changes nothing."""
        _check_options(self.new, self.options)
        model = bare(model)
        norms = candidates(model, self.match)
        refused = {path: reason for path, m in norms.items() if (reason := kind_reason(m))}
        joint = {p: f"{p}.act" for p, m in norms.items() if p not in refused and self._is_joint_pair(m)}
        seen = look(model, {p: m for p, m in norms.items() if p not in refused and p not in joint}, self.activations)
        found = _Sorted(seen, [p for p in norms if p not in joint], refused)
        removed, edited = _feasible(model, found)
        if not found.pairs and not joint:
            why = "; ".join(f"{path}: {reason}" for path, reason in [*found.refused.items()][:3])
            why = why or f"it has {', '.join(found.lone)} without one"
            asked = ", ".join(self.activations)
            raise AnatomyError(f"no batch norm of {type(model).__name__} is followed by one of {asked} alone: {why}")
        with torch.device("meta"):
            for path in (*found.pairs, *joint, *found.lone):
                _fused(norms[path], self.new, self.options, path not in found.lone, Lineage())
        paired = {path: calls[0].path for path, calls in found.pairs.items()} | joint
        return ReplaceNormActivationDecision(
            tuple((path, paired[path]) for path in norms if path in paired),
            tuple(found.lone),
            {path: found.refused[path] for path in norms if path in found.refused},
            self.new,
            dict(self.options),
            removed,
            edited,
            tuple(path for path in found.lone if path in found.before_sum),
        )

    def apply(self, model: nn.Module, decision: ReplaceNormActivationDecision, lineage: Lineage) -> nn.Module:
        """Leave the activations out, then put the fused layers in place of the norms."""
        for path, ordinals in decision.edited.items():
            leave_out(anatomy.get(model, path), ordinals)
        for path in decision.removed:
            anatomy.swap(model, path, nn.Identity().train(anatomy.get(model, path).training), all=True)
        for path in (*(norm for norm, _ in decision.pairs), *decision.lone):
            old = anatomy.get(model, path)
            with torch.device(_device(old, model)):
                new = _fused(old, decision.new, decision.options, path not in decision.lone, lineage)
            anatomy.swap(model, path, new, all=True)
        return model

    def _is_joint_pair(self, norm: nn.Module) -> bool:
        inner = joint_activation(norm)
        return inner is not None and name_of(inner) in self.activations


class _Sorted:
    """Norms by what becomes of them: all calls of one must agree."""

    def __init__(self, seen: Seen, norms: Sequence[str], refused: Mapping[str, str]) -> None:
        self.seen, self.refused = seen, dict(refused)
        self.pairs: dict[str, list[ActivationCall]] = {}
        self.lone: list[str] = []
        self.before_sum = {call.path for call in seen.norms if call.before_sum}
        for path in (p for p in norms if p not in refused):
            self._sort(path, [call for call in seen.norms if call.path == path])

    def _sort(self, path: str, calls: list[NormCall]) -> None:
        paired = [call.activation for call in calls if call.activation is not None]
        reason = next((call.reason for call in calls if call.reason), "")
        if not calls:
            reason = "it is not called in any part of the model that torch.fx can trace"
        elif paired and len(paired) < len(calls):
            reason = "an activation follows at some of its calls only"
        if reason:
            self.refused[path] = reason
        elif paired:
            self.pairs[path] = paired
        else:
            self.lone.append(path)

    def paired_calls(self) -> list[ActivationCall]:
        return [call for calls in self.pairs.values() for call in calls]

    def refuse(self, calls: Sequence[ActivationCall], reason: str) -> None:
        for path in [p for p, own in self.pairs.items() if any(c in calls for c in own)]:
            self.refused[path] = reason
            del self.pairs[path]


def _feasible(model: nn.Module, found: _Sorted) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Return (modules to remove, calls to leave out by block); pairs for which neither can be done are refused."""
    while True:
        paired = found.paired_calls()
        removed = _wholly_paired(model, found.seen, paired)
        edited: dict[str, set[int]] = {}
        for call in paired:
            if call.path not in removed:
                edited.setdefault(call.block, set()).add(call.ordinal)
        failed = False
        for block, ordinals in edited.items():
            try:
                _check_calls(found.seen, paired, block, ordinals)
                check(anatomy.get(model, block), sorted(ordinals))
            except AnatomyError as error:
                calls = [c for c in paired if c.block == block and c.path not in removed]
                found.refuse(calls, f"its activation cannot be left out: {error}")
                failed = True
        if not failed:
            return tuple(removed), {block: tuple(sorted(o)) for block, o in edited.items()}


def _check_calls(seen: Seen, paired: Sequence[ActivationCall], block: str, ordinals: Iterable[int]) -> None:
    """Refuse a call that is paired at one run of its block and not at another."""
    for ordinal in ordinals:
        runs = [c for c in seen.activations if (c.block, c.ordinal) == (block, ordinal)]
        if len(runs) > sum((c.block, c.ordinal) == (block, ordinal) for c in paired):
            raise AnatomyError(f"{block} runs several times, and a norm precedes it at some only")


def _wholly_paired(model: nn.Module, seen: Seen, paired: Sequence[ActivationCall]) -> list[str]:
    """Name the activation modules that are called nowhere but behind a paired norm."""
    removed = []
    for path in dict.fromkeys(c.path for c in paired if c.path != FUNCTIONAL):
        module = anatomy.get(model, path)
        places = [p for p, m in model.named_modules(remove_duplicate=False) if m is module]
        seen_all = all(any(p.startswith(f"{part}.".lstrip(".")) for part in seen.parts) for p in places)
        calls = [c for c in seen.activations if c.path == path]
        if seen_all and len(calls) == sum(c.path == path for c in paired):
            removed.append(path)
    return removed


def _device(norm: nn.Module, model: nn.Module) -> torch.device:
    tensors = itertools.chain(norm.parameters(), norm.buffers(), model.parameters())
    return next((t.device for t in tensors), torch.device("cpu"))


def _fused(old: nn.Module, new: str, options: Mapping[str, Any], nonlinearity: bool, lineage: Lineage) -> nn.Module:
    made = batch_norm_to_fused(old, new, {**options, "nonlinearity": nonlinearity}, lineage)
    return made.train(old.training)


def _check_options(new: str, options: Mapping[str, Any]) -> None:
    accepted = inspect.signature(registry.find("norm", new)).parameters
    if "nonlinearity" not in accepted:
        raise RecipeError(f"{new} is no activation of its own (it takes no nonlinearity); evonorm is")
    for name in options:
        if name == "nonlinearity":
            raise RecipeError("nonlinearity is not an option here: what follows each norm decides it")
        if name not in accepted:
            raise RecipeError(f"{new} has no option {name!r}{nearest(name, accepted)}; it has {', '.join(accepted)}")
    try:
        registry.find("norm", new)(1, **options)
    except (TypeError, ValueError) as error:
        raise LaminaError(f"{new} cannot be built with {dict(options)}: {error}") from error
