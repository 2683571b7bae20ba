"""The names and orders of okojoalg/raft-mlp's weights, turned into ours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lamina.nn.raft_mixer import RaftTokenMixing

if TYPE_CHECKING:
    from lamina.models.raft_mlp import RaftMLP

PLAIN = "1"
"""Where an official level has the linear layer of a plain patch embedding; that of a multi-scale one is before it."""

LAYERS = {"norm": "norm", "norm.1": "norm", "fn.0": "up", "fn.3": "down"}


def renamed(state: dict[str, Tensor], model: RaftMLP) -> dict[str, Tensor]:
    """Rename an official state dict and put its tensors into our orders; what it does not know keeps its name."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"levels\.(\d+)\.fn\.(\d+)\.(.+)", name):
            level, place, rest = int(match[1]), int(match[2]), match[3]
            part = _embedding(model.levels[level], match[2], rest, value) if place < 2 else None
            found |= _prefixed(f"levels.{level}.", part or _block(model.levels[level], place - 2, rest, value))
        elif match := re.fullmatch(r"heads\.(\d+)\.(\d+)\.(\w+)", name):
            found[f"{'norms' if match[2] == '1' else 'shortcuts'}.{match[1]}.{match[3]}"] = value
        else:
            found[name.replace("classifier.", "head.")] = value
    return found


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _embedding(level: Any, place: str, rest: str, value: Tensor) -> dict[str, Tensor]:
    """Split the weight of the one linear layer by kernels; a plain patch stands there as (row, column, channel)."""
    if rest.endswith("bias"):
        return {"embed.convs.0.bias": value}
    shapes = [conv.weight.shape[1:] for conv in level.embed.convs]
    if place == PLAIN:
        channels, *window = shapes[0]
        return {"embed.convs.0.weight": value.unflatten(1, (*window, channels)).movedim(-1, 1)}
    parts = value.split([s.numel() for s in shapes], dim=1)
    return {f"embed.convs.{i}.weight": p.unflatten(1, s) for i, (p, s) in enumerate(zip(parts, shapes, strict=True))}


def _block(level: Any, number: int, rest: str, value: Tensor) -> dict[str, Tensor]:
    """Rename one tensor of a block; a raft's norm stands in the order (channel of a raft, raft) there."""
    place, layer, kind = re.fullmatch(r"(\d+)\.(.+)\.(\w+)", rest).groups()  # type: ignore[union-attr]
    mixing = level.blocks[number].token_mixing
    inner = mixing.mixer if level.resize else mixing
    branches = {"1": "vertical", "3": "horizontal"} if isinstance(inner, RaftTokenMixing) else {"1": "both"}
    if place not in branches:
        name = "norm" if layer == "norm" else f"feed_forward.{LAYERS[layer]}"
        return {f"blocks.{number}.{name}.{kind}": value}
    name = LAYERS[layer] if layer.startswith("norm") else f"mlp.{LAYERS[layer]}"
    if layer == "norm.1" and isinstance(inner, RaftTokenMixing):
        value = value.view(-1, inner.rafts).t().reshape(-1)
    return {f"blocks.{number}.token_mixing.{'mixer.' if level.resize else ''}{branches[place]}.{name}.{kind}": value}
