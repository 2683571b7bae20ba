"""What may be done to the bytes of a file before a model reads them: obfuscation, noise, other orders, a masked camera.

A transform is called with the bytes (S,) uint8 of one file and a generator for what it draws, and returns such bytes.
A camera that never records some of the pixels, a table that only its owner knows: both hide what was seen, neither is
cryptography (a table is a substitution cipher).
Source: Horton et al., Bytes Are All You Need (2023), arXiv 2306.00238, sections 4.3 and 4.4 and appendix C.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError, RecipeError, ShapeError, nearest

PERMUTATION_SEED = 2147483647
"""Of the official code's table."""

Transform = Callable[[Tensor, torch.Generator], Tensor]
"""(bytes (S,) uint8, generator of this file's draws) -> bytes."""

Order = Literal["reverse", "random", "cyclic", "stride", "window"]


def byte_table(seed: int = PERMUTATION_SEED) -> Tensor:
    """Draw a table phi of the byte values: (256,) int64, each value once."""
    return torch.randperm(256, generator=torch.Generator().manual_seed(seed))


class BytePermutation:
    """Replace every byte b by phi(b): the same table for all files.

    Args:
        seed: of the table, see `byte_table`.
        table: phi itself, 256 numbers; then seed is not read.
    Raises:
        LaminaError: a table that does not have each of 0..255 once.
    """

    draws: ClassVar[bool] = False

    def __init__(self, seed: int = PERMUTATION_SEED, table: Sequence[int] | None = None) -> None:
        numbers = byte_table(seed) if table is None else torch.as_tensor(table)
        if sorted(numbers.tolist()) != list(range(256)):
            raise LaminaError(f"a table of bytes has each of the numbers 0..255 once, got {len(numbers)} numbers")
        self.table = numbers.to(torch.uint8)

    def __call__(self, content: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Look up every byte."""
        return self.table[content.long()]

    def inverse(self) -> BytePermutation:
        """Return what undoes it."""
        return BytePermutation(table=self.table.argsort().tolist())


class ByteNoise:
    """Add a whole number drawn from low..high to every byte, modulo 256; new in every epoch.

    Args:
        low, high: both included; the paper has 5, 10 and 20 either way.
    Raises:
        LaminaError: low above high.
    """

    draws: ClassVar[bool] = True

    def __init__(self, low: int = -20, high: int = 20) -> None:
        if low > high:
            raise LaminaError(f"low must not be above high, got {low} and {high}")
        self.low, self.high = low, high

    def __call__(self, content: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw, add, and wrap round."""
        noise = torch.randint(self.low, self.high + 1, content.shape, generator=generator)
        return ((content.long() + noise) % 256).to(torch.uint8)


class ByteShuffle:
    """Put the bytes of a file in another order.

    Args:
        order: "reverse"; "cyclic" (by half the file); "stride" (every size-th byte from the first, then from the
            second ...); "window" (one order, drawn from `seed`, in every window of `size` bytes; what is left over at
            the end stays); "random" (a new one every time: what no model can learn from but the counts of bytes).
        size: of a stride or a window, bytes.
        seed: of the order within a window.
    Raises:
        LaminaError: an unknown order, a size below 1.
    """

    def __init__(self, order: Order, size: int = 1024, seed: int = 0) -> None:
        known = ("reverse", "random", "cyclic", "stride", "window")
        if order not in known:
            raise LaminaError(f"no order is called {order!r}{nearest(str(order), known)}; there are {', '.join(known)}")
        if size < 1:
            raise LaminaError(f"size must be at least 1, got {size}")
        self.order, self.size, self.draws = order, size, order == "random"
        self.within = torch.randperm(size, generator=torch.Generator().manual_seed(seed))

    def __call__(self, content: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the bytes in the new order."""
        if self.order == "random":
            return content[torch.randperm(len(content), generator=generator)]
        return content[self.places(len(content))]

    def undo(self, content: Tensor) -> Tensor:
        """Return the bytes in their old order.

        Raises:
            LaminaError: the order is "random".
        """
        if self.order == "random":
            raise LaminaError("a random order is not kept, so it cannot be undone")
        found = torch.empty_like(content)
        found[self.places(len(content))] = content
        return found

    def places(self, length: int) -> Tensor:
        """Return where each byte of the new order was: (length,)."""
        at = torch.arange(length)
        if self.order == "reverse":
            return at.flip(0)
        if self.order == "cyclic":
            return at.roll(length // 2)
        if self.order == "stride":
            return torch.cat([at[i :: self.size] for i in range(min(self.size, length))]) if length else at
        whole = length - length % self.size
        return torch.cat(((at[:whole].view(-1, self.size)[:, self.within]).flatten(), at[whole:]))


class PositionMask:
    """Keep the bytes at some positions, in order, and never look at the others: a camera that records a part.

    The positions are drawn once, the same for all files. On "fhwc" bytes these are single channels of pixels.

    Args:
        keep: share of the bytes, above 0 up to 1; rounded down to whole bytes.
        size: bytes of a file, all of one length.
        seed: of the positions.
    Raises:
        LaminaError: a share out of range, or that keeps no byte. ShapeError: at the call, a file of another length.
    """

    draws: ClassVar[bool] = False

    def __init__(self, keep: float, size: int, seed: int = 0) -> None:
        if not 0 < keep <= 1 or int(keep * size) < 1:
            raise LaminaError(f"keep is a share in 0..1 that leaves at least a byte of {size}, got {keep}")
        self.keep, self.size = keep, size
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        self.positions = order[: int(keep * size)].sort().values

    def __call__(self, content: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the bytes that are kept."""
        if len(content) != self.size:
            raise ShapeError(
                f"position_mask keeps the same positions of files of {self.size} bytes, and one has {len(content)}: it "
                "is for encodings of one length"
            )
        return content[self.positions]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "byte_permutation": BytePermutation,
    "byte_noise": ByteNoise,
    "byte_shuffle": ByteShuffle,
    "position_mask": PositionMask,
}
"""By the names that recipes use."""


def make_transform(node: str | Mapping[str, Any] | Transform) -> Transform:
    """Build the transform that a node of a recipe names: `byte_noise`, or `{name: byte_noise, low: -5, high: 5}`.

    Raises:
        RecipeError: no such transform, or an option that it does not have or that it refuses.
    """
    if not isinstance(node, (str, Mapping)):
        return node
    options: dict[str, Any] = {"name": node} if isinstance(node, str) else dict(node)
    name = str(options.pop("name", None))
    if name not in TRANSFORMS:
        known = ", ".join(TRANSFORMS)
        raise RecipeError(f"no transform of bytes is called {name!r}{nearest(name, TRANSFORMS)}; there are {known}")
    taken = inspect.signature(TRANSFORMS[name]).parameters
    for option in options:
        if option not in taken:
            raise RecipeError(f"{name} has no option {option!r}{nearest(option, taken)}; it has {', '.join(taken)}")
    try:
        made: Transform = TRANSFORMS[name](**options)
    except (LaminaError, TypeError) as error:
        raise RecipeError(f"{name}: {error}") from error
    return made
