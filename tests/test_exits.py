"""Exits: where a stream can be left in models nobody wrote for it."""

from __future__ import annotations

import pytest
import torch
from tests.contract.foreign import HomeMade, llama, ours
from torch import nn

from lamina.anatomy.exits import find_exits
from lamina.errors import AnatomyError, ShapeError


def test_exits_of_models_of_several_kinds():
    found = find_exits(llama()[0])
    assert (found.trunk, found.depth, found.norm, found.width) == ("model.layers", 4, "model.norm", 16)
    found = find_exits(ours()[0])
    assert (found.trunk, found.depth, found.norm, found.width) == ("blocks", 4, "final_norm", 16)
    found = find_exits(HomeMade())
    assert (found.trunk, found.depth, found.norm, found.width) == ("stack", 4, "norm", 16)


def test_post_norm_blocks_have_no_final_norm_and_shared_ones_run_often():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}
    bert = transformers.BertModel(transformers.BertConfig(num_hidden_layers=3, **sizes))
    assert find_exits(bert).norm is None
    albert = transformers.AlbertModel(transformers.AlbertConfig(num_hidden_layers=3, embedding_size=8, **sizes))
    found = find_exits(albert)
    assert (len(found.blocks), found.depth) == (1, 3)


def test_the_stream_is_brought_into_one_order():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 2, enable_nested_tensor=False)
    found = find_exits(encoder)
    assert found.time_first
    assert found.tokens(torch.zeros(5, 3, 16)).shape == (3, 5, 16)
    found = find_exits(HomeMade())
    grid = torch.arange(2 * 16 * 6.0).view(2, 16, 2, 3)
    assert torch.equal(found.tokens(grid), grid.flatten(2).transpose(1, 2))
    assert torch.equal(found.tokens(grid.movedim(1, -1)), grid.flatten(2).transpose(1, 2))
    with pytest.raises(ShapeError, match=r"the stream of stack should be \(batch, tokens, 16\), got \(2, 3, 8\)"):
        found.tokens(torch.zeros(2, 3, 8))


def test_several_trunks_need_a_name_and_none_is_an_error():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    t5 = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(AnatomyError, match=r"several trunks: name one of encoder.block, decoder.block"):
        find_exits(t5)
    assert find_exits(t5, "encoder.block").norm == "encoder.final_layer_norm"
    assert find_exits(t5, "decoder.block").norm == "decoder.final_layer_norm"
    with pytest.raises(AnatomyError, match=r"found no repeated blocks"):
        find_exits(nn.Sequential(nn.Linear(4, 4)))
