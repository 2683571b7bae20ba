from __future__ import annotations

import copy
import json
import sys
import types
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import AnatomyError, LaminaError, RecipeError, ShapeError
from lamina.lineage import Lineage
from lamina.nn import ChannelLayerNorm, LayerNormGRU, LayerNormLSTM, LayerNormRNN, TokenBatchNorm
from lamina.nn._layer_norm_gru import gru_loop
from lamina.nn._layer_norm_lstm import lstm_loop
from lamina.rewrite import Replace, ReplaceDecision, history, replay, rewrite
from lamina.rewrite.conversion import conversion
from lamina.rewrite.rewriting import to_json


def home_made() -> nn.Module:
    from tests.contract import foreign

    return foreign.home_made()[0]


def vectors() -> dict[str, Tensor]:
    return {"inputs": torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))}


EXAMPLES = [
    Example("pass", "replace", {"old": "layer_norm", "new": "rms_norm"}, bad={"new": "rms_nrm"}),
    Example(
        "pass",
        "replace",
        {"old": "lstm", "new": "layer_norm_lstm"},
        model=home_made,
        batch=vectors,
        bad={"old": "lsmt"},
    ),
]


class Tagger(nn.Module):
    """An LSTM user who calls flatten_parameters and reads both states."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 5, **options), nn.LazyLinear(2)
        self.head(torch.zeros(1, (2 if options.get("bidirectional") else 1) * 5))

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.head(self.rnn(x)[0])


PAIRS = [
    (nn.LSTM, "lstm", "layer_norm_lstm", LayerNormLSTM),
    (nn.GRU, "gru", "layer_norm_gru", LayerNormGRU),
    (nn.RNN, "rnn", "layer_norm_rnn", LayerNormRNN),
]


@pytest.mark.parametrize(("peer", "old", "new", "twin"), PAIRS)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
)
def test_recurrent_nets_become_their_twins(peer: Any, old: str, new: str, twin: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Tagger(peer, **options), torch.randn(4, 2, 3)
    before = model(x)
    assert rewrite(model, Replace(old, new)) is model
    assert type(model.rnn) is twin
    assert model(x).shape == before.shape
    assert not torch.allclose(model(x), before, atol=1e-3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_lstm_weights_are_those_of_torch_once_the_norms_are_off() -> None:
    torch.manual_seed(0)
    model, x, zero = Tagger(nn.LSTM), torch.randn(4, 2, 3), torch.zeros(2, 5)
    expected = model.rnn(x)[0]
    cell = rewrite(model, Replace("lstm", "layer_norm_lstm")).rnn.cells[0]
    rows = x.view(-1, 3) @ cell.weight_ih.T + cell.bias
    got = lstm_loop(rows, zero, zero, cell.weight_hh, None, None, None, None, False, 1e-5)[0]
    torch.testing.assert_close(got.view(4, 2, 5), expected)
    assert all((p == 1).all() for n, p in cell.named_parameters() if n.startswith("gain"))
    assert not any(p.any() for n, p in cell.named_parameters() if n.startswith("shift"))


def test_gru_weights_and_both_biases_are_those_of_torch_once_the_norms_are_off() -> None:
    torch.manual_seed(0)
    model, x, zero = Tagger(nn.GRU), torch.randn(4, 2, 3), torch.zeros(2, 5)
    expected = model.rnn(x)[0]
    cell = rewrite(model, Replace("gru", "layer_norm_gru")).rnn.cells[0]
    rows = x.view(-1, 3) @ cell.weight_ih.T + cell.bias
    got = gru_loop(rows, zero, cell.weight_hh, None, cell.shift_hh[10:], None, False, 1e-5)[0]
    torch.testing.assert_close(got.view(4, 2, 5), expected)


def test_momentum_follows_the_gates_to_their_new_rows() -> None:
    torch.manual_seed(0)
    model = Tagger(nn.LSTM, num_layers=2, bidirectional=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(4, 2, 3)).square().sum().backward()
    optimizer.step()
    old = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.rnn.named_parameters()}
    rewrite(model, Replace("lstm", "layer_norm_lstm"), optimizer=optimizer)
    for k, name in enumerate(("l0", "l0_reverse", "l1", "l1_reverse")):
        cell = model.rnn.cells[k]
        for new, source in (("weight_ih", "weight_ih"), ("weight_hh", "weight_hh"), ("bias", "bias_ih")):
            i, f, g, o = old[f"{source}_{name}"].chunk(4)
            assert torch.equal(optimizer.state[getattr(cell, new)]["exp_avg"], torch.cat([i, f, o, g]))
        assert cell.gain_hh not in optimizer.state or not optimizer.state[cell.gain_hh]
    model(torch.randn(4, 2, 3)).sum().backward()
    optimizer.step()


def test_options_reach_the_new_net() -> None:
    model = rewrite(Tagger(nn.LSTM), Replace("lstm", "layer_norm_lstm", options={"variant": "cell", "eps": 1e-3}))
    assert model.rnn.cells[0].variant == "cell"
    assert model.rnn.cells[0].eps == 1e-3
    relu = rewrite(Tagger(nn.RNN, nonlinearity="relu"), Replace("rnn", "layer_norm_rnn"))
    assert relu.rnn.cells[0].nonlinearity == "relu"


def test_batch_norm_becomes_layer_norm_with_gain_shift_and_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3), nn.Flatten(), nn.Linear(96, 4), nn.BatchNorm1d(4)
    )
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
    x = torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    gain, momentum = model[1].weight.detach().clone(), optimizer.state[model[1].weight]["exp_avg"].clone()
    rewrite(model, Replace("batch_norm", "layer_norm"), optimizer=optimizer)
    assert type(model[1]) is type(model[4]) is ChannelLayerNorm
    assert model[1].eps == 1e-3
    assert torch.equal(model[1].weight, gain)
    assert torch.equal(optimizer.state[model[1].weight]["exp_avg"], momentum)
    assert not list(model.buffers())
    single = model(x[:1])
    torch.testing.assert_close(single, model(x)[:1])
    tokens = rewrite(nn.Sequential(nn.Linear(3, 4), TokenBatchNorm(4)), Replace("batch_norm", "layer_norm"))
    assert type(tokens[1]) is nn.LayerNorm


def test_layer_norm_becomes_rms_norm_inside_torchs_encoder_layer_in_evaluation_too() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    rewrite(encoder, Replace("layer_norm", "rms_norm"))
    x = torch.randn(2, 5, 8)
    expected = encoder.train()(x)
    with torch.no_grad():
        # The fused kernel of evaluation would compute layer norm.
        torch.testing.assert_close(encoder.eval()(x), expected)


def test_a_class_the_registry_does_not_know_is_named_by_its_class() -> None:
    class OddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), 1e-3

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    model = rewrite(nn.Sequential(OddNorm(), nn.Linear(3, 3)), Replace("OddNorm", "layer_norm"))
    assert model[0].weight.tolist() == [1.0, 2.0, 3.0]
    assert model[0].eps == 1e-3


def test_match_shared_modules_and_the_root() -> None:
    shared = nn.LayerNorm(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, shared), "b": nn.LayerNorm(4)})
    rewrite(model, Replace("layer_norm", "rms_norm", match="a.*"))
    assert model["a"][0] is model["a"][1]
    assert type(model["a"][0]) is nn.RMSNorm
    assert type(model["b"]) is nn.LayerNorm
    root = rewrite(nn.LSTM(3, 4), Replace("lstm", "layer_norm_lstm"))
    assert type(root) is LayerNormLSTM
    assert history(root)[0].name == "replace"


def test_dtype_mode_and_frozen_weights_are_kept() -> None:
    model = Tagger(nn.LSTM).double().eval().requires_grad_(False)
    rewrite(model, Replace("lstm", "layer_norm_lstm"))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not model.rnn.training
    assert not model.rnn.cells[0].weight_hh.requires_grad
    assert model.rnn.cells[0].gain_hh.requires_grad


def test_replay_on_the_original_and_on_meta() -> None:
    torch.manual_seed(0)
    original = Tagger(nn.GRU, num_layers=2)
    model = rewrite(copy.deepcopy(original), Replace("gru", "layer_norm_gru"))
    record = history(model)[0]
    assert json.loads(json.dumps(record.decision)) == {
        "paths": ["rnn"], "old": "gru", "new": "layer_norm_gru", "options": {}, "grid": None, "prefix": 0, "seed": 0,
        "untied": [],
    }  # fmt: skip
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = replay(copy.deepcopy(original), history(model))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    skeleton = replay(original.to("meta"), history(model))
    assert all(p.is_meta for p in skeleton.parameters())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_whatever_a_new_module_draws_comes_from_the_seed_of_the_decision() -> None:
    class NoisyNorm(nn.LayerNorm):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.noise = nn.Parameter(torch.randn(width))

    module = types.ModuleType("noisy_norm_of_a_test")
    module.NoisyNorm = NoisyNorm  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module

    def noise(seed: int) -> Tensor:
        made = rewrite(nn.Sequential(nn.LayerNorm(4)), Replace("layer_norm", f"{module.__name__}:NoisyNorm", seed=seed))
        return made[0].noise.detach()

    assert torch.equal(noise(3), noise(3))
    assert not torch.equal(noise(3), noise(4))


@pytest.mark.parametrize(
    ("model", "one", "error", "words"),
    [
        (Tagger(nn.LSTM), Replace("lsmt", "layer_norm_lstm"), LaminaError, "did you mean .*'lstm'"),
        (Tagger(nn.LSTM), Replace("lstm", "layer_norm_lsmt"), LaminaError, "did you mean 'layer_norm_lstm'"),
        (Tagger(nn.LSTM), Replace("gru", "layer_norm_gru"), AnatomyError, "has no gru to replace; it has LSTM, "),
        (Tagger(nn.LSTM), Replace("Linear", "rms_norm"), LaminaError, "Linear cannot (become|be replaced)"),
        (nn.LSTM(3, 4, proj_size=2), Replace("lstm", "layer_norm_lstm"), ShapeError, "proj_size=2"),
        (nn.Sequential(nn.LayerNorm(4)), Replace("layer_norm", "rmsnorm"), LaminaError, "did you mean 'rms_norm'"),
        (nn.Sequential(nn.LayerNorm((4, 4))), Replace("layer_norm", "rms_norm"), ShapeError, r"over \(4, 4\)"),
        (nn.Sequential(nn.BatchNorm2d(4)), Replace("batch_norm", "rms_norm"), ShapeError, "dimension 1"),
        (nn.Sequential(nn.LayerNorm(4)), Replace("layer_norm", "channel_layer_norm"), ShapeError, "last dimension"),
        (nn.Sequential(nn.LayerNorm(4)), Replace("layer_norm", "rms_norm", match="x.*"), AnatomyError, r"\['0'\]"),
        (
            nn.Sequential(nn.LayerNorm(4)),
            Replace("layer_norm", "rms_norm", options={"epz": 1.0}),
            RecipeError,
            "did you mean 'eps'",
        ),
    ],
)
def test_refusals_name_what_is_there_and_change_nothing(
    model: nn.Module, one: Replace, error: type[Exception], words: str
) -> None:
    before = [id(m) for m in model.modules()]
    with pytest.raises(error, match=words):
        rewrite(model, one)
    assert [id(m) for m in model.modules()] == before


def test_a_refusal_of_the_second_module_leaves_the_first_alone() -> None:
    model = nn.Sequential(nn.LSTM(3, 4), nn.LSTM(3, 4, proj_size=2))
    with pytest.raises(ShapeError):
        rewrite(model, Replace("lstm", "layer_norm_lstm"))
    assert type(model[0]) is nn.LSTM


def test_grid_is_for_attention_only() -> None:
    with pytest.raises(RecipeError, match="grid is for replacing attention"):
        Replace("lstm", "layer_norm_lstm", grid=(2, 2))


def test_attention_is_handed_to_its_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("lamina.rewrite.replace_attention")
    asked: dict[str, Any] = {}

    def decide_attention(model: nn.Module, data: Any, **options: Any) -> ReplaceDecision:
        asked.update(options)
        return ReplaceDecision(("0",), "attention", options["new"], options["options"], options["grid"], prefix=1)

    def apply_attention(model: nn.Sequential, decision: ReplaceDecision, lineage: Lineage) -> nn.Module:
        model[0] = nn.Identity()
        return model

    stand_in.decide_attention, stand_in.apply_attention = decide_attention, apply_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr("lamina.rewrite.replace_attention", stand_in, raising=False)
    one = Replace("attention", "pooling_mixer", match="0*", grid=(2, 3), options={"kernel_size": 5})
    model = rewrite(nn.Sequential(nn.Linear(2, 2)), one)
    assert asked == {"new": "pooling_mixer", "match": "0*", "grid": (2, 3), "options": {"kernel_size": 5}}
    assert history(model)[0].decision == to_json(
        ReplaceDecision(("0",), "attention", "pooling_mixer", {"kernel_size": 5}, (2, 3), 1)
    )


class Doubled(nn.Linear):
    """A part of somebody else's, called like nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


DOUBLED = "tests.rewrite.test_replace:Doubled"


def test_the_head_becomes_any_layer_called_like_a_linear_and_takes_over_what_fits() -> None:
    model = home_made()
    before = model.answer.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(**{"x": vectors()["inputs"]}).sum().backward()
    optimizer.step()
    trained = model.answer.weight.detach().clone()
    momentum = optimizer.state[model.answer.weight]["momentum_buffer"].clone()
    model = rewrite(model, Replace("head", DOUBLED), optimizer=optimizer)
    assert history(model)[0].decision["paths"] == ["answer"]
    assert type(model.answer).__name__ == "Doubled"
    assert torch.equal(model.answer.weight, trained)
    assert not torch.equal(trained, before)
    assert torch.equal(optimizer.state[model.answer.weight]["momentum_buffer"], momentum)


def test_linears_are_replaced_by_pattern_and_the_head_of_a_plain_stack_is_its_last_linear() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.Sigmoid())
    assert history(rewrite(copy.deepcopy(model), Replace("head", DOUBLED)))[0].decision["paths"] == ["2"]
    changed = rewrite(copy.deepcopy(model), Replace("linear", DOUBLED, match="0"))
    x = torch.randn(5, 2)
    expected = model[3](model[2](torch.relu(2 * model[0](x))))
    torch.testing.assert_close(changed(x), expected)


def test_a_head_tied_to_the_embedding_is_untied_and_says_so() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).eval()
    embedding = model.transformer.wte.weight
    assert model.lm_head.weight is embedding
    model = rewrite(model, Replace("head", DOUBLED))
    assert history(model)[0].decision["untied"] == ["transformer.wte.weight"]
    assert model.transformer.wte.weight is embedding
    assert model.lm_head.weight is not embedding
    assert torch.equal(model.lm_head.weight, embedding)


@pytest.mark.parametrize(
    ("model", "one", "words"),
    [
        (nn.Sequential(nn.ReLU()), Replace("head", DOUBLED), "has no head"),
        (nn.Sequential(nn.Linear(2, 2)), Replace("head", "gelu"), "Linear cannot be(come 'gelu'| replaced)"),
        (nn.Sequential(nn.Linear(2, 2)), Replace("linear", DOUBLED, options={"bais": False}), "did you mean 'bias'"),
        (nn.Sequential(nn.Conv2d(2, 2, 1)), Replace("linear", DOUBLED), "has no linear to replace"),
    ],
)
def test_a_linear_that_cannot_be_replaced_is_refused(model: nn.Module, one: Replace, words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        rewrite(model, one)


def test_a_conversion_is_registered_once_for_a_role_there_is() -> None:
    with pytest.raises(LaminaError, match="no role of a layer is called 'linaer'"):
        conversion("linaer", "gelu")

    def own(old: nn.Module, new: str, options: Any, lineage: Lineage) -> nn.Module:
        return nn.Identity()

    with pytest.raises(LaminaError, match="two conversions of lstm to layer_norm_lstm"):
        conversion("lstm", "layer_norm_lstm")(own)
