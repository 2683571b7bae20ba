"""How `Hopfield` reads and checks its options."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from lamina.errors import ShapeError

C = TypeVar("C", bound=type[nn.Module])
NormOption = bool | Literal["plain"]
"""True = layer normalisation with gain and shift, "plain" = without, False = none."""


def options_of(other: Callable[..., Any], *, without: Sequence[str] = ()) -> Callable[[C], C]:
    """Spell `**options`, which a class hands on to another, out in its signature, for recipes and for `help`."""

    def add(cls: C) -> C:
        init: Any = cls.__init__
        own = inspect.signature(init).parameters
        kept = [p for p in own.values() if p.kind is not p.VAR_KEYWORD]
        theirs = [
            p
            for p in inspect.signature(other).parameters.values()
            if p.kind is p.KEYWORD_ONLY or (p.name == "heads" and "heads" not in own)
        ]
        more = [p.replace(kind=p.KEYWORD_ONLY) for p in theirs if p.name not in own and p.name not in without]
        hints = typing.get_type_hints(other.__init__, include_extras=True)
        init.__signature__ = inspect.Signature([*kept, *more])
        init.__annotations__ = {**init.__annotations__, **{p.name: hints[p.name] for p in more}}
        return cls

    return add


def make_norm(option: NormOption, width: int) -> nn.Module:
    """Build the norm that an option asks for."""
    if option not in (True, False, "plain"):
        raise ValueError(f"a norm is True, 'plain' (without gain and shift) or False, got {option!r}")
    return nn.LayerNorm(width, elementwise_affine=option is True) if option else nn.Identity()


def per_head(name: str, value: float | Sequence[float] | Tensor, heads: int, least: float) -> tuple[float, ...]:
    """Read an option that may have one entry a head; refuse another number of them, and what is not above `least`."""
    values = value.tolist() if isinstance(value, Tensor) else value
    many = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)] * heads
    if len(many) != heads:
        raise ShapeError(f"{name} has {len(many)} entries for {heads} heads: give one number, or one a head")
    if not all(least < v < math.inf for v in many):
        raise ValueError(f"{name} must be above {least:g} and finite, got {value}")
    return tuple(many)


def steps_of(value: int | Sequence[int] | Tensor | None, heads: int) -> tuple[int, ...] | None:
    """Read the number of updates of each head; None = until they stop moving."""
    if value is None:
        return None
    values = value.tolist() if isinstance(value, Tensor) else value
    many = list(values) if isinstance(values, Sequence) else [values] * heads
    if len(many) != heads:
        raise ShapeError(f"update_steps_max has {len(many)} entries for {heads} heads: give one number, or one a head")
    if any(v != int(v) or v < 0 for v in many):
        raise ValueError(f"update_steps_max must be whole numbers of at least 0, or None, got {value}")
    return tuple(int(v) for v in many)


def head_sizes(layer: Any, hidden_size: int | None, pattern_size: int | None) -> tuple[int, int]:
    """Check the sizes of a Hopfield layer; return the widths of one head's keys and of its values."""
    names = ("width", "heads", "kv_heads", "stored_size", "projection_size")
    given = {name: getattr(layer, name) for name in names} | {"hidden_size": hidden_size, "pattern_size": pattern_size}
    bad = {name: size for name, size in given.items() if size is not None and size < 1}
    if bad:
        raise ShapeError(f"Hopfield: sizes must be positive, got {', '.join(f'{k}={v}' for k, v in bad.items())}")
    if layer.heads % layer.kv_heads:
        raise ShapeError(f"Hopfield: {layer.heads} heads do not divide by {layer.kv_heads} kv_heads")
    if hidden_size is None and layer.width % layer.heads:
        raise ShapeError(
            f"Hopfield: width {layer.width} does not divide by {layer.heads} heads; change one, or give hidden_size, "
            "the width of one head"
        )
    hidden = layer.width // layer.heads if hidden_size is None else hidden_size
    return hidden, hidden if pattern_size is None else pattern_size


def check_static(layer: Any) -> None:
    """Refuse tensors that are used as they are and do not fit, and connections that lead nowhere."""
    if layer.projection_connected and layer.pattern_size != layer.hidden_size:
        raise ShapeError(
            "projection_connected: values come from the key projection, so pattern_size must be hidden_size, got "
            f"{layer.pattern_size} and {layer.hidden_size}"
        )
    if layer.projection_connected and (layer.stored_static or layer.projection_size != layer.stored_size):
        raise ShapeError(
            "projection_connected: what is projected goes through the key projection, which there must be "
            f"(stored_static=False) and which reads {layer.stored_size}, not {layer.projection_size}"
        )
    own = layer.projection_static and not layer.projection_connected
    for name, on, size, what, needed in (
        ("stored_static", layer.stored_static, layer.stored_size, "hidden_size", layer.hidden_size),
        ("state_static", layer.state_static, layer.width, "hidden_size", layer.hidden_size),
        ("projection_static", own, layer.projection_size, "pattern_size", layer.pattern_size),
    ):
        if on and size != needed:
            raise ShapeError(
                f"{name}: patterns of width {size} are used as they are, so {what} must be {size}, got {needed}"
            )


def check_rest(layer: Any) -> None:
    """Refuse a size of the output, a dropout, or rotary positions that cannot be."""
    if layer.output_size < 1:
        raise ShapeError(f"Hopfield: output_size must be positive, got {layer.output_size}")
    if layer.rotary and layer.hidden_size % 2:
        raise ShapeError(f"rotary positions pair up channels: hidden_size must be even, got {layer.hidden_size}")
    if not 0.0 <= layer.dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {layer.dropout}")
