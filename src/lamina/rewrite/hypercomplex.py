"""Make the linear layers and convolutions of a model hypercomplex, for 1/n of the weights; and fold them back.

    model = rewrite(model, Hypercomplex(n=4))                    # fresh weights: train from here
    model = rewrite(model, Hypercomplex(n=2, fit=True))          # the nearest to the trained ones: heal from here
    model = rewrite(model.eval(), FoldHypercomplex())            # plain layers again, equal outputs

Source: Grassucci, Zhang, Comminiello, PHNNs (2022), arXiv 2110.04176.
"""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lamina import anatomy
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError, RecipeError, ShapeError, nearest
from lamina.lineage import Lineage
from lamina.nn import nearest_kron_sum
from lamina.registry import register
from lamina.rewrite._replace_hypercomplex import HYPERCOMPLEX, TWINS, take_nearest, twin
from lamina.rewrite.conversion import take_over

SOURCE = "Grassucci, Zhang, Comminiello, PHNNs (2022), arXiv 2110.04176"
TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": tuple(t for t in TWINS if t is not nn.Linear),
}
"""What may be replaced; exact types, as a subclass may differ."""


@dataclass(frozen=True)
class HypercomplexLayer:
    """What one layer becomes."""

    n: int
    error: float | None = None
    """Norm of what the nearest sum of Kronecker products misses, over the weight's; None where nothing is fitted."""


@dataclass(frozen=True)
class HypercomplexDecision:
    """Which layers become hypercomplex, and which stay."""

    layers: dict[str, HypercomplexLayer]
    """By path; a module that stands at several is named once and replaced at all of them."""
    skipped: dict[str, str]
    """Why a layer stays, by its path."""
    fit: bool = False
    share_algebra: bool = False
    init: Literal["variance", "official", "algebra"] = "variance"
    seed: int = 0
    """Each layer draws from a generator seeded by this and its path."""

    def table(self) -> str:
        """Word the decision for people."""
        words = [
            f"  {path}: n={layer.n}" + ("" if layer.error is None else f", relative error {layer.error:.3f}")
            for path, layer in self.layers.items()
        ]
        return "\n".join([*words, *(f"  stays: {path}: {why}" for path, why in self.skipped.items())])


@dataclass(frozen=True)
class FoldHypercomplexDecision:
    """Which layers become plain."""

    paths: tuple[str, ...]


@register("pass", source=SOURCE)
class Hypercomplex:
    """Make linear layers and convolutions hypercomplex: 1/n of their weights, gradients and optimizer state.

    The new layers start fresh, for training from here, or, with `fit`, as near to the old ones as they can come; heal
    those with a distillation objective. Biases and their optimizer state stay. Operations and latency do not change.

    Args:
        n: components; divides the inputs and outputs of every layer that is replaced.
        types: "linear", "conv" (1-3d, and transposed 2-d).
        skip: paths or patterns of layers that stay; "first" is the layer that reads the data (the first one, unless an
            embedding stands before it), "last" the head. Depthwise convolutions and tied weights always stay.
        match: pattern of the paths to replace, such as `encoder.*`; default all.
        fit: start at the nearest sum of n Kronecker products (by SVD, exact).
        share_algebra: all layers share one A. Not with `fit`, which gives each layer its own.
        init: how fresh layers start, see `PHMLinear`.
        seed: of what fresh layers draw.
    Raises:
        ShapeError: n does not divide a layer's sizes, or it has groups; names the layer and the next n that would do.
        AnatomyError: nothing to replace. LaminaError: n below 1. RecipeError: options that contradict.
    Source: Grassucci, Zhang, Comminiello (2022), arXiv 2110.04176; the fit: Van Loan and Pitsianis, Approximation with
        Kronecker Products (1993).
    Example:
        >>> from lamina.rewrite import rewrite
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
        >>> rewrite(model, Hypercomplex(n=4))[2]
        PHMLinear(32, 32, n=4, algebra=learned, bias=True)
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        n: int = 4,
        types: Sequence[str] = ("linear", "conv"),
        *,
        skip: Sequence[str] = ("first", "last"),
        match: str | None = None,
        fit: bool = False,
        share_algebra: bool = False,
        init: Literal["variance", "official", "algebra"] = "variance",
        seed: int = 0,
    ) -> None:
        if n < 1:
            raise LaminaError(f"Hypercomplex: n is the number of components, at least 1, got {n}")
        unknown = next((t for t in types if t not in TYPES), None)
        if unknown is not None or not types:
            raise RecipeError(
                f"Hypercomplex: types are {', '.join(TYPES)}, got {unknown!r}{nearest(str(unknown), TYPES)}"
            )
        if fit and share_algebra:
            raise RecipeError("Hypercomplex: fit gives every layer its own algebra: share_algebra excludes it")
        self.n, self.types, self.skip, self.match = n, tuple(types), tuple(skip), match
        self.fit, self.share_algebra, self.init, self.seed = fit, share_algebra, init, seed

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> HypercomplexDecision:
        """Find the layers, and build each on meta, so that a refusal leaves no half."""
        model = bare(model)
        known = tuple(t for name in self.types for t in TYPES[name])
        found = {path: m for path, m in model.named_modules() if type(m) in known}
        # Once for all layers: finding the last one reads the whole model.
        ends = {
            _last(model, found) if "last" in self.skip else None: "last",
            _first(model, found) if "first" in self.skip else None: "first",
        }
        skipped = {path: why for path, m in found.items() if (why := self._stays(model, ends, path, m))}
        taken = {path: m for path, m in found.items() if path not in skipped}
        if not taken:
            here = "; ".join(f"{p}: {why}" for p, why in skipped.items()) or "it has none"
            raise AnatomyError(f"{type(model).__name__} has no {' or '.join(self.types)} layer to replace ({here})")
        layers = {path: self._decide_one(path, m) for path, m in taken.items()}
        return HypercomplexDecision(layers, skipped, self.fit, self.share_algebra, self.init, self.seed)

    def apply(self, model: nn.Module, decision: HypercomplexDecision, lineage: Lineage) -> nn.Module:
        """Put the layers in place; return the model (or, where it was itself replaced, its successor)."""
        first: nn.Module | None = None
        for path, layer in decision.layers.items():
            old: Any = anatomy.get(model, path)
            options = {"n": layer.n, "init": decision.init, "algebra_from": first if decision.share_algebra else None}
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.device(old.weight.device):
                torch.manual_seed(zlib.crc32(f"{decision.seed}:{path}".encode()))
                made = twin(old, **options)
            if decision.fit:
                take_nearest(made, old)
            first = first or made
            take_over(made, old, lineage).train(old.training)
            if not path:
                return made
            anatomy.swap(model, path, made, all=True)
        return model

    def _decide_one(self, path: str, layer: Any) -> HypercomplexLayer:
        try:
            with torch.device("meta"):
                twin(layer, n=self.n, init=self.init)
        except (ShapeError, RecipeError) as refusal:
            raise type(refusal)(f"{path or 'the model'}: {refusal} (or name the layer in `skip`)") from refusal
        error = nearest_kron_sum(layer.weight, self.n)[2] if self.fit and not layer.weight.is_meta else None
        return HypercomplexLayer(self.n, error)

    def _stays(self, model: nn.Module, ends: dict[str | None, str], path: str, layer: Any) -> str:
        """Say why a layer is not replaced; empty = it is."""
        if self.match is not None and not fnmatch.fnmatchcase(path, self.match):
            return f"not like {self.match}"
        named = next((s for s in self.skip if s not in ("first", "last") and fnmatch.fnmatchcase(path, s)), None)
        if named is not None:
            return f"skip {named}"
        if path and path in ends:
            return ends[path]
        if getattr(layer, "groups", 1) == getattr(layer, "in_channels", 0) > 1:
            return "depthwise"
        return next((f"tied to {name}" for name in _holders(model, layer)), "")


@register("pass", source=SOURCE)
class FoldHypercomplex:
    """Turn hypercomplex layers into the plain `nn.Linear` and `nn.Conv` with equal outputs, for deployment.

    Args:
        match: pattern of the paths to fold; default all.
    Raises:
        AnatomyError: there is none.
    Source: Grassucci, Zhang, Comminiello (2022), arXiv 2110.04176; exact, up to the rounding of the weight's dtype.
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "function"

    def __init__(self, match: str | None = None) -> None:
        self.match = match

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> FoldHypercomplexDecision:
        """List the hypercomplex layers."""
        model = bare(model)
        found = [path for path, module in model.named_modules() if isinstance(module, HYPERCOMPLEX)]
        paths = [p for p in found if self.match is None or fnmatch.fnmatchcase(p, self.match)]
        if not paths:
            where = f"like {self.match!r}; they are at {found}" if found else "(phm_linear, ph_conv2d, ...) to fold"
            raise AnatomyError(f"{type(model).__name__} has no hypercomplex layer {where}")
        return FoldHypercomplexDecision(tuple(paths))

    def apply(self, model: nn.Module, decision: FoldHypercomplexDecision, lineage: Lineage) -> nn.Module:
        """Put the plain layers in place; return the model (or, where it was itself replaced, its successor)."""
        for path in decision.paths:
            old: Any = anatomy.get(model, path)
            made: nn.Module = old.fold()
            if old.bias is not None:
                lineage.derive(made.bias, old.bias)  # type: ignore[arg-type]
            if not path:
                return made
            anatomy.swap(model, path, made, all=True)
        return model


def _first(model: nn.Module, found: dict[str, nn.Module]) -> str | None:
    """Return the path of the layer that reads the data; None where an embedding does."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            return None
        if path in found:
            return path
    return None


def _last(model: nn.Module, found: dict[str, nn.Module]) -> str | None:
    try:
        return anatomy.find_head(model)
    except AnatomyError:
        return next(reversed(found), None)


def _holders(model: nn.Module, layer: nn.Module) -> list[str]:
    """Name the other places where a layer's weight is held (the embedding of a tied head)."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if module is not layer
        for name, parameter in module.named_parameters(recurse=False)
        if parameter is layer.weight
    ]
