from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.errors import LaminaError, ShapeError

datasets = pytest.importorskip("datasets")

ROWS = '{"sentence": "to be", "label": 1, "x": [1.5, 2.0]}\n{"sentence": "or not", "label": 0, "x": [0.0, 3.0]}\n'

EXAMPLES = [
    Example(
        "data",
        "hugging_face",
        options={
            "path": "{folder}",
            "columns": {"sentence": "input_ids", "label": "labels"},
            "batch": 1,
            "evaluation": "test",
            "context": 8,
        },
        files={"train.jsonl": ROWS.encode(), "test.jsonl": ROWS.encode()},
        bad={"columns": {"sentense": "input_ids"}},
    )
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def test_text_numbers_and_arrays_become_tensors() -> None:
    rows = datasets.Dataset.from_dict(
        {"text": ["ab", "c", "def"], "label": [2, 0, 1], "x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}
    )
    found = data.from_datasets(rows, {"text": "input_ids", "label": "labels", "x": "inputs"}, 2, context=3)
    batch = found.train.batch(torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[100, 101, 102], [97, 98, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [1, 2]
    assert batch["inputs"].tolist() == [[5, 6], [1, 2]]
    assert found.sizes == {"vocabulary": 256, "context": 3}
    next(data.Loader(found.train, 3))


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_format_of_the_rows_changes_nothing(form: str) -> None:
    rows = datasets.Dataset.from_dict({"text": ["ab", "c"], "x": [[1.0, 2.0], [3.0, 4.0]]})
    columns = {"text": "input_ids", "x": "inputs"}
    plain, formatted = (data.from_datasets(r, columns, 2, context=3) for r in (rows, rows.with_format(form)))
    one, two = (d.train.batch(torch.tensor([1, 0])) for d in (plain, formatted))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert one["inputs"].dtype == torch.float32


def test_what_is_no_data_set_is_named() -> None:
    rows = datasets.Dataset.from_dict({"text": ["ab", None], "x": [1.0, None]})
    for column in ("text", "x"):
        found = data.from_datasets(rows, {column: "inputs"}, 2)
        with pytest.raises(LaminaError, match=f"the column '{column}' misses values"):
            found.train.batch(torch.arange(2))
    columns = {"text": "input_ids"}
    with pytest.raises(LaminaError, match=r"a DatasetDict with splits \['train'\]: give one of them"):
        data.from_datasets(datasets.DatasetDict(train=rows), columns, 2)
    with pytest.raises(LaminaError, match="a IterableDataset with no rows to pick from"):
        data.from_datasets(rows.to_iterable_dataset(), columns, 2)
    with pytest.raises(LaminaError, match="a list with no rows to pick from"):
        data.from_datasets([{"text": "a"}], columns, 2)
    with pytest.raises(LaminaError, match=r"name the columns to use, of \['text', 'x'\]"):
        data.from_datasets(rows, {}, 2)


def test_images_and_class_names() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [image.fromarray(pixels)] * 2, "label": [0, 1]}, features=features)
    found = data.from_datasets(rows, {"image": "pixel_values", "label": "labels"}, 2)
    batch = found.train.batch(torch.arange(2))
    assert batch["pixel_values"].shape == (2, 3, 2, 4)
    assert batch["pixel_values"][1, 2, 1, 3].item() == pytest.approx(23 / 255)
    assert found.sizes == {"classes": 2}
    other = {"image": [image.new("L", (2, 2)), image.new("L", (3, 2))], "label": [0, 1]}
    mixed = data.from_datasets(datasets.Dataset.from_dict(other, features=features), {"image": "pixel_values"}, 2)
    with pytest.raises(ShapeError, match="column 'image' differ in size"):
        mixed.train.batch(torch.arange(2))


def test_a_folder_is_loaded_by_splits(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        (tmp_path / "set" / f"{name}.jsonl").write_text(ROWS)
    options = {"path": str(tmp_path / "set"), "columns": {"sentence": "input_ids", "label": "labels"}, "batch": 2}
    found = data.load("hugging_face", **options, evaluation="test", context=4)
    assert found.evaluation.batch(torch.tensor([1]))["input_ids"].tolist() == [list(b"or n")]
    with pytest.raises(LaminaError, match=r"no split 'tests', only .*did you mean 'test'"):
        data.hugging_face(**options, evaluation="tests")


def test_mistakes_are_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["ab"], "ragged": [[1]]})
    with pytest.raises(LaminaError, match=r"no column 'txt'.*did you mean 'text'"):
        data.from_datasets(rows, {"txt": "input_ids"}, 1)
    ragged = datasets.Dataset.from_dict({"x": [[1], [1, 2]]})
    with pytest.raises(LaminaError, match="column 'x' cannot be a tensor"):
        data.from_datasets(ragged, {"x": "inputs"}, 1).train.batch(torch.arange(2))
    with pytest.raises(LaminaError, match=r"load_dataset\('.*nowhere'\) failed"):
        data.hugging_face(str(tmp_path / "nowhere"), {"a": "inputs"})
