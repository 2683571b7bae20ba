"""Replace one kind of layer by another; weights and optimizer state go along where a map between the two exists.

Known maps: torch's recurrent nets to their layer-normalised twins, batch norm to layer norm, and any norm to any
registered norm. `attention` is a role, found by anatomy: see `lamina.rewrite.replace_attention`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lamina import anatomy, registry
from lamina.batches import Batch
from lamina.errors import AnatomyError, LaminaError, RecipeError, nearest
from lamina.lineage import Lineage
from lamina.nn import TokenBatchNorm
from lamina.registry import register
from lamina.rewrite._replace_norm import batch_norm_to_layer_norm, norm_to_norm
from lamina.rewrite._replace_recurrent import gru_to_layer_norm, lstm_to_layer_norm, rnn_to_layer_norm

Conversion = Callable[[nn.Module, str, Mapping[str, Any], Lineage], nn.Module]
"""Builds the successor of a module: (module, registered name of the new one, its options, lineage)."""

CONVERSIONS: dict[tuple[str, str], Conversion] = {
    ("lstm", "layer_norm_lstm"): lstm_to_layer_norm,
    ("gru", "layer_norm_gru"): gru_to_layer_norm,
    ("rnn", "layer_norm_rnn"): rnn_to_layer_norm,
    ("batch_norm", "layer_norm"): batch_norm_to_layer_norm,
}
"""The maps that know both ends; any other pair of norms goes through `norm_to_norm`."""

ROLES: dict[str, tuple[type[nn.Module], ...]] = {
    "lstm": (nn.LSTM,),
    "gru": (nn.GRU,),
    "rnn": (nn.RNN,),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, TokenBatchNorm),
    "group_norm": (nn.GroupNorm,),
}
"""What may be replaced under a name that is not a registered norm's own; exact types, as a subclass may differ."""


@dataclass(frozen=True)
class ReplaceDecision:
    """Which modules become what."""

    paths: tuple[str, ...]
    """Modules to replace; one that stands at several paths is named once and replaced at all of them."""
    old: str
    new: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of the new module's constructor, besides its sizes."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the tokens; only where attention is replaced."""
    prefix: int = 0
    """How many class and register tokens stand before the grid; only where attention is replaced."""
    seed: int = 0
    """Of whatever the new modules draw."""


@register("pass", source="Ba, Kiros, Hinton (2016), arXiv 1607.06450; Yu et al. (2022), arXiv 2111.11418")
class Replace:
    """Replace every layer of one kind by another, keeping shapes; the rest of the model is not touched.

    Recurrent nets hand over their weights (biases summed, gates re-ordered), norms their gain and shift where the
    new one has them; running statistics are dropped. What is copied keeps its optimizer state.

    Args:
        old: `lstm`, `gru`, `rnn`, `batch_norm`, `group_norm`, `attention`, a registered norm, or the name of a norm
            class that the model uses (`LlamaRMSNorm`).
        new: registered name of the replacement.
        match: pattern of the paths to replace, such as `encoder.*`; default all.
        options: for the new module, besides its sizes.
        grid: (rows, columns) of the tokens, for attention where it cannot be told from the model.
        seed: of whatever the new modules draw.
    Raises:
        LaminaError: a name is not known; the message lists the nearest.
        RecipeError: an option that the new module does not have, or `grid` without attention.
        AnatomyError: the model has nothing of that kind; the message lists what it has.
        ShapeError: a module that cannot be converted (`proj_size`, norms over another dimension).
    Source: Ba, Kiros, Hinton (2016) for the recurrent nets; the gains start at 1, so outputs change.
    Example:
        >>> from lamina.rewrite import rewrite
        >>> rewrite(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), Replace("layer_norm", "rms_norm"))[1]
        RMSNorm((8,), eps=1e-05, elementwise_affine=True)
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        old: str,
        new: str,
        *,
        match: str | None = None,
        options: Mapping[str, Any] | None = None,
        grid: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        if grid is not None and old != "attention":
            raise RecipeError(f"grid is for replacing attention, it means nothing for {old!r}")
        self.old, self.new, self.match, self.grid, self.seed = old, new, match, grid, seed
        self.options = dict(options or {})

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ReplaceDecision:
        """Find the modules, and try every conversion on the meta device, so that a refusal leaves no half."""
        if self.old == "attention":
            from lamina.rewrite import replace_attention

            decision = replace_attention.decide_attention(
                model, data, new=self.new, match=self.match, options=self.options, grid=self.grid
            )
            return dataclasses.replace(decision, seed=self.seed)
        found = _find(model, self.old, self.match)
        _check_options(self.new, self.options, next(iter(found.values())))
        with torch.device("meta"):
            for module in found.values():
                _convert(module, self.new, self.options, Lineage())
        return ReplaceDecision(tuple(found), self.old, self.new, dict(self.options), seed=self.seed)

    def apply(self, model: nn.Module, decision: ReplaceDecision, lineage: Lineage) -> nn.Module:
        """Put the successors in place; return the model (or, where it was itself replaced, its successor)."""
        if decision.old == "attention":
            from lamina.rewrite import replace_attention

            return replace_attention.apply_attention(model, decision, lineage)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(decision.seed)
            for path in decision.paths:
                old = model.get_submodule(path)
                with torch.device(_device(old, model)):
                    new = _convert(old, decision.new, decision.options, lineage)
                if not path:
                    return new
                anatomy.swap(model, path, new, all=True)
                _leave_fast_path(model.get_submodule(path.rpartition(".")[0]))
        return model


def _find(model: nn.Module, old: str, match: str | None) -> dict[str, nn.Module]:
    known = _types(old)
    here = {type(m).__name__ for m in model.modules()}
    found = {p: m for p, m in model.named_modules() if (type(m) in known if known else type(m).__name__ == old)}
    if not known and not found:
        choices = {*ROLES, *registry.names("norm"), "attention", *here}
        raise LaminaError(
            f"no kind of layer is called {old!r}, and {type(model).__name__} has none{nearest(old, choices)}"
        )
    if not found:
        raise AnatomyError(f"{type(model).__name__} has no {old} to replace; it has {', '.join(sorted(here))}")
    kept = {p: m for p, m in found.items() if match is None or fnmatch.fnmatchcase(p, match)}
    if not kept:
        raise AnatomyError(
            f"no {old} of {type(model).__name__} stands at a path like {match!r}; they are at {[*found]}"
        )
    return kept


def _types(old: str) -> tuple[type, ...]:
    if old in ROLES:
        return ROLES[old]
    if old in registry.names("norm"):
        target = registry.find("norm", old)
        return (target,) if isinstance(target, type) else ()
    return ()


def _convert(module: nn.Module, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the successor of a module, in its dtype and mode, on the device of the context."""
    made = _conversion(module, new)(module, new, options, lineage)
    return made.train(module.training)


def _conversion(module: nn.Module, new: str) -> Conversion:
    role = _role(module)
    exact = CONVERSIONS.get((role, new))
    if exact is not None:
        return exact
    is_norm = "norm" in type(module).__name__.lower()
    allowed = {n for r, n in CONVERSIONS if r == role} | set(registry.names("norm") if is_norm else ())
    if not allowed:
        olds = ", ".join(sorted({*(r for r, _ in CONVERSIONS), "attention", "any norm"}))
        raise AnatomyError(f"a {type(module).__name__} cannot be replaced; these can: {olds}")
    if not is_norm or (new not in allowed and ":" not in new):
        raise LaminaError(
            f"a {type(module).__name__} cannot become {new!r}{nearest(new, allowed)}; it can become "
            f"{', '.join(sorted(allowed))}"
        )
    return norm_to_norm


def _role(module: nn.Module) -> str:
    return next((role for role, types in ROLES.items() if type(module) in types), "")


def _check_options(new: str, options: Mapping[str, Any], example: nn.Module) -> None:
    _conversion(example, new)
    kind = "layer" if new in registry.names("layer") else "norm"
    accepted = inspect.signature(registry.find(kind, new)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    for name in options:
        if name not in accepted:
            raise RecipeError(f"{new} has no option {name!r}{nearest(name, accepted)}; it has {', '.join(accepted)}")


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    for tensors in (module.parameters(), module.buffers(), model.parameters()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def _leave_fast_path(parent: nn.Module) -> None:
    # In evaluation torch's encoder layer hands its norms' numbers to one fused kernel that knows layer norm only;
    # this is the attribute by which the layer itself declares that it cannot be fused.
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0
