"""`torch.onnx.export` for tests, with torch's table of operators read once instead of at each export."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch


@functools.cache
def _table() -> Any:
    """Half of a small module's export is parsing the source of 500 operators; no export changes them."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return ONNXRegistry.from_torchlib()


def export(*given: Any, **options: Any) -> Any:
    """Export as `torch.onnx.export(..., dynamo=True, verbose=False)` does."""
    table = _table()
    with mock.patch.object(type(table), "from_torchlib", return_value=table):
        return torch.onnx.export(*given, **options, dynamo=True, verbose=False)
