"""Graphs whose nodes are classified: features, edges and the public split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lamina.data._arrays import Array, npz
from lamina.data._at_hand import places
from lamina.data.images import whole_labels
from lamina.errors import LaminaError, ShapeError


@dataclass(frozen=True)
class Graph:
    """One graph; nodes are numbered from 0."""

    features: Tensor
    """(nodes, features) float32."""
    edges: Tensor
    """(2, edges) int64: from, to; an undirected edge stands in both directions."""
    labels: Tensor
    """(nodes,) int64, classes from 0."""
    train: Tensor
    """Node numbers; so are `validation` and `test`. No node is in two of them."""
    validation: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        """Refuse edges or parts that name nodes which are not there, and nodes in two parts."""
        nodes = len(self.features)
        if self.features.ndim != 2 or self.labels.shape != (nodes,):
            shapes = tuple(self.features.shape), tuple(self.labels.shape)
            raise ShapeError(f"a graph needs features (nodes, features) and a label a node, got {shapes}")
        if self.edges.ndim != 2 or len(self.edges) != 2:
            raise ShapeError(f"edges are (2, edges): from and to, got {tuple(self.edges.shape)}")
        held = torch.cat([self.train, self.validation, self.test])
        for what, numbers in (("edges", self.edges), ("the parts", held)):
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < nodes:
                raise LaminaError(f"{what} name nodes {int(numbers.min())}..{int(numbers.max())} of 0..{nodes - 1}")
        if len(held.unique()) != len(held):
            raise LaminaError("a node is in two of the parts train, validation and test, or twice in one")


def cora(folder: str | Path | None = None) -> Graph:
    """Citations between 2,708 papers of 7 topics: 1,433 words as 0/1 features, the split of 140 / 500 / 1,000.

    Args:
        folder: with `graph/cora.npz`; default: what LAMINA_DATA names.
    Raises:
        LaminaError: the file is not below the folder (the hub has no copy that loads as data), or is damaged.
    Source: Yang, Cohen, Salakhutdinov, Revisiting semi-supervised learning with graph embeddings (2016), arXiv
        1603.08861.
    """
    found = places("cora", ["graph/cora.npz"], folder, hub=None) or []
    names = ["edge_index", "y", "train_idx", "val_idx", "test_idx", "x_data", "x_indices", "x_indptr", "x_shape"]
    edges, labels, *parts, values, columns, starts, shape = npz(found[0], names)
    train, validation, test = (_numbers(part) for part in parts)
    features = _dense(values, columns, starts, shape, found[0])
    return Graph(features, _numbers(edges), whole_labels(labels), train, validation, test)


def _numbers(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _dense(values: Array, columns: Array, starts: Array, shape: Array, path: Path) -> Tensor:
    """Write compressed sparse rows out."""
    rows, width = (int(size) for size in shape)
    counts = np.diff(starts)
    whole = len(starts) == rows + 1 and len(values) == len(columns) == starts[-1] and (counts >= 0).all()
    if not whole or (len(columns) and not 0 <= columns.min() <= columns.max() < width):
        raise LaminaError(f"the sparse features of {str(path)!r} do not fit their shape ({rows}, {width})")
    dense = np.zeros((rows, width), dtype=np.float32)
    dense[np.repeat(np.arange(rows), counts), columns] = values
    return torch.from_numpy(dense)
