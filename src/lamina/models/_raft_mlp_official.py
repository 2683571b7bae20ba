"""The names and orders of okojoalg/raft-mlp's weights, turned into ours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lamina.nn.raft_mixer import RaftTokenMixing
from lamina.nn.resize_token_mixing import ResizeTokenMixing

if TYPE_CHECKING:
    from lamina.models.raft_mlp import RaftMLP

PLAIN = "1"
"""Where an official level has the linear layer of a plain patch embedding; that of a multi-scale one is before it."""

LAYERS = {"fn.0": "up", "fn.3": "down"}


def renamed(state: dict[str, Tensor], model: RaftMLP) -> dict[str, Tensor]:
    """Rename an official state dict and put its tensors into our orders; what it does not know keeps its name."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"levels\.(\d+)\.fn\.(\d+)\.(.+)", name):
            level, place, rest = int(match[1]), int(match[2]), match[3]
            if place < 2:
                part = _prefixed(f"embeds.{level}.", _embedding(model.embeds[level], match[2], rest, value))
            else:
                part = _prefixed(
                    f"levels.{level}.{place - 2}.",
                    _block(model.levels[level].get_submodule(str(place - 2)), rest, value),
                )
            found |= part
        elif match := re.fullmatch(r"heads\.(\d+)\.(\d+)\.(\w+)", name):
            found[f"{'norms' if match[2] == '1' else 'shortcuts'}.{match[1]}.{match[3]}"] = value
        else:
            found[name.replace("classifier.", "head.")] = value
    return found


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _embedding(embed: Any, place: str, rest: str, value: Tensor) -> dict[str, Tensor]:
    """Split the weight of the one linear layer by kernels; a plain patch stands there as (row, column, channel)."""
    if rest.endswith("bias"):
        return {"convs.0.bias": value}
    shapes = [conv.weight.shape[1:] for conv in embed.convs]
    if place == PLAIN:
        channels, *window = shapes[0]
        return {"convs.0.weight": value.unflatten(1, (*window, channels)).movedim(-1, 1)}
    parts = value.split([s.numel() for s in shapes], dim=1)
    return {f"convs.{i}.weight": p.unflatten(1, s) for i, (p, s) in enumerate(zip(parts, shapes, strict=True))}


def _block(block: Any, rest: str, value: Tensor) -> dict[str, Tensor]:
    """Rename one tensor of a block; a raft's norm stands in the order (channel of a raft, raft) there."""
    place, layer, kind = re.fullmatch(r"(\d+)\.(.+)\.(\w+)", rest).groups()  # type: ignore[union-attr]
    resized = isinstance(block.token_mixing, ResizeTokenMixing)
    mixing = block.token_mixing.mixer if resized else block.token_mixing
    branches = {"1": "vertical", "3": "horizontal"} if isinstance(mixing, RaftTokenMixing) else {"1": "both"}
    if place not in branches:
        name = "norm" if layer == "norm" else f"feed_forward.{LAYERS[layer]}"
        return {f"{name}.{kind}": value}
    name = "norm" if layer == "norm.1" else f"mlp.{LAYERS[layer]}"
    if layer == "norm.1" and isinstance(mixing, RaftTokenMixing):
        value = value.view(-1, mixing.rafts).t().reshape(-1)
    return {f"token_mixing.{'mixer.' if resized else ''}{branches[place]}.{name}.{kind}": value}
