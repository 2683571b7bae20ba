from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.onnx_export import export
from torch import nn

import lamina
from lamina import io
from lamina.errors import LaminaError
from lamina.models import Transformer
from lamina.optim import MuP, MuReadout, coordinate_check, mup, parameter_groups, parametrize
from lamina.optim.parametrization import param_groups, widths_of
from lamina.optim.parametrization.rates import RULES, Rule, rates
from lamina.recipe import factory
from lamina.registry import names
from lamina.rewrite import DropMLP, GrowParameterTokens, Replace, history, rewrite

OF_SMALL = {
    "parameters": {
        "0.weight": (1.0, 2.0, "vector"),
        "0.bias": (1.0, 2.0, "vector"),
        "1.weight": (1.0, 2.0, "vector"),
        "1.bias": (1.0, 2.0, "vector"),
        "3.weight": (2.0, 1.0, "vector"),
    },
    "shapes": {"0.weight": (8, 6), "0.bias": (8,), "1.weight": (8,), "1.bias": (8,), "3.weight": (3, 8)},
}
"""Of the network that the contract tests train."""

EXAMPLES = [
    Example("optimizer", "mup", {"base": {"name": "adamw", "lr": 5e-3}, "widths": OF_SMALL}, bad={"rule": "adamm"})
]


def network(width: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers = (nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 3))
    return nn.Sequential(*layers).to(dtype)


def in_mup(width: int, base: int, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return parametrize(network(width, dtype), base=lambda: network(base, dtype), **options)


def decoder(width: int, heads: int = 2, **options: Any) -> Transformer:
    return Transformer(2, width, heads, vocabulary=19, context=9, **options)


def tokens(rows: int = 3, length: int = 7, vocabulary: int = 19) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    known = {id(p): n for n, p in model.named_parameters()}
    return {known[id(p)]: (g["lr"], g.get("weight_decay", 0.0)) for g in groups for p in g["params"]}


def test_widths_and_first_values_of_a_perceptron_by_hand() -> None:
    torch.manual_seed(0)
    plain = network(63)
    model = in_mup(63, 7)
    found = widths_of(model)
    assert found.parameters == {
        "0.weight": (1.0, 9.0, "vector"),
        "0.bias": (1.0, 9.0, "vector"),
        "2.weight": (9.0, 9.0, "matrix"),
        "2.bias": (1.0, 9.0, "vector"),
        "4.weight": (9.0, 1.0, "vector"),
        "4.bias": (1.0, 1.0, "fixed"),
    }
    assert found.readouts == {"4": 9.0}
    # torch draws all of a layer as small as its input is wide: right for hidden weights alone.
    assert found.factors == pytest.approx({"2.bias": 3.0, "4.weight": 3.0, "4.bias": 3.0})
    x = torch.randn(2, 7)
    h = torch.tanh(F.linear(torch.tanh(plain[0](x)), plain[2].weight, 3 * plain[2].bias))
    torch.testing.assert_close(model(x), F.linear(h / 9, 3 * plain[4].weight, 3 * plain[4].bias))


TABLE: dict[Rule, Callable[[float, float], dict[str, float]]] = {
    "adam": lambda i, o: {"0.weight": 1, "2.weight": 1 / i, "4.weight": 1, "4.bias": 1},
    "sgd": lambda i, o: {"0.weight": o, "2.weight": o / i, "4.weight": i, "4.bias": 1},
    "lamb": lambda i, o: {"0.weight": 1, "2.weight": i**-0.5, "4.weight": 1, "4.bias": 1},
}
"""Factors of the learning rate, as table 8 of arXiv 2203.03466 has them (and LAMB's as derived)."""


@pytest.mark.parametrize("rule", TABLE)
def test_rates_are_the_papers_and_decay_times_rate_does_not_depend_on_the_width(rule: Rule) -> None:
    model = in_mup(28, 7)
    found = by_name(model, param_groups(model, rule=rule, lr=0.1, weight_decay=0.2, exclude="nothing"))
    for name, factor in TABLE[rule](4.0, 4.0).items():
        lr, decay = found[name]
        assert lr == pytest.approx(0.1 * factor)
        if rule != "lamb":
            assert lr * decay == pytest.approx(0.1 * 0.2)
    left = by_name(model, param_groups(model, rule=rule, lr=0.1, weight_decay=0.2, decoupled=True, exclude="nothing"))
    assert {decay for _, decay in left.values()} == {0.2}
    assert rates((4.0, 2.0, "matrix"), "sgd") == (0.5, 2.0)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_training_is_that_of_a_network_parametrized_by_hand(name: str, dtype: torch.dtype, tolerance: float) -> None:
    options = {"lr": 0.02, "weight_decay": 0.05}
    model = in_mup(63, 7, dtype=dtype)
    weights = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    k = 9.0
    adam = [(1, 1), (1, 1), (1 / k, k), (1, 1), (1, 1), (1, 1)]
    sgd = [(k, 1 / k), (k, 1 / k), (1, 1), (k, 1 / k), (k, 1 / k), (1, 1)]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    factors = sgd if name == "sgd" else adam
    by_hand: Any = kind(
        [
            {"params": [w], "lr": 0.02 * lr, "weight_decay": 0.05 * decay}
            for w, (lr, decay) in zip(weights, factors, strict=True)
        ]
    )
    ours = mup(model, {"name": name, **options}, params=model.parameters())
    assert type(ours) is kind

    def literal(x: torch.Tensor) -> torch.Tensor:
        a, a0, b, b0, c, c0 = weights
        h = torch.tanh(F.linear(torch.tanh(F.linear(x, a, a0)), b, b0))
        return F.linear(h * (1 / k), c, c0)

    for step in range(5):
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step)).to(dtype)
        for forward, optimizer in ((model, ours), (literal, by_hand)):
            optimizer.zero_grad()
            (forward(x) - 1).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(model(x), literal(x), rtol=tolerance, atol=tolerance)


def test_at_the_bases_own_width_nothing_changes() -> None:
    torch.manual_seed(0)
    plain = decoder(16)
    model = rewrite(copy.deepcopy(plain), MuP({"width": 16}))
    assert history(model)[0].decision["factors"] == {}
    assert widths_of(model).parameters["blocks.0.mixer.query.weight"] == (1.0, 1.0, "matrix")
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = mup(model, {"name": "adamw", **options})
    theirs: Any = factory("optimizer", {"name": "adamw", **options})(parameter_groups(plain, 0.1))
    assert [(g["lr"], g["weight_decay"]) for g in ours.param_groups] == [(0.01, 0.1), (0.01, 0.0)]
    for _ in range(3):
        for one, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            one(tokens()).square().mean().backward()
            optimizer.step()
    assert torch.equal(model(tokens()), plain(tokens()))
    # Without a second width, shapes tell nothing there; the model is in muP all the same.
    same = in_mup(16, 16)
    assert isinstance(same[4], MuReadout)
    torch.manual_seed(0)
    assert torch.equal(same(batch()["inputs"]), network(16)(batch()["inputs"]))


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (32,), generator=generator)
    return {"inputs": torch.randn(32, 7, generator=generator), "labels": labels}


@pytest.mark.parametrize(
    ("name", "lr", "grows"), [("adam", 0.01, ("2", 0.3)), ("sgd", 0.1, None), ("lamb", 0.03, ("4", 0.1))]
)
def test_coordinates_stay_flat_in_mup_and_grow_without(name: str, lr: float, grows: tuple[str, float] | None) -> None:
    widths, hidden = [64, 256, 1024], ["0", "2"]
    options: Any = {"steps": 3, "optimizer": {"name": name, "lr": lr}, "modules": [*hidden, "4"]}
    flat = coordinate_check(lambda w: in_mup(w, 32), widths, batch(), **options)
    assert all(abs(flat.slopes(step)[path]) < 0.1 for step in range(4) for path in hidden)
    assert flat.slopes()["4"] < 0.1
    if grows is not None:
        plain = coordinate_check(network, widths, batch(), **options)
        assert plain.slopes()[grows[0]] > grows[1]
        assert "2" in plain.table()


def test_coordinates_of_a_transformer_with_a_tied_head_whose_heads_grow() -> None:
    make = lambda w: rewrite(decoder(w), MuP({"width": 16}))  # noqa: E731
    found = coordinate_check(
        make, [32, 256], {"input_ids": tokens()}, steps=3, optimizer={"name": "adam", "lr": 0.01}, seeds=2
    )
    watched = {p: s for p, s in found.slopes().items() if not p.endswith(("query", "dropout"))}
    assert {p for p, s in watched.items() if abs(s) > 0.25} == set()
    assert len(found.sizes["head"]) == 4


def test_the_plot_of_a_check_is_a_file(tmp_path: Path) -> None:
    found = coordinate_check(network, [8, 16], batch(), steps=1)
    assert "<svg" in found.plot(tmp_path / "check.svg", "plain").read_text()


def llama(width: int, **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2} | options
    return LlamaForCausalLM(LlamaConfig(vocab_size=19, num_hidden_layers=2, use_cache=False, **sizes))


def test_a_hugging_face_model_by_its_config_shrinks_its_hidden_weights_and_its_logits() -> None:
    torch.manual_seed(0)
    plain = llama(64)
    model = rewrite(copy.deepcopy(plain), MuP({"hidden_size": 16, "intermediate_size": 32}))
    found = widths_of(model)
    # It draws everything with 0.02, whatever the width.
    matrices = [n for n, (_, _, kind) in found.parameters.items() if kind == "matrix"]
    assert found.factors == pytest.approx(dict.fromkeys(matrices, 0.5))
    assert len(matrices) == 14
    assert found.readouts == {"lm_head": 4.0}
    assert found.logits == pytest.approx({f"model.layers.{i}.self_attn": 0.5 for i in range(2)})
    # Heads of 32 channels, of 8 in the base: one over 32, and at 8 what it always was.
    assert model.get_submodule("model.layers.0.self_attn").scaling == pytest.approx(8**0.5 / 32)
    assert not torch.allclose(model(tokens()).logits, plain(tokens()).logits)
    heads = rewrite(
        llama(64, num_attention_heads=4), MuP({"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2})
    )
    assert widths_of(heads).logits == {}


def test_a_transposed_weight_and_a_tied_head_are_seen() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 19, "n_layer": 1, "n_head": 2, "n_positions": 9, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_inner=96, **sizes))
    rewrite(model, MuP(GPT2LMHeadModel(GPT2Config(n_embd=16, n_inner=24, **sizes))))
    found = widths_of(model)
    assert found.parameters["transformer.h.0.mlp.c_fc.weight"] == (2.0, 4.0, "matrix")
    assert found.parameters["transformer.h.0.mlp.c_proj.weight"] == (4.0, 2.0, "matrix")
    assert found.tied == ["lm_head"]
    assert isinstance(model.lm_head, MuReadout)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "transformer.wte.weight" not in found.factors


class Sunday(nn.Module):
    """Home-made: a convolution, tokens of torch's own attention, a read-out of one pixel, a free parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Conv2d(1, width, 3)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.attend = nn.MultiheadAttention(width, width // 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.read(x)
        tokens = torch.cat((self.cls_token.expand(len(h), -1, -1), h.flatten(2).transpose(1, 2)), 1)
        mixed = self.norm(self.attend(tokens, tokens, tokens)[0])
        return self.out(mixed[:, 1:].transpose(1, 2).unflatten(2, h.shape[2:]))


def test_a_home_made_model_saves_and_loads_and_is_never_scaled_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = parametrize(Sunday(32), "mup", base=lambda: Sunday(8), output_mult=0.5, zero=["out.bias"])
    found = widths_of(model)
    assert found.parameters["cls_token"] == (1.0, 4.0, "vector")
    assert found.parameters["attend.in_proj_weight"] == (4.0, 4.0, "matrix")
    assert found.readouts == {"out": 4.0}
    assert not model.out.bias.any()
    mup(model, {"name": "sgd", "lr": 0.1})
    x = torch.randn(2, 1, 5, 5)
    plain = Sunday(32)
    plain.load_state_dict(model.state_dict())
    plain.out.weight.data /= 8  # output_mult / 4
    torch.testing.assert_close(model(x), plain(x))
    io.save(model, tmp_path / "model", base=f"{__name__}:sunday")
    loaded = lamina.load(tmp_path / "model", base=Sunday(32))
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(loaded(x), model.eval()(x))
    assert widths_of(loaded) == found
    with pytest.raises(LaminaError, match="is in muP already"):
        parametrize(loaded, base=lambda: Sunday(8))
    assert torch.equal(copy.deepcopy(loaded)(x), loaded(x))


def sunday() -> nn.Module:
    return Sunday(32)


def test_queries_carry_the_scale_of_their_logits_and_nothing_else_does() -> None:
    torch.manual_seed(0)
    model = rewrite(decoder(32), MuP({"width": 8}))
    attention = model.get_submodule("blocks.0.mixer")
    x = torch.randn(2, 3, 32)
    # Heads of 16 channels, of 4 in the base.
    torch.testing.assert_close(attention.query(x), 0.5 * F.linear(x, attention.query.weight))
    torch.testing.assert_close(attention.key(x), F.linear(x, attention.key.weight))
    by_heads = rewrite(decoder(32, heads=4), MuP({"width": 16, "heads": 2}))
    assert widths_of(by_heads).logits == {}


def small_decoder() -> nn.Module:
    torch.manual_seed(0)
    return rewrite(Transformer(1, 16, 2, vocabulary=19, context=9), MuP({"width": 8})).eval()


def test_a_parametrized_model_compiles_and_runs_in_bf16() -> None:
    model = small_decoder()
    expected = model(tokens())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens()).float(), expected, rtol=0.1, atol=0.01)
    assert [g["lr"] for g in mup(compiled, {"name": "adam", "lr": 0.1}).param_groups] == [0.05, 0.1, 0.1]


@pytest.mark.slow
def test_a_parametrized_model_exports(tmp_path: Path) -> None:
    model = small_decoder()
    expected = model(tokens())
    exported = torch.export.export(model, (tokens(),))
    torch.testing.assert_close(exported.module()(tokens()), expected)
    with warnings.catch_warnings():
        # torch's own exporter calls what torch deprecates.
        warnings.simplefilter("ignore")
        export(model, (tokens(),), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 1000


def test_a_model_without_a_read_out_is_rescaled_and_the_optimizer_follows() -> None:
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(9, width), nn.Linear(width, width, bias=False), nn.LayerNorm(width))

    torch.manual_seed(0)
    model = make(28)
    nn.init.normal_(model[1].weight, std=0.1)
    before = model[1].weight.detach().clone()

    def base() -> nn.Module:
        narrow = make(7)
        nn.init.normal_(narrow[1].weight, std=0.1)
        return narrow

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewrite(model, MuP(base), optimizer=optimizer)
    torch.testing.assert_close(model[1].weight.detach(), before * 0.5)
    assert any(p is model[1].weight for p in optimizer.param_groups[0]["params"])


def tokenformer(base: dict[str, int]) -> nn.Module:
    from lamina.models import TokenFormer

    sizes: Any = {"depth": 1, "vocabulary": 19, "context": 8, "attention_pairs": 4, "mlp_pairs": 8}
    roles: Any = {"blocks.*.key": "normalized", "blocks.*.value": "input"}
    return rewrite(TokenFormer(width=32, heads=2, **sizes), MuP(base, roles=roles))


def test_pairs_may_grow_unless_they_are_a_width_themselves() -> None:
    model = tokenformer({"width": 16})
    optimizer = mup(model, {"name": "adam", "lr": 0.1})
    key = next(n for n, _ in model.named_parameters() if n.endswith(".key"))
    assert by_name(model, optimizer.param_groups)[key][0] == pytest.approx(0.1 / 2**0.5)
    rewrite(model, GrowParameterTokens(2.0), optimizer=optimizer)
    carried = by_name(model, optimizer.param_groups)
    assert carried[key][0] == pytest.approx(0.1 / 2**0.5)
    assert by_name(model, mup(model, {"name": "adam", "lr": 0.1}).param_groups) == carried
    grown = rewrite(tokenformer({"width": 16, "attention_pairs": 2, "mlp_pairs": 4}), GrowParameterTokens(2.0))
    with pytest.raises(LaminaError, match=r"is \(8, 32\), and was \(4, 32\) when MuP decided"):
        mup(grown, "adam")


def test_a_resumed_run_has_the_groups_of_one_never_killed() -> None:
    model = rewrite(decoder(32), MuP({"width": 16}))
    node: Any = {"name": "lamb", "lr": 0.1}
    optimizer = mup(model, node)
    rewrite(model, Replace("attention", "hopfield"), optimizer=optimizer)
    rewrite(model, DropMLP(1), data=[{"input_ids": tokens()}], optimizer=optimizer)
    resumed = mup(model, node)
    carried = [(g["lr"], sorted(map(id, g["params"]))) for g in optimizer.param_groups]
    assert [(g["lr"], sorted(map(id, g["params"]))) for g in resumed.param_groups] == carried
    assert len({id(p) for g in resumed.param_groups for p in g["params"]}) == len(list(model.parameters()))
    # A group that a pass has emptied is still there.
    thin = in_mup(28, 7)
    before = len(mup(thin, "adam").param_groups)
    thin[2] = nn.Identity()  # type: ignore[index]
    assert len(mup(thin, "adam").param_groups) == before == 3


def test_the_global_generator_is_left_alone_and_objectives_parameters_keep_the_rate() -> None:
    model = network(28)
    state = torch.random.get_rng_state()
    rewrite(model, MuP(lambda: network(7)))
    assert torch.equal(torch.random.get_rng_state(), state)
    extra = nn.Parameter(torch.zeros(2))
    groups = [{"params": [*model.parameters(), extra], "weight_decay": 0.3}]
    made = mup(model, {"name": "adamw", "lr": 0.1}, params=groups)
    assert [g["lr"] for g in made.param_groups] == pytest.approx([0.025, 0.1])
    assert [g["weight_decay"] for g in made.param_groups] == pytest.approx([1.2, 0.3])
    assert any(p is extra for p in made.param_groups[1]["params"])


def test_every_optimizer_of_ours_is_known_or_refused_by_name() -> None:
    model = in_mup(28, 7)
    for name in sorted(set(names("optimizer")) - {"mup"}):
        kind: Any = factory("optimizer", name)
        if any(c in RULES for c in kind.found.part.target.__mro__):
            assert mup(model, {"name": name, "lr": 0.01}).param_groups
        else:
            with pytest.raises(LaminaError, match="does not know how the steps of"):
                mup(model, name)
            assert mup(model, name, rule="adam").param_groups


class Router(nn.Module):
    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.read = nn.Conv1d(4, width, 1)
        self.mix = nn.Conv1d(width, width, 1, groups=groups)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "mlp": nn.Linear(width, 3), "back": nn.Linear(3, width)})
            for _ in range(2)
        )


def test_what_cannot_scale_is_refused_with_a_sentence() -> None:
    def refused(match: str, model: nn.Module, base: Any, **options: Any) -> None:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(LaminaError, match=match):
            rewrite(model, MuP(base, **options))
        for a, b in zip(model.parameters(), before, strict=True):
            assert torch.equal(a, b) or a.is_meta

    refused("give the base the same depth", network(8), lambda: nn.Sequential(*network(4), nn.Linear(3, 3)))
    refused("grows in 3 dimensions", nn.Bilinear(8, 8, 8), lambda: nn.Bilinear(4, 4, 4))
    refused("has 8 groups and the base's 4", Router(8, 8), lambda: Router(4, 4))
    refused("cannot see of in_proj|cannot see of weight", nn.Bilinear(8, 3, 2), lambda: nn.Bilinear(4, 3, 2))
    refused("which of its two dimensions is the input", nn.Conv1d(3, 8, 8), nn.Conv1d(3, 4, 4))
    refused("is the same in base and delta", network(8), network(4), delta=network(4))
    refused("no parameter fits the pattern 'q.weight' of zero", network(8), network(4), zero=["q.weight"])
    refused("roles are hidden, input", network(8), network(4), roles={"0.weight": "inputs"})
    refused("no parameter fits the pattern", network(8), network(4), roles={"key": "input"})
    refused("there are none on the meta device", network(8), network(4).to("meta"))
    refused("does not know how it was built", network(8), {"width": 4})
    by_hand = nn.Sequential(nn.Linear(7, 8), MuReadout(8, 3))
    refused("in muP already", by_hand, nn.Sequential(nn.Linear(7, 4), MuReadout(4, 3)))
    refused("heads", nn.Sequential(nn.MultiheadAttention(16, 2)), nn.Sequential(nn.MultiheadAttention(8, 2)))
    with pytest.raises(LaminaError, match="output_mult must be > 0"):
        MuP({"width": 4}, output_mult=0.0)
    with pytest.raises(LaminaError, match="names no option"):
        MuP({})
    with pytest.raises(LaminaError, match="parametrize knows 'mup'"):
        parametrize(network(8), "mupp", base=network(4))  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="does not know its widths"):
        mup(network(8))
    with pytest.raises(LaminaError, match="these are no widths"):
        mup(network(8), widths={"parameters": 3})
    with pytest.raises(LaminaError, match="rule is one of"):
        param_groups(in_mup(8, 4), rule="adamm", lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="two widths"):
        coordinate_check(network, [8], batch())
    with pytest.raises(LaminaError, match="pass a loss"):
        coordinate_check(network, [8, 16], {"inputs": torch.randn(2, 7)})
    late = in_mup(8, 4)
    late.add_module("more", nn.Linear(3, 3))
    with pytest.raises(LaminaError, match=r"more.weight has no width"):
        mup(late)


def test_a_gate_in_a_block_must_be_called_a_read_out() -> None:
    with pytest.raises(LaminaError, match="in the middle of the network"):
        rewrite(decoder(32, hidden=8), MuP({"width": 16}))
    roles: Any = {"*.feed_forward.up.weight": "readout"}
    model = rewrite(decoder(32, hidden=8), MuP({"width": 16}, roles=roles))
    assert isinstance(model.get_submodule("blocks.0.feed_forward.up"), MuReadout)


def test_a_deep_wide_network_without_norms_is_warned_of() -> None:
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(2, width), *(nn.Linear(width, width) for _ in range(5)), nn.Linear(width, 2))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rewrite(make(130), MuP(lambda: make(2)))
    assert ["no norm" in str(w.message) for w in caught] == [True]
