"""Split any state into JSON and tensors, and put it together again: a checkpoint holds no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lamina.errors import LaminaError

TENSOR, TUPLE, ITEMS = "__tensor__", "__tuple__", "__items__"
"""Marks for what JSON does not have: a tensor kept elsewhere, a tuple, a mapping whose keys are not strings."""


def pack(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Return `tree` as JSON values; its tensors go into `tensors` under `prefix.path`.

    Raises:
        LaminaError: something in it is neither a tensor nor plain data.
    """
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach()
        return {TENSOR: prefix}
    if isinstance(tree, Mapping):
        if all(isinstance(k, str) for k in tree):
            return {k: pack(v, f"{prefix}.{k}", tensors) for k, v in tree.items()}
        return {ITEMS: [[k, pack(v, f"{prefix}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        items = [pack(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
        return {TUPLE: items} if isinstance(tree, tuple) else items
    try:
        json.dumps(tree)
    except TypeError as error:
        raise LaminaError(
            f"a checkpoint holds tensors and plain data, but {prefix} is a {type(tree).__name__}"
        ) from error
    return tree


def unpack(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Undo `pack`; `tensor` returns the tensor of a key."""
    if isinstance(tree, list):
        return [unpack(v, tensor) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {TENSOR}:
        return tensor(tree[TENSOR])
    if set(tree) == {TUPLE}:
        return tuple(unpack(v, tensor) for v in tree[TUPLE])
    if set(tree) == {ITEMS}:
        return {k: unpack(v, tensor) for k, v in tree[ITEMS]}
    return {k: unpack(v, tensor) for k, v in tree.items()}
