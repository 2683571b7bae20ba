"""An attention's projections go over to its successor, whatever they are fused into: equal outputs, if that is all."""

import copy

import pytest
import torch
from torch import nn

from lamina.anatomy import attention_projections, dissect, get
from lamina.batches import call, logits
from lamina.models import Transformer
from lamina.rewrite import Replace, rewrite

transformers = pytest.importorskip("transformers")


def bert():
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )
    return transformers.BertModel(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def opt():
    config = transformers.OPTConfig(
        vocab_size=32,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=16,
        use_cache=False,
    )
    return transformers.OPTForCausalLM(config)


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=32, dim=16, n_layers=2, n_heads=4, hidden_dim=24)
    return transformers.DistilBertModel(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=2
    )
    return transformers.ViTForImageClassification(config)


def torch_encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def ours():
    return Transformer(2, 16, 2, vocabulary=32, context=8)


TOKENS = {"input_ids": torch.arange(14).view(2, 7)}
IMAGES = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
VECTORS = {"inputs": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))}


def perturbed(make):
    """Biases start at zero in most models, and would hide a mistake."""
    torch.manual_seed(0)
    model = make().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (bert, TOKENS),
        (gpt2, TOKENS),
        (opt, TOKENS),
        (distilbert, TOKENS),
        (vit, IMAGES),
        (torch_encoder, VECTORS),
    ],
)
def test_our_attention_in_place_of_theirs_gives_their_outputs(make, batch):
    model = perturbed(make)
    with torch.no_grad():
        expected = logits(call(model, batch))
        found = logits(call(rewrite(model, Replace("attention", "attention")).eval(), batch))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grouped_heads_are_taken_over_too():
    torch.manual_seed(0)
    model = Transformer(2, 16, 4, kv_heads=2, vocabulary=32, context=8).eval()
    options = {"rotary": True}
    with torch.no_grad():
        expected = model(TOKENS["input_ids"])
        model = rewrite(model, Replace("attention", "attention", options=options)).eval()
        torch.testing.assert_close(model(TOKENS["input_ids"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "batch"), [(torch_encoder, VECTORS), (vit, IMAGES)])
def test_momentum_follows_by_rows(make, batch):
    model = perturbed(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    logits(call(model, batch)).square().mean().backward()
    optimizer.step()
    sublayer = dissect(model).trunk().blocks[1].find("attention")
    before = attention_projections(get(model, sublayer.path))
    expected = {
        name: optimizer.state[p.weight]["momentum_buffer"][list(p.rows)].clone() for name, p in before.named().items()
    }
    model = rewrite(model, Replace("attention", "attention"), optimizer=optimizer)
    after = attention_projections(get(model, sublayer.path))
    for name, p in after.named().items():
        assert torch.equal(optimizer.state[p.weight]["momentum_buffer"], expected[name]), name


def test_a_weight_fused_head_by_head_is_taken_apart_by_heads():
    config = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    attention = transformers.GPTNeoXForCausalLM(config).gpt_neox.layers[0].attention
    x = torch.randn(3, 16)
    found = attention_projections(attention, heads=4)
    query, key, value = attention.query_key_value(x).view(3, 4, 12).chunk(3, dim=-1)
    for projection, expected in ((found.query, query), (found.key, key), (found.value, value)):
        torch.testing.assert_close(x @ projection.matrix().T + projection.vector(), expected.flatten(1))
    assert attention_projections(attention) is None, "without the heads the rows cannot be told"


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(16, 2, add_bias_kv=True),
        nn.MultiheadAttention(16, 2, add_zero_attn=True),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4), "out": nn.Linear(4, 4)}),
    ],
)
def test_what_is_not_four_projections_is_none(module):
    assert attention_projections(module) is None


def test_torch_attention_with_keys_of_another_width_keeps_weights_and_biases_together():
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    found = attention_projections(module)
    assert [tuple(p.matrix().shape) for p in found.named().values()] == [(8, 8), (8, 6), (8, 4), (8, 8)]
    assert torch.equal(found.value.vector(), module.in_proj_bias[16:])


def test_a_mixer_without_projections_starts_fresh_and_leaves_the_rest():
    model = perturbed(vit)
    before = copy.deepcopy(model.state_dict())
    model = rewrite(model, Replace("attention", "identity_mixer"), data=[IMAGES])
    kept = {n for n in model.state_dict() if n in before}
    assert kept
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in kept)
