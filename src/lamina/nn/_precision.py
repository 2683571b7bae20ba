"""Arithmetic that autocast must leave alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off inside, where it is on."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; there is none on meta, where torch.autocast would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
