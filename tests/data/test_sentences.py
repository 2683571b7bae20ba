from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.data._tokenize import encode
from lamina.errors import LaminaError, ShapeError

TABLE = "sentence\tlabel\n" + "".join(f'number "{i % 15}\t{(2, 10)[i % 2]}\n' for i in range(30))

EXAMPLES = [
    Example(
        "data",
        "sentences",
        options={"source": "{folder}/t.tsv", "context": 12, "batch": 4},
        files={"t.tsv": TABLE.encode()},
        bad={"label": "lable"},
    )
]


def test_bytes_are_cut_and_padded_by_hand() -> None:
    found = encode(["abc", "é"], 2, None)
    assert found["input_ids"].tolist() == [[97, 98], [0xC3, 0xA9]]
    found = encode(["abc", "é"], 4, None)
    assert found["input_ids"].tolist() == [[97, 98, 99, 0], [0xC3, 0xA9, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    with pytest.raises(LaminaError, match="text 1 is empty"):
        encode(["a", ""], 3, None)


def test_a_hugging_face_tokenizer_keeps_its_closing_token() -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "to", "be", "or", "not"]
    tool = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    expected = tool(["to be or not", "to"], padding="max_length", truncation=True, max_length=5, return_tensors="pt")
    found = encode(["to be or not", "to"], 5, tool)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    made = data.from_texts((["to be", "or"], ["no", "yes"]), None, 5, 1, tokenizer=tool)
    assert made.sizes == {"vocabulary": len(words), "context": 5, "classes": 2}


def test_equal_texts_stay_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(TABLE)
    found = data.load("sentences", source=str(tmp_path / "t.tsv"), context=16, batch=4, split=0.2)
    parts = [p.batch(torch.arange(len(p))) for p in (found.train, found.evaluation)]
    texts = [{tuple(row) for row in p["input_ids"].tolist()} for p in parts]
    assert [len(t) for t in texts] == [12, 3]
    assert not texts[0] & texts[1]
    assert sum(len(p["labels"]) for p in parts) == 30
    assert found.sizes == {"vocabulary": 256, "context": 16, "classes": 2}


def test_classes_are_numbered_as_numbers() -> None:
    found = data.from_texts((["a", "b", "c"], ["10", "2", "x"]), (["d"], ["10"]), 4, 1)
    assert found.train.batch(torch.arange(3))["labels"].tolist() == [1, 0, 2]
    assert found.evaluation.batch(torch.arange(1))["labels"].tolist() == [1]
    assert found.train.batch(torch.arange(1))["input_ids"].tolist() == [[97, 0, 0, 0]]


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(TABLE)
    with pytest.raises(LaminaError, match="did you mean 'label'"):
        data.sentences(tmp_path / "t.tsv", label="lable")
    with pytest.raises(LaminaError, match="has the class 'z', training only"):
        data.from_texts((["a"], ["x"]), (["b"], ["z"]), 4, 1)
    with pytest.raises(ShapeError, match="2 texts for 1 labels"):
        data.from_texts((["a", "b"], ["x"]), None, 4, 1)


def test_pairs_by_hand(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('sentence1,sentence2,score\n"a, b",c,1.5\nd,NA,5\n')
    pairs = data.sentence_pairs(tmp_path / "p.csv")
    assert (pairs.first, pairs.second, pairs.scores.tolist()) == (["a, b", "d"], ["c", "NA"], [1.5, 5.0])
    assert len(pairs) == 2
    (tmp_path / "p.csv").write_text("sentence1,sentence2,score\na,b,much\n")
    with pytest.raises(LaminaError, match=r"'score' of 'p.csv' is not numeric"):
        data.sentence_pairs(tmp_path / "p.csv")
    with pytest.raises(ShapeError, match=r"\(1, 2, 1\)"):
        data.SentencePairs(["a"], ["b", "c"], torch.ones(1))
