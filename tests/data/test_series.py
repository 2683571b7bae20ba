from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.errors import LaminaError

TABLE = "date,a,b\n" + "".join(f"day {i},{i},{100 + i}\n" for i in range(20))

EXAMPLES = [
    Example(
        "data",
        "series",
        options={"source": "{folder}/t.csv", "context": 3, "horizon": 2, "batch": 4, "drop": ["date"]},
        files={"t.csv": TABLE.encode()},
        bad={"horizon": 0},
    )
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "t.csv").write_text(TABLE)
    return tmp_path / "t.csv"


def test_windows_by_hand(table: Path) -> None:
    found = data.load(
        "series", source=str(table), context=3, horizon=2, batch=4, drop=["date"], standardise=False, split=0.2
    )
    batch = found.train.batch(torch.tensor([0, 11]))
    assert batch["inputs"][..., 0].tolist() == [[0, 1, 2], [11, 12, 13]]
    assert batch["labels"][..., 1].tolist() == [[103, 104], [114, 115]]
    assert len(found.train) == 12
    assert len(found.evaluation) == 3
    assert found.sizes == {"channels": 2, "context": 3, "horizon": 2}


def test_no_label_row_is_in_both_parts(table: Path) -> None:
    found = data.series(table, 3, 2, 4, columns=["a"], standardise=False, split=0.3)
    labels = [set(p.batch(torch.arange(len(p)))["labels"].flatten().tolist()) for p in (found.train, found.evaluation)]
    assert labels == [set(range(3, 14)), set(range(14, 20))]


def test_only_training_rows_give_the_statistics(table: Path) -> None:
    found = data.series(table, 3, 2, 4, columns=["a"], split=0.5)
    expected = (np.arange(20) - 4.5) / np.arange(10).std()
    np.testing.assert_allclose(found.evaluation.values[:, 0], expected[7:], rtol=1e-6)


def test_mistakes_are_named(table: Path, tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match=r"'date' of 't.csv' is not numeric"):
        data.series(table, 3, 2)
    with pytest.raises(LaminaError, match="no column 'c'"):
        data.series(table, 3, 2, columns=["c"])
    with pytest.raises(LaminaError, match="16 training and 4 evaluation rows, too few for windows of 15"):
        data.series(table, 15, 2, 1, columns=["a"])
    (tmp_path / "n.csv").write_text("a\n1\nnan\n")
    with pytest.raises(LaminaError, match=r"'a' of 'n.csv' misses 1 values \(first in row 2\)"):
        data.series(tmp_path / "n.csv", 1, 1, 1)
