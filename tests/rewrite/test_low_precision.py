from __future__ import annotations

import copy

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import home_made, llama
from torch import Tensor, nn

from lamina import io
from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.models import Transformer
from lamina.nn.float8 import Float8Activation, Float8GatedMLP, Float8Linear, Float8RMSNorm, saved_bytes
from lamina.rewrite import LowPrecision, rewrite

EXAMPLES = [Example("pass", "low_precision", bad={"backward": "e3m4"})]


def decoder(width: int = 32, **options: object) -> Transformer:
    torch.manual_seed(0)
    chosen = {"norm": "rms_norm", "feed_forward": "swiglu", "vocabulary": 32, "context": 16, **options}
    return Transformer(1, width, 2, **chosen)  # type: ignore[arg-type]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0))


def test_the_parameters_are_the_very_same_under_the_same_names() -> None:
    for model in (decoder(), llama()[0], home_made()[0]):
        before = {n: id(p) for n, p in model.named_parameters()}
        lineage = Lineage()
        one = LowPrecision()
        model = one.apply(model, one.decide(model), lineage)
        assert {n: id(p) for n, p in model.named_parameters()} == before
        assert len(lineage) == 0


def test_what_it_finds_in_a_llama() -> None:
    model, _ = llama()
    decision = LowPrecision().decide(model)
    layer = "model.layers.0"
    assert decision.linear[:4] == tuple(f"{layer}.self_attn.{n}_proj" for n in "qkvo")
    assert decision.kept_input[0] == f"{layer}.self_attn.o_proj"
    assert decision.norm[f"{layer}.input_layernorm"] == decision.norm[f"{layer}.post_attention_layernorm"] == "rms_norm"
    plan = decision.gated_mlp[f"{layer}.mlp"]
    assert (plan.gate, plan.up, plan.down, plan.function) == ("gate_proj", "up_proj", "down_proj", "silu")
    assert (decision.activation, decision.fallback, decision.stays) == ({}, (), {})
    assert "model.norm" not in decision.norm
    model = rewrite(model, LowPrecision())
    assert isinstance(model.model.layers[1].mlp, Float8GatedMLP)
    assert isinstance(model.model.layers[1].input_layernorm, Float8RMSNorm)
    assert type(model.lm_head) is nn.Linear


class Gated(nn.Module):
    """Gate and other input in an order of its own, with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w1(x) * nn.functional.gelu(self.w3(x)))


class Mapped(nn.Module):
    """Computes what nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).square())


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_a_network_is_known_by_what_it_computes() -> None:
    model = nn.Sequential(Block(Gated()), Block(Gated()))
    plan = LowPrecision().decide(model).gated_mlp["0.mlp"]
    assert (plan.gate, plan.up, plan.down, plan.function) == ("w3", "w1", "w2", "gelu")
    unknown = nn.Sequential(Block(Mapped()), Block(Mapped()))
    decision = LowPrecision().decide(unknown)
    assert decision.fallback == ("0.mlp", "1.mlp")
    assert decision.linear == ()
    without = LowPrecision(fallback=False).decide(unknown)
    assert without.fallback == ()
    assert without.stays["0.mlp"] == "what Mapped computes is not known, and fallback is off"
    saving = rewrite(copy.deepcopy(unknown), LowPrecision())
    x = torch.randn(2, 3, 16)
    for m in (unknown, saving):
        m(x).square().sum().backward()
    assert torch.equal(saving[0].mlp.fc1.weight, unknown[0].mlp.fc1.weight)
    ours, exact = saving[0].mlp.fc2.weight.grad, unknown[0].mlp.fc2.weight.grad
    assert not torch.equal(ours, exact)
    assert cosine(ours, exact) > 0.99


def test_the_home_made_block_has_linear_layers_and_an_activation() -> None:
    model, _ = home_made()
    model = rewrite(model, LowPrecision(skip=["stack.3.*"]))
    assert [type(m) for m in model.stack[0].net] == [Float8Linear, Float8Activation, Float8Linear]
    assert model.stack[0].net[1].function == "gelu"
    assert [type(m) for m in model.stack[3].net] == [nn.Linear, nn.GELU, nn.Linear]
    assert type(model.answer) is Float8Linear  # "head" was left out of skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_block_are_those_of_float32(dtype: torch.dtype) -> None:
    model = decoder(width=64).blocks[0]
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)
    plain, x = copy.deepcopy(model), torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(1))
    whole = decoder(width=64)
    whole.blocks[0] = model
    block = rewrite(whole, LowPrecision()).blocks[0].to(dtype)
    g = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(2))
    inputs = [x.clone().requires_grad_(), x.to(dtype).requires_grad_()]
    for m, given in zip((plain, block), inputs, strict=True):
        m(given).backward(g.to(given.dtype))
    assert cosine(inputs[0].grad, inputs[1].grad) > 0.999  # type: ignore[arg-type]
    exact, found = gradients(plain), gradients(block)
    # Rounding a random matrix to E5M2 alone makes 1 - cos = 0.0013, and a gate's gradient is rounded seven times.
    assert min(cosine(exact[n], found[n]) for n in exact) > 0.992


def test_what_a_block_keeps_is_what_the_table_says() -> None:
    """Bytes a token and channel: two norms 9/8 each, their outputs 1, attention 8; the gated network's."""
    width, rows = 64, 2 * 16
    model = decoder(width=width, position="learned").bfloat16()
    hidden = model.blocks[0].feed_forward.gate.out_features
    x = torch.randn(2, 16, width).bfloat16().requires_grad_()
    before = saved_bytes(model.blocks[0], lambda: model.blocks[0](x))
    block = rewrite(model, LowPrecision()).blocks[0]
    found = saved_bytes(block, lambda: block(x))
    table = 2 * (width + 2 * width / 16) + 2 * width + 8 * width + 3 * (hidden + 2 * hidden / 16) + hidden
    assert found == pytest.approx(rows * table, rel=0.03)
    assert found <= 0.7 * before


def test_an_optimizer_goes_on_and_a_saved_model_comes_back(tmp_path: object) -> None:
    model, batch = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        if step == 2:
            model = rewrite(model, LowPrecision(), optimizer=optimizer).train()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            logits(call(model, batch))[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert {int(s["step"]) for s in optimizer.state.values()} == {6}
    io.save(model, f"{tmp_path}/saved")
    with torch.no_grad():
        assert torch.equal(logits(call(io.load(f"{tmp_path}/saved"), batch)), logits(call(model.eval(), batch)))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(LaminaError, match="backward must be 'e4m3' or 'e5m2', got 'e3m4'"):
        LowPrecision(backward="e3m4")  # type: ignore[arg-type]
    with pytest.raises(AnatomyError, match="blocks"):
        rewrite(nn.Sequential(nn.Linear(4, 4)), LowPrecision())
    with pytest.raises(AnatomyError, match=r"nothing in the blocks of Transformer can train on float8 \(skipped\)"):
        rewrite(decoder(), LowPrecision(skip=["*"]))
    model, _ = llama()
    model.model.layers[1].gradient_checkpointing = True
    with pytest.raises(LaminaError, match=r"model.layers.1 does not keep them at all \(activation checkpointing\)"):
        rewrite(model, LowPrecision())
