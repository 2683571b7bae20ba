"""Another representation for a radiance field, wherever it stands in a model; what fits of its networks goes along.

What comes out says nothing yet: the objective `volume_distillation` teaches it, with the model as it was as teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from lamina import anatomy
from lamina.batches import Batch
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@dataclass(frozen=True)
class ConvertFieldDecision:
    """Which fields become what."""

    paths: tuple[str, ...]
    """The fields to replace; "" is the model itself."""
    to: dict[str, Any]
    """Node of the new field, bound and dim included."""
    carried: tuple[tuple[str, str], ...]
    """(new, old) names below a field of the parameters that are handed over."""
    frozen: bool = False
    """Whether these stay as they are."""
    seed: int = 0
    """Of the weights that are drawn."""


@register("pass", source="Fang et al., One is All (AAAI 2023), arXiv 2211.15977, section 4.1")
class ConvertField:
    """Replace every radiance field of a model by one of another representation, in the same box.

    The networks for geometry and colour start from the old field's where names and shapes match (hash and MLP: both;
    low-rank: colour), with their optimizer state; all else is fresh. To be followed by `volume_distillation`.

    Args:
        to: the new field, a name or node: hash_field, mlp_field, low_rank_field, grid_field, or one of your own.
        freeze: leave what was handed over as it is.
        seed: of the fresh weights.
    Raises:
        AnatomyError: the model has no field.
        LaminaError: the node sets another bound or dim than the old field's.
    Source: as registered.
    Example:
        >>> from lamina.nn.fields import GridField
        >>> from lamina.rewrite import rewrite
        >>> type(rewrite(GridField(resolution=4), ConvertField({"name": "mlp_field", "width": 8}))).__name__
        'MLPField'
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(self, to: Annotated[Node, Slot("field")], *, freeze: bool = False, seed: int = 0) -> None:
        if not isinstance(to, (str, Mapping)):
            raise LaminaError(
                f"convert_field takes the name or node of a field, which a file can hold, not a {type(to).__name__}"
            )
        self.to: dict[str, Any] = {"name": to} if isinstance(to, str) else dict(to)
        self.freeze, self.seed = freeze, seed

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ConvertFieldDecision:
        """Find the fields, build the new one without memory, and see what of the old fits."""
        found = fields_of(model)
        if not found:
            raise AnatomyError(
                f"{type(model).__name__} has no radiance field (looked for modules with bound, geometry and color)"
            )
        boxes = {(float(f.bound), int(getattr(f, "dim", 3))) for f in found.values()}
        if len(boxes) > 1:
            raise LaminaError(f"convert_field takes fields of one bound and dim at a time, got {sorted(boxes)}")
        bound, dim = next(iter(boxes))
        for name, own in (("bound", bound), ("dim", dim)):
            if self.to.get(name, own) != own:
                raise LaminaError(f"the field has {name} {own:g} and the new one {self.to[name]}: leave it out")
        node = {**self.to, "bound": bound, "dim": dim}
        with torch.device("meta"):
            new = _build(node)
        carried = [name for name in _networks(new) if all(_fits(name, new, f) for f in found.values())]
        return ConvertFieldDecision(tuple(found), node, tuple((n, n) for n in carried), self.freeze, self.seed)

    def apply(self, model: nn.Module, decision: ConvertFieldDecision, lineage: Lineage) -> nn.Module:
        """Put the new fields in place; return the model, or its successor where it was itself the field."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(decision.seed)
            for path in decision.paths:
                old = model.get_submodule(path)
                like = next(old.parameters(), torch.empty(0))
                with torch.device(like.device):
                    new = _build(decision.to)
                new.to(dtype=like.dtype).train(old.training)
                _hand_over(new, old, decision, lineage)
                if not path:
                    return new
                anatomy.swap(model, path, new, all=True)
        return model


def fields_of(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a model by path: the outermost modules with `bound`, `geometry` and `color`."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        inside = any(not p or path.startswith(f"{p}.") for p in found)
        if not inside and hasattr(module, "bound") and all(callable(getattr(module, n, None)) for n in ("geometry", "color")):  # fmt: skip  # noqa: E501
            found[path] = module
    return found


def _build(node: Mapping[str, Any]) -> nn.Module:
    made: nn.Module = factory("field", node)()
    return made


def _networks(field: nn.Module) -> list[str]:
    """Name the parameters of the two small networks: they read a feature, not a place."""
    return [name for name, _ in field.named_parameters() if name.partition(".")[0].endswith("_net")]


def _fits(name: str, new: nn.Module, old: nn.Module) -> bool:
    known = dict(old.named_parameters())
    return name in known and known[name].shape == new.get_parameter(name).shape


def _hand_over(new: nn.Module, old: nn.Module, decision: ConvertFieldDecision, lineage: Lineage) -> None:
    for name, before in decision.carried:
        parameter, origin = new.get_parameter(name), old.get_parameter(before)
        with torch.no_grad():
            parameter.copy_(origin)
        parameter.requires_grad_(origin.requires_grad and not decision.frozen)
        lineage.derive(parameter, origin)
