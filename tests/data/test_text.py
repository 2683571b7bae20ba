from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example

from lamina import data
from lamina.data.text import Blocks
from lamina.errors import LaminaError

EXAMPLES = [
    Example(
        "data",
        "text",
        options={"source": "{folder}/a.txt", "context": 8, "batch": 2, "split": 0.2},
        files={"a.txt": bytes(range(97, 123)) * 10},
        bad={"split": 1.5},
    )
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))


def test_labels_are_the_next_bytes_by_hand() -> None:
    blocks = Blocks(np.frombuffer(b"abcdefghij", dtype=np.uint8), 3)
    batch = blocks.batch(torch.tensor([2, 0]))
    assert len(blocks) == 3
    assert [bytes(r.tolist()) for r in batch["input_ids"]] == [b"ghi", b"abc"]
    assert [bytes(r.tolist()) for r in batch["labels"]] == [b"hij", b"bcd"]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_without_labels_the_last_block_needs_no_next_byte() -> None:
    blocks = Blocks(np.frombuffer(b"abcdefghi", dtype=np.uint8), 3, next_token=False)
    assert len(blocks) == 3
    assert [bytes(r.tolist()) for r in blocks.batch(torch.arange(3))["input_ids"]] == [b"abc", b"def", b"ghi"]
    assert "labels" not in blocks.batch(torch.arange(1))
    assert len(Blocks(np.frombuffer(b"abcdefghi", dtype=np.uint8), 3)) == 2


def test_writing_into_the_input_leaves_the_labels() -> None:
    batch = Blocks(np.arange(20), 4).batch(torch.arange(2))
    batch["input_ids"].fill_(-1)
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


@given(length=st.integers(0, 60), context=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_blocks_tile_the_text_without_overlap(length: int, context: int) -> None:
    blocks = Blocks(np.arange(length), context)
    assert len(blocks) == max(0, (length - 1) // context)
    if len(blocks):
        ids = blocks.batch(torch.arange(len(blocks)))["input_ids"]
        assert ids.flatten().tolist() == list(range(len(blocks) * context))
        with pytest.raises(IndexError):
            blocks.batch(torch.tensor([len(blocks)]))


def test_a_plain_file_is_mapped_where_it_stands(tmp_path: Path) -> None:
    content = bytes(random.Random(0).choices(range(97, 123), k=1000))
    (tmp_path / "a.txt").write_bytes(content)
    found = data.load("text", source=str(tmp_path / "a.txt"), context=10, batch=2, split=0.1)
    assert isinstance(found.train.tokens, np.memmap)
    assert found.train.tokens.filename == tmp_path / "a.txt"
    assert bytes(found.train.tokens) + bytes(found.evaluation.tokens) == content
    assert len(found.evaluation.tokens) == 100
    assert not (tmp_path / "cache").exists()
    assert found.sizes == {"vocabulary": 256, "context": 10}


def test_a_compressed_file_is_unpacked_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"0123456789" * 50))
    first = data.text(tmp_path / "a.txt.gz", context=10, split=0.1)
    (place,) = (tmp_path / "cache" / "text").iterdir()
    stamp = place.stat().st_mtime_ns
    second = data.text(tmp_path / "a.txt.gz", context=10, split=0.1)
    assert isinstance(first.train.tokens, np.memmap)
    assert bytes(second.train.tokens) == b"0123456789" * 45
    assert place.stat().st_mtime_ns == stamp
    assert [p.name for p in (tmp_path / "cache" / "text").iterdir()] == [place.name]


def _folder(root: Path) -> dict[str, bytes]:
    contents = {f"part{i}/f{j}.txt": bytes([65 + i * 5 + j]) * 100 for i in range(4) for j in range(5)}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return contents


def test_whole_files_of_a_folder_are_held_out(tmp_path: Path) -> None:
    contents = _folder(tmp_path / "books")
    found = data.text(tmp_path / "books", context=4, split=0.2)
    train, held = set(bytes(found.train.tokens)), set(bytes(found.evaluation.tokens))
    assert len(held) == 4
    assert not train & held
    assert len(train | held) == len(contents)
    assert bytes(found.train.tokens) == b"".join(contents[n] for n in sorted(contents) if contents[n][0] in train)
    other = data.text(tmp_path / "books", context=4, split=0.2, seed=1)
    assert set(bytes(other.evaluation.tokens)) != held


def test_one_large_file_is_cut_not_held_out(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_bytes(b"a" * 900)
    (tmp_path / "books" / "b.txt").write_bytes(b"b" * 1100)
    found = data.text(tmp_path / "books", context=4, split=0.1)
    assert bytes(found.train.tokens) == b"a" * 900 + b"b" * 900
    assert bytes(found.evaluation.tokens) == b"b" * 200


def test_pattern_and_hidden_files(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", ".c.py", ".git/d.py"):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_bytes(name.encode() * 10)
    found = data.text(tmp_path / "code", context=2, batch=1, split=0.0, pattern="*.py")
    assert bytes(found.train.tokens) == b"a.py" * 10
    with pytest.raises(LaminaError, match=r"no file named like '\*\.rs' \(2 others\)"):
        data.text(tmp_path / "code", pattern="*.rs")


def test_the_content_names_the_cache(tmp_path: Path) -> None:
    _folder(tmp_path / "books")
    data.text(tmp_path / "books", context=4)
    (tmp_path / "books" / "part0" / "f0.txt").write_bytes(b"!" * 100)
    again = data.text(tmp_path / "books", context=4, split=0.0)
    assert b"!" * 100 in bytes(again.train.tokens)
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 2


def test_the_standard_library_is_large_and_deterministic() -> None:
    first, second = data.text(), data.text()
    assert isinstance(first.train.tokens, np.memmap)
    assert len(first.train.tokens) > 4_000_000
    assert bytes(first.train.tokens[:10_000]) == bytes(second.train.tokens[:10_000])
    share = len(first.evaluation.tokens) / (len(first.train.tokens) + len(first.evaluation.tokens))
    assert 0.025 <= share <= 0.05
    assert b"site-packages/" not in bytes(first.train.tokens[:1000])


def test_limit_bounds_both_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 10_000)
    found = data.text(tmp_path / "a.txt", context=10, limit=1000, split=0.1)
    assert (len(found.train.tokens), len(found.evaluation.tokens)) == (900, 100)


def test_characters_are_numbered_and_cut_whole(tmp_path: Path) -> None:
    written = "aé€b" * 50
    (tmp_path / "a.txt").write_text(written, encoding="utf-8")
    for split in (0.1, 0.11, 0.12, 0.13):
        found = data.text(tmp_path / "a.txt", context=5, batch=2, unit="characters", split=split)
        letters = sorted(set(written))
        ids = np.concatenate([found.train.tokens, found.evaluation.tokens])
        assert "".join(letters[i] for i in ids) == written
        assert found.sizes == {"vocabulary": 4, "context": 5}


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_bytes(b"To be")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(b"To be or not" * 9)[:-9])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    with pytest.raises(LaminaError, match=r"no 'shakespear.txt' in .*did you mean 'shakespeare.txt'"):
        data.text(tmp_path / "shakespear.txt")
    with pytest.raises(LaminaError, match=r"empty.txt' is empty"):
        data.text(tmp_path / "empty.txt")
    with pytest.raises(LaminaError, match="has 5 tokens, too few for one block of context 256"):
        data.text(tmp_path / "shakespeare.txt", split=0.0)
    with pytest.raises(LaminaError, match="not a whole gzip file"):
        data.text(tmp_path / "broken.txt.gz")
    with pytest.raises(LaminaError, match=r"not UTF-8.*unit='bytes'"):
        data.text(tmp_path / "latin.txt", unit="characters")
    with pytest.raises(LaminaError, match="1 training rows, too few for a batch of 16"):
        data.text(tmp_path / "latin.txt", context=300, split=0.0)
    with pytest.raises(LaminaError, match="evaluation's share"):
        data.text(split=1.0)


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "file"))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"To be or not" * 99))
    with pytest.raises(LaminaError, match="LAMINA_CACHE names another"):
        data.text(tmp_path / "a.txt.gz")
