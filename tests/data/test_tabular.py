from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example

from lamina import data
from lamina.data.examples import split_rows
from lamina.errors import LaminaError, ShapeError

TABLE = "a,colour,b,kind\n" + "".join(
    f"{i},{'red' if i % 2 else 'blue'},{i * i},{10 if i % 3 else 2}\n" for i in range(20)
)

EXAMPLES = [
    Example(
        "data",
        "tabular",
        options={"source": "{folder}/t.csv", "target": "kind", "batch": 4},
        files={"t.csv": TABLE.encode()},
        bad={"target": "kinds"},
    )
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "t.csv").write_text(TABLE)
    return tmp_path / "t.csv"


def test_columns_by_hand(table: Path) -> None:
    found = data.load("tabular", source=str(table), target="kind", batch=2, split=0.0, standardise=False)
    batch = found.train.batch(torch.tensor([3, 4]))
    # a, blue, red, b; classes 2 -> 0 and 10 -> 1, in the order of numbers.
    assert batch["inputs"].tolist() == [[3, 0, 1, 9], [4, 1, 0, 16]]
    assert batch["labels"].tolist() == [0, 1]
    assert found.sizes == {"features": 4, "classes": 2}
    assert batch["inputs"].dtype == torch.float32


def test_regression_keeps_the_unit(table: Path) -> None:
    found = data.tabular(table, "b", 2, task="regression", drop=["kind"], split=0.0)
    assert found.train.batch(torch.arange(4))["labels"].tolist() == [0.0, 1.0, 4.0, 9.0]
    assert found.sizes == {"features": 3, "outputs": 1}


def test_statistics_come_from_the_training_rows_alone() -> None:
    x = np.random.default_rng(0).normal(5, 3, (50, 2))
    x[:, 1] = 7
    train, held = split_rows(50, 0.4, 3)
    found = data.from_arrays(x, x[:, 0], 4, task="regression", split=0.4, seed=3)
    inputs = found.train.batch(torch.arange(30))["inputs"]
    assert inputs[:, 0].mean().item() == pytest.approx(0, abs=1e-6)
    assert inputs[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert inputs[:, 1].abs().max() == 0
    expected = (x[held.numpy(), 0] - x[train.numpy(), 0].mean()) / x[train.numpy(), 0].std()
    np.testing.assert_allclose(found.evaluation.batch(torch.arange(20))["inputs"][:, 0], expected, rtol=1e-5)


@given(length=st.integers(2, 60), split=st.floats(0, 0.5), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_split_parts_are_disjoint_and_complete(length: int, split: float, seed: int) -> None:
    train, held = split_rows(length, split, seed)
    assert sorted(train.tolist() + held.tolist()) == list(range(length))
    assert len(held) == round(length * split)


def test_given_rows_are_held_out() -> None:
    x = np.arange(8.0)[:, None]
    found = data.from_arrays(x, x, 1, task="regression", evaluation=[2, 5])
    assert found.evaluation.batch(torch.arange(2))["labels"].tolist() == [2, 5]
    assert found.train.batch(torch.arange(6))["labels"].tolist() == [0, 1, 3, 4, 6, 7]


def test_npz_tsv_and_gz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=np.eye(4), y=np.array([0, 1, 0, 1]))
    assert data.tabular(tmp_path / "a.npz", batch=1, split=0.0).sizes == {"features": 4, "classes": 2}
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b'a\ty\n1\tsay "no\n2\tyes\n3\tyes\n4\tyes\n'))
    found = data.tabular(tmp_path / "a.tsv.gz", batch=1, split=0.0)
    assert found.train.batch(torch.arange(4))["labels"].tolist() == [0, 1, 1, 1]
    (tmp_path / "b.csv").write_text('a;y\n"1;5";0\n2;1\n')
    with pytest.raises(LaminaError, match="no column 'z'"):
        data.tabular(tmp_path / "b.csv", "z", delimiter=";")


def _write(tmp_path: Path, content: str) -> Path:
    (tmp_path / "x.csv").write_text(content)
    return tmp_path / "x.csv"


def test_mistakes_are_named(tmp_path: Path, table: Path) -> None:
    with pytest.raises(LaminaError, match=r"no column 'kinds'.*did you mean 'kind'"):
        data.tabular(table, "kinds")
    with pytest.raises(LaminaError, match="no column 'colors'"):
        data.tabular(table, "kind", drop=["colors"])
    with pytest.raises(LaminaError, match=r"'b' of 'x.csv' misses 2 values \(first in row 2\)"):
        data.tabular(_write(tmp_path, "a,b,y\n1,1,0\n1,nan,1\n1,,1\n"), batch=1)
    dropped = data.tabular(_write(tmp_path, "a,b,y\n1,1,0\n1,nan,1\n1,,1\n"), batch=1, drop=["b"])
    assert dropped.sizes["features"] == 1
    with pytest.raises(LaminaError, match=r"'y' of 'x.csv' misses 1"):
        data.tabular(_write(tmp_path, "a,y\n1,0\n1,\n"), batch=1)
    with pytest.raises(LaminaError, match=r"row 2 of .* has 3 values, the header 2"):
        data.tabular(_write(tmp_path, "a,y\n1,0\n1,2,3\n"), batch=1)
    with pytest.raises(LaminaError, match="no row below"):
        data.tabular(_write(tmp_path, "a,y\n"))
    with pytest.raises(LaminaError, match="65 different texts"):
        data.tabular(_write(tmp_path, "a,y\n" + "".join(f"n{i},0\n" for i in range(65))), batch=1)
    with pytest.raises(LaminaError, match="two columns of one name"):
        data.tabular(_write(tmp_path, "a,a\n1,2\n"))
    with pytest.raises(LaminaError, match="no column left"):
        data.tabular(_write(tmp_path, "y\n1\n0\n"), batch=1)


def test_bad_arrays_are_named() -> None:
    x, y = np.ones((6, 2)), np.array([0, 1, 0, 1, 0, 1])
    x[4, 1] = np.inf
    with pytest.raises(LaminaError, match=r"'width' of the table has 1 values .*row 5"):
        data.from_arrays(x, y, 1, columns=["length", "width"])
    with pytest.raises(LaminaError, match="the target"):
        data.from_arrays(np.ones((6, 2)), np.array([0, 1, np.nan, 1, 0, 1]), 1)
    with pytest.raises(LaminaError, match="6 classes in 6 rows: task='regression'"):
        data.from_arrays(np.ones((6, 2)), np.arange(6), 1)
    with pytest.raises(ShapeError, match=r"\(6, 2\) \(5,\)"):
        data.from_arrays(np.ones((6, 2)), np.ones(5), 1)


def test_load_words_a_wrong_name_or_option() -> None:
    with pytest.raises(LaminaError, match="did you mean 'tabular'"):
        data.load("tabulr")
    with pytest.raises(LaminaError, match="unexpected keyword argument 'contxt'"):
        data.load("text", contxt=3)
    with pytest.raises(LaminaError, match=r"returned a Fraction"):
        data.load("fractions:Fraction")


@pytest.mark.parametrize(
    ("rows", "words"),
    [([0, 10], r"rows 0\.\.10, but there are 0\.\.9"), ([-1, 2], r"rows -1\.\.2"),
     ([1, 1, 2], "3 rows, of which only 2"), ([0.5], "a list of row numbers, got float64")],
)  # fmt: skip
def test_held_out_rows_that_are_none_are_refused(rows: list[float], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        data.from_arrays(np.ones((10, 2)), np.arange(10) % 2, 2, evaluation=rows)  # type: ignore[arg-type]


def test_a_delimiter_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a;y\n1;2\n", encoding="utf-8")
    for delimiter in (";;", "", "\n"):
        with pytest.raises(LaminaError, match="delimiter must be one character"):
            data.tabular(tmp_path / "t.csv", delimiter=delimiter)
