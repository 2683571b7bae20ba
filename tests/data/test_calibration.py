from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamina.data.calibration import standard_text


def test_bytes_for_a_model_of_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = standard_text(tmp_path, vocabulary=256, context=None)
    assert found is not None
    assert not caplog.text
    batches = list(found)
    assert [b["input_ids"].shape for b in batches] == [(4, 256)] * 8
    assert "standard library" in caplog.text
    assert torch.equal(next(iter(found))["input_ids"], batches[0]["input_ids"])


def test_the_models_own_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "import": 1, "def": 2, "return": 3}
    tool = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tool.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tool, unk_token="[UNK]").save_pretrained(tmp_path)
    found = standard_text(tmp_path, vocabulary=4, context=32)
    assert found is not None
    ids = torch.cat([b["input_ids"] for b in found])
    assert ids.shape == (32, 32)
    assert set(ids.unique().tolist()) == {0, 1, 2, 3}


def test_nothing_where_nothing_tells_how_text_is_read(tmp_path: Path) -> None:
    assert standard_text(tmp_path, vocabulary=1000, context=32) is None
