from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.data.listops import TOKENS
from lamina.errors import LaminaError

SMALL: dict[str, Any] = {"context": 60, "shortest": 5, "depth": 4, "rows": 300, "evaluation_rows": 50}
EXAMPLES = [Example("data", "listops", SMALL | {"rows": 20, "evaluation_rows": 5, "batch": 4}, bad={"arguments": 1})]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))


def rows(found: data.Data) -> list[tuple[str, int]]:
    batch = found.train.batch(torch.arange(len(found.train)))
    texts = [" ".join(TOKENS[i] for i in row[mask].tolist()) for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip  # noqa: E501
    return list(zip(texts, batch["labels"].tolist(), strict=True))


def evaluate(text: str) -> tuple[int, int, int]:
    """(value, levels, most arguments), by rewriting the text as Python calls."""
    levels, most = [0], [0]

    def operator(value: Any) -> Any:
        def call(*given: tuple[int, int]) -> tuple[int, int]:
            most[0] = max(most[0], len(given))
            assert len(given) >= 2
            return value([v for v, _ in given]), 1 + max(level for _, level in given)

        return call

    names: dict[str, Any] = {
        "MIN": operator(min),
        "MAX": operator(max),
        "MED": operator(lambda v: int(statistics.median(v))),
        "SM": operator(lambda v: sum(v) % 10),
    }
    python = "".join(f"({t},1)," if t.isdigit() else f"{t[1:]}(" if t[0] == "[" else ")," for t in text.split())
    value, levels[0] = eval(python.removesuffix(","), names)
    return value, levels[0], most[0]


def test_labels_depths_and_lengths_by_an_independent_evaluator() -> None:
    found = rows(data.load("listops", **SMALL))
    assert evaluate("[MAX 2 9 [MIN 4 7 ] 0 ]") == (9, 3, 4)
    assert evaluate("[MED 4 7 ]") == (5, 2, 2)
    seen = [evaluate(text) for text, _ in found]
    assert [value for value, _, _ in seen] == [label for _, label in found]
    assert max(level for _, level, _ in seen) == 4
    assert max(most for _, _, most in seen) == 10
    assert {len(text.split()) for text, _ in found} <= set(range(5, 61))
    assert max(len(text.split()) for text, _ in found) > 40


def test_classes_are_not_degenerate_and_no_expression_is_there_twice() -> None:
    found = data.load("listops", **SMALL)
    counts = Counter(label for _, label in rows(found))
    assert len(counts) == 10
    assert max(counts.values()) < 0.3 * 300
    assert found.evaluation is not None
    every = [bytes(part.batch(torch.tensor([i]))["input_ids"].flatten().tolist()) for part in (found.train, found.evaluation) for i in range(len(part))]  # fmt: skip  # noqa: E501
    assert len(set(every)) == 350


def test_the_same_seed_gives_the_same_expressions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = rows(data.load("listops", **SMALL))
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "other"))
    assert rows(data.load("listops", **SMALL)) == first
    assert rows(data.load("listops", **SMALL, seed=1)) != first


def test_padding_is_masked() -> None:
    batch = data.load("listops", **SMALL).train.batch(torch.tensor([0, 7]))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 60)
    assert torch.equal(batch["attention_mask"], batch["input_ids"] != 0)


def test_the_arenas_lengths_are_reached() -> None:
    found = data.load("listops", rows=5, evaluation_rows=0, batch=5)
    lengths = [len(text.split()) for text, _ in rows(found)]
    assert min(lengths) >= 500
    assert max(lengths) <= 2000
    assert found.evaluation is None
    assert found.sizes == {"vocabulary": 16, "context": 2000, "classes": 10}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shortest": 61}, r"shortest must lie in 1\.\.context \(60\), got 61"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"arguments": 1}, "arguments at least 2"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"depth": 1}, "found only 0 different expressions of 5 to 60 tokens"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        data.load("listops", **SMALL | options)
