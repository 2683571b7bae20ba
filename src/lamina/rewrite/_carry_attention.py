"""Hand the projections of one attention over to another, whatever each is fused into."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import Parameter

from lamina.anatomy import Projection, Projections, attention_projections
from lamina.lineage import Lineage


def offered(old: nn.Module, heads: int | None) -> dict[str, bool | int | float]:
    """Say which options make a successor with the same four projections: for `factory` to hand over."""
    found = attention_projections(_heir(old), heads)
    if found is None:
        return {}
    given: dict[str, bool | int | float] = {
        "bias": found.query.bias is not None,
        "output_bias": found.out.bias is not None,
    }
    scale = _scale(old)
    given |= {} if scale is None else {"scale": scale}
    fraction = _rotary_fraction(_heir(old))
    given |= {} if fraction is None else {"rotary_fraction": fraction}
    if heads is not None and len(found.query.rows) % heads == 0:
        head_width = len(found.query.rows) // heads
        given |= {"head_width": head_width, "kv_heads": len(found.key.rows) // head_width}
    return given


def _scale(old: nn.Module) -> float | None:
    """Return what the attention says that it multiplies its scores by; None = it does not say."""
    values = (getattr(m, name, None) for m in old.modules() for name in ("scaling", "scale"))
    return next((v for v in values if isinstance(v, float) and v > 0), None)


def _rotary_fraction(old: nn.Module) -> float | None:
    """Return which share of a head's channels the attention says that it turns; None = it does not say."""
    for module in old.modules():
        turning, size = getattr(module, "rotary_width", None), getattr(module, "head_width", None)
        if turning and size:
            # Not a hair less: the share times head_width is rounded down.
            return min(1.0, math.nextafter(turning / size, 2.0))
    config, name = getattr(old, "config", None), "partial_rotary_factor"
    rope = getattr(config, "rope_parameters", None)
    # In the configuration itself before transformers 5.
    share = rope.get(name) if isinstance(rope, Mapping) else getattr(config, name, None)
    return share if isinstance(share, float) else None


def carry_projections(old: nn.Module, new: nn.Module, heads: int | None, lineage: Lineage) -> bool:
    """Copy query, key, value and output weights where all four fit; say whether they did.

    A bias that only the new attention has becomes zero. A mixer of several attentions names in `takes_over` the one
    that they are for.
    """
    before, after = attention_projections(_heir(old), heads), attention_projections(_heir(new))
    if before is None or after is None or not _fit(before, after):
        return False
    for name, source in before.named().items():
        _copy(source, after.named()[name], lineage)
    return True


def _heir(mixer: nn.Module) -> nn.Module:
    naming = next((m for m in mixer.modules() if isinstance(getattr(m, "takes_over", None), str)), None)
    return mixer if naming is None else naming.get_submodule(str(naming.takes_over))


def _fit(before: Projections, after: Projections) -> bool:
    pairs = [(p, after.named()[n]) for n, p in before.named().items()]
    return all(a.matrix().shape == b.matrix().shape for a, b in pairs)


def _copy(source: Projection, target: Projection, lineage: Lineage) -> None:
    with torch.no_grad():
        view = target.weight.T if target.transposed else target.weight
        view[list(target.rows)] = source.matrix().to(view.dtype)
        if target.bias is not None:
            values = source.vector()
            target.bias[list(target.bias_rows)] = 0 if values is None else values.to(target.bias.dtype)
    if not source.transposed and not target.transposed:
        _derive(target.weight, target.rows, source.weight, source.rows, lineage)
    if source.bias is not None and target.bias is not None:
        _derive(target.bias, target.bias_rows, source.bias, source.bias_rows, lineage)
    target.weight.requires_grad_(source.weight.requires_grad)


def _derive(
    new: Parameter, new_rows: tuple[int, ...], old: Parameter, old_rows: tuple[int, ...], lineage: Lineage
) -> None:
    index = torch.full((new.shape[0],), -1)
    index[list(new_rows)] = torch.tensor(old_rows)
    lineage.derive(new, old, index)
