"""Replace one kind of layer by another; weights and optimizer state go along where a map between the two exists.

The maps are the functions registered by `lamina.rewrite.conversion`. Two roles are found by anatomy, not by type:
`head`, the last projection, and `attention` (see `lamina.rewrite.replace_attention`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lamina import anatomy, registry
from lamina.batches import Batch
from lamina.errors import AnatomyError, LaminaError, RecipeError, nearest
from lamina.lineage import Lineage
from lamina.registry import register
from lamina.rewrite import _replace_coordinate_conv as _replace_coordinate_conv
from lamina.rewrite import _replace_equilibrium as _replace_equilibrium
from lamina.rewrite import _replace_evonorm as _replace_evonorm
from lamina.rewrite import _replace_fourier_head as _replace_fourier_head
from lamina.rewrite import _replace_hypercomplex as _replace_hypercomplex
from lamina.rewrite import _replace_multigrid as _replace_multigrid
from lamina.rewrite import _replace_pattention as _replace_pattention
from lamina.rewrite import _replace_recurrent as _replace_recurrent
from lamina.rewrite._fused_layer import leave_fused_path
from lamina.rewrite._replace_norm import norm_to_norm
from lamina.rewrite.conversion import HEAD, ROLES, Conversion, find_conversion, role_of, targets


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
    untied: tuple[str, ...] = ()
    """Parameters that were shared with a replaced layer, and are not any more (the embedding of a tied head)."""


@register("pass", source="Ba, Kiros, Hinton (2016), arXiv 1607.06450; Yu et al. (2022), arXiv 2111.11418")
class Replace:
    """Replace every layer of one kind by another, keeping shapes; the rest of the model is not touched.

    Recurrent nets hand over their weights (biases summed, gates re-ordered), norms their gain and shift where the
    new one has them; running statistics are dropped. What is copied keeps its optimizer state.

    Args:
        old: `head` (the last projection), `attention`, `linear`, `conv2d`, `lstm`, `batch_norm` or another key of
            `lamina.rewrite.conversion.ROLES`, a registered norm, or the name of a norm class that the model uses
            (`LlamaRMSNorm`).
        new: registered name of the replacement; for `head` and `linear` any layer called like `nn.Linear(in, out)`.
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
        _check_options(self.old, self.new, self.options, next(iter(found.values())))
        with torch.device("meta"):
            for module in found.values():
                _convert(module, self.old, self.new, self.options, Lineage())
        untied = _shared_outside(model, list(found.values()))
        return ReplaceDecision(tuple(found), self.old, self.new, dict(self.options), seed=self.seed, untied=untied)

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
                    new = _convert(old, decision.old, decision.new, decision.options, lineage)
                if not path:
                    return new
                anatomy.swap(model, path, new, all=True)
                leave_fused_path(model, path.rpartition(".")[0])
        return model


def _find(model: nn.Module, old: str, match: str | None) -> dict[str, nn.Module]:
    if old == HEAD:
        path = anatomy.find_head(model)
        found = {path: anatomy.get(model, path)}
        return _matching(model, old, match, found)
    known = _types(old)
    here = {type(m).__name__ for m in model.modules()}
    found = {p: m for p, m in model.named_modules() if (type(m) in known if known else type(m).__name__ == old)}
    if not known and not found:
        choices = {*ROLES, *registry.names("norm"), "attention", HEAD, *here}
        raise LaminaError(
            f"no kind of layer is called {old!r}, and {type(model).__name__} has none{nearest(old, choices)}"
        )
    if not found:
        raise AnatomyError(f"{type(model).__name__} has no {old} to replace; it has {', '.join(sorted(here))}")
    return _matching(model, old, match, found)


def _matching(model: nn.Module, old: str, match: str | None, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
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


def _convert(module: nn.Module, old: str, new: str, options: Mapping[str, Any], lineage: Lineage) -> nn.Module:
    """Build the successor of a module, in its dtype and mode, on the device of the context."""
    made = _conversion(module, old, new)(module, new, options, lineage)
    return made.train(module.training)


def _conversion(module: nn.Module, old: str, new: str) -> Conversion:
    role = HEAD if old == HEAD else role_of(module)
    exact = find_conversion(role, new)
    if exact is not None:
        return exact
    is_norm = "norm" in type(module).__name__.lower()
    allowed = targets(role) | set(registry.names("norm") if is_norm else ())
    if not allowed:
        olds = ", ".join(sorted({*(r for r in ROLES if targets(r)), "attention", "linear", HEAD, "any norm"}))
        raise AnatomyError(f"a {type(module).__name__} cannot be replaced; these can: {olds}")
    if not is_norm or (new not in allowed and ":" not in new):
        raise LaminaError(
            f"a {type(module).__name__} cannot become {new!r}{nearest(new, allowed)}; it can become "
            f"{', '.join(sorted(allowed))}"
        )
    return norm_to_norm


def _check_options(old: str, new: str, options: Mapping[str, Any], example: nn.Module) -> None:
    _conversion(example, old, new)
    kind = next((k for k in ("layer", "mixer") if new in registry.names(k)), "norm")
    if ":" in new:
        kind = "norm" if "norm" in type(example).__name__.lower() else "layer"
    accepted = inspect.signature(registry.find(kind, new)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    for name in options:
        if name not in accepted:
            raise RecipeError(f"{new} has no option {name!r}{nearest(name, accepted)}; it has {', '.join(accepted)}")


def _shared_outside(model: nn.Module, replaced: list[nn.Module]) -> tuple[str, ...]:
    """Name the parameters of the rest of the model that a replaced layer holds too."""
    going = {id(m) for module in replaced for m in module.modules()}
    taken = {id(p) for module in replaced for p in module.parameters()}
    return tuple(
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if id(module) not in going
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in taken
    )


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    for tensors in (module.parameters(), module.buffers(), model.parameters()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")
