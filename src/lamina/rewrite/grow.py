"""Add pairs of keys and values to the `Pattention` layers of a model, in training too, without changing its function.

    bigger = rewrite(model, GrowParameterTokens(3.0), optimizer=optimizer)       # three times the pairs, equal outputs

Source: Wang et al., TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters (2025), arXiv
2410.23168.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lamina import anatomy
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError, nearest
from lamina.lineage import Lineage
from lamina.nn.parameter_attention import KEY_STD, Pattention, default_scale
from lamina.registry import register

SOURCE = "Wang et al., TokenFormer (2025), arXiv 2410.23168, section 3.3"

Pairs = int | float | Mapping[str, int | float]
"""A new count, a factor, or either by a pattern of the layers' paths."""


@dataclass(frozen=True)
class Growth:
    """What one layer becomes."""

    before: int
    """Pairs it has."""
    after: int
    """Pairs it will have."""


@dataclass(frozen=True)
class GrowDecision:
    """Which layers get how many pairs."""

    layers: dict[str, Growth]
    """By path; a layer that stands at several is named once."""
    value_std: float | None = None
    """Deviation of the new values; None = that of the layer's present ones."""
    seed: int = 0
    """Each layer draws from a generator seeded by this and its path."""

    def table(self) -> str:
        """Word the decision for people."""
        return "\n".join(f"  {path}: {g.before} -> {g.after} pairs" for path, g in self.layers.items())


@dataclass(frozen=True)
class GrowRandomDecision(GrowDecision):
    """Which layers get how many pairs, and what else changes."""

    key_std: float = KEY_STD
    """Deviation of the new keys."""
    rescale: bool = True
    """Whether the scale becomes that of the new count."""


@register("pass", source=SOURCE)
class GrowParameterTokens:
    """Add pairs to `Pattention` layers: the same function at this moment, more to train from here.

    The new keys are zero, so the new pairs score nothing, and the scale of the scores stays as it was; the new values
    are drawn, for with zeros there neither would ever get a gradient. Moments of the optimizer stay with the old rows.

    Args:
        pairs: a whole number: the new count; with a decimal point: a factor (rounded up); or either by a pattern of
            paths, `{"*.mixer.*": 1792, "*.feed_forward": 7168}` (the first that fits; layers that none fits stay).
        match: pattern of the paths to grow, such as `blocks.0.*`; default all.
        value_std: deviation of the new values; None = that of the layer's present values.
        seed: of the new values.
    Raises:
        AnatomyError: no such layer, a pattern that fits none, fewer pairs than there are, a layer with score "softmax"
            (a zero key adds to its normaliser), an edited scale, keys shared with a part that does not grow along.
        LaminaError: numbers out of range, a sharded model.
    Source: Wang et al. (2025), arXiv 2410.23168, section 3.3. The official code draws the new keys and changes the
        scale: that is `GrowParameterTokensRandom`.
    Example:
        >>> from lamina.nn import Pattention
        >>> from lamina.rewrite import rewrite
        >>> rewrite(nn.Sequential(Pattention(8, 8, 16)), GrowParameterTokens(3.0))[0]
        Pattention(8, 8, pairs=48, score=l2_gelu)
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "function"

    def __init__(
        self, pairs: Pairs, *, match: str | None = None, value_std: float | None = None, seed: int = 0
    ) -> None:
        _check(type(self).__name__, pairs, {"value_std": value_std})
        self.pairs, self.match, self.value_std, self.seed = pairs, match, value_std, seed

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> GrowDecision:
        """Find the layers and count; the data is not looked at."""
        layers = _find(model, self.pairs, self.match)
        for path in layers:
            layer = _layer(model, path)
            if layer.score == "softmax":
                raise AnatomyError(
                    f'{path or "the model"} scores by "softmax", where a key of zeros takes its share: pairs cannot be '
                    "added without changing the function (grow_parameter_tokens_random does not promise that)"
                )
            if self.value_std is None and not layer.value.is_meta and not layer.value.any():
                raise AnatomyError(
                    f"{path or 'the model'} has no value but zeros to take the deviation from: give value_std"
                )
        return GrowDecision(layers, self.value_std, self.seed)

    def apply(self, model: nn.Module, decision: GrowDecision, lineage: Lineage) -> nn.Module:
        """Add the pairs in place; return the model."""
        return _grow(model, decision, lineage, key_std=0.0)


@register("pass", source=f"{SOURCE}; the official code's way")
class GrowParameterTokensRandom:
    """Add pairs to `Pattention` layers as the official code does: random keys, scale of the new count. Outputs jump.

    Only to compare with, or to go on with the official recipe; see `GrowParameterTokens`.

    Args:
        pairs, match, value_std, seed: see `GrowParameterTokens`.
        key_std: deviation of the new keys; 0 leaves the change of scale alone.
        rescale: set the scale to what a fresh layer of that many pairs has.
    Raises:
        AnatomyError, LaminaError: see `GrowParameterTokens`; every score is taken.
    Source: github.com/Haiyang-W/TokenFormer, which copies old rows into a fresh model of the new size.
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        pairs: Pairs,
        *,
        key_std: float = KEY_STD,
        rescale: bool = True,
        match: str | None = None,
        value_std: float | None = None,
        seed: int = 0,
    ) -> None:
        _check(type(self).__name__, pairs, {"value_std": value_std, "key_std": key_std})
        self.pairs, self.match, self.value_std, self.seed = pairs, match, value_std, seed
        self.key_std, self.rescale = key_std, rescale

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> GrowRandomDecision:
        """Find the layers and count; the data is not looked at."""
        layers = _find(model, self.pairs, self.match)
        return GrowRandomDecision(layers, self.value_std, self.seed, self.key_std, self.rescale)

    def apply(self, model: nn.Module, decision: GrowRandomDecision, lineage: Lineage) -> nn.Module:
        """Add the pairs in place; return the model."""
        _grow(model, decision, lineage, key_std=decision.key_std)
        for path in decision.layers if decision.rescale else ():
            layer = _layer(model, path)
            layer.scale = torch.full_like(layer.scale, default_scale(layer.score, layer.pairs))
        return model


def _grow(model: nn.Module, decision: GrowDecision, lineage: Lineage, *, key_std: float) -> nn.Module:
    grown: dict[int, Parameter] = {}
    for path, growth in decision.layers.items():
        layer = _layer(model, path)
        if layer.pairs != growth.before:
            raise LaminaError(f"the decision adds to {growth.before} pairs at {path!r}, and there are {layer.pairs}")
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{decision.seed}:{path}".encode()))
        for name, std in (("key", key_std), ("value", decision.value_std)):
            old: Parameter = getattr(layer, name)
            # Drawn even where it is shared with a layer that grew before, so that no draw hangs on that.
            drawn = _rows(old, growth.after - growth.before, std, generator)
            if id(old) not in grown:
                grown[id(old)] = _longer(old, drawn, lineage)
            setattr(layer, name, grown[id(old)])
    return model


def _rows(old: Parameter, count: int, std: float | None, generator: torch.Generator) -> Tensor:
    """Draw rows like those of `old`; of the same numbers on every device."""
    if old.is_meta:
        return old.new_empty(count, old.shape[1])
    if std == 0.0:
        return old.new_zeros(count, old.shape[1])
    spread = float(old.detach().float().std(correction=0)) if std is None else std
    drawn = torch.randn(count, old.shape[1], generator=generator, device="cpu") * spread
    return drawn.to(old.device, old.dtype)


def _longer(old: Parameter, rows: Tensor, lineage: Lineage) -> Parameter:
    new = Parameter(torch.cat((old.detach(), rows)), requires_grad=old.requires_grad)
    lineage.derive(new, old, [*range(len(old)), *[-1] * len(rows)])
    return new


def _find(model: nn.Module, pairs: Pairs, match: str | None) -> dict[str, Growth]:
    """List the layers that grow.

    Raises:
        AnatomyError: none, fewer pairs than there are, or a layer that cannot grow.
    """
    model = bare(model)
    found = {path: m for path, m in model.named_modules() if isinstance(m, Pattention)}
    if not found:
        raise AnatomyError(
            f"{type(model).__name__} has no Pattention layer to add pairs to; "
            "replace its linear layers first: {name: replace, old: linear, new: pattention}"
        )
    patterns = pairs if isinstance(pairs, Mapping) else {"*": pairs}
    for pattern in (*patterns, *([match] if match is not None else [])):
        if not any(fnmatch.fnmatchcase(path, pattern) for path in found):
            raise AnatomyError(f"no Pattention layer stands at a path like {pattern!r}{nearest(pattern, found)}; "
                               f"they are at {', '.join(map(repr, found))}")  # fmt: skip
    layers = {}
    for path, layer in found.items():
        wanted = next((w for p, w in patterns.items() if fnmatch.fnmatchcase(path, p)), None)
        if wanted is not None and (match is None or fnmatch.fnmatchcase(path, match)):
            layers[path] = _growth(path, layer, wanted)
    layers = {path: g for path, g in layers.items() if g.after > g.before}
    if not layers:
        raise AnatomyError(f"every Pattention layer asked for has that many pairs already ({pairs})")
    _check_shared(model, layers)
    return layers


def _growth(path: str, layer: Pattention, wanted: int | float) -> Growth:
    where = path or "the model"
    if isinstance(layer.key, DTensor):
        raise LaminaError(
            f"{where} is sharded: take the model back first (lamina.parallel.data_parallel.gather); in training the "
            "trainer does"
        )
    if layer.scale.numel() != 1 or not (layer.scale.is_meta or 0.0 < float(layer.scale) < math.inf):
        raise AnatomyError(f"{where}: the scale must be one positive number, it is {layer.scale}")
    # 50 * 1.1 is 55.00000000000001.
    after = wanted if isinstance(wanted, int) else math.ceil(round(layer.pairs * wanted, 6))
    if after < layer.pairs:
        hint = f" (for a factor write {float(wanted)})" if isinstance(wanted, int) else ""
        raise AnatomyError(f"{where} has {layer.pairs} pairs and cannot shrink to {after}{hint}")
    return Growth(layer.pairs, after)


def _check_shared(model: nn.Module, layers: Mapping[str, Growth]) -> None:
    """Refuse keys and values that something else holds too, unless it grows alike: the tie would break."""
    growing = {id(p): g for path, g in layers.items() for p in (_layer(model, path).key, _layer(model, path).value)}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            growth = growing.get(id(parameter))
            alike = layers.get(path) if isinstance(module, Pattention) and name in ("key", "value") else None
            if growth is not None and alike != growth:
                held = f"{path}.{name}".lstrip(".")
                raise AnatomyError(f"{held} is shared with a Pattention layer that grows, and does not grow alike")


def _layer(model: nn.Module, path: str) -> Pattention:
    layer = anatomy.get(model, path)
    if not isinstance(layer, Pattention):
        raise AnatomyError(f"{path!r} of {type(model).__name__} is a {type(layer).__name__}, not a Pattention")
    return layer


def _check(name: str, pairs: Pairs, deviations: Mapping[str, float | None]) -> None:
    for wanted in pairs.values() if isinstance(pairs, Mapping) else (pairs,):
        if isinstance(wanted, bool) or not isinstance(wanted, (int, float)) or not (1 <= wanted < math.inf):
            raise LaminaError(f"{name}: pairs is a new count or a factor, at least 1, got {wanted!r}")
    if isinstance(pairs, Mapping) and not pairs:
        raise LaminaError(f"{name}: pairs names no layer: give a pattern such as '*'")
    for option, std in deviations.items():
        if std is not None and not (0.0 <= std < math.inf):
            raise LaminaError(f"{name}: {option} must not be negative, got {std}")
        if option == "value_std" and std == 0.0:
            raise LaminaError(f"{name}: new values of zeros would never get a gradient: value_std must be positive")
