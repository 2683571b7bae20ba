from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lamina import io
from lamina.errors import RecipeError, ShapeError
from lamina.models import TokenFormer, TokenFormerViT, tokenformer
from lamina.nn import Pattention
from lamina.nn.attention import rotate
from lamina.rewrite import DropAttention, DropMLP, GrowParameterTokens, rewrite

SIZES = {
    "tokenformer_124m": 123_569_664,
    "tokenformer_150m": 151_881_216,
    "tokenformer_354m": 353_503_232,
    "tokenformer_450m": 454_166_528,
    "tokenformer_757m": 756_156_416,
    "tokenformer_900m": 903_252_480,
    "tokenformer_1_5b": 1_587_219_456,
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(32, shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "model",
        "tokenformer",
        {"depth": 1, "width": 16, "heads": 2, "vocabulary": 32, "context": 12, "attention_pairs": 6},
        batch=lambda: {"input_ids": tokens(2, 8), "labels": tokens(2, 8, seed=1)},
        bad={"mlp_pairs": 0},
    ),
    Example(
        "model",
        "tokenformer_vit",
        {"image": 8, "patch": 4, "depth": 1, "width": 16, "heads": 2, "attention_pairs": 6, "classes": 3},
        batch=lambda: {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])},
        bad={"score": "relu"},
    ),
    *(
        Example("model", name, {"depth": 1}, batch=lambda: {"input_ids": tokens(1, 3)}, size_of="tokenformer")
        for name in SIZES
    ),
]  # fmt: skip


def make(**options: Any) -> TokenFormer:
    torch.manual_seed(0)
    chosen = {"depth": 2, "width": 32, "heads": 4, "vocabulary": 32, "context": 16, "attention_pairs": 12} | options
    return TokenFormer(**chosen).eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = getattr(tokenformer, name)()
    assert count(model) == SIZES[name]


def test_the_354m_model_grows_into_the_757m_one() -> None:
    with torch.device("meta"):
        small, large = tokenformer.tokenformer_354m(), tokenformer.tokenformer_757m()
    grown = rewrite(small, GrowParameterTokens({"*.mixer.*": 1792, "*.feed_forward": 7168}))
    assert count(grown) == SIZES["tokenformer_757m"]
    assert {n: t.shape for n, t in grown.state_dict().items()} == {n: t.shape for n, t in large.state_dict().items()}


def pattention(layer: Any, x: Tensor) -> Tensor:
    scores = x @ layer.key.T
    return F.gelu(scores * layer.scale / scores.square().sum(-1, keepdim=True).sqrt()) @ layer.value


def written_out(model: TokenFormer, ids: Tensor) -> Tensor:
    """The model once more, head by head, from its weights alone."""
    x = model.embedding.weight[ids]
    length, width = ids.shape[1], x.shape[-1]
    for block in model.blocks:
        h, a, outs = F.layer_norm(x, (width,), eps=1e-5), block.mixer, []
        q, k, v = (pattention(p, h) for p in (a.query, a.key, a.value))
        size = width // a.heads
        turned = size // 4
        for head in range(a.heads):
            mine = slice(head * size, (head + 1) * size)
            qh, kh = (torch.cat((rotate(t[None, ..., mine][..., :turned], torch.arange(length))[0],
                                 t[..., mine][..., turned:]), -1) for t in (q, k))  # fmt: skip
            scores = (qh @ kh.transpose(1, 2) / math.sqrt(size)).masked_fill(
                torch.ones(length, length).triu(1).bool(), -math.inf
            )
            outs.append(scores.softmax(-1) @ v[..., mine])
        x = x + pattention(a.out, torch.cat(outs, -1))
        x = x + pattention(block.feed_forward, F.layer_norm(x, (width,), eps=1e-5))
    last = model.final_norm
    return F.layer_norm(x, (width,), last.weight, last.bias) @ model.embedding.weight.T


@pytest.mark.parametrize("length", [1, 7])
def test_outputs_are_those_of_the_model_written_out(length: int) -> None:
    model, ids = make().double(), tokens(2, length)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.testing.assert_close(model(ids), written_out(model, ids), rtol=1e-6, atol=1e-7)


def test_values_and_keys_start_as_published_and_norms_in_blocks_have_no_weights() -> None:
    model = make(depth=4, width=64, attention_pairs=128)
    for layer in (m for m in model.modules() if isinstance(m, Pattention)):
        assert layer.key.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.value.std().item() == pytest.approx(2 / (4 * 8), rel=0.05)
    assert {n.partition(".")[0] for n, _ in model.named_parameters()} == {"embedding", "blocks", "final_norm"}
    assert all("norm" not in n and "bias" not in n for n, _ in model.blocks.named_parameters())
    assert model.head.weight is model.embedding.weight
    # 2 * width * (4 * attention_pairs + mlp_pairs) a block.
    assert count(model.blocks) == 4 * 2 * 64 * (4 * 128 + 512)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_a_cache_and_growth_change_no_generated_token(position: Any) -> None:
    model = make(position=position)
    made = model.generate(tokens(2, 4), steps=8, temperature=0)
    slow = tokens(2, 4)
    for _ in range(8):
        slow = torch.cat((slow, model(slow)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(made, slow)
    grown = rewrite(model, GrowParameterTokens(2.0))
    assert torch.equal(grown.generate(tokens(2, 4), steps=8, temperature=0), made)


def test_growth_leaves_the_cost_of_attention_between_tokens_as_it_is() -> None:
    def operations(model: nn.Module) -> tuple[int, int]:
        # Written out, attention is two batched products, and the layers are products of matrices.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(tokens(1, 16))
        kinds = counter.get_flop_counts()["Global"]
        return sum(n for op, n in kinds.items() if "bmm" in str(op)), counter.get_total_flops()

    model = make()
    before, whole = operations(model)
    after, grown = operations(rewrite(model, GrowParameterTokens(3.0)))
    assert before == after > 0
    # Two multiply-adds (four operations) a token, pair and channel.
    blocks = 2 * 2 * 32 * (4 * 12 + 48) * 2 * 16
    assert grown - whole == 2 * blocks


def test_a_vit_has_the_parts_and_parameters_it_says() -> None:
    with torch.device("meta"):
        vit = TokenFormerViT()
    blocks = 12 * 2 * 768 * (4 * 768 + 3072)
    ends = 768 * (3 * 256 + 1) + 768 + 197 * 768 + 2 * 768 + 769 * 1000
    assert count(vit) == blocks + ends
    model = TokenFormerViT(8, 4, 1, 16, 2, classes=5, pool="mean")
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_other_passes_find_their_place_and_it_is_saved(tmp_path: Any) -> None:
    model = make(depth=3)
    batch = {"input_ids": tokens(2, 8)}
    model = rewrite(model, DropAttention(count=1), GrowParameterTokens(1.5), DropMLP(count=1), data=[batch])
    found = [n for n, m in model.named_modules() if isinstance(m, Pattention)]
    assert len(found) == 3 * 5 - 4 - 1
    assert model.eval()(**batch).isfinite().all()
    io.save(model, tmp_path / "saved")
    assert torch.equal(io.load(tmp_path / "saved")(**batch), model(**batch))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"sizes must be at least 1, got width=32, attention_pairs=0"):
        make(attention_pairs=0)
    with pytest.raises(RecipeError, match=r"score: expected one of"):
        make(score="relu")
    with pytest.raises((ShapeError, RecipeError), match=r"rotary_fraction must lie above 0"):
        make(rotary_fraction=0.0)
