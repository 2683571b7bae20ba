from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina import io
from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError, RecipeError
from lamina.models import Transformer, VisionTransformer
from lamina.nn import GridAsSequence, PoolingMixer, SpatialLinearMixer
from lamina.rewrite import Replace, history, replay, rewrite
from lamina.rewrite._replaced_attention import ReplacedAttention

transformers = pytest.importorskip("transformers")


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


SIZES: dict[str, Any] = {"image": 12, "patch": 4, "depth": 2, "width": 16, "heads": 2, "classes": 5}


def ours(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**(SIZES | options)).eval()


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": images(2, 3, 12, 12), "labels": torch.tensor([0, 4])}


EXAMPLES = [
    Example(
        "pass",
        "replace",
        {"old": "attention", "new": "pooling_mixer"},
        model=ours,
        batch=pixels,
        bad={"new": "poolling_mixer"},
    ),
    Example(
        "pass",
        "replace",
        {"old": "attention", "new": "attention", "options": {"bias": True}, "seed": 3},
        bad={"match": "nowhere.*"},
    ),
]

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**(SMALL | {"image_size": 12, "patch_size": 4, "num_labels": 5} | options))
    return transformers.ViTForImageClassification(config).eval()


class Sunday(nn.Module):
    """Home-made: patches by unfold, two register tokens, a fused projection, attention returns a tensor."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj(torch.softmax(q @ k.mT / 4, -1) @ v)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.attn, self.n2 = nn.LayerNorm(16), Sunday.Attention(), nn.LayerNorm(16)
            self.ff = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.n1(x))
            return x + self.ff(self.n2(x))

    def __init__(self, prefix: int = 2) -> None:
        super().__init__()
        self.embed, self.registers = nn.Linear(48, 16), nn.Parameter(torch.randn(1, prefix, 16))
        self.layers = nn.ModuleList(Sunday.Block() for _ in range(2))
        self.answer = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, 4, stride=4).mT
        x = torch.cat((self.registers.expand(len(x), -1, -1), self.embed(patches)), 1)
        for layer in self.layers:
            x = layer(x)
        return self.answer(x[:, 0])


def decided(model: nn.Module) -> dict[str, Any]:
    return history(model)[-1].decision


def out(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return logits(call(model, batch))


@pytest.mark.parametrize("new", ["pooling_mixer", "spatial_linear_mixer", {"kernel_size": 5}])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_our_vision_transformer_becomes_the_one_built_with_the_mixer(new: Any, pool: str) -> None:
    options = new if isinstance(new, dict) else {}
    name = "pooling_mixer" if isinstance(new, dict) else new
    model, built = ours(pool=pool), ours(pool=pool, mixer={"name": name, **options})
    rewrite(model, Replace("attention", name, options=options))
    prefix = int(pool == "class")
    assert (decided(model)["grid"], decided(model)["prefix"]) == ([3, 3], prefix)
    state = {k.replace("mixer.mixer.mixer.", "mixer.mixer."): v for k, v in model.state_dict().items()}
    built.load_state_dict(state, strict=True)
    assert torch.equal(out(model, pixels()), out(built, pixels()))
    if name == "pooling_mixer" and not options:
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in built.parameters())


def test_the_vit_of_transformers_with_pooling_is_the_hand_built_one() -> None:
    model = vit()
    twin = copy.deepcopy(model)
    rewrite(model, Replace("attention", "pooling_mixer"))
    assert (decided(model)["grid"], decided(model)["prefix"]) == ([3, 3], 1)

    x = twin.vit.embeddings(pixels()["pixel_values"])
    for layer in twin.vit.layers:
        mixed = layer.layernorm_before(x)
        cells = mixed[:, 1:].mT.unflatten(2, (3, 3))
        pooled = nn.functional.avg_pool2d(cells, 3, 1, 1, count_include_pad=False) - cells
        x = x + torch.cat((torch.zeros_like(mixed[:, :1]), pooled.flatten(2).mT), 1)
        x = x + layer.mlp(layer.layernorm_after(x))
    expected = twin.classifier(twin.vit.layernorm(x)[:, 0])
    torch.testing.assert_close(out(model, pixels()), expected)


def test_the_class_token_passes_by() -> None:
    torch.manual_seed(0)
    shim = ReplacedAttention(GridAsSequence(PoolingMixer(), (3, 3), 1), names=("hidden_states",), rest=(None,))
    x = images(2, 10, 16)
    for result in (shim(x), shim(hidden_states=x, attention_mask=None)):
        assert result[1] is None
        assert not result[0][:, 0].any()
        assert result[0][:, 1:].any()


def test_a_class_token_that_will_see_no_image_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    constant = rewrite(vit(), Replace("attention", "pooling_mixer"))
    assert "1 class or register tokens will see nothing of the image" in caplog.text
    one, two = out(constant, pixels())
    torch.testing.assert_close(one, two)
    caplog.clear()
    mixed = rewrite(vit(), Replace("attention", "pooling_mixer", match="*.0.attention"))
    rewrite(ours(pool="mean"), Replace("attention", "pooling_mixer"))
    assert caplog.text == ""
    one, two = out(mixed, pixels())
    assert not torch.allclose(one, two)


def test_a_home_made_model_with_registers_and_no_convolution() -> None:
    torch.manual_seed(0)
    model, batch = Sunday().eval(), {"pixels": images(2, 3, 16, 16)}
    with pytest.raises(AnatomyError, match=r"nothing tells the grid of Sunday's tokens: give data, or grid="):
        rewrite(model, Replace("attention", "pooling_mixer"))
    rewrite(model, Replace("attention", "pooling_mixer"), data=[batch])
    assert (decided(model)["grid"], decided(model)["prefix"]) == ([4, 4], 2)
    assert [type(m.attn) for m in model.layers] == [ReplacedAttention] * 2
    assert torch.isfinite(out(model, batch)).all()


def test_the_grid_of_an_oblong_image_is_read_off_the_convolution() -> None:
    model = vit(image_size=(8, 16), patch_size=4)
    batch = {"pixel_values": images(2, 3, 8, 16)}
    for data in (None, [batch]):
        one = rewrite(copy.deepcopy(model), Replace("attention", "pooling_mixer"), data=data)
        assert (decided(one)["grid"], decided(one)["prefix"]) == ([2, 4], 1)
        assert out(one, batch).shape == (2, 5)


def test_registers_beside_the_class_token_are_counted() -> None:
    options = SMALL | {"image_size": 12, "patch_size": 4, "num_register_tokens": 4}
    model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**options)).eval()
    rewrite(model, Replace("attention", "spatial_linear_mixer"))
    assert (decided(model)["grid"], decided(model)["prefix"]) == ([3, 3], 5)
    assert model.encoder.layer[0].layer_scale1.lambda1.shape == (16,)
    assert model(images(1, 3, 12, 12)).last_hidden_state.shape == (1, 14, 16)


def test_only_what_matches_is_replaced_and_the_rest_keeps_its_momentum() -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters())
    out_before = logits(call(model, pixels()))
    out_before.sum().backward()
    optimizer.step()
    kept = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters() if ".1.attention" not in n}
    rewrite(model, Replace("attention", "spatial_linear_mixer", match="*.1.attention"), optimizer=optimizer)
    assert decided(model)["paths"] == ["vit.layers.1.attention"]
    assert type(model.vit.layers[0].attention) is not ReplacedAttention
    assert type(model.vit.layers[1].attention.mixer.mixer) is SpatialLinearMixer
    now = dict(model.named_parameters())
    assert all(torch.equal(optimizer.state[now[n]]["exp_avg"], m) for n, m in kept.items())
    fresh = now["vit.layers.1.attention.mixer.mixer.linear.weight"]
    assert not optimizer.state.get(fresh)
    assert any(fresh is p for g in optimizer.param_groups for p in g["params"])


def cells(model: nn.Module) -> Tensor:
    """What the last block knows of the patches; the class token sees nothing of them."""
    with torch.no_grad():
        return model.vit(pixels()["pixel_values"]).last_hidden_state[:, 1:]


def test_a_history_replays_bit_for_bit_and_hangs_on_its_seed_alone(tmp_path: Any) -> None:
    found = []
    for seed in (0, 7):
        model = vit()
        original = copy.deepcopy(model)
        torch.manual_seed(100 + seed)
        rewrite(model, Replace("attention", "spatial_linear_mixer", seed=seed))
        records = history(model)
        assert json.loads(json.dumps(records[0].decision)) == records[0].decision
        assert records[0].decision["seed"] == seed
        torch.manual_seed(5)
        again = replay(original, records)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        found.append(cells(again))
        assert torch.equal(found[-1], cells(model))
    assert not torch.equal(found[0], found[1])
    io.save(model, tmp_path / "saved")
    assert torch.equal(cells(io.load(tmp_path / "saved").eval()), found[1])


def test_it_decides_and_applies_on_meta() -> None:
    real = rewrite(vit(), Replace("attention", "spatial_linear_mixer"))
    skeleton = rewrite(vit().to("meta"), Replace("attention", "spatial_linear_mixer"))
    assert decided(skeleton) == decided(real)
    assert all(p.is_meta for p in skeleton.parameters())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_deciding_changes_nothing() -> None:
    model = vit().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    Replace("attention", "random_mixer").decide(model, [pixels()])
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=32)).eval()


def test_bert_keeps_the_residual_and_the_norm_that_its_attention_held() -> None:
    model = bert()
    norms = [layer.attention.output.LayerNorm for layer in model.encoder.layer]
    ids = torch.arange(9).view(1, 9)
    with pytest.raises(AnatomyError, match="9 tokens, which are not the cells of an image: give grid="):
        rewrite(model, Replace("attention", "pooling_mixer"), data=[{"input_ids": ids}])
    rewrite(model, Replace("attention", "pooling_mixer", grid=(3, 3)), data=[{"input_ids": ids}])
    assert [layer.attention.norm for layer in model.encoder.layer] == norms
    x = model.embeddings(ids)
    for layer in model.encoder.layer:
        cells = x.mT.unflatten(2, (3, 3))
        pooled = nn.functional.avg_pool2d(cells, 3, 1, 1, count_include_pad=False) - cells
        x = layer.attention.norm(x + pooled.flatten(2).mT)
        x = layer.output(layer.intermediate(x), x)
    torch.testing.assert_close(model(ids).last_hidden_state, x)


def test_a_padding_mask_reaches_a_sequence_mixer_and_is_refused_by_a_grid() -> None:
    ids, mask = torch.arange(9).view(1, 9), torch.ones(1, 9, dtype=torch.long)
    padded = {"input_ids": ids, "attention_mask": mask.clone()}
    padded["attention_mask"][:, 6:] = 0
    with pytest.raises(AnatomyError, match="given attention_mask: a grid has no place for padding"):
        rewrite(bert(), Replace("attention", "pooling_mixer", grid=(3, 3)), data=[padded])
    grid = rewrite(bert(), Replace("attention", "pooling_mixer", grid=(3, 3)))
    with pytest.raises(LaminaError, match="PoolingMixer in place of attention takes no mask"):
        call(grid, padded)
    model = rewrite(bert(), Replace("attention", "attention"))
    short = call(model, {"input_ids": ids[:, :6]}).last_hidden_state
    torch.testing.assert_close(call(model, padded).last_hidden_state[:, :6], short)
    assert not torch.allclose(call(model, {"input_ids": ids}).last_hidden_state[:, :6], short, atol=1e-3)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_in_both_orders_and_both_layouts(norm_first: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, norm_first=norm_first, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = images(2, 9, 16)
    fed = x if batch_first else x.transpose(0, 1)
    rewrite(model, Replace("attention", "pooling_mixer", grid=(3, 3)), data=[{"src": fed}])
    found = model(fed) if batch_first else model(fed).transpose(0, 1)

    def pooled(x: Tensor) -> Tensor:
        return GridAsSequence(PoolingMixer(), (3, 3))(x)

    for one in model.layers:
        if norm_first:
            x = x + pooled(one.norm1(x))
            x = x + one.linear2(one.linear1(one.norm2(x)).relu())
        else:
            x = one.norm1(x + pooled(x))
            x = one.norm2(x + one.linear2(one.linear1(x).relu()))
    torch.testing.assert_close(found, x)
    with pytest.raises(LaminaError, match="attn_mask has the shape"):
        model(fed, mask=torch.zeros(9, 9))


def test_t5_keeps_its_norm_and_hands_no_position_bias_on() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=20)
    model = transformers.T5EncoderModel(config).eval()
    ids = torch.arange(9).view(1, 9)
    with pytest.raises(AnatomyError, match="position biases that others use"):
        rewrite(copy.deepcopy(model), Replace("attention", "attention", match="*.0.layer.0"))
    rewrite(model, Replace("attention", "identity_mixer", grid=(3, 3)), data=[{"input_ids": ids}])
    x = model.shared(ids)
    for block in model.encoder.block:
        x = x + block.layer[0].norm(x)
        x = block.layer[1](x)
    torch.testing.assert_close(model(ids).last_hidden_state, model.encoder.final_layer_norm(x))


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, vocab_size=32, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config).eval()


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return Transformer(2, 16, 2, vocabulary=32, context=16).eval()


@pytest.mark.parametrize("make", [llama, decoder])
def test_decoders_take_causal_mixers_only(make: Any) -> None:
    ids = torch.arange(9).view(1, 9)
    for new in ("pooling_mixer", "identity_mixer"):
        with pytest.raises(AnatomyError, match=f"{new} mixes whole images, but .* sees earlier tokens only"):
            rewrite(make(), Replace("attention", new, grid=(3, 3)))
    with pytest.raises(AnatomyError, match="not known to be causal"):
        rewrite(make(), Replace("attention", "attention", options={"causal": False}))
    model = rewrite(make(), Replace("attention", "attention", options={"rotary": True}))
    changed = ids.clone()
    changed[:, 5:] = 1
    one, two = (out(model, {"input_ids": i}) for i in (ids, changed))
    torch.testing.assert_close(one[:, :5], two[:, :5])
    assert not torch.allclose(one[:, 5:], two[:, 5:], atol=1e-3)


def test_left_padding_is_seen_by_a_replaced_decoder() -> None:
    model = rewrite(llama(), Replace("attention", "attention"))
    ids = torch.arange(9).view(1, 9)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    padded = out(model, {"input_ids": ids, "attention_mask": mask})[:, 3:]
    torch.testing.assert_close(padded, out(model, {"input_ids": ids[:, 3:]}))


def test_our_decoder_generates_with_its_cache_after_the_swap() -> None:
    model = rewrite(decoder(), Replace("attention", "attention", options={"rotary": True}))
    start = torch.arange(3).view(1, 3)
    expected = start
    for _ in range(6):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(start, 6, temperature=0), expected)


def test_a_foreign_cache_is_refused_and_off_by_default() -> None:
    model = rewrite(llama(), Replace("attention", "attention"))
    ids = torch.arange(4).view(1, 4)
    assert model.config.use_cache is False
    with pytest.raises(LaminaError, match="use_cache=False"):
        model(ids, use_cache=True)
    expected = ids
    for _ in range(3):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False, **options)
    assert torch.equal(found, expected)


def test_twice_is_the_second() -> None:
    model = rewrite(vit(), Replace("attention", "attention"), Replace("attention", "pooling_mixer"))
    assert torch.equal(out(model, pixels()), out(rewrite(vit(), Replace("attention", "pooling_mixer")), pixels()))


def test_windows_that_shift_are_refused() -> None:
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, window_size=4)).eval()
    batch = {"pixel_values": images(2, 3, 16, 16)}
    with pytest.raises(AnatomyError, match="attention_mask"):
        rewrite(model, Replace("attention", "pooling_mixer"), data=[batch])
    rewrite(model, Replace("attention", "pooling_mixer", match="*.blocks.0.attention"), data=[batch])
    assert (decided(model)["grid"], decided(model)["prefix"]) == ([4, 4], 0)
    assert torch.isfinite(out(model, batch)).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"new": "poling_mixer"}, LaminaError, "did you mean 'pooling_mixer'"),
        ({"new": "pooling_mixer", "match": "vit.layer.*"}, AnatomyError, "vit.layers.0.attention"),
        ({"new": "pooling_mixer", "options": {"kernel": 3}}, RecipeError, "kernel_size"),
        ({"new": "pooling_mixer", "options": {"kernel_size": 2}}, LaminaError, "odd"),
        ({"new": "attention", "options": {"heads": 3}}, LaminaError, "does not divide"),
        ({"new": "attention", "grid": (3, 3)}, RecipeError, "grid is for mixers of images"),
        ({"new": "pooling_mixer", "grid": (4, 4)}, AnatomyError, "10 tokens, which are not the 4 x 4 given"),
    ],
)
def test_bad_requests_are_refused_and_change_nothing(options: Any, error: type[Exception], words: str) -> None:
    model = vit()
    before = [id(m) for m in model.modules()]
    with pytest.raises(error, match=words):
        rewrite(model, Replace("attention", **options))
    assert [id(m) for m in model.modules()] == before


def test_a_model_without_attention_says_so() -> None:
    model = ours(mixer="pooling_mixer")
    with pytest.raises(AnatomyError, match="has no attention to replace"):
        rewrite(model, Replace("attention", "identity_mixer"))
