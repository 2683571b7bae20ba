from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.errors import LaminaError


def letters(texts: list[str]) -> list[list[int]]:
    """A tokenizer for the tests: one number a character."""
    return [[ord(c) - 97 if c.isalpha() else 26 for c in text] for text in texts]


EXAMPLES = [
    Example(
        "data",
        "tokens",
        options={"source": "{folder}/t.bin", "vocabulary": 50, "context": 8, "batch": 2, "split": 0.2},
        files={"t.bin": (np.arange(200, dtype="<u2") % 50).tobytes()},
        bad={"vocabulary": 0},
    ),
    Example(
        "data",
        "tokenized_text",
        options={"source": "{folder}/t.txt", "tokenizer": letters, "context": 4, "batch": 2, "split": 0.2},
        files={"t.txt": b"to be or not to be\n" * 5},
        bad={"split": 1.0},
    ),
]


def test_bare_and_npy_files_give_the_same_blocks(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 999, 101).astype(np.uint16)
    ids.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", ids.astype(np.int32))
    bare = data.load("tokens", source=str(tmp_path / "a.bin"), vocabulary=999, context=10, batch=2, split=0.2)
    full = data.tokens(tmp_path / "a.npy", 999, 10, 2, split=0.2)
    for found in (bare, full):
        batch = found.train.batch(torch.tensor([1]))
        assert batch["input_ids"].tolist() == [ids[10:20].tolist()]
        assert batch["labels"].tolist() == [ids[11:21].tolist()]
        assert isinstance(found.train.tokens, np.memmap)
        assert len(found.train.tokens) == 81
        assert found.evaluation.tokens.tolist() == ids[81:].tolist()
        assert found.sizes == {"vocabulary": 999, "context": 10}


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2, 3, 4, 50, 6]))
    found = data.tokens(tmp_path / "a.npy", 50, 2, 1, split=0.0)
    assert found.train.batch(torch.tensor([0]))["labels"].tolist() == [[2, 3]]
    with pytest.raises(LaminaError, match=r"a.npy has tokens 4..50, the vocabulary is 0..49"):
        found.train.batch(torch.tensor([1]))


def test_files_that_hold_no_tokens_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(LaminaError, match="3 bytes: not a file of uint16 tokens"):
        data.tokens(tmp_path / "a.bin", 50)
    np.save(tmp_path / "a.npy", np.ones((3, 3)))
    with pytest.raises(LaminaError, match=r"whole numbers .n,., got float64"):
        data.tokens(tmp_path / "a.npy", 50)
    np.save(tmp_path / "b.npy", np.arange(9))
    with pytest.raises(LaminaError, match="9 tokens, too few for a block of context 10"):
        data.tokens(tmp_path / "b.npy", 50, 10, split=0.0)


def test_a_text_is_tokenized_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("ab\n\ncd")
    found = data.tokenized_text(tmp_path / "t.txt", letters, 3, 1, split=0.0)
    assert np.asarray(found.train.tokens).tolist() == [0, 1, 26, 26, 2, 3]
    assert found.sizes == {"vocabulary": 27, "context": 3}


def test_a_hugging_face_tokenizer_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "be", "or", "not"]
    tool = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    tool.save_pretrained(tmp_path / "tool")
    (tmp_path / "t.txt").write_text("to be\nor not\n" * 9)
    found = data.tokenized_text(tmp_path / "t.txt", str(tmp_path / "tool"), 2, 1, split=0.0)
    assert found.train.tokens[:6].tolist() == [5, 6, 7, 8, 5, 6]
    assert isinstance(found.train.tokens, np.memmap)
    assert found.sizes["vocabulary"] == len(words)
    (place,) = (tmp_path / "cache" / "tokens").iterdir()
    stamp = place.stat().st_mtime_ns
    data.tokenized_text(tmp_path / "t.txt", str(tmp_path / "tool"), 2, 1, split=0.0)
    assert place.stat().st_mtime_ns == stamp
    words[5:7] = ["be", "to"]
    transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path / "tool")
    found = data.tokenized_text(tmp_path / "t.txt", str(tmp_path / "tool"), 2, 1, split=0.0)
    assert found.train.tokens[:4].tolist() == [6, 5, 7, 8]
