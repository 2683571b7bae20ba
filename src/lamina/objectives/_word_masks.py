"""Whole words hidden at random: two masks of one text, the smaller inside the larger, drawn by row and step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.objectives.supervised import IGNORE

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Constants of splitmix64 (Steele et al. 2014), as signed numbers."""


@dataclass(frozen=True)
class Hidden:
    """A text with words hidden."""

    input_ids: Tensor
    labels: Tensor
    """(B, T): the hidden tokens, -100 elsewhere."""


def draws(ids: Tensor, real: Tensor, seed: int, stream: int) -> Tensor:
    """Return uniform numbers (B, T) in 0..1 that hang on a row's own real tokens, the place, seed and stream alone.

    So the rows of a batch may be shared out among processes, or padded further, and keep their masks.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    row = (_mixed(ids * _GOLDEN + place) * real).sum(1, keepdim=True)
    start = (seed * _FIRST + stream * _SECOND + (1 << 63)) % (1 << 64) - (1 << 63)
    mixed = _mixed(_mixed(row + start) + place * _GOLDEN)
    return ((mixed >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


def word_order(ids: Tensor, maskable: Tensor, continues: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Shuffle the words of each row; return for each token where its word ends in that order, and whether it is first.

    Args:
        maskable: (B, T) tokens that may be hidden at all.
        continues: (B, T) tokens that belong to the word of the token before.
    Returns:
        (B, T) number of tokens up to and with the word's last; (B, T) bool, of the first word.
    """
    word = (~continues).long().cumsum(1)
    start = torch.where(continues, 2.0, drawn)
    # All tokens of a word sort by the draw of its first token.
    key = torch.full_like(drawn, 2.0).repeat(1, 2)[:, : drawn.shape[1] + 1].scatter_reduce(1, word, start, "amin")
    key = key.gather(1, word).masked_fill(~maskable, 3.0)
    order = key.argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(ids.shape[1], device=ids.device).expand_as(order))
    last = torch.zeros_like(key.long()).new_zeros(len(ids), ids.shape[1] + 1)
    last = last.scatter_reduce(1, word, rank.masked_fill(~maskable, 0), "amax").gather(1, word)
    first = key == key.amin(1, keepdim=True)
    return last + 1, first & maskable


def hide(
    ids: Tensor, share: float, ends: Tensor, first: Tensor, maskable: Tensor, *, mask_token: int, vocabulary: int,
    drawn: Tensor,
) -> Hidden:  # fmt: skip
    """Hide whole words, in their order, up to a share of the tokens that may be hidden; one word at least.

    Of the hidden tokens 80 % become `mask_token`, 10 % a random one, 10 % stay.

    Args:
        drawn: (B, T) uniform numbers, for what a hidden token becomes.
    """
    budget = (share * maskable.sum(1, keepdim=True)).round()
    chosen = maskable & ((ends <= budget) | first)
    other = (drawn * 1e6 % 1.0 * vocabulary).long().clamp(max=vocabulary - 1)
    hidden = torch.where(drawn < 0.8, mask_token, torch.where(drawn < 0.9, other, ids))
    return Hidden(torch.where(chosen, hidden, ids), ids.masked_fill(~chosen, IGNORE))


def _mixed(x: Tensor) -> Tensor:
    """Spread the bits of whole numbers (splitmix64's last step); they overflow, which is meant."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))
