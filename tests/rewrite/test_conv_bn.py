from __future__ import annotations

import copy
import itertools
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.contract.foreign import convolutional
from tests.rewrite.batch_norms import drawn, images, small, with_statistics
from torch import Tensor, nn

from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError, RecipeError
from lamina.models import ResNet
from lamina.nn import TokenBatchNorm
from lamina.rewrite import ConvBN, DropBlock, activation_bytes, history, release, replay, rewrite, set_mode
from lamina.rewrite._conv_bn_block import folded
from lamina.rewrite.conv_bn import ConvBNBlock, HeldConv

EXAMPLES = [
    Example("pass", "conv_bn", {}, model=small, batch=images, bad={"match": "nowhere.*"}),
    Example(
        "pass",
        "conv_bn",
        {"mode": "eval", "freeze_statistics": True},
        model=small,
        batch=images,
        bad={"mode": "tuned"},
    ),
]


LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 4, 3, dilation=2), nn.BatchNorm1d(4), (2, 3, 7)),
    "conv2d": (nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), (2, 3, 7, 63)),
    "conv2d_same": (nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4, affine=False), (1, 3, 5, 5)),
    "conv2d_groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6, eps=1e-3), (2, 4, 1, 7)),
    "conv2d_reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (2, 3, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, bias=False), nn.BatchNorm3d(3, affine=False), (2, 2, 3, 4, 5)),
    "transposed1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), nn.BatchNorm1d(4), (2, 3, 7)),
    "transposed2d": (nn.ConvTranspose2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), (2, 3, 4, 4)),
    "transposed2d_groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(2, 2, 2, groups=2), nn.BatchNorm3d(2), (1, 2, 3, 3, 3)),
    "linear": (nn.Linear(5, 7), nn.BatchNorm1d(7), (63, 5)),
    "linear_no_bias": (nn.Linear(5, 1, bias=False), nn.BatchNorm1d(1, affine=False), (1, 5)),
    "linear_sync": (nn.Linear(5, 3), nn.SyncBatchNorm(3), (4, 5)),
    "linear_tokens": (nn.Linear(5, 7), TokenBatchNorm(7), (2, 3, 5)),
}


def two(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return the plain pair, the same in tune mode, and an input."""
    layer, norm, shape = LAYERS[name]
    plain = with_statistics(copy.deepcopy(nn.Sequential(layer, norm))).to(dtype).eval()
    return plain, rewrite(copy.deepcopy(plain), ConvBN()), drawn(*shape).to(dtype)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    model.zero_grad()
    (output * drawn(*output.shape, seed=1).to(output.dtype)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **{n: g for n, g in found.items() if g is not None}}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_outputs_and_all_gradients_are_those_of_evaluation_mode(name: str, dtype: torch.dtype, bound: float) -> None:
    plain, tuned, x = two(name, dtype)
    expected, got = gradients(plain, x), gradients(tuned, x)
    assert isinstance(tuned[1], ConvBNBlock)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert (got[key] - value).abs().max() <= bound * value.abs().max().clamp(min=1), key


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_gradients_are_the_closed_forms(name: str) -> None:
    plain, tuned, x = two(name, torch.float64)
    got, output = gradients(tuned, x), plain(x)
    g = drawn(*output.shape, seed=1).double()
    layer, norm = plain
    k = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    folded = (k.view(-1, *[1] * (layer.weight.dim() - 1)) * layer.weight).detach().requires_grad_()
    unscaled = F.conv2d(x, folded, stride=2) if name == "conv2d" else F.linear(x, folded)
    (d_folded,) = torch.autograd.grad((unscaled * g).sum(), folded)
    d_bias = g.sum([d for d in range(g.dim()) if d != 1])
    inner = (d_folded * layer.weight).flatten(1).sum(1)
    b = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(got["0.weight"], d_folded * k.view(-1, *[1] * (layer.weight.dim() - 1)))
    torch.testing.assert_close(got["1.bias"], d_bias)
    expected = torch.rsqrt(norm.running_var + norm.eps) * (inner + (b - norm.running_mean) * d_bias)
    torch.testing.assert_close(got["1.weight"], expected)
    if layer.bias is not None:
        torch.testing.assert_close(got["0.bias"], k * d_bias)


def test_second_derivatives_are_right() -> None:
    plain, tuned, _ = two("conv2d_groups", torch.float64)
    x = drawn(1, 4, 2, 2).double().requires_grad_()
    assert torch.autograd.gradgradcheck(tuned, (x,))
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), x, create_graph=True)[0].sum() for m in (tuned, plain))
    torch.testing.assert_close(
        torch.autograd.grad(ours, tuned[1].weight)[0], torch.autograd.grad(theirs, plain[1].weight)[0]
    )


def test_half_precision_folds_in_float32() -> None:
    plain, tuned, x = two("conv2d", torch.float32)
    with torch.no_grad():
        for model in (plain, tuned):
            model[1].running_var.fill_(1e-7)
    exact = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tuned(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() <= 0.01 * exact.abs().max()
    half, _, _ = two("conv2d", torch.bfloat16)
    got, _ = folded(half[0], half[1], half[0].weight, None)
    k = half[1].weight.double() * torch.rsqrt(half[1].running_var.double() + half[1].eps)
    exact = k.view(-1, 1, 1, 1) * half[0].weight.double()
    # One rounding, at the end: half a unit in the last of eight places.
    assert got.dtype == torch.bfloat16
    assert ((got - exact).abs() <= 1.01 * 2**-8 * exact.abs()).all()


def test_statistics_move_in_training_alone_and_then_as_ever() -> None:
    torch.manual_seed(0)
    plain = small().double()
    tuned = rewrite(copy.deepcopy(plain).eval(), ConvBN())
    x = images()["pixel_values"].double()
    before = {n: b.clone() for n, b in tuned.named_buffers()}
    tuned(x).sum().backward()
    assert all(torch.equal(before[n], b) for n, b in tuned.named_buffers())
    torch.testing.assert_close(tuned.train()(x), plain.train()(x), rtol=0, atol=0)
    after = dict(plain.named_buffers())
    assert all(torch.equal(after[n], b) for n, b in tuned.named_buffers())
    assert not torch.equal(before["stem.1.running_mean"], after["stem.1.running_mean"])
    torch.testing.assert_close(tuned.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(("dtype", "steps", "bound"), [(torch.float64, 50, 1e-6), (torch.float32, 5, 1e-4)])
def test_momentum_takes_both_modes_the_same_way(dtype: torch.dtype, steps: int, bound: float) -> None:
    torch.manual_seed(0)
    plain = small().to(dtype).eval()
    x, y = drawn(16, 3, 8, 8).to(dtype), torch.randint(3, (16,))
    losses: list[list[float]] = []
    for model in (plain, rewrite(copy.deepcopy(plain), ConvBN())):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        losses.append([])
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= bound
    assert losses[0][-1] < losses[0][0]


def saved(model: nn.Module, x: Tensor) -> dict[tuple[int, ...], int]:
    """Bytes kept for the backward pass by shape; every storage once, parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[tuple[int, ...], int] = {}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            known.add(t.untyped_storage().data_ptr())
            kept.append(t)  # so that no other storage gets its place
            found[tuple(t.shape)] = found.get(tuple(t.shape), 0) + t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return found


def six_blocks() -> nn.Module:
    widths = (3, 32, 32, 32, 32, 32, 32)
    pairs = itertools.pairwise(widths)
    return nn.Sequential(
        *(m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()))
    )


def test_the_output_of_the_convolution_is_not_kept() -> None:
    plain = with_statistics(six_blocks()).eval()
    tuned, x = rewrite(copy.deepcopy(plain), ConvBN()), drawn(16, 3, 32, 32)
    before, after = saved(plain, x), saved(tuned, x)
    one_map = 16 * 32 * 32 * 32 * 4
    # One map a block goes, and no second one hides in another place.
    assert before[16, 32, 32, 32] == 12 * one_map
    assert after[16, 32, 32, 32] == 6 * one_map
    assert sum(after.values()) <= 0.52 * sum(before.values())


def test_the_prediction_is_what_is_kept() -> None:
    plain = with_statistics(six_blocks()).eval()
    x = drawn(4, 3, 16, 16)
    predicted = activation_bytes(plain, x)
    tuned = rewrite(copy.deepcopy(plain), ConvBN())
    assert activation_bytes(tuned, {"inputs": x}) == predicted
    assert list(predicted) == [str(3 * i + 1) for i in range(6)]
    assert predicted["4"] == {"eval": 2 * 4 * 32 * 16 * 16 * 4, "tune": 4 * 32 * 16 * 16 * 4 + 32 * 32 * 9 * 4}
    last, statistics = 4 * 32 * 16 * 16 * 4, 6 * 2 * 32 * 4
    for model, mode in ((plain, "eval"), (tuned, "tune")):
        # The last ReLU's output is no convolution's input; the norms' statistics and scales are a few bytes a channel.
        difference = sum(saved(model, x).values()) - last - sum(p[mode] for p in predicted.values())
        assert abs(difference) <= 2 * statistics


def test_an_input_that_two_layers_read_counts_once_and_shapes_suffice() -> None:
    model = ResNet((1, 1), (8, 16), classes=3)
    found = activation_bytes(model.eval(), torch.empty(5, 3, 64, 64, device="meta"))
    assert found["stem.1"]["eval"] == 5 * 4 * (3 * 64 * 64 + 8 * 32 * 32)
    first, shortcut = found["stages.1.0.norm1"], found["stages.1.0.shortcut.1"]
    assert sorted([first["eval"], shortcut["eval"]]) == [5 * 4 * 16 * 64, 5 * 4 * (16 * 64 + 8 * 256)]


def test_the_state_goes_both_ways_and_the_optimizer_stays() -> None:
    plain = small().eval()
    tuned, other = rewrite(copy.deepcopy(plain), ConvBN()), small().eval()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1)
    plain.load_state_dict(tuned.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(tuned.state_dict())
    x = images()["pixel_values"]
    torch.testing.assert_close(plain(x), tuned(x))
    tuned.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(other(x), tuned(x))
    again = small().eval()
    names = {n: id(p) for n, p in again.named_parameters()}
    assert {n: id(p) for n, p in rewrite(again, ConvBN()).named_parameters()} == names
    with torch.device("meta"):
        skeleton = replay(ResNet((1, 1), (8, 12), stem="small", classes=3).eval(), history(again))
    skeleton.load_state_dict(tuned.state_dict(), strict=True, assign=True)
    torch.testing.assert_close(skeleton(x), tuned(x))


def test_norms_in_training_stay_unless_their_statistics_are_to_be_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3)).eval()
    model[3].train()
    decision = ConvBN().decide(model)
    assert decision.pairs == (("0", "1"),)
    assert "training mode" in decision.skipped["3"]
    assert len(ConvBN("train").decide(model).pairs) == 2
    frozen = rewrite(model, ConvBN(freeze_statistics=True)).train()
    assert frozen.training
    assert not frozen[1].training
    assert not frozen[3].training
    before = frozen[1].running_mean.clone()
    frozen(drawn(4, 3, 2, 2))
    assert torch.equal(frozen[1].running_mean, before)


def test_modes_switch_back_and_forth_and_the_way_back_is_whole() -> None:
    plain = small().eval()
    model, x = rewrite(copy.deepcopy(plain), ConvBN(freeze_statistics=True)), images()["pixel_values"]
    norm = model.stem[1]
    for mode in ("eval", "tune"):
        assert set_mode(model, mode) is model  # type: ignore[arg-type]
        assert norm.mode == mode
        torch.testing.assert_close(model.train()(x), plain(x))
    set_mode(model, "train")
    assert norm.training
    torch.testing.assert_close(model(x), copy.deepcopy(plain).train()(x))
    set_mode(model, "tune", freeze_statistics=True)
    assert not norm.training
    assert model is rewrite(model, ConvBN("eval")), "the pass switches, too"
    assert model.stem[1].mode == "eval"
    assert model.stem[1].training, "and no longer frozen"
    with pytest.raises(LaminaError, match="changed nothing"):
        rewrite(model, ConvBN("eval"))
    assert release(model.eval()) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert "held" not in vars(model.stem[1])
    back = with_statistics(model)
    torch.testing.assert_close(back(x), with_statistics(plain)(x))


def test_what_is_no_batch_of_rows_runs_after_its_linear_layer() -> None:
    model = with_statistics(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).eval()
    x = drawn(2, 4, 4)
    expected = model(x)
    assert torch.equal(rewrite(model, ConvBN())(x), expected)


@pytest.mark.parametrize("data", [True, False])
def test_a_transformers_resnet_is_tuned(data: bool) -> None:
    plain, batch = convolutional()
    model = rewrite(copy.deepcopy(plain).eval(), ConvBN(), data=[batch] if data else None)
    assert sum(isinstance(m, ConvBNBlock) for m in model.modules()) == 10
    expected, got = (logits(call(m.eval(), batch)) for m in (plain, model))
    torch.testing.assert_close(got, expected)
    for m, out in ((plain, expected), (model, got)):
        m.zero_grad()
        out.square().sum().backward()
    grads = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "tuned"}, "mode must be one of tune, eval, train, got 'tuned'; did you mean 'tune'"),
        ({"mode": "deploy"}, "a pass of its own"),
        ({"mode": "train", "freeze_statistics": True}, "choose one"),
        ({"min_ratio": -0.1}, "at least 0, got -0.1"),
        ({"min_ratio": float("nan")}, "at least 0, got nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        ConvBN(**options)


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(AnatomyError, match="has no batch norm"):
        rewrite(nn.Linear(2, 2), ConvBN())
    with pytest.raises(AnatomyError, match=r"no batch norm of ResNet stands at a path like 'x\*'; they are at stem.1"):
        rewrite(small(), ConvBN(match="x*"))
    with pytest.raises(AnatomyError, match="has no ConvBNBlock"):
        set_mode(small(), "tune")
    with pytest.raises(LaminaError, match="a pass of its own"):
        set_mode(rewrite(small().eval(), ConvBN()), "deploy")  # type: ignore[arg-type]
    with pytest.raises(AnatomyError, match="the data to look at has no batch"):
        ConvBN().decide(small().eval(), [])
    with pytest.raises(RecipeError, match="mode"):
        from lamina.recipe import build

        build({"name": "conv_bn", "mode": "fast"}, "pass")


def test_copies_pickles_and_other_passes_keep_the_pair_together() -> None:
    tuned, x = rewrite(small().eval(), ConvBN()), images()["pixel_values"]
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        with torch.no_grad():
            other.stem[0].weight.zero_()
        assert not torch.equal(other(x), tuned(x)), "the copy's block reads the copy's layer"
        assert other.stem[1].held[0] is other.stem[0]
    deep = with_statistics(ResNet((3,), (8,), stem="small", classes=3)).eval()
    expected = rewrite(copy.deepcopy(deep), DropBlock(count=1, order="last"), data=[images()])
    both = rewrite(deep, ConvBN(), DropBlock(count=1, order="last"), data=[images()])
    torch.testing.assert_close(both(x), expected(x))
    stored = json.loads(json.dumps(history(both)[0].decision))
    assert stored["pairs"][0] == ["stem.0", "stem.1"]


def test_loops_that_look_for_batch_norms_and_convolutions_still_find_them() -> None:
    from lamina.optim import parameter_groups

    plain, tuned = small(), rewrite(small().eval(), ConvBN())
    for kind in (nn.BatchNorm2d, nn.Conv2d):
        assert [n for n, m in tuned.named_modules() if isinstance(m, kind)] == [
            n for n, m in plain.named_modules() if isinstance(m, kind)
        ]
    assert [len(g["params"]) for g in parameter_groups(tuned, 0.1)] == [
        len(g["params"]) for g in parameter_groups(plain, 0.1)
    ]
    assert "mode='tune'" in repr(tuned)
    assert "held=Conv2d(3, 8" in repr(tuned)
    assert sum(isinstance(m, HeldConv) for m in tuned.modules()) == 6


def test_frozen_weights_checkpointing_and_channels_last() -> None:
    from torch.utils.checkpoint import checkpoint

    plain = small().eval()
    tuned, x = rewrite(copy.deepcopy(plain), ConvBN()), images()["pixel_values"]
    for model in (plain, tuned):
        model.stem[0].weight.requires_grad_(False)
        model.to(memory_format=torch.channels_last)
    expected = gradients(plain, x)
    got = gradients(tuned, x.to(memory_format=torch.channels_last))
    tuned.zero_grad()
    again = x.clone().requires_grad_()
    out = checkpoint(tuned, again, use_reentrant=False)
    (out * drawn(*out.shape, seed=1)).sum().backward()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.grad, expected["x"], rtol=1e-4, atol=1e-4)


def test_it_exports() -> None:
    tuned, x = rewrite(small().eval(), ConvBN()), images()["pixel_values"]
    exported = torch.export.export(tuned, (x,))
    torch.testing.assert_close(exported.module()(x), tuned(x))


@pytest.mark.slow
def test_inductors_own_pass_finds_as_many_pairs_and_the_same_numbers() -> None:
    import torch._inductor.config as config
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    plain = small().eval()
    tuned, x = rewrite(copy.deepcopy(plain), ConvBN()), images()["pixel_values"]
    torch.compiler.reset()
    counters.clear()
    expected = gradients(copy.deepcopy(plain), x)
    # A graph compiled in an earlier run would be taken from the cache on disk, and no pass would be counted.
    with config.patch(efficient_conv_bn_eval_fx_passes=True), fresh_cache():
        theirs = gradients(torch.compile(plain), x)
    assert counters["inductor"]["efficient_conv_bn_eval"] == len(ConvBN().decide(small().eval()).pairs) == 6
    ours = gradients(torch.compile(tuned, fullgraph=True), x)
    for key, value in expected.items():
        for got in (theirs, ours):
            found = got.get(key, got.get(f"_orig_mod.{key}"))
            assert found is not None
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-3)
