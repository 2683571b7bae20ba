"""A small set of sequences in three classes, for tests: sine waves of three frequencies."""

from __future__ import annotations

import math

import torch

from lamina.data import Columns, Data


def wiggles(batch: int = 8) -> Data:
    """Return 96 sequences (7, 5) with their class as labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    steps = torch.arange(7.0)[None, :, None] * (1 + labels.float())[:, None, None]
    inputs = torch.sin(steps * math.pi / 4) + 0.1 * torch.randn(96, 7, 5, generator=generator)
    rows = {"inputs": inputs, "labels": labels}
    train, held = ({k: v[part] for k, v in rows.items()} for part in (slice(0, 72), slice(72, None)))
    return Data(Columns(train), Columns(held), batch, {}, "wiggles")
