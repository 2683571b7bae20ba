"""How a hypernetwork emits numbers: all at once, a head a tensor, a run a component, or in chunks.

Shapes: B conditions, R rows (runs of the trunk for one condition: chunks or components), C code, K embedding of a row,
H hidden. A generator maps codes (B, C) to a list of (B, numbers), one a tensor of the target.
Source: Chauhan et al., A Brief Review of Hypernetworks in Deep Learning (2023), arXiv 2306.06955, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.recipe import Node, factory

Generation = Literal["chunk", "once", "multihead", "component"]

LARGEST_ONCE = 50_000_000
"""Numbers that one head may emit without being asked twice."""


class Generator(nn.Module):
    """A trunk over (code, row embedding), and linear heads that emit the numbers.

    Args:
        width: of a code.
        sizes: numbers to emit, a tensor each.
        generation: `once`: one head for all. `multihead`: a head a tensor. `component`: the trunk runs once a tensor,
            with an embedding of it, and one head of the largest size serves all (each takes the rows it needs).
            `chunk`: the numbers are cut into pieces of `chunk_size`, and one head serves all; the tail is dropped.
        hidden: widths of the trunk's layers; none = the heads are linear in the code.
        trunk: another trunk, (B, R, C + K) -> (B, R, H): built as trunk(C + K), or a module. R runs stand in a row, so
            that a recurrent net, a convolution or attention lets the pieces see each other.
    """

    def __init__(
        self,
        width: int,
        sizes: Sequence[int],
        *,
        generation: Generation,
        chunk_size: int,
        embedding: int,
        hidden: Sequence[int],
        trunk: nn.Module | Node | Callable[..., Any] | None,
        allow_large: bool,
    ) -> None:
        super().__init__()
        self.generation, self.sizes, total = generation, list(sizes), sum(sizes)
        if generation == "once" and total > LARGEST_ONCE and not allow_large:
            raise LaminaError(
                f"one head for {total:,} numbers would have that many rows: use generation='chunk', or rank, or pass "
                "allow_large=True"
            )
        rows = {"chunk": math.ceil(total / chunk_size), "component": len(self.sizes)}.get(generation)
        heads = {"chunk": [chunk_size], "component": [max(self.sizes)], "once": [total]}.get(generation, self.sizes)
        self.embedding = None if rows is None else nn.Parameter(torch.randn(rows, embedding) / math.sqrt(embedding))
        width += 0 if rows is None else embedding
        self.trunk, out = make_trunk(width, rows or 1, hidden, trunk)
        self.heads = nn.ModuleList(nn.Linear(out, size) for size in heads)
        for head in self.heads:
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, codes: Tensor) -> list[Tensor]:
        """Emit (B, size) for every size."""
        hidden = self.hidden(codes)  # (B, R, H)
        if self.generation == "multihead":
            return [head(hidden[:, 0]) for head in self.heads]
        head = self.heads[0]
        if self.generation == "component":
            weight, bias = head.weight, head.bias
            return [F.linear(hidden[:, i], weight[:n], bias[:n]) for i, n in enumerate(self.sizes)]  # type: ignore[index]
        numbers = head(hidden).flatten(1)
        return list(numbers[:, : sum(self.sizes)].split(self.sizes, dim=1))

    def hidden(self, codes: Tensor) -> Tensor:
        """Return what the heads read: (B, C) -> (B, R, H)."""
        rows = codes.unsqueeze(1)
        if self.embedding is not None:
            count, width = self.embedding.shape
            each = rows.expand(-1, count, -1), self.embedding.expand(len(codes), count, width)
            rows = torch.cat(each, dim=2)
        return _first(self.trunk(rows))

    @torch.no_grad()
    def normalise(self, codes: Tensor) -> None:
        """Scale the heads so that over these codes the mean square of what they emit is 1, biases aside.

        Raises:
            LaminaError: the trunk gives zeros (or no numbers) for these codes.
        """
        if codes.is_meta:
            return
        hidden = self.hidden(codes)
        power = float(hidden.float().square().mean()) * hidden.shape[-1]
        if not 0 < power < math.inf:
            raise LaminaError(
                f"the generator's trunk has mean square {power:g} on these conditions: cannot scale to it"
            )
        for head in self.heads:
            weight: Tensor = head.weight  # type: ignore[assignment]
            weight.mul_((power * weight.float().square().mean()).rsqrt())

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Multiply the heads' weights."""
        for head in self.heads:
            head.weight.mul_(factor)  # type: ignore[operator]


def make_trunk(
    width: int, rows: int, hidden: Sequence[int], trunk: nn.Module | Node | Callable[..., Any] | None
) -> tuple[nn.Module, int]:
    """Return the trunk and the width of what it gives.

    Raises:
        ShapeError: a trunk that does not give (B, R, H) for (B, R, width).
    """
    if trunk is None:
        layers: list[nn.Module] = []
        for into, out in zip((width, *hidden), hidden, strict=False):
            linear = nn.Linear(into, out)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers), hidden[-1] if hidden else width
    built: nn.Module = trunk if isinstance(trunk, nn.Module) else factory("layer", trunk)(width)
    with torch.no_grad():
        given = torch.zeros(2, rows, width)
        found = _first(built(given))
    if found.dim() != 3 or found.shape[:2] != given.shape[:2]:
        raise ShapeError(f"the generator must map (B, R, {width}) to (B, R, H): {tuple(given.shape)} gave {tuple(found.shape)}")  # fmt: skip  # noqa: E501
    return built, found.shape[2]


def _first(output: Any) -> Tensor:
    """Take the sequence out of what a recurrent net returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
