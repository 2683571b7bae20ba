"""Byte tokens in front of encoders that others wrote."""

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina import io
from lamina.errors import AnatomyError, ShapeError
from lamina.models import ByteReader, Transformer
from lamina.nn import ByteTokens

ENCODER = {"name": "transformer", "depth": 1, "width": 8, "heads": 2, "position": "learned"}
EXAMPLES = [
    Example(
        "model",
        "byte_reader",
        options={"model": ENCODER, "kernel": 4, "context": 40, "classes": 3},
        batch=lambda: {"inputs": torch.randint(256, (2, 60))},
        bad={"kernel": 3},
    )
]


def padded(length=60, real=33):
    x = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(1))
    x[1, real:] = -1
    return x


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=64, num_labels=3, **sizes))


def test_a_transformers_encoder_reads_bytes_whatever_the_padding_and_loses_its_table():
    x, model = padded(), bert()
    before = sum(p.numel() for p in model.parameters())
    reader = ByteReader(model, kernel=4).eval()
    whole = reader(x).logits
    torch.testing.assert_close(reader(x[1:, :33]).logits, whole[1:])
    tokens = sum(p.numel() for p in reader.tokens.parameters())
    assert sum(p.numel() for p in reader.parameters()) == before - 32 * 16 + tokens
    reader.train()(x).logits.square().sum().backward()
    assert all(p.grad is not None for p in reader.parameters())


def test_it_is_the_encoder_on_the_tokens_bit_for_bit():
    torch.manual_seed(0)
    model = Transformer(1, 8, 2, vocabulary=5, context=40, causal=False, position="learned", classes=3)
    reader = ByteReader(model, kernel=4)
    tokens, mask = reader.tokens(padded())
    assert torch.equal(reader(padded()), model(inputs_embeds=tokens, attention_mask=mask))


def test_a_home_made_encoder_without_masks_will_do():
    class Home(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.body, self.answer = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, ids=None, inputs_embeds=None):
            x = self.words(ids) if inputs_embeds is None else inputs_embeds
            return self.answer(torch.tanh(self.body(x)).mean(1))

    reader = ByteReader(Home(), kernel=2)
    assert reader(torch.randint(256, (2, 11))).shape == (2, 2)
    assert isinstance(reader.tokens, ByteTokens)
    assert not [n for n, _ in reader.named_parameters() if "words" in n]


def test_a_reader_of_a_recipe_s_transformers_model_is_saved_and_loaded(tmp_path):
    config = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": 4,
    }
    config |= {"architectures": ["BertForSequenceClassification"], "vocab_size": 32, "intermediate_size": 24}
    reader = ByteReader({"name": "hugging_face", "config": config}, kernel=4).eval()
    io.save(reader, tmp_path / "saved")
    assert torch.equal(io.load(tmp_path / "saved").eval()(padded()).logits, reader(padded()).logits)


def test_what_cannot_read_is_refused():
    with pytest.raises(AnatomyError, match=r"Linear.forward takes no inputs_embeds"):
        ByteReader(nn.Linear(3, 3))

    class NoTable(nn.Module):
        def forward(self, inputs_embeds):
            return inputs_embeds

    with pytest.raises(AnatomyError, match="no table that tokens are looked up in"):
        ByteReader(NoTable())
    with pytest.raises(ShapeError, match="context and classes"):
        ByteReader(bert(), context=0)
