"""Bytes as tokens: a table with a row for every byte value, and a strided convolution that makes fewer tokens of them.

Source: Horton et al., Bytes Are All You Need (2023), arXiv 2306.00238, section 3.1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.registry import register

SOURCE = "Horton et al. 2023, arXiv 2306.00238, section 3.1"
PADDING = -1
"""Stands where a file has ended and its batch has not."""

ROWS = 257
"""Rows of the table: one a byte value, and the last one for padding, zero."""

MANY = 2 * ROWS
"""Tokens of a batch from which on the table of all bytes at all places is the cheaper way."""


@register("layer", source=SOURCE)
class ByteTokens(nn.Module):
    """Embed bytes and reduce their number: byte tokens for any encoder.

    inputs (B, S) whole numbers 0..255, padded with -1 -> tokens (B, N, width) and mask (B, N) bool, True = a token of
    real bytes alone; N = (S - kernel) // (kernel / 2) + 1. A file gives the same real tokens alone and in a padded
    batch; up to kernel / 2 - 1 bytes at its end are in no token.

    Where the batch has more tokens than `MANY`, no byte is embedded one by one: what each byte value adds to a token
    from each of the kernel's places is multiplied out once (257 * kernel vectors), and a token is the sum of `kernel`
    of these. That is the convolution of the embedded bytes, at 257 / (B * N) of its products. Layers of another kind
    put in place of `embedding.table` or `reduction.conv` are called one after the other.

    Args:
        kernel: bytes a token is made of, even; their starts are kernel / 2 apart. 0 = every byte is a token.
    Raises:
        ShapeError: an odd or negative kernel, a width below 1; at the call, no whole numbers (B, S), fewer bytes than
            the kernel; on a CPU (where looking costs nothing) values outside -1..255, a file shorter than the kernel.
    Source: section 3.1 and figure 2. Deviation: a token with any padded byte is masked, where the official code masks
        those with nothing else, so that what a token is does not hang on the batch.
    Example:
        >>> tokens, mask = ByteTokens(16, kernel=8)(torch.randint(256, (2, 100)))
        >>> tokens.shape, mask.all()
        (torch.Size([2, 24, 16]), tensor(True))
    """

    def __init__(self, width: int, kernel: int = 16) -> None:
        super().__init__()
        if width < 1:
            raise ShapeError(f"ByteTokens: width must be at least 1, got {width}")
        self.width, self.kernel = width, kernel
        self.embedding: nn.Module = ByteEmbedding(width)
        self.reduction: nn.Module | None = TokenReduction1d(width, kernel) if kernel else None

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and their mask."""
        check_bytes(inputs, self.kernel)
        # In unsigned bytes, 255 would equal the padding.
        inputs = inputs.long()
        table: Any = getattr(self.embedding, "table", None)
        conv: Any = getattr(self.reduction, "conv", None)
        plain = type(table) is nn.Embedding and type(conv) is nn.Conv1d
        if plain and len(inputs) * inputs.shape[1] > MANY * self.kernel // 2:
            return byte_tokens(inputs, table.weight, conv.weight), real_tokens(inputs != PADDING, self.kernel)
        x, mask = self.embedding(inputs)
        return (x, mask) if self.reduction is None else self.reduction(x, mask)


class ByteEmbedding(nn.Module):
    """A row of a table for every byte: (B, S) whole numbers -1..255 -> (B, S, width) and mask (B, S), True = a byte.

    The row of padding, the last, is zero and gets no gradient; the others start normal with deviation width^-0.5, cut
    off at 2. The input is not written to.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, width, padding_idx=ROWS - 1)
        with torch.no_grad():
            nn.init.trunc_normal_(self.table.weight[:-1], std=math.sqrt(1 / width))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Embed."""
        inputs = inputs.long()
        return self.table(as_rows(inputs)), inputs != PADDING


class TokenReduction1d(nn.Module):
    """A convolution of stride kernel / 2 over tokens: x (B, S, width), mask (B, S) or None -> (B, N, width), (B, N).

    Args:
        kernel: tokens that become one, even and positive; N = (S - kernel) // (kernel / 2) + 1.
    Raises:
        ShapeError: an odd or no kernel; at the call, fewer tokens than that.
    """

    def __init__(self, width: int, kernel: int = 16) -> None:
        super().__init__()
        if kernel < 2 or kernel % 2:
            raise ShapeError(f"the kernel must be even, for its stride is half of it, and at least 2; got {kernel}")
        self.kernel = kernel
        self.conv = nn.Conv1d(width, width, kernel, kernel // 2, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Reduce; a token made of any masked one is masked."""
        if x.shape[1] < self.kernel:
            raise ShapeError(f"a kernel of {self.kernel} needs as many tokens, got {x.shape[1]}")
        return self.conv(x.transpose(1, 2)).transpose(1, 2), None if mask is None else real_tokens(mask, self.kernel)


def byte_tokens(inputs: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    """Convolve embedded bytes without embedding them: (B, S) -> (B, N, width).

    Token n is the sum over j of `weight[:, :, j] @ table[inputs[:, n * stride + j]]`, and each of these vectors is
    made once.

    Args:
        inputs: int64, -1..255; -1 is the table's last row.
        table: (257, channels). weight: (width, channels, kernel); the stride is kernel // 2.
    """
    width, _, kernel = weight.shape
    # The row of padding has no gradient.
    table = torch.cat((table[:-1], table[-1:].detach()))
    added = torch.einsum("oij,bi->jbo", weight, table).reshape(kernel * len(table), width)
    windows = as_rows(inputs).unfold(1, kernel, kernel // 2)  # (B, N, kernel)
    places = torch.arange(kernel, device=inputs.device) * len(table)
    tokens = F.embedding_bag((windows + places).flatten(0, 1), added, mode="sum")
    return tokens.unflatten(0, windows.shape[:2])


def real_tokens(mask: Tensor, kernel: int) -> Tensor:
    """Say which tokens are made of real bytes alone: (B, S) bool -> (B, N)."""
    return mask if not kernel else mask.unfold(1, kernel, kernel // 2).all(-1)


def as_rows(inputs: Tensor) -> Tensor:
    """Return the rows of the table for bytes (int64), padding as the last one; a new tensor."""
    return torch.where(inputs == PADDING, ROWS - 1, inputs)


def check_bytes(inputs: Tensor, kernel: int) -> None:
    """Refuse what is no padded batch of bytes (B, S) that each fill a token.

    Raises:
        ShapeError: says what was given.
    """
    if inputs.dim() != 2 or inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        raise ShapeError(f"bytes are whole numbers (batch, length), got {inputs.dtype} {tuple(inputs.shape)}")
    if inputs.shape[1] < max(kernel, 1):
        raise ShapeError(f"a kernel of {kernel} bytes needs files as long, got {inputs.shape[1]} bytes")
    # Elsewhere the look would wait for the device, and a graph cannot branch on it.
    if inputs.device.type != "cpu" or torch.compiler.is_compiling() or not len(inputs):
        return
    low, high = (int(v) for v in inputs.aminmax())
    if low < PADDING or high > 255:
        raise ShapeError(f"bytes are 0..255 and padding is -1, got values from {low} to {high}")
    if low == PADDING and kernel:
        lengths = (inputs != PADDING).sum(1)
        short = lengths[(lengths > 0) & (lengths < kernel)]
        if len(short):
            raise ShapeError(
                f"a kernel of {kernel} bytes needs files as long; the batch has one of {int(short[0])} bytes"
            )
