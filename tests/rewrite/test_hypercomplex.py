from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from tests.contract import foreign
from tests.contract.example import Example
from torch import Tensor, nn

from lamina import anatomy, io
from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError, RecipeError, ShapeError
from lamina.models import ResNet, Transformer
from lamina.nn import PHConv1d, PHConv2d, PHConv3d, PHConvTranspose2d, PHMLinear, kron_sum
from lamina.rewrite import DropMLP, FoldHypercomplex, Hypercomplex, Replace, history, replay, rewrite


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolutions() -> nn.Module:
    return ResNet((1, 1), (16, 32), stem="small", classes=3)


def images() -> dict[str, Tensor]:
    return {"pixel_values": drawn(2, 3, 8, 8)}


def already() -> nn.Module:
    linear = {"name": "phm_linear", "n": 2}
    return Transformer(2, 16, 2, vocabulary=32, context=8, linear=linear)


def tokens() -> dict[str, Tensor]:
    return {"input_ids": foreign.tokens()}


EXAMPLES = [
    Example("pass", "hypercomplex", {"n": 2}, bad={"n": 0}),
    Example(
        "pass", "hypercomplex", {"n": 2, "fit": True, "types": ["conv"]}, model=convolutions, batch=images, bad={"n": 5}
    ),
    Example(
        "pass",
        "fold_hypercomplex",
        {},
        model=already,
        batch=tokens,
        bad={"match": "nowhere.*"},
        only_ours="there is nothing to fold before `hypercomplex`; both are tried on foreign models in its own test",
    ),
    Example(
        "pass",
        "replace",
        {"old": "linear", "new": "phm_linear", "options": {"n": 2}, "match": "*.q*"},
        bad={"new": "phm"},
    ),
]
LAYERS: list[tuple[nn.Module, str, str, Any, tuple[int, ...]]] = [
    (nn.Linear(8, 12), "linear", "phm_linear", PHMLinear, (5, 8)),
    (nn.Conv1d(8, 4, 3, stride=2), "conv1d", "ph_conv1d", PHConv1d, (2, 8, 7)),
    (nn.Conv2d(4, 8, (1, 3), padding="same", bias=False), "conv2d", "ph_conv2d", PHConv2d, (1, 4, 5, 7)),
    (nn.Conv3d(4, 4, 2, padding=1, padding_mode="circular"), "conv3d", "ph_conv3d", PHConv3d, (1, 4, 3, 3, 3)),
    (
        nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, dilation=2),
        "conv_transpose2d", "ph_conv_transpose2d", PHConvTranspose2d, (1, 8, 4, 5),
    ),
]  # fmt: skip


def exact(layer: Any, n: int) -> Any:
    """Give a layer a weight that is a sum of n Kronecker products."""
    rows, columns, *kernel = layer.weight.shape
    with torch.no_grad():
        layer.weight.copy_(kron_sum(drawn(n, n, n), drawn(n, rows // n, columns // n, *kernel, seed=1)))
    return layer


@pytest.mark.parametrize(("layer", "old", "new", "kind", "shape"), LAYERS)
@pytest.mark.parametrize("n", [2, 4])
def test_a_weight_that_is_such_a_sum_is_replaced_without_a_trace_and_folded_back(
    layer: nn.Module, old: str, new: str, kind: Any, shape: tuple[int, ...], n: int
) -> None:
    model, x = nn.Sequential(exact(copy.deepcopy(layer), n)), drawn(*shape)
    before, text = model(x).detach(), repr(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the smallest save nothing
        replaced = rewrite(copy.deepcopy(model), Replace(old, new, options={"n": n}))
        passed = rewrite(copy.deepcopy(model), Hypercomplex(n, skip=(), fit=True))
    for result in (replaced, passed):
        assert type(result[0]) is kind
        torch.testing.assert_close(result(x).detach(), before, rtol=1e-4, atol=1e-5)
        fine = rewrite(copy.deepcopy(result).double().eval(), FoldHypercomplex())
        torch.testing.assert_close(fine(x.double()), copy.deepcopy(result).double()(x.double()), rtol=1e-12, atol=1e-12)
        assert repr(fine) == text
    assert history(passed)[0].decision["layers"]["0"]["error"] < 1e-6


def test_a_fitted_model_is_as_near_as_the_decision_says_and_the_bias_keeps_its_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    old, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(drawn(4, 16)).square().sum().backward()
    grads = model[0].bias.grad.clone()
    one = Hypercomplex(4, skip=(), fit=True)
    decision = one.decide(model)
    optimizer.step()
    with torch.no_grad():
        model[0].weight.copy_(old)
        model[0].bias.copy_(bias)
    momentum = optimizer.state[model[0].bias]["exp_avg"].clone()
    model = rewrite(model, one, optimizer=optimizer)
    assert torch.equal(model[0].bias, bias)
    assert torch.equal(optimizer.state[model[0].bias]["exp_avg"], momentum)
    assert torch.equal(momentum, 0.1 * grads)
    assert not optimizer.state[model[0].F]
    found = (model[0].weight.detach() - old).norm() / old.norm()
    assert float(found) == pytest.approx(decision.layers["0"].error, rel=1e-4)
    assert 0.2 < float(found) < 1


def test_fresh_layers_are_drawn_from_seed_and_path_and_may_share_one_algebra() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    def made(**options: Any) -> nn.Module:
        return rewrite(copy.deepcopy(model), Hypercomplex(2, skip=(), **options))

    state = torch.get_rng_state()
    one, same, other = made(seed=1), made(seed=1), made(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0].F, same[0].F)
    assert not torch.equal(one[0].F, other[0].F)
    assert not torch.equal(one[0].F, one[1].F)
    assert torch.equal(one[3].bias, model[3].bias)
    shared = made(share_algebra=True)
    assert shared[0].A is shared[3].A
    assert sum(p.numel() for p in shared.parameters()) == 8 + 4 * (128 + 16)
    again = replay(copy.deepcopy(model), history(shared))
    assert again[0].A is again[3].A
    assert torch.equal(again(drawn(2, 16)), shared(drawn(2, 16)))


def test_what_stays_and_why() -> None:
    torch.manual_seed(0)
    tied = nn.Linear(8, 8)
    model = nn.ModuleDict(
        {
            "read": nn.Conv2d(3, 8, 3),
            "deep": nn.Conv2d(8, 8, 3, groups=8),
            "body": nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1)),
            "one": tied,
            "two": nn.Linear(8, 8),
            "answer": nn.Linear(8, 5),
        }
    )
    model["two"].weight = tied.weight
    decision = Hypercomplex(2, skip=("first", "last", "body.1")).decide(model)
    assert set(decision.layers) == {"body.0"}
    assert decision.skipped == {
        "read": "first",
        "deep": "depthwise",
        "body.1": "skip body.1",
        "one": "tied to two.weight",
        "two": "tied to one.weight",
        "answer": "last",
    }
    assert "body.0: n=2\n  stays: read: first" in decision.table()
    assert set(Hypercomplex(2, match="body.*").decide(model).layers) == {"body.0", "body.1"}
    # The first layer of a language model reads no data: its embedding does.
    names = Hypercomplex(2).decide(foreign.llama()[0]).layers
    assert "model.layers.0.self_attn.q_proj" in names
    assert "lm_head" not in names


WHERE = [*foreign.ALL, "encoder", "bert"]


@pytest.mark.parametrize(
    ("where", "fit"),
    # The fit takes a second a model: one in the default run, the others in the slow one.
    [(w, False) for w in WHERE] + [pytest.param(w, True, marks=[pytest.mark.slow] * (w != "ours")) for w in WHERE],
)
def test_foreign_models_there_trained_and_back(where: str, fit: bool) -> None:
    torch.manual_seed(0)
    if where == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        model: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        batch: Any = {"src": drawn(2, 5, 16)}
    elif where == "bert":
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model, batch = transformers.BertForSequenceClassification(config), tokens()
    else:
        model, batch = foreign.ALL[where]()
    parameters = sum(p.numel() for p in model.parameters())
    model = rewrite(model, Hypercomplex(2, fit=fit))
    assert sum(p.numel() for p in model.parameters()) < 0.9 * parameters
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    logits(call(model.train(), batch)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        before = logits(call(model.eval(), batch))
        model = rewrite(model, FoldHypercomplex())
        torch.testing.assert_close(logits(call(model, batch)), before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, (PHMLinear, PHConv2d)) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_rewritten_model_is_still_dissected() -> None:
    model = rewrite(foreign.ours()[0], Hypercomplex(2))
    assert [s.kind for s in anatomy.dissect(model).trunks[0].blocks[0].sublayers] == ["attention", "mlp"]
    model = rewrite(model, DropMLP(count=1, order="last"))
    assert logits(call(model, tokens())).shape == (2, 8, 32)
    plain = ResNet((2, 2), (16, 32), stem="small", classes=3)
    ours = rewrite(copy.deepcopy(plain), Hypercomplex(4))
    assert anatomy.dissect(plain) == anatomy.dissect(ours)


def test_the_decision_is_json_and_a_model_is_saved_with_its_shared_algebra(tmp_path: Any) -> None:
    model = rewrite(foreign.ours()[0], Hypercomplex(2, share_algebra=True, match="*.mixer.*"))
    decision = json.loads(json.dumps(history(model)[0].decision))
    assert decision["layers"]["blocks.0.mixer.query"] == {"n": 2, "error": None}
    assert decision["skipped"]["blocks.0.feed_forward.up"] == "not like *.mixer.*"
    assert (decision["fit"], decision["share_algebra"], decision["init"], decision["seed"]) == (
        False,
        True,
        "variance",
        0,
    )
    io.save(model.eval(), tmp_path / "saved")
    loaded = io.load(tmp_path / "saved")
    assert loaded.blocks[0].mixer.query.A is loaded.blocks[3].mixer.out.A
    assert torch.equal(loaded(foreign.tokens()), model(foreign.tokens()))


def test_the_head_can_be_replaced_and_frozen_layers_stay_frozen() -> None:
    model = foreign.home_made()[0].double().requires_grad_(False)
    model = rewrite(model, Replace("linear", "phm_linear", match="stack.*", options={"n": 4, "rank": 1}))
    layer: Any = model.stack[0].attend.q
    assert layer.left.dtype == torch.float64
    assert not any(p.requires_grad for p in layer.parameters())
    headed = rewrite(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), Replace("head", "phm_linear", options={"n": 1}))
    assert type(headed[1]) is PHMLinear
    fixed = Replace("linear", "phm_linear", options={"n": 2, "algebra": "complex"})
    assert not isinstance(rewrite(nn.Sequential(nn.Linear(4, 8)), fixed)[0].A, nn.Parameter)


@pytest.mark.parametrize(
    ("make", "one", "error", "words"),
    [
        (
            convolutions,
            {"n": 3},
            ShapeError,
            r"stages\.0\.0\.conv1: PHConv2d: n=3 must divide .* that does is 4 .*in `skip`",
        ),
        (
            lambda: nn.Sequential(nn.ReLU()),
            {"n": 2},
            AnatomyError,
            r"no linear or conv layer to replace \(it has none\)",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"n": 2}, AnatomyError, r"to replace \(0: first\)"),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 1, groups=2)),
            {"n": 2, "skip": ()},
            RecipeError,
            r"0: PHConv2d: groups must be 1, got 2",
        ),
        (convolutions, {"n": 2, "types": ("convolution",)}, RecipeError, "types are linear, conv, got 'convolution'"),
        (convolutions, {"n": 2, "fit": True, "share_algebra": True}, RecipeError, "share_algebra excludes it"),
        (convolutions, {"n": 8, "init": "algebra"}, RecipeError, r"stages.*n = 1, 2, 4, not 8"),
        (convolutions, {"n": -1}, LaminaError, "at least 1, got -1"),
    ],
)
def test_refusals_name_the_layer_and_change_nothing(
    make: Any, one: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = make()
    before = [id(m) for m in model.modules()]
    with pytest.raises(error, match=words):
        rewrite(model, Hypercomplex(**one))
    assert [id(m) for m in model.modules()] == before


def test_there_must_be_something_to_fold() -> None:
    with pytest.raises(AnatomyError, match="no hypercomplex layer"):
        rewrite(convolutions(), FoldHypercomplex())
    with pytest.raises(AnatomyError, match=r"like 'head'; they are at \['blocks.0.mixer.query'"):
        rewrite(already(), FoldHypercomplex(match="head"))
    root = rewrite(PHMLinear(8, 4, n=2), FoldHypercomplex())
    assert type(root) is nn.Linear
    assert type(rewrite(nn.Linear(8, 8), Hypercomplex(2))) is PHMLinear
