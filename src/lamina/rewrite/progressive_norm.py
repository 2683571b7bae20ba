"""Let every layer norm of a model turn into batch norm while it is trained, so that none is left at inference.

    model = rewrite(model, ProgressiveNorm())                               # LayerNorm -> PRepBN, weights taken over
    ...                                                                     # train; `set_progress` before each step
    model = rewrite(model.eval(), Calibrate(200), Fold(), data=batches)     # statistics made exact, norms folded away

Source: Guo, Chen, Tang, Wang, SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
Re-parameterized Batch Normalization (ICML 2024), arXiv 2405.11582.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina import anatomy
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.lineage import Lineage
from lamina.nn.progressive_norm import BASES, PRepBN, check_decay
from lamina.registry import register
from lamina.rewrite._fused_layer import leave_fused_path

Base = Literal["layer_norm", "rms_norm"]


@dataclass(frozen=True)
class NormPlan:
    """What one norm is, and so what its successor begins as."""

    base: Base
    features: int
    eps: float


@dataclass(frozen=True)
class ProgressiveNormDecision:
    """Which norms turn, and when."""

    norms: dict[str, NormPlan]
    """By path; a norm that stands at several paths is named once and replaced at all of them."""
    decay_fraction: float
    warm_fraction: float
    skip_init: float
    scale_init: float
    begin: float = 0.0
    """Fraction of training that is over; the other fractions are shares of what is left."""
    sync: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a norm stays as it is, by path."""

    def table(self) -> str:
        """Word the decision for people."""
        lines = [f"  {path}: {n.base} of {n.features} features" for path, n in self.norms.items()]
        return "\n".join([*lines, *(f"  stays: {path}: {why}" for path, why in self.skipped.items())])


@register("pass", source="Guo et al., SLAB (2024), arXiv 2405.11582")
class ProgressiveNorm:
    """Replace every layer norm and RMS norm over the last dimension by one that ends as batch norm (`PRepBN`).

    In training mode the outputs at the moment of the swap are the old ones; in evaluation mode they are not, as the
    new norms' statistics have seen nothing yet. `Fold` removes the norms after training.

    Args:
        decay_fraction: share of the training that is left over which the old norm fades out, 0..1. With 0.2 others met
            loss spikes and NaN; 0.8 is what was stable.
        warm_fraction: share of it before that in which the old norm stays alone.
        skip_init: start of the skip beside the batch norm: 1 for vision, 0 for language models (with scale_init=0).
        scale_init: the batch norm's gains and shifts start as the old norm's, times this.
        match: pattern of the norms' paths; default all.
        begin: fraction of training that is over when the pass runs; the trainer says so itself (`set_progress`).
        sync: take the batch norms' statistics over all processes, see `RepBN`.
    Raises:
        AnatomyError: no such norm, or none at such a path; the message says why.
        ShapeError: a layer norm over more than the last dimension.
        LaminaError: fractions with which the old norm would not fade out, or no training left.
    Source: the definition of PRepBN, arXiv 2405.11582.
    Example:
        >>> from lamina.rewrite import rewrite
        >>> type(rewrite(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), ProgressiveNorm())[1]).__name__
        'PRepBN'
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        decay_fraction: float = 0.8,
        warm_fraction: float = 0.0,
        skip_init: float = 1.0,
        scale_init: float = 1.0,
        match: str | None = None,
        begin: float = 0.0,
        sync: bool = False,
    ) -> None:
        check_decay("ProgressiveNorm", decay_fraction, warm_fraction)
        self.decay_fraction, self.warm_fraction = decay_fraction, warm_fraction
        self.skip_init, self.scale_init, self.match, self.sync = skip_init, scale_init, match, sync
        self.set_progress(begin)

    def set_progress(self, fraction: float) -> None:
        """Say how far training is when the pass runs."""
        if not 0 <= fraction < 1:
            raise LaminaError(
                f"ProgressiveNorm needs training to come, in which the old norms fade out; {fraction:g} of it is over"
            )
        self.begin = fraction

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ProgressiveNormDecision:
        """Find the norms; each foreign class is called once on random numbers to see what it computes."""
        model = bare(model)
        inside = [f"{path}." if path else "" for path, m in model.named_modules() if isinstance(m, PRepBN)]
        found = {
            path: m
            for path, m in model.named_modules()
            if path and _is_token_norm(m) and not path.startswith(tuple(inside))
        }
        if not found:
            raise AnatomyError(f"{type(model).__name__} has no layer norm or RMS norm over its last dimension")
        kept = {p: m for p, m in found.items() if self.match is None or fnmatch.fnmatchcase(p, self.match)}
        if not kept:
            raise AnatomyError(
                f"no norm of {type(model).__name__} stands at a path like {self.match!r}; they are at "
                f"{', '.join(found)}"
            )
        norms: dict[str, NormPlan] = {}
        skipped: dict[str, str] = {}
        for path, module in kept.items():
            plan = _plan(path, module)
            if isinstance(plan, str):
                skipped[path] = plan
            else:
                norms[path] = plan
        if not norms:
            why = "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3])
            raise AnatomyError(f"no norm of {type(model).__name__} can turn into batch norm: {why}")
        options = (self.decay_fraction, self.warm_fraction, self.skip_init, self.scale_init, self.begin, self.sync)
        return ProgressiveNormDecision(norms, *options, skipped)

    def apply(self, model: nn.Module, decision: ProgressiveNormDecision, lineage: Lineage) -> nn.Module:
        """Put the new norms in place; gains and shifts are copies, the first pair with the old optimizer state."""
        for path, plan in decision.norms.items():
            old = anatomy.get(model, path)
            new = _successor(old, plan, decision, model, lineage)
            anatomy.swap(model, path, new.train(old.training), all=True)
            leave_fused_path(model, path.rpartition(".")[0])
        return model


def _is_token_norm(module: nn.Module) -> bool:
    """Tell layer norms and RMS norms, ours and foreign, from the norms that look at more than one token."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    name = type(module).__name__.lower()
    own = list(module.parameters(recurse=False))
    vectors = bool(own) and all(p.dim() == 1 for p in own) and not any(True for _ in module.children())
    return vectors and ("layernorm" in name or "rmsnorm" in name) and _eps(module) is not None


def _eps(module: nn.Module) -> float | None:
    for name in ("eps", "variance_epsilon", "epsilon"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    if isinstance(module, nn.RMSNorm):
        dtype = torch.float32 if module.weight is None else module.weight.dtype
        return float(torch.finfo(dtype).eps)
    return None


def _plan(path: str, module: nn.Module) -> NormPlan | str:
    """Say what a norm computes, or why it is none that can turn.

    Raises:
        ShapeError: it normalises over more than the last dimension.
    """
    shape = getattr(module, "normalized_shape", None)
    if shape is not None and len(shape) != 1:
        raise ShapeError(
            f"the norm at {path!r} normalises over {tuple(shape)}, a progressive norm over the last dimension only: "
            "leave it out by match="
        )
    weight = getattr(module, "weight", None)
    features = int(shape[0]) if shape is not None else int(weight.shape[0]) if isinstance(weight, Tensor) else 0
    eps = _eps(module)
    if not features or eps is None:
        return "its size or its eps cannot be told"
    if type(module) is nn.LayerNorm:
        return NormPlan("layer_norm", features, eps)
    if type(module) is nn.RMSNorm:
        return NormPlan("rms_norm", features, eps)
    if any(p.is_meta for p in module.parameters()):
        return f"what {type(module).__name__} computes cannot be tried on the meta device"
    plans = [NormPlan("layer_norm", features, eps), NormPlan("rms_norm", features, eps)]
    same = [plan for plan in plans if _computes(module, plan)]
    return same[0] if same else f"{type(module).__name__} is neither a plain layer norm nor a plain RMS norm"


@torch.no_grad()
def _computes(module: nn.Module, plan: NormPlan) -> bool:
    """Whether a module of another class is that norm with its own weight and bias, over the last dimension."""
    like = next(module.parameters())
    # The middle dimension is no number of features: a norm over it would fail or differ.
    x = torch.randn(2, plan.features + 1, plan.features, generator=torch.Generator().manual_seed(0)).to(like)
    twin = BASES[plan.base](plan.features, plan.eps).to(like)
    _copy(twin, module)
    try:
        with anatomy.undisturbed(module):
            found = module(x)
    except Exception:
        # Any code may stand in a forward: then it is another kind of norm.
        return False
    tolerance = max(1e-4, 4 * torch.finfo(like.dtype).eps)
    return (
        isinstance(found, Tensor)
        and found.shape == x.shape
        and torch.allclose(found.float(), twin(x).float(), rtol=tolerance, atol=tolerance)
    )


def _copy(new: nn.Module, old: nn.Module, factor: float = 1.0) -> list[tuple[Parameter, Parameter]]:
    """Copy weight and bias where both have them; return the pairs (new, old)."""
    pairs = []
    for name in ("weight", "bias"):
        value, source = getattr(new, name, None), getattr(old, name, None)
        if isinstance(value, Parameter) and isinstance(source, Parameter):
            value.data.copy_(source.detach() * factor)
            value.requires_grad_(source.requires_grad)
            pairs.append((value, source))
    return pairs


def _successor(
    old: nn.Module, plan: NormPlan, decision: ProgressiveNormDecision, model: nn.Module, lineage: Lineage
) -> PRepBN:
    left = 1 - decision.begin
    like: Any = next((p for p in (*old.parameters(), *model.parameters())), torch.empty(0))
    with torch.device(like.device):
        new = PRepBN(
            plan.features,
            plan.base,
            plan.eps,
            decision.decay_fraction * left,
            decision.begin + decision.warm_fraction * left,
            skip_init=decision.skip_init,
            scale_init=decision.scale_init,
            sync=decision.sync,
        )
    new = new.to(like.dtype)
    # A fraction of a step is lost in half precision.
    new.lam = new.lam.float()
    for value, source in _copy(new.norm, old):
        lineage.derive(value, source)
    if any(p.requires_grad is False for p in old.parameters()):
        new.rep.skip.requires_grad_(False)
    _copy(new.rep, old, decision.scale_init)
    return new
