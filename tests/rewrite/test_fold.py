from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import convolutional
from tests.rewrite.batch_norms import drawn, images, small, with_statistics
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError
from lamina.nn import TokenBatchNorm
from lamina.rewrite import ConvBN, Fold, history, replay, rewrite

EXAMPLES = [Example("pass", "fold", {}, model=small, batch=images, bad={"match": "nowhere.*"})]

LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, eps=1e-3), (2, 4, 7, 63)),
    "conv2d_reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (1, 3, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False), (1, 2, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 4, 4)),
    "linear": (nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), (63, 5)),
    "tokens": (nn.Linear(5, 7), TokenBatchNorm(7), (2, 3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_folded_pair_computes_the_same(name: str, dtype: torch.dtype, bound: float) -> None:
    layer, norm, shape = LAYERS[name]
    plain = with_statistics(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))).eval().to(dtype)
    x = drawn(*shape).to(dtype)
    expected = plain(x)
    folded = rewrite(plain, Fold())
    assert type(folded[1]) is nn.Identity
    assert folded[0].bias is not None
    assert folded[0].weight.dtype == dtype
    assert (folded(x) - expected).abs().max() <= bound * expected.abs().max()


def test_it_is_torchs_own_fusion() -> None:
    for name, fuse in (("conv2d", fuse_conv_bn_eval), ("linear", fuse_linear_bn_eval)):
        layer, norm, _ = LAYERS[name]
        plain = with_statistics(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))).eval()
        peer: Any = fuse(plain[0], plain[1])
        folded = rewrite(plain, Fold())
        torch.testing.assert_close(folded[0].weight, peer.weight)
        torch.testing.assert_close(folded[0].bias, peer.bias)


def test_a_tiny_variance_is_folded_in_double_precision() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)).eval()
    with torch.no_grad():
        model[1].running_var.fill_(1e-30)
        model[1].running_mean.fill_(0.1)
        model[0].weight.fill_(1e-15)
        model[0].bias.fill_(0.1)
    scale = model[1].running_var.double().rsqrt()
    folded = rewrite(model, Fold())[0]
    torch.testing.assert_close(folded.weight.item(), (1e-15 * scale).item(), rtol=1e-5, atol=0)
    assert folded.bias.item() == 0.0


def test_whole_models_lose_every_norm() -> None:
    foreign, batch = convolutional()
    for model, inputs in ((small(), images()), (foreign, batch)):
        model.eval()
        count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        before = logits(call(model, inputs))
        decision = Fold().decide(model, [inputs])
        assert len(decision.norms) == count > 0
        assert {n.into for n in decision.norms.values()} == {"producer"}
        rewrite(model, Fold(), data=[inputs])
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        torch.testing.assert_close(logits(call(model, inputs)), before, rtol=1e-4, atol=1e-5)


def test_blocks_of_tune_mode_become_ordinary_layers() -> None:
    model, x = small().eval(), images()["pixel_values"]
    expected = copy.deepcopy(model)(x)
    kinds = [type(m) for m in rewrite(copy.deepcopy(model), Fold()).modules()]
    both = rewrite(model, ConvBN(freeze_statistics=True), Fold())
    assert [type(m) for m in both.modules()] == kinds
    torch.testing.assert_close(both(x), expected)
    original = small().eval()
    again = replay(original, history(both))
    again.load_state_dict(both.state_dict(), strict=True)
    assert torch.equal(again(x), both(x))


def test_one_step_moves_a_deployed_weight_by_one_over_k_squared_of_the_tuned_step() -> None:
    # Card: training w' at rate eta is training w (gamma, beta frozen, no bias) at the rate eta / k^2 of its channel.
    plain = with_statistics(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5))).double().eval()
    k = (plain[1].weight * torch.rsqrt(plain[1].running_var + plain[1].eps)).detach()
    tuned, deployed = rewrite(copy.deepcopy(plain), ConvBN()), rewrite(copy.deepcopy(plain), Fold())
    x, eta = drawn(4, 3, 7, 7).double(), 0.1
    for model in (tuned, deployed):
        (model(x) * drawn(4, 5, 5, 5, seed=1).double()).sum().backward()
    per_channel = (eta / k.square()).view(-1, 1, 1, 1)
    stepped = tuned[0].weight - per_channel * tuned[0].weight.grad
    torch.testing.assert_close(deployed[0].weight - eta * deployed[0].weight.grad, k.view(-1, 1, 1, 1) * stepped)


def test_weights_shared_with_another_layer_are_not_touched_there() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))).eval()
    model[2].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    x, kept = drawn(1, 3, 4, 4), model[2].weight.clone()
    expected = model(x)
    rewrite(model, Fold())
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model[2].weight, kept)
    assert not model[0].weight.requires_grad


def test_what_cannot_go_stays_with_its_reason() -> None:
    model = with_statistics(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    ).eval()
    decision = Fold().decide(model)
    assert list(decision.norms) == ["1"]
    assert decision.norms["1"].modules == ("0",)
    assert "not the output of a convolution" in decision.skipped["3"]
    assert "stays: 3" in decision.table()
    assert json.loads(json.dumps(history(rewrite(model, Fold()))[0].decision))["norms"]["1"]["into"] == "producer"
    with pytest.raises(AnatomyError, match="no norm of Sequential can be folded: 3: its input"):
        Fold().decide(model)


def test_training_mode_is_refused() -> None:
    with pytest.raises(LaminaError, match="cannot be folded while it is in training mode"):
        rewrite(small(), Fold())
    model = small().eval()
    model.stem[1].train()
    with pytest.raises(LaminaError, match=r"while its norm stem\.1 is in training mode"):
        rewrite(model, Fold())
    with pytest.raises(AnatomyError, match="has no batch norm"):
        rewrite(nn.Linear(2, 2).eval(), Fold())
    with pytest.raises(AnatomyError, match="stands at a path like 'z'"):
        rewrite(small().eval(), Fold(match="z"))
