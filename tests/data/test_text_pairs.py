"""Two texts a row: passages that follow each other, sentences with a score."""

from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example

from lamina.data import SentencePairs, passage_pairs, scored_pairs
from lamina.errors import LaminaError

TABLE = "sentence1\tsentence2\tscore\nab\tabc\t4.5\nxyz\tq\t0.5\nlong one\tb\t2.0\n"

EXAMPLES = [
    Example(
        "data",
        "passage_pairs",
        options={"source": "{folder}/a.txt", "context": 8, "batch": 2, "split": 0.2},
        files={"a.txt": bytes(range(97, 123)) * 10},
        bad={"split": 1.5},
    ),
    Example(
        "data",
        "scored_pairs",
        options={"source": "{folder}/t.tsv", "evaluation": "{folder}/t.tsv", "context": 4, "batch": 2},
        files={"t.tsv": TABLE.encode()},
        bad={"score": "stars"},
    ),
]


def test_a_passage_is_followed_by_its_pair(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    data = passage_pairs(tmp_path / "a.txt", 8, 2, split=0.2)
    found = data.train.batch(torch.tensor([0, 3]))["input_ids"]
    assert found.shape == (2, 2, 8)
    assert found[1].flatten().tolist() == list(range(48, 64))
    assert data.sizes == {"vocabulary": 256, "context": 8}
    assert data.evaluation is not None
    assert data.evaluation.batch(torch.tensor([0]))["input_ids"].min() >= 160
    assert passage_pairs(tmp_path / "a.txt", 8, 2, split=0).evaluation is None


def test_sentences_are_cut_padded_and_keep_their_scores(tmp_path):
    (tmp_path / "t.tsv").write_text(TABLE)
    data = scored_pairs(tmp_path / "t.tsv", 4, 2)
    found = data.train.batch(torch.tensor([0, 2]))
    assert found["input_ids"].tolist() == [[[97, 98, 0, 0], [97, 98, 99, 0]], [[108, 111, 110, 103], [98, 0, 0, 0]]]
    assert found["attention_mask"].sum(-1).tolist() == [[2, 3], [4, 1]]
    assert found["label"].tolist() == [4.5, 2.0]
    assert data.evaluation is None
    pairs = SentencePairs(["a", "b"], ["c", "d"], torch.tensor([1.0, 2.0]))
    read = scored_pairs(pairs, 3, 2, evaluation=pairs, tokenizer=lambda rows: [[7, 8] for _ in rows])
    assert read.train.batch(torch.tensor([1]))["input_ids"].tolist() == [[[7, 8, 0], [7, 8, 0]]]
    with pytest.raises(LaminaError, match=r"no column 'stars'|'stars'"):
        scored_pairs(tmp_path / "t.tsv", 4, 2, score="stars")
