from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import anatomy
from lamina.errors import AnatomyError, LaminaError, RecipeError
from lamina.rewrite import (
    DropAttention,
    DropBlock,
    DropDecision,
    DropMLP,
    DropSublayers,
    check_order,
    history,
    import_official,
    replay,
    rewrite,
)
from lamina.rewrite._drop_apply import slots
from lamina.rewrite._skip import returned_rest
from lamina.rewrite.rewriting import from_json, to_json
from lamina.rewrite.similarity import Similarity, cosine, similarity

transformers = pytest.importorskip("transformers")

EXAMPLES = [
    Example("pass", "drop_attention", options={"count": 1}, bad={"count": -1}),
    Example("pass", "drop_mlp", options={"count": 2}, bad={"keep": 1.5}),
    Example("pass", "drop_block", options={"keep": 0.5, "order": "consecutive"}, bad={"order": "sideways"}),
    Example("pass", "drop_sublayers", options={"count": 3}, bad={"order": "last"}),
]

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every sublayer matters, biases and norms not at their trivial start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.dim() > 1 else 0.1
            p.add_(torch.randn(p.shape, generator=generator).to(p) * scale)
    return model.eval()


def llama(depth: int = 4, **options: object) -> nn.Module:
    config = transformers.LlamaConfig(num_hidden_layers=depth, num_key_value_heads=2, **SIZES, **options)
    return spread(transformers.LlamaForCausalLM(config))


def gpt2(depth: int = 3) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=depth, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    return spread(transformers.GPT2LMHeadModel(config))


def bert(depth: int = 3) -> nn.Module:
    return spread(transformers.BertModel(transformers.BertConfig(num_hidden_layers=depth, **SIZES)))


def vit(depth: int = 3) -> nn.Module:
    sizes = {k: SIZES[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size")}
    return spread(
        transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=depth, image_size=16, patch_size=4, **sizes))
    )


def gemma2(depth: int = 4) -> nn.Module:
    config = transformers.Gemma2Config(
        num_hidden_layers=depth, num_key_value_heads=2, head_dim=8, sliding_window=5, **SIZES
    )
    return spread(transformers.Gemma2ForCausalLM(config))


def neox(depth: int = 3) -> nn.Module:
    return spread(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(num_hidden_layers=depth, **SIZES)))


def t5(depth: int = 3) -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=depth, num_heads=4, vocab_size=64, decoder_start_token_id=0
    )
    return spread(transformers.T5ForConditionalGeneration(config))


def encoder(depth: int = 3, norm_first: bool = True, batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, norm_first=norm_first, batch_first=batch_first)
    return spread(nn.TransformerEncoder(layer, depth, enable_nested_tensor=False))


def tokens(rows: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": tokens(seed=seed + i), "attention_mask": torch.ones(3, 9, dtype=torch.long)} for i in range(2)
    ]


class Branch(nn.Module):
    """A residual branch F whose effect is known; `weight` only makes it a projection-like part."""

    def __init__(self, turn: Tensor | float) -> None:
        super().__init__()
        width = 4
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.turn = turn

    def forward(self, x: Tensor) -> Tensor:
        _ = self.out(self.value(x) + self.query(x) + self.key(x)) * 0
        return x @ self.turn if isinstance(self.turn, Tensor) else x * self.turn


class PlainBlock(nn.Module):
    def __init__(self, turn: Tensor | float) -> None:
        super().__init__()
        self.attention = Branch(turn)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    def __init__(self, *turns: Tensor | float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainBlock(t) for t in turns)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def quarter_turn() -> Tensor:
    one = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    return torch.block_diag(one, one)


def test_known_branches_have_known_scores() -> None:
    model = Plain(quarter_turn(), 0.0, -2.0)
    x = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    found = similarity(model, anatomy.dissect(model).trunk(), [{"inputs": x}])
    assert found.attention == pytest.approx((0.5**0.5, 1.0, -1.0), abs=1e-6)
    assert found.mlp == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    assert found.block == pytest.approx((0.5**0.5, 1.0, -1.0), abs=1e-6)
    assert found.tokens == 35


def test_a_branch_that_adds_nothing_goes_first_and_no_output_changes() -> None:
    model = llama()
    nn.init.zeros_(model.model.layers[2].self_attn.o_proj.weight)
    ids = tokens()
    before = model(ids).logits
    decision = DropAttention(1).decide(model, batches())
    assert decision.attention == (2,)
    assert decision.scores is not None
    assert decision.scores["attention"][2] == pytest.approx(1.0, abs=1e-6)
    assert "attention" in decision.table().splitlines()[3]
    rewrite(model, DropAttention(1), data=batches())
    torch.testing.assert_close(model(ids).logits, before, atol=1e-6, rtol=1e-6)


def test_cosine_of_bfloat16_is_taken_in_float32() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = (x + 0.05 * torch.randn(64, 512, generator=torch.Generator().manual_seed(1))).bfloat16()
    expected = F.cosine_similarity(x.double(), y.double(), dim=-1)
    torch.testing.assert_close(cosine(x, y).double(), expected, atol=1e-6, rtol=0)
    assert cosine(torch.zeros(1, 3), torch.ones(1, 3)).item() == 0.0


def by_hand(model: nn.Module, states: list[tuple[Tensor, Tensor]], keep: Tensor) -> list[float]:
    return [float(F.cosine_similarity(a.double(), b.double(), dim=-1)[keep].mean()) for a, b in states]


def llama_states(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    states: dict[str, list[tuple[Tensor, Tensor]]] = {"attention": [], "mlp": [], "block": []}
    hidden = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    for index, layer in enumerate(model.model.layers):
        x = hidden[index]
        kept: list[Tensor] = []
        handle = layer.self_attn.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out[0]))
        model(ids, attention_mask=mask, use_cache=False)
        handle.remove()
        middle = x + kept[0]
        out = middle + layer.mlp(layer.post_attention_layernorm(middle))
        states["attention"].append((x, middle))
        states["mlp"].append((middle, out))
        states["block"].append((x, out))
    return states


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_scores_of_llama_equal_a_loop_by_hand_and_padding_does_not_count(side: str) -> None:
    model = llama().double()
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    if side != "none":
        mask[0, :3] = 0
        if side == "right":
            mask = mask.flip(1)
    with torch.no_grad():
        states = llama_states(model, ids, mask)
    found = similarity(model, anatomy.dissect(model).trunk(), [{"input_ids": ids, "attention_mask": mask}])
    for kind in ("attention", "mlp", "block"):
        assert getattr(found, kind) == pytest.approx(by_hand(model, states[kind], mask.bool()), abs=1e-9)
    assert found.tokens == int(mask.sum())
    # Whatever stands in the padding, the scores are the same.
    other = torch.where(mask.bool(), ids, 63 - ids)
    again = similarity(model, anatomy.dissect(model).trunk(), [{"input_ids": other, "attention_mask": mask}])
    assert again.attention == pytest.approx(found.attention, abs=1e-9)


def test_scores_of_bert_compare_with_what_dropping_leaves() -> None:
    model = bert().double()
    ids, mask = tokens(2, 8), torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    trunk = anatomy.dissect(model).trunk()
    attention, mlp, kept = [], [], []
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        wide = transformers.masking_utils.create_bidirectional_mask(model.config, hidden[0], mask)
        for index, layer in enumerate(model.encoder.layer):
            x = hidden[index]
            middle = layer.attention(x, wide)[0]
            attention.append((x, middle))
            mlp.append((middle, hidden[index + 1]))
            kept.append((layer.attention.output.LayerNorm(x), middle))
    batch = {"input_ids": ids, "attention_mask": mask}
    found = similarity(model, trunk, [batch])
    assert found.attention == pytest.approx(by_hand(model, attention, mask.bool()), abs=1e-9)
    assert found.mlp == pytest.approx(by_hand(model, mlp, mask.bool()), abs=1e-9)
    found = similarity(model, trunk, [batch], keep_norm=True)
    assert found.attention == pytest.approx(by_hand(model, kept, mask.bool()), abs=1e-9)


@pytest.mark.parametrize("make", [gpt2, vit, neox, gemma2])
def test_scores_equal_the_outputs_of_a_model_without_the_part(make) -> None:
    """The stream behind block i with the sublayer dropped is what the score compares with, in any architecture."""
    model = make().double()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16).double()} if make is vit else {"input_ids": tokens()}
    trunk = anatomy.dissect(model).trunk()
    found = similarity(model, trunk, [batch])
    assert all(s is not None for s in (*found.attention, *found.mlp, *found.block))
    last = len(trunk.blocks) - 1
    with torch.no_grad():
        whole = stream(model, trunk.blocks[last].path, batch)
        without = stream(apply_to_copy(model, mlp=(last,)), trunk.blocks[last].path, batch)
        if make is not neox:
            expected = F.cosine_similarity(without, whole, dim=-1).mean()
            assert found.mlp[last] == pytest.approx(float(expected), abs=1e-9)
            both = apply_to_copy(model, mlp=(last,), attention=(last,))
            alone = stream(both, trunk.blocks[last].path, batch)
            expected = F.cosine_similarity(alone, without, dim=-1).mean()
        else:
            # Parallel branches: each is measured alone against the block's input.
            alone = stream(apply_to_copy(model, mlp=(last,), attention=(last,)), trunk.blocks[last].path, batch)
            expected = F.cosine_similarity(alone, without, dim=-1).mean()
    assert found.attention[last] == pytest.approx(float(expected), abs=1e-9)
    empty = apply_to_copy(model, mlp=(last,), attention=(last,))
    assert not list(empty.get_submodule(trunk.blocks[last].path).parameters())


def stream(model: nn.Module, path: str, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(**batch)
    handle.remove()
    return seen[0]


def apply_to_copy(model: nn.Module, **chosen: object) -> nn.Module:
    other = copy.deepcopy(model)
    return rewrite(other, Given(DropDecision(**chosen)))


class Given(DropAttention):
    """Carries out a decision made elsewhere."""

    def __init__(self, decision: DropDecision) -> None:
        self.decision = decision

    def decide(self, model: nn.Module, data: object = None) -> DropDecision:
        return self.decision


OUTPUTS = {
    llama: ("self_attn.o_proj", "mlp.down_proj"),
    gpt2: ("attn.c_proj", "mlp.c_proj"),
    neox: ("attention.dense", "mlp.dense_4h_to_h"),
    vit: ("attention.o_proj", "mlp.fc2"),
}


@pytest.mark.parametrize("make", list(OUTPUTS))
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_dropping_equals_zeroing_the_output_projection(make, kind: str) -> None:
    model = make()
    zeroed = copy.deepcopy(model)
    trunk = anatomy.dissect(model).trunk()
    for index in (0, 2):
        name = f"{trunk.blocks[index].path}.{OUTPUTS[make][kind == 'mlp']}"
        for p in zeroed.get_submodule(name).parameters():
            nn.init.zeros_(p)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)} if make is vit else {"input_ids": tokens()}
    before = sum(p.numel() for p in model.parameters())
    gone = sum(
        p.numel()
        for i in (0, 2)
        for s in (trunk.blocks[i].find(kind),)
        for path in (*s.parts, *s.norms)
        for p in model.get_submodule(path).parameters()
    )
    rewrite(model, Given(DropDecision(**{kind: (0, 2)})))
    torch.testing.assert_close(model(**batch)[0], zeroed(**batch)[0], atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == before - gone


def test_sandwich_norms_go_with_the_branch() -> None:
    model = gemma2()
    for name in ("post_attention_layernorm", "input_layernorm"):
        assert getattr(model.model.layers[1], name).weight.numel() == 32
    zeroed = copy.deepcopy(model)
    # Gemma's norm multiplies by 1 + weight.
    nn.init.constant_(zeroed.model.layers[1].post_attention_layernorm.weight, -1.0)
    rewrite(model, Given(DropDecision(attention=(1,))))
    torch.testing.assert_close(model(tokens()).logits, zeroed(tokens()).logits, atol=1e-5, rtol=1e-5)
    assert not list(model.model.layers[1].post_attention_layernorm.parameters())


@pytest.mark.parametrize("keep_norm", [False, True])
def test_post_norm_is_identity_or_the_norm_alone(keep_norm: bool) -> None:
    model = bert()
    layer = model.encoder.layer[1]
    norms = layer.attention.output.LayerNorm, layer.output.LayerNorm
    x = torch.randn(2, 5, 32)
    rewrite(model, Given(DropDecision(attention=(1,), mlp=(1,), keep_norm=keep_norm)))
    expected = norms[1](norms[0](x)) if keep_norm else x
    torch.testing.assert_close(layer(x), expected)
    out = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert len(out.hidden_states) == 4


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_encoder_layers(norm_first: bool, batch_first: bool) -> None:
    model = encoder(norm_first=norm_first, batch_first=batch_first)
    x = torch.randn(5, 7, 16)
    padding = torch.zeros((5, 7) if batch_first else (7, 5), dtype=torch.bool)
    padding[1, -2:] = True
    seen = model.layers[0](x).detach()
    trunk = anatomy.dissect(model).trunk()
    found = similarity(model, trunk, [{"inputs": x}])
    expected = F.cosine_similarity(x, seen, dim=-1).mean()
    assert found.block[0] == pytest.approx(float(expected), abs=1e-5)
    rewrite(model, DropAttention(1, order="first"), DropMLP(1, order="last"))
    layer = copy.deepcopy(model.layers[1])
    for p in (*layer.self_attn.parameters(), *layer.linear2.parameters()):
        assert p.numel()
    with torch.no_grad():
        plain, masked = model(x), model(x, src_key_padding_mask=padding)
        first = x
        layer0 = model.layers[0]
        ff = lambda y: layer0.linear2(layer0.activation(layer0.linear1(y)))  # noqa: E731
        first = x + ff(layer0.norm2(x)) if norm_first else layer0.norm2(x + ff(x))
        torch.testing.assert_close(layer0(x), first)
    assert plain.shape == masked.shape
    assert torch.isfinite(masked).all()


def greedy(model: nn.Module, ids: Tensor, steps: int = 30, **options: object) -> Tensor:
    return model.generate(
        ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), max_new_tokens=steps,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("gone", [(0,), (3,), (0, 1, 2), (1, 3)])
@pytest.mark.parametrize("make", [llama, gemma2])
def test_generation_with_cache_equals_generation_without(make, gone: tuple[int, ...]) -> None:
    model = make()
    if make is gemma2 and gone == (0, 1, 2):
        with pytest.raises(LaminaError, match="slot 0"):
            rewrite(model, Given(DropDecision(attention=gone)))
        return
    rewrite(model, Given(DropDecision(attention=gone)))
    ids = tokens(2, 5)
    plain = greedy(model, ids, use_cache=False)
    assert len(set(plain[0].tolist())) > 3
    assert torch.equal(greedy(model, ids), plain)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), plain)
    padded, mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1), torch.ones(2, 8, dtype=torch.long)
    mask[:, :3] = 0
    assert torch.equal(greedy(model, padded, attention_mask=mask)[:, 3:], plain)
    beams = greedy(model, ids, num_beams=2, use_cache=False)
    assert torch.equal(greedy(model, ids, num_beams=2), beams)


def test_cache_slots_are_numbered_by_type_and_bytes_fall() -> None:
    assert slots(["a"] * 4, [1, 3]) == {1: 0, 3: 1}
    assert slots(["sliding_attention", "full_attention"] * 2, [2, 3]) == {2: 0, 3: 1}
    with pytest.raises(LaminaError, match="sliding_attention"):
        slots(["sliding_attention", "full_attention"], [1])
    model = llama()
    decision = DropAttention(2, order="first").decide(model)
    assert decision.saving is not None
    # Keys and values of 2 heads of 8 channels in float32, two layers.
    assert decision.saving.cache_bytes == 2 * (2 * 2 * 8 * 4)
    rewrite(model, DropAttention(2, order="first"))
    assert [layer.self_attn.layer_idx for layer in list(model.model.layers)[2:]] == [0, 1]
    cache = model(tokens(2, 7), use_cache=True).past_key_values
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.is_initialized]
    assert len(held) == 2
    assert cache.get_seq_length() == 7
    total = sum(p.numel() for p in model.parameters())
    assert decision.saving.parameters == decision.saving.total - total


def test_whole_blocks_leave_a_plain_model() -> None:
    model = llama(depth=5)
    expected = copy.deepcopy(model)
    rewrite(model, Given(DropDecision(blocks=(1, 3))))
    assert model.config.num_hidden_layers == 3
    assert not hasattr(model.config, "drop_attn_list")
    plain = transformers.LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens()).logits, model(tokens()).logits)
    for index in (1, 3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            nn.init.zeros_(expected.model.layers[index].get_submodule(name).weight)
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy(model, tokens(2, 5)), greedy(model, tokens(2, 5), use_cache=False))


def test_typed_layers_lose_a_block() -> None:
    model = gemma2()
    rewrite(model, Given(DropDecision(blocks=(1,))))
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    rewrite(model, Given(DropDecision(attention=(0,))))
    assert model.config.drop_attn_list == [0]
    assert torch.equal(greedy(model, tokens(2, 5)), greedy(model, tokens(2, 5), use_cache=False))


def test_drops_accumulate_and_indices_follow_the_blocks() -> None:
    model = llama(depth=5)
    rewrite(model, Given(DropDecision(attention=(1, 4))))
    decision = DropAttention(2, order="first").decide(model)
    assert decision.attention == (0, 2), "the dropped one is no candidate"
    rewrite(model, Given(DropDecision(blocks=(0,))))
    assert model.config.drop_attn_list == [0, 3]
    assert [b.find("attention") is None for b in anatomy.dissect(model).trunk().blocks] == [True, False, False, True]
    fresh = replay(llama(depth=5), history(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens()).logits, model(tokens()).logits)
    assert torch.equal(greedy(model, tokens(2, 5)), greedy(model, tokens(2, 5), use_cache=False))


def test_albert_runs_fewer_times() -> None:
    config = transformers.AlbertConfig(num_hidden_layers=4, embedding_size=16, **SIZES)
    model = spread(transformers.AlbertModel(config))
    hidden = model(tokens(), output_hidden_states=True).hidden_states
    with pytest.raises(AnatomyError, match="same weights 4 times"):
        DropAttention(1).decide(model, batches())
    rewrite(model, DropBlock(1))
    torch.testing.assert_close(model(tokens()).last_hidden_state, hidden[3])


def test_t5_keeps_its_position_bias_and_its_cross_attention() -> None:
    model = t5()
    batch = {"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 4, seed=1)}
    with pytest.raises(AnatomyError, match="several trunks"):
        DropAttention(1).decide(model, [batch])
    with pytest.raises(LaminaError, match="cannot drop 3"):
        DropAttention(3, trunk="decoder.block").decide(model, [batch])
    zeroed = copy.deepcopy(model)
    nn.init.zeros_(zeroed.decoder.block[1].layer[0].SelfAttention.o.weight)
    for block in (1, 2):
        nn.init.zeros_(zeroed.encoder.block[block].layer[0].SelfAttention.o.weight)
    decision = DropAttention(2, trunk="encoder.block").decide(model, [batch])
    assert decision.attention == (1, 2), "block 0 holds the bias of all"
    rewrite(model, Given(decision), Given(DropDecision("decoder.block", attention=(1,))))
    torch.testing.assert_close(model(**batch).logits, zeroed(**batch).logits, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = batch["input_ids"]
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_joint_order_is_the_order_of_the_concatenated_table() -> None:
    model = llama()
    decision = DropSublayers(5).decide(model, batches())
    assert decision.scores is not None
    table = [(-s, k, i) for k in ("attention", "mlp") for i, s in enumerate(decision.scores[k])]
    first = sorted(table)[:5]
    assert decision.attention == tuple(sorted(i for _, k, i in first if k == "attention"))
    assert decision.mlp == tuple(sorted(i for _, k, i in first if k == "mlp"))


def test_scores_do_not_depend_on_how_the_samples_are_batched() -> None:
    model = llama()
    ids, mask = tokens(6, 9), torch.ones(6, 9, dtype=torch.long)
    mask[2, :4] = mask[5, :7] = 0
    trunk = anatomy.dissect(model).trunk()
    one = similarity(model, trunk, [{"input_ids": ids, "attention_mask": mask}])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    parts = [{"input_ids": ids[o], "attention_mask": mask[o]} for o in order.split(4)]
    other = similarity(model, trunk, parts)
    assert other.attention == pytest.approx(one.attention, abs=1e-6)
    assert other.block == pytest.approx(one.block, abs=1e-6)
    assert similarity(model, trunk, parts, samples=5).tokens == int(mask[order[:5]].sum())


def test_consecutive_blocks_are_the_run_that_changes_least() -> None:
    model = llama(depth=5)
    with torch.no_grad():
        seen = [stream(model, f"model.layers.{i}", {"input_ids": tokens()}) for i in range(5)]
        seen.insert(0, model.model.embed_tokens(tokens()))
    scores = [float(F.cosine_similarity(seen[i], seen[i + 2], dim=-1).mean()) for i in range(4)]
    decision = DropBlock(2, order="consecutive").decide(model, [{"input_ids": tokens()}])
    found = similarity(model, anatomy.dissect(model).trunk(), [{"input_ids": tokens()}] * 2, span=2)
    assert found.runs == pytest.approx(scores, abs=1e-6)
    best = max(range(4), key=lambda i: scores[i])
    assert decision.blocks == (best, best + 1)
    assert 0 not in DropBlock(2, order="consecutive", protect=[0]).decide(model, batches()).blocks


def test_iterative_scores_again_after_each_drop() -> None:
    model = llama()
    chosen: list[int] = []
    trial = copy.deepcopy(model)
    for _ in range(2):
        one = DropAttention(1).decide(trial, batches())
        chosen += one.attention
        rewrite(trial, Given(one))
    before = copy.deepcopy(model.state_dict())
    assert DropAttention(2, order="iterative").decide(model, batches()).attention == tuple(sorted(chosen))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    first = DropBlock(1).decide(model, batches()).blocks[0]
    blocks = DropBlock(3, order="iterative").decide(model, batches()).blocks
    assert len(blocks) == 3
    assert first in blocks
    assert model.config.num_hidden_layers == 4


def test_orders_without_data_and_protection() -> None:
    model = llama()
    assert DropAttention(2, order="last").decide(model).attention == (2, 3)
    assert DropAttention(2, order="first", protect=[0]).decide(model).attention == (1, 2)
    assert DropMLP(keep=0.5, order="random", seed=1).decide(model) == DropMLP(2, order="random", seed=1).decide(model)
    drawn = {DropMLP(2, order="random", seed=s).decide(model).mlp for s in range(20)}
    assert len(drawn) > 3
    empty = DropAttention(0).decide(model)
    assert empty.attention == ()
    assert empty.scores is None


def test_decide_leaves_modes_and_hooks_as_they_were() -> None:
    model = llama().train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    DropSublayers(2).decide(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_decide_leaves_what_a_forward_would_write_and_runs_no_eval_of_the_models_own() -> None:
    class Noting(Plain):
        def __init__(self) -> None:
            super().__init__(0.5, 0.1, 0.2)
            self.calls, self.merged = 0, False
            self.register_buffer("last", None)

        def train(self, mode: bool = True) -> nn.Module:
            # As LoRA layers do: a mode is more than a flag.
            self.merged = not mode
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            return super().forward(x)

    model = Noting().train()
    DropAttention(1).decide(model, [{"inputs": torch.randn(2, 5, 4)}])
    assert (model.calls, model.merged, model.last, model.training) == (0, False, None, True)


def test_decisions_are_json_and_apply_on_meta() -> None:
    model = llama()
    decision = DropSublayers(3).decide(model, batches())
    stored = json.loads(json.dumps(to_json(decision)))
    assert from_json(DropSublayers, stored, 1) == decision
    rewrite(model, Given(decision))
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(llama().config)
    rewrite(empty, Given(decision))
    assert empty.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(LaminaError, match="meta"):
        DropAttention(1).decide(empty, batches())


def test_official_lists() -> None:
    assert import_official({"drop_attn_list": [3, 1], "drop_mlp_list": []}) == DropDecision(attention=(1, 3))
    assert import_official({"drop_mlp_list": [False, True, True]}).mlp == (1, 2)
    with pytest.raises(LaminaError, match="neither"):
        import_official({})
    with pytest.raises(LaminaError, match="'all'"):
        import_official({"drop_attn_list": "all"})


LOAD = """
import sys, torch
from lamina import io
model = io.load(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def test_saved_and_loaded_in_a_fresh_process_and_as_an_official_folder(tmp_path: Path) -> None:
    from safetensors import safe_open

    from lamina import io

    model = llama()
    rewrite(model, DropAttention(2), DropMLP(1), data=batches())
    folder = io.save(model, tmp_path / "dropped")
    gone = f"model.layers.{model.config.drop_attn_list[0]}.self_attn"
    with safe_open(str(folder / "model.safetensors"), framework="pt") as stored:
        assert not any(name.startswith(gone) for name in stored.keys())  # noqa: SIM118 - not a mapping
    assert json.loads((folder / "config.json").read_text())["drop_mlp_list"] == model.config.drop_mlp_list
    torch.save(tokens(), tmp_path / "ids.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert torch.equal(torch.load(tmp_path / "out.pt"), model(tokens()).logits)
    # Without our file it is a folder as the method's authors publish them.
    (folder / "architecture.json").unlink()
    official = io.load(folder)
    assert torch.equal(official(tokens()).logits, model(tokens()).logits)
    assert len(history(official)) == 1
    assert torch.equal(greedy(official, tokens(2, 5)), greedy(model, tokens(2, 5)))


@pytest.mark.parametrize("make", [bert, encoder])
def test_compiles_whole(make) -> None:
    model = make(depth=3)
    rewrite(model, DropAttention(1, order="first"), DropMLP(1, order="last"))
    given = torch.randn(2, 5, 16) if make is encoder else tokens()
    block = anatomy.get(model, anatomy.dissect(model).trunk().blocks[0].path)
    part = model if make is encoder else block
    x = given if make is encoder else torch.randn(2, 5, 32)
    torch.compiler.reset()
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), part(x))
    torch.compiler.reset()


@pytest.mark.slow
def test_a_decoder_compiles_whole() -> None:
    model = llama(depth=3)
    rewrite(model, DropAttention(1, order="first"), DropMLP(1, order="last"))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("make", [llama, bert, encoder])
def test_every_parameter_left_learns(make) -> None:
    model = make().train()
    rewrite(model, DropAttention(1, order="first"), DropMLP(1, order="last"))
    out = model(torch.randn(2, 5, 16) if make is encoder else tokens())
    (out if make is encoder else out[0]).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None and "pooler" not in n]
    copied = copy.deepcopy(model)
    assert [n for n, _ in copied.named_modules()] == [n for n, _ in model.named_modules()]


def test_under_autocast_and_gradient_checkpointing() -> None:
    model = llama()
    rewrite(model, DropAttention(2, order="first"), DropMLP(1, order="first"))
    with torch.autocast("cpu", torch.bfloat16):
        loose = model(tokens()).logits
    assert loose.dtype == torch.bfloat16
    model.train()
    model(tokens()).logits.square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(tokens()).logits.square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_the_optimizer_keeps_the_state_of_what_stays() -> None:
    model = llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(tokens()).logits.square().mean().backward()
    optimizer.step()
    last = model.model.layers[3].mlp.down_proj.weight
    state = optimizer.state[last]["exp_avg"].clone()
    rewrite(model, DropBlock(2, order="first"), optimizer=optimizer)
    assert model.model.layers[1].mlp.down_proj.weight is last
    assert torch.equal(optimizer.state[last]["exp_avg"], state)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


class Convolutional(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.more = out - into

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.more)) + self.conv2(torch.relu(self.norm(self.conv1(x))))


def test_residual_convolutions_lose_blocks_of_equal_shape_only() -> None:
    model = nn.Sequential(*(Convolutional(i, o) for i, o in ((3, 8), (8, 8), (8, 8))))
    net = nn.Sequential(nn.Identity(), model)
    images = torch.randn(2, 3, 6, 6)
    with pytest.raises(LaminaError, match="convolutions"):
        DropBlock(1, order="first", trunk="1").decide(net)
    decision = DropBlock(1, order="first", trunk="1").decide(net, [{"inputs": images}])
    assert decision.blocks == (1,)
    assert decision.scores is not None
    assert decision.scores["block"][0] is None
    with torch.no_grad():
        net.eval()
        x = model[0](images)
        expected = F.cosine_similarity(x, model[1](x), dim=1).mean()
    assert decision.scores["block"][1] == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(AnatomyError, match="no attention"):
        DropAttention(1, trunk="1").decide(net, [{"inputs": images}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"count": 1, "keep": 0.5}, "exactly one"),
        ({"count": -1}, "negative"),
        ({"keep": 0.0}, "0 < keep <= 1"),
        ({"keep": 1.2}, "0 < keep <= 1"),
        ({"count": 1, "order": "consecutive"}, "consecutive"),
        ({"count": 1, "protect": [-1]}, "protect"),
        ({"count": 1, "protect": 1}, "protect is a list of block indices, not negative, got 1"),
        ({"count": 1.5}, "count must be a whole number, not negative, got 1.5"),
        ({"count": "2"}, "count must be a whole number, not negative, got '2'"),
        ({"keep": "0.5"}, "0 < keep <= 1, got '0.5'"),
        ({"count": 1, "samples": 0.5}, "samples must be a whole number, at least 1, got 0.5"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(LaminaError, match=message):
        DropAttention(**options)


def test_bad_models_and_data(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    with pytest.raises(AnatomyError, match="no repeated blocks"):
        DropAttention(1).decide(nn.Sequential(nn.Linear(2, 2)), batches())
    with pytest.raises(LaminaError, match="calibration data"):
        DropAttention(1).decide(model)
    with pytest.raises(LaminaError, match="empty"):
        DropAttention(1).decide(model, [])
    with pytest.raises(LaminaError, match="one must stay"):
        DropAttention(4).decide(model, batches())
    with pytest.raises(LaminaError, match="only 1 of 4 can go"):
        DropAttention(2, protect=[0, 1, 2]).decide(model, batches())
    with pytest.raises(LaminaError, match=r"cannot protect \[9\]: model.layers has blocks 0\.\.3"):
        DropAttention(1, protect=[0, 9], order="last").decide(model)
    with pytest.raises(LaminaError, match="without attention"):
        rewrite(model, Given(DropDecision(attention=(0, 1, 2, 3))))
    with pytest.raises(AnatomyError, match=r"blocks 0\.\.3"):
        rewrite(model, Given(DropDecision(mlp=(4,))))
    rewrite(model, Given(DropDecision(attention=(1,))))
    with pytest.raises(AnatomyError, match="no attention that can be dropped"):
        rewrite(model, Given(DropDecision(attention=(1,))))
    with caplog.at_level(logging.WARNING):
        DropAttention(1).decide(model, batches())
    assert "54 tokens only" in caplog.text
    nn.init.constant_(model.model.layers[0].mlp.down_proj.weight, float("nan"))
    with pytest.raises(LaminaError, match="NaN"):
        DropAttention(1).decide(model, batches())
    with pytest.raises(LaminaError, match="no token"):
        DropMLP(1).decide(llama(), [{"input_ids": tokens(), "attention_mask": torch.zeros(3, 9)}])


def test_order_with_other_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_order([DropAttention(1), DropMLP(1)])
    monkeypatch.setattr("lamina.rewrite.drop.pass_name", lambda one: "early_exit")
    with pytest.raises(RecipeError, match="drop first"):
        check_order([DropAttention(1), DropMLP(1)])


def opt() -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    return spread(transformers.OPTForCausalLM(transformers.OPTConfig(word_embed_proj_dim=32, **sizes)))


def falcon() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.FalconConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    return spread(transformers.FalconForCausalLM(config))


@pytest.mark.parametrize("make", [opt, falcon, gemma2, neox, bert])
def test_a_block_without_sublayers_is_the_identity(make) -> None:
    """OPT folds batch and time; Falcon and GPT-NeoX run both branches on one input, Falcon adds them in place."""
    model = make()
    trunk = anatomy.dissect(model).trunk()
    scores = DropSublayers(1).decide(model, [{"input_ids": tokens()}]).scores
    assert scores is not None
    assert None not in (*scores["attention"], *scores["mlp"])
    rewrite(model, Given(DropDecision(attention=(1,))), Given(DropDecision(mlp=(1,))))
    seen: list[tuple[Tensor, Tensor]] = []
    block = model.get_submodule(trunk.blocks[1].path)
    block.register_forward_hook(
        lambda m, a, k, o: seen.append((a[0] if a else k["hidden_states"], o[0] if isinstance(o, tuple) else o)),
        with_kwargs=True,
    )
    model(tokens())
    torch.testing.assert_close(seen[0][0], seen[0][1], rtol=0, atol=0)
    assert not list(block.parameters())


def test_tuples_are_read_off_the_source() -> None:
    model = t5()
    assert returned_rest(model.decoder.block[1].layer[0]) == (("position_bias", 2), None)
    assert returned_rest(llama().model.layers[0].self_attn) == (None,)


def test_similarity_is_plain_data() -> None:
    assert Similarity((0.5,), (None,), (0.5,)).tokens == 0


class InPlace(PlainBlock):
    """Adds to the stream itself, as many home-made models do."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.attention(x)
        out = self.down(torch.relu(self.up(x)))
        out.add_(x)
        return out


def with_blocks(kind: type[PlainBlock]) -> nn.Module:
    torch.manual_seed(0)
    model = spread(Plain(0.5, quarter_turn(), -0.3))
    for i, block in enumerate(list(model.layers)):
        model.layers[i] = kind(block.attention.turn)
        model.layers[i].load_state_dict(block.state_dict())
    return model.eval()


def test_a_stream_changed_in_place_has_the_same_scores_and_can_lose_parts() -> None:
    data = [{"inputs": torch.randn(2, 5, 4)}, {"inputs": torch.randn(3, 5, 4)}]
    want, got = (DropSublayers(2).decide(with_blocks(kind), copy.deepcopy(data)) for kind in (PlainBlock, InPlace))
    assert got.scores == want.scores
    with torch.inference_mode():
        assert DropSublayers(2).decide(with_blocks(InPlace), copy.deepcopy(data)).scores == want.scores
    plain, changed = (rewrite(with_blocks(kind), Given(want)).train() for kind in (PlainBlock, InPlace))
    torch.testing.assert_close(changed(torch.ones(1, 2, 4)), plain(torch.ones(1, 2, 4)))
    model = with_blocks(InPlace)
    assert anatomy.dissect(model, {"inputs": torch.randn(2, 5, 4)}) == anatomy.dissect(model)


def olmo2() -> nn.Module:
    return spread(transformers.Olmo2ForCausalLM(transformers.Olmo2Config(num_hidden_layers=3, **SIZES)))


def test_a_norm_behind_the_branch_does_not_hide_where_the_branch_begins() -> None:
    model = olmo2()
    found = similarity(model, anatomy.dissect(model).trunk(), batches())
    seen: list[Tensor] = []
    block = model.model.layers[1]
    block.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    block.post_attention_layernorm.register_forward_hook(lambda m, args, out: seen.append(out))
    scores = []
    with torch.no_grad():
        for batch in batches():
            seen.clear()
            model(**batch)
            branch, x = seen
            scores.append(F.cosine_similarity(x, x + branch, dim=-1).mean())
    assert found.attention[1] == pytest.approx(float(sum(scores)) / 2, abs=1e-5)


def test_what_stands_ahead_of_the_first_sublayer_is_not_scored_with_it() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(4, 4))
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + x @ self.mix
            return x + self.down(torch.relu(self.up(self.norm(x))))

    model = nn.Sequential(Bare(), Bare())
    nn.init.zeros_(model[0].down.weight)
    nn.init.zeros_(model[0].down.bias)
    found = similarity(model, anatomy.dissect(model).trunk(), [{"inputs": torch.randn(2, 5, 4)}])
    assert found.mlp[0] == pytest.approx(1.0)
    assert found.block[0] < 0.99


@pytest.mark.parametrize("inside", [True, False])
def test_blocks_that_are_lists_of_parts_are_scored(inside: bool) -> None:
    class Part(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(4), inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.norm(x)) + x if inside else self.inner(self.norm(x))

    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            feed = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)]
            self.layers = nn.ModuleList(nn.ModuleList([Part(Branch(t)), Part(f)]) for t, f in enumerate(feed))

        def forward(self, x: Tensor) -> Tensor:
            for attention, feed in self.layers:
                x = attention(x) if inside else attention(x) + x
                x = feed(x) if inside else feed(x) + x
            return x

    torch.manual_seed(0)
    model, x = Lists(), torch.randn(2, 5, 4)
    found = similarity(model, anatomy.dissect(model).trunk(), [{"inputs": x}])
    with torch.no_grad():
        for i, (attention, feed) in enumerate(model.layers):
            middle = attention(x) if inside else attention(x) + x
            after = feed(middle) if inside else feed(middle) + middle
            for scores, one, two in ((found.attention, x, middle), (found.mlp, middle, after), (found.block, x, after)):
                assert scores[i] == pytest.approx(float(F.cosine_similarity(one, two, dim=-1).mean()), abs=1e-6)
            x = after
        without = x = torch.randn(2, 5, 4)
        for i, (attention, feed) in enumerate(model.layers):
            if i != 1:
                without = attention(without) if inside else attention(without) + without
            without = feed(without) if inside else feed(without) + without
        dropped = rewrite(model, Given(DropDecision(attention=(1,))))
        torch.testing.assert_close(dropped(x), without)


def test_experts_go_with_the_shared_one_and_windows_with_their_norm() -> None:
    sizes = {"num_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1}
    config = transformers.Qwen2MoeConfig(
        num_hidden_layers=2, num_key_value_heads=2, shared_expert_intermediate_size=16, **sizes, **SIZES
    )
    moe = rewrite(spread(transformers.Qwen2MoeForCausalLM(config)), DropMLP(1, order="last"))
    assert not [n for n, _ in moe.named_parameters() if n.startswith("model.layers.1.mlp")]
    config = transformers.Swinv2Config(
        embed_dim=8, depths=[2], num_heads=[2], window_size=4, image_size=16, patch_size=2
    )
    swin = rewrite(spread(transformers.Swinv2Model(config)), DropAttention(1, order="last"))
    assert swin(pixel_values=torch.randn(1, 3, 16, 16)).last_hidden_state.isfinite().all()


def test_a_block_at_several_places_cannot_lose_a_part_at_one() -> None:
    model = Plain(0.5, 0.1)
    model.layers = nn.ModuleList([*model.layers, *model.layers])
    data = [{"inputs": torch.randn(2, 5, 4)}]
    for one in (DropAttention(1), DropMLP(1, order="last"), DropBlock(1)):
        with pytest.raises(AnatomyError, match=r"blocks \[0, 2\] of layers are one module"):
            one.decide(model, data)
    with pytest.raises(AnatomyError, match=r"blocks \[1, 3\] of layers are one module"):
        rewrite(model, Given(DropDecision(attention=(3,))))
    assert len(rewrite(model, DropBlock(1, order="last")).layers) == 3


def test_tables_that_others_use_stay_whoever_decides() -> None:
    for gone in ({"attention": (0,)}, {"blocks": (0,)}):
        with pytest.raises(AnatomyError, match=r"blocks \[0\] of decoder.block holds tables that all others use"):
            rewrite(t5(), Given(DropDecision("decoder.block", **gone)))


def test_iterations_of_a_shared_block_are_told() -> None:
    config = transformers.AlbertConfig(num_hidden_layers=6, embedding_size=8, **SIZES)
    decision = DropBlock(2).decide(transformers.AlbertModel(config))
    assert decision.table().endswith("the blocks share their weights and run 4 of 6 times")


@pytest.mark.parametrize(
    ("data", "given"),
    [(torch.zeros(2, 4), "a Tensor"), ([torch.zeros(2, 4)], "a Tensor in it"), ({"input_ids": tokens()}, "a dict")],
)
def test_data_that_is_no_iterable_of_batches(data: object, given: str) -> None:
    with pytest.raises(LaminaError, match=rf"an iterable of batches, each a mapping of names .* got {given}$"):
        DropAttention(1).decide(llama(), data)  # type: ignore[arg-type]


def test_only_what_has_a_row_each_is_cut_and_empty_batches_are_passed_over() -> None:
    places = torch.arange(9)[None]
    batch = {"input_ids": tokens(6), "position_ids": places}
    model = llama()
    got = DropAttention(1, samples=2).decide(model, [{"input_ids": tokens(0)}, batch])
    assert got.scores == DropAttention(1).decide(model, [{"input_ids": tokens(6)[:2]}]).scores
    with pytest.raises(LaminaError, match=r"is empty.*an iterator is used up after one pass"):
        rewrite(llama(), DropAttention(1), DropMLP(1), data=iter(batches()))


def test_a_data_parallel_wrapper_is_refused() -> None:
    wrapper = nn.parallel.DistributedDataParallel
    with pytest.raises(LaminaError, match="takes the bare module, not the DistributedDataParallel round it"):
        rewrite(wrapper.__new__(wrapper), DropAttention(1, order="last"))
