"""A Fourier head in place of the last linear layer of models that were not made for it."""

import copy
import json

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina import io
from lamina.batches import call, logits
from lamina.errors import LaminaError
from lamina.models import Transformer
from lamina.nn import FourierHead
from lamina.rewrite import Replace, history, replay, rewrite
from lamina.rewrite.conversion import targets

EXAMPLES = [
    Example(
        "pass",
        "replace",
        {"old": "head", "new": "fourier_head", "options": {"num_frequencies": 1}},
        bad={"options": {"num_frequency": 1}},
    )
]

TOKENS = torch.arange(12).view(2, 6)


def replace(**options):
    return Replace("head", "fourier_head", options={"num_frequencies": 5, **options})


def home_made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 20))


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def test_the_head_of_a_tied_language_model_is_replaced_untied_trained_saved_and_loaded(tmp_path):
    model = llama()
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    rewrite(model, replace())
    decision = json.loads(json.dumps(history(model)[0].decision))
    assert decision["paths"] == ["lm_head"]
    assert decision["new"] == "fourier_head"
    assert decision["options"] == {"num_frequencies": 5}
    assert decision["untied"] == ["model.embed_tokens.weight"]
    assert model.model.embed_tokens.weight is embedding
    out = model(input_ids=TOKENS, labels=TOKENS)
    assert out.logits.shape == (2, 6, 32)
    out.loss.backward()
    assert model.lm_head.linear.weight.grad.any()
    assert model.generate(TOKENS[:1, :3], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 5)
    io.save(model, tmp_path / "saved")
    loaded = io.load(tmp_path / "saved")
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_ours_and_a_home_made_model_take_it_with_sizes_dtype_and_seed():
    ours = Transformer(1, 8, 2, vocabulary=16, context=8)
    rewrite(ours, replace())
    assert ours.head.waves is not None
    assert logits(call(ours, {"input_ids": TOKENS})).shape == (2, 6, 16)
    assert ours.head.linear.weight is not ours.embedding.weight
    model, other = home_made().double(), home_made().double()
    rewrite(model, replace())
    torch.manual_seed(123)
    rewrite(other, replace())
    assert (type(model[2]), model[2].in_features, model[2].num_bins) == (FourierHead, 8, 20)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model[2].linear.weight, other[2].linear.weight)
    skeleton = replay(home_made().to("meta"), history(model))
    assert skeleton[2].waves.is_meta
    assert list(skeleton.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_extra_classes_are_counted_among_the_outputs_and_keep_their_rows_and_momentum(bias):
    model = home_made()
    model[2] = nn.Linear(8, 20, bias=bias)
    old = copy.deepcopy(model[2])
    x = torch.randn(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[2].weight]["momentum_buffer"].clone()
    rewrite(model, replace(extra_classes=3), optimizer=optimizer)
    head = model[2]
    assert head.num_bins == 17
    assert model(x).shape == (4, 20)
    torch.testing.assert_close(model(x)[:, 17:], old(torch.relu(model[0](x)))[:, 17:])
    kept = optimizer.state[head.extra.weight]["momentum_buffer"]
    assert torch.equal(kept[1:], momentum[17:])
    assert not kept[0].any()
    assert head.linear.weight not in optimizer.state or not optimizer.state[head.linear.weight]


def test_what_does_not_fit_is_refused_and_nothing_changes():
    model = home_made()
    for options, words in (
        ({"extra_classes": 19}, "extra_classes=19 of 20 outputs leaves fewer than 2"),
        ({"order": [0, 1]}, "each of the 20 bins"),
        ({"frequencies": 3}, "did you mean 'num_frequencies'"),
    ):
        with pytest.raises(LaminaError, match=words):
            rewrite(model, replace(**options))
    assert type(model[2]) is nn.Linear


def test_a_layer_that_gives_no_tensor_is_no_successor_of_a_linear_layer():
    assert "fourier_head" in targets("head")
    assert "fourier_density" not in targets("head") | targets("linear")
    with pytest.raises(LaminaError, match="cannot become 'fourier_density'"):
        rewrite(home_made(), Replace("head", "fourier_density"))
