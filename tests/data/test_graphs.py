from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lamina import data
from lamina.errors import LaminaError, ShapeError

# Three nodes, 0 - 1 - 2, four words.
ARRAYS = {
    "edge_index": np.array([[0, 1, 1, 2], [1, 0, 2, 1]], dtype=np.int32),
    "y": np.array([0, 1, 0], dtype=np.int16),
    "train_idx": np.array([2]), "val_idx": np.array([0]), "test_idx": np.array([1]),
    "x_data": np.array([1, 1, 2], dtype=np.float32), "x_indices": np.array([3, 0, 1]),
    "x_indptr": np.array([0, 1, 1, 3]), "x_shape": np.array([3, 4]),
}  # fmt: skip


def write(folder: Path, **changed: np.ndarray) -> Path:
    (folder / "graph").mkdir(exist_ok=True)
    np.savez(folder / "graph" / "cora.npz", **{**ARRAYS, **changed})
    return folder


def test_cora_is_read_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_DATA", str(write(tmp_path)))
    graph = data.cora()
    assert graph.features.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [1, 2, 0, 0]]
    assert graph.edges.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.labels.tolist() == [0, 1, 0]
    assert (graph.train.tolist(), graph.validation.tolist(), graph.test.tolist()) == ([2], [0], [1])
    assert {t.dtype for t in (graph.edges, graph.labels, graph.train)} == {torch.int64}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"edge_index": np.array([[0], [3]])}, r"edges name nodes 0\.\.3 of 0\.\.2"),
        ({"train_idx": np.array([0])}, "a node is in two of the parts"),
        ({"test_idx": np.array([-1])}, r"the parts name nodes -1\.\.2"),
        ({"x_indptr": np.array([0, 1, 3])}, "the sparse features"),
        ({"x_indices": np.array([3, 0, 4])}, "the sparse features"),
        ({"y": np.array([0, 1])}, "a label a node"),
        ({"edge_index": np.array([0, 1])}, "from and to"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changed: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises((LaminaError, ShapeError), match=words):
        data.cora(write(tmp_path, **changed))


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMINA_DATA", raising=False)
    with pytest.raises(LaminaError, match=r"'cora' is not at hand: LAMINA_DATA names no folder.*graph/cora\.npz"):
        data.cora()
    with pytest.raises(LaminaError, match="not at hand"):
        data.cora(tmp_path)


def test_the_real_cora_classifies_as_known() -> None:
    """Two hops of the normalised graph and a linear classifier reach 0.805 on the public test nodes."""
    if not Path(os.environ.get("LAMINA_DATA", "/nowhere"), "graph/cora.npz").is_file():
        pytest.skip("LAMINA_DATA has no graph/cora.npz")
    linear = pytest.importorskip("sklearn.linear_model")
    graph = data.cora()
    assert graph.features.shape == (2708, 1433)
    assert graph.edges.shape == (2, 10556)
    assert [len(p) for p in (graph.train, graph.validation, graph.test)] == [140, 500, 1000]
    nodes = len(graph.labels)
    near = torch.eye(nodes)
    near[graph.edges[0], graph.edges[1]] = 1
    scale = near.sum(1).rsqrt()
    near = scale[:, None] * near * scale
    x = graph.features / graph.features.sum(1, keepdim=True).clamp(min=1)
    x = (near @ (near @ x)).numpy()
    y = graph.labels.numpy()
    fitted = linear.LogisticRegression(C=100, max_iter=1000).fit(x[graph.train], y[graph.train])
    assert fitted.score(x[graph.test], y[graph.test]) == pytest.approx(0.805, abs=0.015)
