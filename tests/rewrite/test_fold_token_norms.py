"""Norms of tokens are folded into the layers that read them; the other half of `Fold` is in test_fold.py."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.contract.foreign import home_made, llama, ours, vision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError
from lamina.models import VisionTransformer
from lamina.nn import PRepBN, RepBN, TokenBatchNorm
from lamina.rewrite import Fold, ProgressiveNorm, history, replay, rewrite
from lamina.rewrite.fold import ChannelAffine


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> nn.Module:
    """Layer norms become progressive norms that have turned."""
    return turned(rewrite(model, ProgressiveNorm()))


def turned(model: nn.Module) -> nn.Module:
    """Give progressive norms the end of their decay, and statistics and numbers that say something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, PRepBN)):
            norm.set_progress(1.0)
            norm.rep.running_mean.normal_(generator=generator)
            norm.rep.running_var.uniform_(0.3, 3, generator=generator)
            norm.rep.weight.uniform_(-1.5, 1.5, generator=generator)
            norm.rep.bias.normal_(generator=generator)
            norm.rep.skip.fill_(0.7)
    return model.eval()


def vit(pool: str = "mean", **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = VisionTransformer(8, 2, 2, 16, 2, classes=5, channels=1, pool=pool, **options)
    return model, {"pixel_values": drawn(2, 1, 8, 8)}


def encoder(norm_first: bool = True, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"inputs": drawn(2, 7, 16)}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    return GPT2LMHeadModel(config), {"input_ids": torch.arange(14).view(2, 7)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    return BertModel(config), {"input_ids": torch.arange(14).view(2, 7)}


def bare_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    return vit(mixer={"name": "attention", "bias": False}, feed_forward={"name": "swiglu"})


def swin() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=8, patch_size=1, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return SwinForImageClassification(config), {"pixel_values": drawn(2, 3, 8, 8)}


EXAMPLES = [
    Example(
        "pass",
        "fold",
        {},
        model=lambda: turned(vit(norm="prep_bn")[0]),
        batch=lambda: vit()[1],
        only_ours="no model of others has these norms",
        bad={"match": "nowhere.*"},
    )
]

PRE = [home_made, llama, vision, vit, lambda: vit("class"), bare_vit, encoder]


@pytest.mark.parametrize("make", PRE)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_pre_norm_model_keeps_its_outputs_and_no_norm(make: Any, dtype: torch.dtype, bound: float) -> None:
    model, batch = make()
    model = trained(model).to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        expected = logits(call(model, batch))
        model = rewrite(model, Fold(), data=[batch])
        found = logits(call(model, batch))
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    decision = history(model)[-1].decision
    assert {n["into"] for n in decision["norms"].values()} == {"consumers"}
    assert not any(isinstance(m, (RepBN, PRepBN, nn.LayerNorm, ChannelAffine)) for m in model.modules())
    assert not list(model.buffers()) or make in (llama,)


@pytest.mark.parametrize("make", [lambda: encoder(False), bert, ours, gpt2, swin])
def test_what_a_residual_or_a_tied_weight_reads_keeps_a_scale_and_shift(make: Any) -> None:
    model, batch = make()
    model = trained(model)
    with torch.no_grad():
        expected = logits(call(model, batch))
        before = copy.deepcopy(model)
        model = rewrite(model, Fold(), data=[batch])
        torch.testing.assert_close(logits(call(model, batch)), expected, rtol=1e-4, atol=1e-5)
        # Twice in the same process, and by the record alone.
        again = replay(before, history(model)[-1:])
        assert torch.equal(logits(call(again, batch)), logits(call(model, batch)))
    decision = Fold().decide(trained(make()[0]), [batch])
    kinds = {n.into for n in decision.norms.values()}
    assert "affine" in kinds
    assert "-> scale and shift (" in decision.table()
    norms = [m for m in model.modules() if isinstance(m, (RepBN, PRepBN, nn.LayerNorm))]
    assert not norms
    assert sum(isinstance(m, ChannelAffine) for m in model.modules()) == sum(
        n.into == "affine" for n in decision.norms.values()
    )
    if make is ours:
        assert decision.norms["final_norm"].why == "the weight of head is another layer's too"
        assert model.head.weight is model.embedding.weight
    if make is gpt2:
        assert decision.norms["transformer.h.0.ln_1"].modules == ("transformer.h.0.attn.c_attn",)


def test_a_post_norm_encoder_says_what_reads_its_norms() -> None:
    model, batch = encoder(False)
    decision = Fold().decide(trained(model), [batch])
    assert {n.into for n in decision.norms.values()} == {"affine"}
    assert decision.norms["layers.0.norm1"].why == "its output is also read by add"
    assert decision.norms["layers.1.norm2"].why == "its output is also read by the model's output"


def rep(width: int = 6, shift: bool = True) -> RepBN:
    norm = RepBN(width)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.normal_(generator=generator)
        if not shift:
            norm.running_mean.zero_()
            norm.bias.zero_()
    return norm


class Reader(nn.Module):
    """One norm of tokens (B, 16, 6), and what comes after it, in many ways."""

    def __init__(self, way: str, layer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.way, self.norm, self.layer = way, norm or rep(), layer

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        if x.sum() > 1e9:
            return y
        return WAYS[self.way](self.layer, y, x)


def image(y: Tensor) -> Tensor:
    return y.transpose(1, 2).unflatten(2, (4, 4))


MASK = torch.tensor([[True] * 16, [True] * 3 + [False] * 13])
WAYS: dict[str, Any] = {
    "plain": lambda f, y, x: f(y),
    "mean": lambda f, y, x: f(y.mean(1)),
    "mean_kept": lambda f, y, x: f(y.mean(dim=(1,), keepdim=True)),
    "token": lambda f, y, x: f(y[:, 0]),
    "tokens": lambda f, y, x: f(y[:, 1:]),
    "last": lambda f, y, x: f(y[torch.arange(2), torch.tensor([3, 5])]),
    "masked": lambda f, y, x: f(y[MASK]),
    "halves": lambda f, y, x: f(y.chunk(2, dim=1)[1]) + f(y.chunk(2, dim=1)[0]),
    "turned": lambda f, y, x: f(y.transpose(0, 1)).transpose(0, 1),
    "rows": lambda f, y, x: f(y.reshape(-1, 6)).view(2, 16, -1),
    "copied": lambda f, y, x: f(y.contiguous().clone().detach()),
    "twice": lambda f, y, x: f(y) + f(y[:, :1]),
    "image": lambda f, y, x: f(image(y)),
    "pooled": lambda f, y, x: f(F.adaptive_avg_pool1d(y.transpose(1, 2), 1).flatten(1)),
    # No layer to go into:
    "sum": lambda f, y, x: f(y.sum(1)),
    "features": lambda f, y, x: f(y.flip(2)),
    "half_of_features": lambda f, y, x: f(y[..., :3]),
    "heads": lambda f, y, x: f(y.unflatten(2, (2, 3))),
    "channels_last_too": lambda f, y, x: f(y.transpose(1, 2)),
    "activated": lambda f, y, x: f(y.relu()),
    "max": lambda f, y, x: f(y.amax(1)),
    "residual": lambda f, y, x: f(y) + y.mean(-1, keepdim=True),
    "added": lambda f, y, x: f(y + x),
    "in_place": lambda f, y, x: f(y.mul_(2)),
    "in_place_on_a_view": lambda f, y, x: (y[:, 0].zero_(), f(y))[1],
    "returned": lambda f, y, x: (f(y), y),
    "other_input_too": lambda f, y, x: f(y) + f(x),
    "by_its_weight": lambda f, y, x: F.linear(y, f.weight),
    "joined": lambda f, y, x: f(torch.cat([y, x], dim=1)),
}
FOLDS = [*WAYS][:14]


def layer_for(way: str) -> nn.Module:
    torch.manual_seed(0)
    if way == "image":
        return nn.Conv2d(6, 8, 2, groups=2)
    if way in ("half_of_features", "heads"):
        return nn.Linear(3, 4)
    return nn.Linear(16 if way == "channels_last_too" else 6, 4, bias=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_norm_goes_into_its_readers_only_where_that_is_exact(way: str) -> None:
    model, x = Reader(way, layer_for(way)).double().eval(), drawn(2, 16, 6).double()
    with torch.no_grad():
        expected = model(x)
        decision = Fold().decide(model, [{"x": x}])
        model = rewrite(model, Fold(), data=[{"x": x}])
        found = model(x)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)
    assert decision.norms["norm"].into == ("consumers" if way in FOLDS else "affine"), decision.table()
    assert type(model.norm) is (nn.Identity if way in FOLDS else ChannelAffine)


CONVOLUTIONS: dict[str, tuple[nn.Module, bool, str]] = {
    "no padding": (nn.Conv2d(6, 4, 3), True, "consumers"),
    "zeros": (nn.Conv2d(6, 4, 3, padding=1), True, "affine"),
    "zeros, no shift": (nn.Conv2d(6, 4, 3, padding=1, bias=False), False, "consumers"),
    "same": (nn.Conv2d(6, 4, 3, padding="same"), True, "affine"),
    "valid": (nn.Conv2d(6, 4, 3, padding="valid"), True, "consumers"),
    "reflect": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), True, "consumers"),
    "depthwise": (nn.Conv2d(6, 6, 2, stride=2, groups=6), True, "consumers"),
    "transposed": (nn.ConvTranspose2d(6, 4, 2), True, "affine"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_behind_a_norm(name: str) -> None:
    layer, shift, into = CONVOLUTIONS[name]
    model, x = Reader("image", copy.deepcopy(layer), rep(shift=shift)).double().eval(), drawn(2, 16, 6).double()
    with torch.no_grad():
        expected = model(x)
        decision = Fold().decide(model, [{"x": x}])
        torch.testing.assert_close(rewrite(model, Fold(), data=[{"x": x}])(x), expected)
    assert decision.norms["norm"].into == into
    if name == "zeros":
        assert decision.norms["norm"].why == "layer pads with zeros, which have no shift"


class Embedded(nn.Module):
    """Patches, a norm right behind them, a residual from there."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.linear = nn.Conv2d(3, 6, 2, stride=2, bias=False), rep(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        return (y + self.linear(y).relu()) if y.sum() < 1e9 else y


def test_a_norm_that_feeds_a_residual_goes_into_the_layer_before_it() -> None:
    model, x = Embedded().double().eval(), drawn(2, 3, 8, 8).double()
    with torch.no_grad():
        expected = model(x)
        model = rewrite(model, Fold(), data=[{"x": x}])
        torch.testing.assert_close(model(x), expected)
    chosen = history(model)[0].decision["norms"]["norm"]
    assert (chosen["into"], chosen["modules"]) == ("producer", ["patches"])
    assert model.patches.bias is not None


def test_without_data_torch_fx_looks_and_what_it_does_not_see_keeps_a_scale_and_shift() -> None:
    plain = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), rep(), nn.Linear(6, 4), TokenBatchNorm(4)).eval()
    x = drawn(2, 5, 3)
    expected = plain(x)
    decision = Fold().decide(plain)
    assert {p: (n.into, n.modules) for p, n in decision.norms.items()} == {
        "4": ("producer", ("3",)),
        "2": ("consumers", ("3",)),
    }
    torch.testing.assert_close(rewrite(plain, Fold())(x), expected)
    model = Reader("plain", nn.Linear(6, 4)).eval()
    expected = model(drawn(2, 16, 6))
    decision = Fold().decide(model)
    assert decision.norms["norm"].into == "affine"
    assert "not seen by torch.fx: pass data" in decision.norms["norm"].why
    torch.testing.assert_close(rewrite(model, Fold())(drawn(2, 16, 6)), expected)


def stays(change: Any) -> nn.Module:
    model = Reader("plain", nn.Linear(6, 6))
    model.layer = change(model.layer)
    return model.eval()


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (parametrizations.weight_norm, "has a parametrization|may compute something else"),
        (hooked, "hooks are registered"),
        (lambda _: Doubled(6, 6), "Doubled, which may compute something else"),
    ],
)
def test_layers_that_are_not_what_they_seem_are_left_alone(change: Any, words: str) -> None:
    model, x = stays(change), drawn(2, 16, 6)
    expected = model(x)
    decision = Fold().decide(model, [{"x": x}])
    assert decision.norms["norm"].into == "affine"
    assert re.search(words, decision.norms["norm"].why)
    torch.testing.assert_close(rewrite(model, Fold(), data=[{"x": x}])(x), expected)


def test_norms_that_are_no_scale_and_shift_stay_with_their_reason() -> None:
    norms = nn.Sequential(rep(), TokenBatchNorm(6, track_running_stats=False), rep(), PRepBN(6)).eval()
    norms[2].register_forward_hook(lambda module, args, output: output * 2)
    norms[3].set_progress(1.0)
    norms[3].rep.register_forward_hook(lambda module, args, output: output * 2)
    x = drawn(2, 16, 6)
    expected = norms(x)
    decision = Fold().decide(norms, [{"x": x}])
    assert list(decision.norms) == ["0"]
    assert "keeps no running statistics" in decision.skipped["1"]
    assert decision.skipped["2"] == decision.skipped["3"] == "hooks are registered on it"
    torch.testing.assert_close(rewrite(norms, Fold(), data=[{"x": x}])(x), expected)


def test_attention_without_a_bias_and_cross_attention_keep_a_scale_and_shift() -> None:
    model, batch = encoder(bias=False)
    decision = Fold().decide(trained(model), [batch])
    assert decision.norms["layers.0.norm1"].why == "layers.0.self_attn has no one biased input projection"
    assert decision.norms["layers.0.norm2"].into == "consumers"

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attend = rep(), nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.attend(y, x, x)[0] if x.sum() < 1e9 else x

    cross, x = Cross().eval(), drawn(2, 16, 6)
    expected = cross(x)
    assert Fold().decide(cross, [{"x": x}]).norms["norm"].into == "affine"
    torch.testing.assert_close(rewrite(cross, Fold(), data=[{"x": x}])(x), expected)


def test_norms_that_have_not_turned_or_still_train_are_refused() -> None:
    model, batch = vit()
    model = rewrite(model, ProgressiveNorm())
    with pytest.raises(LaminaError, match="cannot be folded while it is in training mode"):
        Fold().decide(model.train(), [batch])
    for norm in (m for m in model.modules() if isinstance(m, PRepBN)):
        norm.set_progress(0.4)
    with pytest.raises(LaminaError, match=r"blocks\.0\.norm1 still blends in 0\.5 of the norm it began as"):
        Fold().decide(model.eval(), [batch])
    model = trained(vit()[0])
    model.blocks[1].norm2.rep.train()
    with pytest.raises(LaminaError, match=r"its norm blocks\.1\.norm2 is in training mode"):
        Fold().decide(model, [batch])
    with pytest.raises(AnatomyError, match="no batch"):
        Fold().decide(trained(vit()[0]), [])
    assert list(Fold(match="blocks.0.*").decide(trained(vit()[0]), [batch]).norms) == [
        "blocks.0.norm1",
        "blocks.0.norm2",
    ]


def test_a_model_that_computes_by_chance_is_not_folded() -> None:
    calls = []

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = rep(), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return self.layer(self.norm(x)) * len(calls)

    model = Random().eval()
    with pytest.raises(LaminaError, match="a folded copy of Random is off by"):
        rewrite(model, Fold(), data=[{"x": drawn(2, 16, 6)}])
    assert type(model.norm) is RepBN


def test_outputs_may_be_infinite() -> None:
    class Forbidding(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.arange(6) > 3, -torch.inf)

    model, x = Forbidding("plain", nn.Linear(6, 6)).eval(), drawn(2, 16, 6)
    expected = model(x)
    torch.testing.assert_close(rewrite(model, Fold(), data=[{"x": x}])(x), expected)


def test_half_precision_is_folded_in_double_precision() -> None:
    model, x = Reader("plain", nn.Linear(6, 4)).eval(), drawn(2, 16, 6)
    expected = model(x)
    half = rewrite(model, Fold(), data=[{"x": x}]).bfloat16()(x.bfloat16())
    assert (half.float() - expected).abs().max() <= 2e-2 * expected.abs().max()
