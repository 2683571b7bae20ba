from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.errors import LaminaError

FILES = {
    **{f"a/{i}.py": bytes([97 + i]) * 50 for i in range(6)},
    **{f"b/deep/{i}.py": bytes([65 + i]) * 30 for i in range(4)},
    "b/notes.txt": b"?" * 100,
    "b/__pycache__/t.py": b"!" * 100,
    "__pycache__/x.py": b"%" * 100,
}
EXAMPLES = [
    Example(
        "data",
        "snippets",
        options={"source": "{folder}", "context": 8, "batch": 2, "split": 0.3},
        files=FILES,
        bad={"context": 0},
    )
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def contents(part: Any) -> list[tuple[bytes, int]]:
    batch = part.batch(torch.arange(len(part)))
    return [(bytes(r.tolist()), v) for r, v in zip(batch["input_ids"], batch["labels"].tolist(), strict=True)]


def test_snippets_are_labelled_by_their_folder_and_classes_are_equally_large(folder: Path) -> None:
    found = data.load("snippets", source=str(folder), context=8, batch=2, split=0.3)
    assert found.sizes == {"vocabulary": 256, "context": 8, "classes": 2}
    for part in (found.train, found.evaluation):
        rows = contents(part)
        assert [v for _, v in rows].count(0) == [v for _, v in rows].count(1) > 0
        assert all(len(set(text)) == 1 and (text[0] >= 97) == (label == 0) for text, label in rows)
    files = [{text[0] for text, _ in contents(part)} for part in (found.train, found.evaluation)]
    assert not files[0] & files[1], "a file is in one part only"
    assert files[0] | files[1] <= {97 + i for i in range(6)} | {65 + i for i in range(4)}


def test_in_a_folder_of_ones_own_a_class_may_be_called_test(folder: Path) -> None:
    (folder / "test").mkdir()
    for i in range(3):
        (folder / f"test/{i}.py").write_bytes(b"t" * 40)
    found = data.load("snippets", source=str(folder), context=8, batch=2, split=0.3)
    assert found.sizes["classes"] == 3
    assert {text[0] for text, label in contents(found.train) if label == 2} == {ord("t")}
    named = data.load("snippets", source=str(folder), context=8, batch=2, split=0.3, folders=["a", "test"])
    assert named.sizes["classes"] == 2


def test_the_draw_follows_the_seed(folder: Path) -> None:
    same = [contents(data.load("snippets", source=str(folder), context=8, batch=2, seed=s).train) for s in (0, 0, 3)]
    assert same[0] == same[1] != same[2]


def test_the_standard_library_has_four_classes_of_every_length() -> None:
    found = data.load("snippets")
    assert found.sizes["classes"] == 4
    assert len(found.train) > 1000
    assert found.evaluation is not None
    assert len(found.evaluation) > 200
    assert data.load("snippets", folders=["json", "email"], context=64).sizes["classes"] == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"folders": ["a", "c"]}, "no folder 'c' in"),
        ({"folders": ["a"]}, "at least two different folders, got a"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"context": 40}, "the training part of a class has no snippet of 40 bytes"),
        ({"split": 1.0}, "split is evaluation's share"),
        ({"source": "nowhere"}, "the text source 'nowhere' does not exist"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        data.load("snippets", **{"source": str(folder), "context": 8, "batch": 2} | options)
