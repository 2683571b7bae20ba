"""The list of sizes (layers, width) that one model is trained for."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

from lamina.anatomy.exits import Exits
from lamina.errors import LaminaError
from lamina.nn.token_pooling import TokenPooling

Pair = tuple[int, int]
"""Layers, and how many numbers of the embedding."""


def default_pairs(depth: int, width: int, count: int = 6) -> list[Pair]:
    """Return `count` sizes, or one a layer where there are fewer: layers in equal steps, widths halved from the last.

    Size k of m: round(k * depth / m) layers, width / 2^(m - k) numbers rounded up to a multiple of 8.
    """
    m = min(count, depth)
    widths = [min(width, -(-width // 2 ** (m - k) // 8) * 8) for k in range(1, m + 1)]
    return [(round(k * depth / m), w) for k, w in enumerate(widths, 1)]


def check_pairs(pairs: Sequence[Sequence[int]]) -> list[Pair]:
    """Return sizes in order, the smallest first, wherever they stood.

    Raises:
        LaminaError: no pair, one that is no two whole numbers from 1 on, one twice, or more layers with less width.
    """
    for pair in pairs:
        if len(pair) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in pair):
            raise LaminaError(f"pairs are (layers, width), two whole numbers from 1 on, got {pair!r}")
    found = sorted((layers, width) for layers, width in pairs)
    if not found:
        raise LaminaError("pairs names no size: give (layers, width) of each, or None for the generic list")
    for (n, d), (layers, width) in itertools.pairwise(found):
        if (n, d) == (layers, width):
            raise LaminaError(f"pairs names the size {(n, d)} twice")
        if not (n < layers and d <= width):
            raise LaminaError(f"pairs must grow in both, and {(n, d)} is followed by {(layers, width)}")
    return found


def fitting_pairs(pairs: Sequence[Pair] | None, exits: Exits, cut: TokenPooling | None = None) -> list[Pair]:
    """Return the sizes that a model has; the generic list where none is given.

    Args:
        cut: of a model that was truncated: larger sizes than its own are left out.
    Raises:
        LaminaError: a size that the model has not.
    """
    if pairs is None:
        return default_pairs(exits.depth, exits.width if cut is None else cut.width or exits.width)
    if cut is not None:
        left = [(n, d) for n, d in pairs if n <= exits.depth and d <= (cut.width or exits.width)]
        if not left:
            raise LaminaError(f"none of the sizes {list(pairs)} is left in a model of {exits.depth} layers")
        return left
    for n, d in pairs:
        if n > exits.depth or d > exits.width:
            raise LaminaError(
                f"pairs names the size {(n, d)}, and {exits.trunk} has {exits.depth} layers of width {exits.width}"
            )
    if pairs[-1] != (exits.depth, exits.width):
        warnings.warn(
            f"the largest size is {pairs[-1]}, and the whole model, {(exits.depth, exits.width)}, is not trained",
            stacklevel=4,
        )
    return list(pairs)
