"""What is decided about a trunk whose blocks are to skip tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamina.nn.token_router import Inference
from lamina.rewrite.depth_routing.block import Positions, Scale

RouterKind = Literal["shared", "per_layer"]


@dataclass(frozen=True)
class RoutingDecision:
    """Which blocks of a trunk skip tokens, and how."""

    trunk: str
    """Path of the stack of blocks."""
    layers: tuple[int, ...]
    """Blocks that skip tokens."""
    ranks: tuple[float | None, ...] | None = None
    """Mean rank of each block's attention maps, where it was measured."""
    skip: float = 0.5
    scale: Scale = "mlp"
    positions: Positions = "original"
    router: RouterKind = "shared"
    threshold_prefill: float = 0.5
    threshold_decode: float = 0.5
    inference: Inference = "threshold"
    protect: str | None = None
    """Name under which the model's forward takes the mask of tokens that must enter."""
    skippable: tuple[int, ...] = ()
    """Ids of tokens that may be skipped; all others are protected."""
    anneal: float = 0.0
    width: int = 0
    """Channels of the stream."""
    depth: int = 0
    """How many blocks the trunk has."""
    seed: int = 0

    def table(self) -> str:
        """Word the decision for people: ranks, what is routed, what that saves of a long prompt."""
        lines = ["block      rank  skips"] if self.ranks else ["block  skips"]
        for index in range(self.depth):
            rank = "" if self.ranks is None else f"{'-' if self.ranks[index] is None else format(self.ranks[index], '.1f'):>10}"  # fmt: skip  # noqa: E501
            lines.append(f"{index:>5}{rank}  {'tokens' if index in self.layers else ''}".rstrip())
        kept = 1.0 - self.skip
        share = len(self.layers) / max(self.depth, 1)
        lines.append(
            f"if every token may be skipped, a routed block computes {kept:.2f} of its linear layers and "
            f"{kept**2:.2f} of its attention; all blocks together {1 - share * self.skip:.2f} and "
            f"{1 - share * (1 - kept**2):.2f}"
        )
        return "\n".join(lines)
