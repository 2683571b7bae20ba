from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.contract.foreign import convolutional
from tests.rewrite.batch_norms import drawn, images, small, with_statistics
from torch import Tensor, nn

from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError, RecipeError, ShapeError
from lamina.nn import EvoNorm, TokenBatchNorm
from lamina.rewrite import DropBlock, Replace, ReplaceNormActivation, history, replay, rewrite

EXAMPLES = [
    Example("pass", "replace_norm_activation", {}, model=small, batch=images, bad={"activations": ["rulu"]}),
    Example(
        "pass",
        "replace_norm_activation",
        {"options": {"variant": "b0"}},
        model=small,
        batch=images,
        bad={"options": {"variant": "b3"}},
    ),
]


class PreActivation(nn.Module):
    """x + conv(relu(norm(conv(silu(norm x))))), by functions, as one writes it at home."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        return x + self.conv2(torch.relu(self.norm2(y)))


def pre_activation() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), PreActivation(8), PreActivation(8), nn.BatchNorm2d(8), nn.ReLU()]
    return with_statistics(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))


class VisionBlock(nn.Module):
    """torchvision's BasicBlock to the letter: one ReLU module behind the first norm and behind the sum."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class VisionResNet(nn.Module):
    """The outline of torchvision's ResNet-18, thin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(VisionBlock(8, 8), VisionBlock(8, 8))
        self.layer2 = nn.Sequential(VisionBlock(8, 16, 2), VisionBlock(16, 16))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


def vision_resnet() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(VisionResNet())


def batch_norms(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("variant", ["b0", "s0"])
def test_a_pre_activation_net_has_no_batch_norm_left_and_equals_one_written_by_hand(variant: str) -> None:
    original = pre_activation().eval()
    model = rewrite(copy.deepcopy(original), ReplaceNormActivation(options={"variant": variant}))
    assert not batch_norms(model)
    fused = {path: m for path, m in model.named_modules() if isinstance(m, EvoNorm)}
    assert len(fused) == 5
    assert all(m.nonlinearity and m.variant == variant for m in fused.values())
    x = drawn(2, 3, 8, 8)
    y = original[0](x)
    for i in (1, 2):
        block = original[i]
        y = y + block.conv2(fused[f"{i}.norm2"](block.conv1(fused[f"{i}.norm1"](y))))
    torch.testing.assert_close(model(x), original[7](fused["3"](y).mean((2, 3))), rtol=1e-6, atol=1e-6)


def test_a_net_like_torchvisions_fuses_the_stem_and_the_inner_pairs_and_keeps_what_follows_the_sum() -> None:
    original = vision_resnet().eval()
    decision = ReplaceNormActivation().decide(original)
    assert decision.pairs[:2] == (("bn1", "relu"), ("layer1.0.bn1", "layer1.0.relu"))
    assert decision.removed == ("relu",)
    assert set(decision.edited) == {"layer1.0", "layer1.1", "layer2.0", "layer2.1"}
    assert decision.lone == ("layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2")
    assert not decision.refused
    assert "the paper did not test this" in decision.table()
    model = rewrite(copy.deepcopy(original), ReplaceNormActivation())
    assert not batch_norms(model)
    x, got = drawn(2, 3, 32, 32), model
    y = got.maxpool(got.bn1(got.conv1(x)))
    for block in (*got.layer1, *got.layer2):
        inner = block.bn2(block.conv2(block.bn1(block.conv1(y))))
        y = torch.relu(inner + (y if block.downsample is None else block.downsample(y)))
    torch.testing.assert_close(model(x), got.fc(y.mean((2, 3))), rtol=1e-6, atol=1e-6)
    assert {n for n, _ in model.named_parameters()} >= {n for n, _ in original.named_parameters()}


def test_an_edited_block_is_still_its_class_and_can_be_copied_and_compiled() -> None:
    model, x = rewrite(vision_resnet().eval(), ReplaceNormActivation()), drawn(2, 3, 32, 32)
    block = model.layer1[0]
    assert isinstance(block, VisionBlock)
    assert type(block) is type(model.layer1[1]), "equal blocks share a class"
    assert type(block).__name__ == "VisionBlock"
    assert (block.stride, list(block._modules)) == (1, list(vision_resnet().layer1[0]._modules))
    other = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(other(x), expected)
    torch.testing.assert_close(torch.compile(other, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_it_is_a_torchvision_resnet_where_torchvision_is_installed() -> None:
    torchvision = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    decision = ReplaceNormActivation().decide(torchvision.resnet18())
    assert (len(decision.pairs), len(decision.lone), len(decision.edited)) == (9, 11, 8)


def test_gain_shift_statistic_and_momentum_follow() -> None:
    model = pre_activation()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(drawn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    old = copy.deepcopy(model)
    state = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    model = rewrite(model, ReplaceNormActivation(options={"variant": "b0"}), optimizer=optimizer)
    for path, made in model.named_modules():
        if isinstance(made, EvoNorm):
            peer = old.get_submodule(path)
            assert torch.equal(made.weight, peer.weight)
            assert torch.equal(made.bias, peer.bias)
            assert torch.equal(made.running_var, peer.running_var)
            assert torch.equal(made.v1, torch.ones(8))
            assert made.training
            assert torch.equal(optimizer.state[made.weight]["momentum_buffer"], state[f"{path}.weight"])
            assert not optimizer.state.get(made.v1)


def test_a_model_of_transformers_that_cannot_be_traced_as_a_whole() -> None:
    model, batch = convolutional()
    before = logits(call(model, batch))
    model = rewrite(model, ReplaceNormActivation(options={"variant": "b0"}))
    assert not batch_norms(model)
    found = history(model)[0].decision
    assert (len(found["pairs"]), len(found["lone"]), found["edited"]) == (5, 5, {})
    out = logits(call(model, batch))
    assert out.shape == before.shape
    assert not torch.allclose(out, before, atol=1e-3)


class Asked(nn.Module):
    """Everything that must be told apart, one a name."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("pair", "method", "lone", "gelu", "several", "both", "skipped", "token", "hooked", "end"):
            self.add_module(name, nn.BatchNorm2d(4))
        self.token = TokenBatchNorm(4)
        self.hooked.register_forward_hook(lambda module, given, out: None)
        self.unused = nn.BatchNorm2d(4)
        self.relu, self.idle, self.conv = nn.ReLU(), nn.Identity(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.idle(self.pair(x)))
        x = self.method(x).relu_()
        x = self.conv(self.lone(x))
        x = F.gelu(self.gelu(x))
        y = self.several(x)
        x = torch.relu(y) + y
        x = torch.relu(self.both(x)) + self.both(x)
        x = self.token(x.transpose(1, 3)).transpose(1, 3)
        x = F.relu(self.hooked(x))
        x = torch.sigmoid(self.skipped(x))
        return self.end(x)


def test_every_norm_gets_its_fate_or_a_reason() -> None:
    model = Asked()
    decision = ReplaceNormActivation().decide(model)
    assert decision.pairs == (("pair", "relu"), ("method", "functional"))
    assert decision.lone == ("lone", "end")
    assert decision.removed == ("relu",)
    assert decision.edited == {"": (1,)}
    reasons = {
        "gelu": "read by gelu",
        "several": "read by relu and add, not by one activation alone",
        "both": "at some of its calls only",
        "token": "features are the last dimension",
        "hooked": "hooks are registered",
        "skipped": "read by sigmoid",
        "unused": "not called in any part",
    }
    assert set(decision.refused) == set(reasons)
    for path, words in reasons.items():
        assert words in decision.refused[path]
        assert f"stays: {path}: " in decision.table()
    x, before = drawn(2, 4, 4, 4), copy.deepcopy(model)
    model = rewrite(model, ReplaceNormActivation(activations=["relu", "gelu"], match="[pg]*"))
    assert [p for p, m in model.named_modules() if isinstance(m, EvoNorm)] == ["pair", "gelu"]
    torch.testing.assert_close(model.method(x), before.method(x))
    model(x).sum().backward()


class Shared(nn.Module):
    """One ReLU in two stacks, behind a norm in one of them only; and a block that is asked for its mode."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.first = nn.Sequential(nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), act)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_shared_activation_of_a_stack_leaves_its_place_there_alone() -> None:
    model = rewrite(Shared(), ReplaceNormActivation())
    assert history(model)[0].decision["edited"] == {"first": [0]}
    assert type(model.first[1]) is nn.Identity
    assert type(model.second[1]) is nn.ReLU
    assert type(model.first) is nn.Sequential
    x = drawn(2, 4, 3, 3)
    torch.testing.assert_close(model(x), torch.relu(model.second[0](model.first[2](model.first[0](x)))))


class ByMode(nn.Module):
    """Its forward is another one in training, and one that only a given mask changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(F.relu(self.norm(x))), 0.1, self.training)


class ByMask(ByMode):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(F.relu(self.norm(x)))
        return y if mask is None else y * mask


@pytest.mark.parametrize(("block", "words"), [(ByMode, "training than in evaluation"), (ByMask, "optional arguments")])
def test_a_block_whose_trace_would_freeze_a_choice_is_refused(block: type[nn.Module], words: str) -> None:
    with pytest.raises(AnatomyError, match=f"cannot be left out.*{words}"):
        ReplaceNormActivation().decide(nn.Sequential(block(), nn.Conv2d(4, 4, 1)))
    paired = nn.Sequential(block(), nn.BatchNorm2d(4), nn.ReLU())
    decision = ReplaceNormActivation().decide(paired)
    assert decision.pairs == (("1", "2"),)
    assert words in decision.refused["0.norm"]


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm writes it: norm, drop and activation in one module."""

    def __init__(self, num_features: int, act: nn.Module) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def test_a_joint_module_is_a_pair_or_a_lone_norm() -> None:
    model = nn.Sequential(
        BatchNormAct2d(4, nn.ReLU(inplace=True)),
        nn.Conv2d(4, 4, 1),
        BatchNormAct2d(4, nn.Identity()),
        nn.Conv2d(4, 4, 1),
    )
    decision = ReplaceNormActivation().decide(model)
    assert decision.pairs == (("0", "0.act"),)
    assert decision.lone == ("2",)
    model = rewrite(model, ReplaceNormActivation())
    assert [m.nonlinearity for m in model.modules() if isinstance(m, EvoNorm)] == [True, False]


def test_a_decision_is_replayed_and_applies_on_meta() -> None:
    original = vision_resnet().eval()
    model = rewrite(copy.deepcopy(original), ReplaceNormActivation(options={"variant": "b0"}))
    record = history(model)[0]
    assert json.loads(json.dumps(record.decision)) == record.decision
    again = replay(copy.deepcopy(original), history(model))
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    skeleton = replay(original.to("meta"), history(model))
    assert all(p.is_meta for p in skeleton.parameters())
    assert not batch_norms(skeleton)


def test_deciding_changes_nothing() -> None:
    model = vision_resnet().train()
    before, modes = copy.deepcopy(model.state_dict()), [(id(m), type(m), m.training) for m in model.modules()]
    ReplaceNormActivation().decide(model)
    assert modes == [(id(m), type(m), m.training) for m in model.modules()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_synchronised_norms_stay_synchronised_and_dtype_mode_and_freezing_are_kept() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
    model = model.double().eval().requires_grad_(False)
    rewrite(model, ReplaceNormActivation(options={"variant": "b0"}))
    assert (model[0].sync, model[3].sync) == (True, False)
    assert model[0].weight.dtype == model[0].running_var.dtype == torch.float64
    assert not model[0].training
    assert (model[0].weight.requires_grad, model[0].v1.requires_grad) == (False, True)


def test_after_a_drop_pass_and_by_replace() -> None:
    from lamina.models import ResNet

    model = with_statistics(ResNet((3, 1), (8, 12), stem="small", classes=3)).eval()
    model = rewrite(model, DropBlock(count=1, trunk="stages.0"), ReplaceNormActivation(), data=[images()])
    assert not batch_norms(model)
    alone = rewrite(small(), Replace("batch_norm", "evonorm", match="stem.*", options={"variant": "b0"}))
    assert isinstance(alone.stem[1], EvoNorm)
    assert torch.equal(alone.stem[1].running_var, small().stem[1].running_var)
    with pytest.raises(ShapeError, match="last dimension"):
        rewrite(nn.Sequential(TokenBatchNorm(4)), Replace("batch_norm", "evonorm"))


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3)), {}, AnatomyError, "Sequential has no batch norm"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), {"match": "x.*"}, AnatomyError, "like 'x.*'; they are at 0"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.GELU()), {}, AnatomyError, "relu, silu, hardswish alone: 0: .*read by"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), {}, AnatomyError, "it has 0 without one"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), {"new": "evonrm"}, LaminaError, "did you mean 'evonorm'"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), {"new": "layer_norm"}, RecipeError, "no activation of its own"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), {"options": {"epz": 1}}, RecipeError, "did you mean 'eps'"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), {"options": {"nonlinearity": True}}, RecipeError, "what follows"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), {"options": {"variant": "b9"}}, LaminaError, "one of b0, b1"),
    ],
)
def test_refusals_say_what_is_there(
    model: nn.Module, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rewrite(model, ReplaceNormActivation(**options))


def test_bad_activations_are_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="did you mean 'relu'"):
        ReplaceNormActivation(activations=["rulu"])
    with pytest.raises(RecipeError, match="names none"):
        ReplaceNormActivation(activations=[])
