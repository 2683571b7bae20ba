"""What the author of a part writes for the contract tests: how to make one, small, and what to feed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Example:
    """One registered part, made small.

    kind / what to give:
        norm, layer, mixer, field: `options`, `inputs` (positional tensors for forward, float32).
        model: `options`, `batch` (a mapping that `lamina.batches.call` understands).
        objective: `options`, `model`, `batch`.
        optimizer: `options` (without params). schedule, reducer: `options`.
        pass: `options`; `model`, `batch` where the usual decoder (4 blocks, width 16, vocabulary 32) does not fit.
        data: `options`, `files` (path -> bytes, written below a folder; "{folder}" in an option stands for it).
    """

    kind: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[], tuple[Tensor, ...]] | None = None
    model: Callable[[], nn.Module] | None = None
    batch: Callable[[], Mapping[str, Any]] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    bad: Mapping[str, Any] = field(default_factory=dict)
    """One option with a value that must be refused when the part is built (or, a pass: when it decides)."""
    size_of: str = ""
    """Another registered name of which this is only a size: then built and run on the meta device, and that is all."""
    no_compile: str = ""
    """Why torch.compile(fullgraph=True) cannot take it; empty = it must."""
    only_ours: str = ""
    """Why a pass has no place in a foreign model (it undoes what another pass of ours did); empty = it must have."""
    no_onnx: str = ""
    """Which operation ONNX does not have; empty = torch.onnx.export must take it. Not looked at under `no_compile`."""
    workers: int = 2
    """How many a reducer takes at least: among two, one that takes more must say so."""
    no_autocast: str = ""
    """Why it cannot run under bf16 autocast; empty = it must."""
