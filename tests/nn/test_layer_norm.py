from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import nn

from lamina import registry
from lamina.errors import ShapeError
from lamina.nn import ChannelLayerNorm, TokenBatchNorm, layer_norm_reference

EXAMPLES = [
    Example("norm", "layer_norm", {"normalized_shape": 8}, inputs=lambda: (torch.randn(2, 3, 8),)),
    Example("norm", "rms_norm", {"normalized_shape": 8}, inputs=lambda: (torch.randn(2, 3, 8),)),
    Example("norm", "batch_norm", {"num_features": 8}, inputs=lambda: (torch.randn(2, 3, 8),)),
    Example(
        "norm",
        "channel_layer_norm",
        {"num_channels": 8},
        inputs=lambda: (torch.randn(2, 8, 4, 4),),
        bad={"num_channels": 0},
    ),
]


def test_layer_norm_is_torchs_own() -> None:
    assert registry.find("norm", "layer_norm") is nn.LayerNorm
    assert registry.find("norm", "rms_norm") is nn.RMSNorm


def test_reference_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0], [0.0, 8.0]], dtype=torch.float64)
    weight, bias = torch.tensor([2.0, 1.0]).double(), torch.tensor([0.5, 0.0]).double()
    got = layer_norm_reference(x, (2,), weight, bias, eps=3.0)
    # Mean 2, variance 1: (x - 2) / sqrt(1 + 3); mean 4, variance 16: (x - 4) / sqrt(16 + 3).
    expected = [[2 * -0.5 + 0.5, 0.5], [2 * -4 / math.sqrt(19) + 0.5, 4 / math.sqrt(19)]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    outside = layer_norm_reference(x, (2,), eps=3.0, eps_outside=True)
    torch.testing.assert_close(
        outside, torch.tensor([[-1 / 4, 1 / 4], [-4 / 7, 4 / 7]], dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (63,)])
def test_reference_equals_torch_in_values_and_three_gradients(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, out = torch.randn(4, *shape, dtype=dtype), torch.randn(4, *shape, dtype=dtype)
    weight, bias = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    results = []
    for norm in (layer_norm_reference, F.layer_norm):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = norm(leaves[0], shape, leaves[1], leaves[2], 1e-5)
        results.append((y, *torch.autograd.grad(y, leaves, out)))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


def test_reference_gradcheck() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,), (5,))]
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm_reference(x, (5,), w, b), leaves)


def _layer(norm: str, W: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Summed inputs of a linear layer, normalised by batch, weight or layer norm; eps 0."""
    if norm == "weight":
        return X @ (W / W.norm(dim=1, keepdim=True)).T
    A = X @ W.T
    dim = 0 if norm == "batch" else 1
    return (A - A.mean(dim, keepdim=True)) / A.var(dim, correction=0, keepdim=True).sqrt()


INVARIANCES = {
    "weight matrix rescaled": (True, True, True),
    "weight matrix re-centred": (False, False, True),
    "one weight vector rescaled": (True, True, False),
    "data set rescaled": (True, False, True),
    "data set re-centred": (True, False, False),
    "one case rescaled": (False, False, True),
}


@pytest.mark.parametrize("change", INVARIANCES)
@pytest.mark.parametrize("norm", ["batch", "weight", "layer"])
def test_invariances_of_table_1(change: str, norm: str) -> None:
    torch.manual_seed(0)
    W, X = torch.randn(6, 5).double(), torch.randn(8, 5).double()
    vector = torch.randn(5).double()
    W2, X2 = W.clone(), X.clone()
    if change == "weight matrix rescaled":
        W2 *= 3
    elif change == "weight matrix re-centred":
        W2 += vector
    elif change == "one weight vector rescaled":
        W2[2] *= 3
    elif change == "data set rescaled":
        X2 *= 3
    elif change == "data set re-centred":
        X2 += vector
    else:
        X2[3] *= 3
    invariant = INVARIANCES[change][["batch", "weight", "layer"].index(norm)]
    moved = (_layer(norm, W2, X2) - _layer(norm, W, X)).abs().max()
    if norm == "layer":
        assert torch.allclose(_layer(norm, W2, X2), layer_norm_reference(X2 @ W2.T, (6,), eps=0.0), atol=1e-12)
    assert moved < 1e-10 if invariant else moved > 1e-2


def test_constant_zero_single_unit_and_half_precision_stay_finite() -> None:
    bias = torch.tensor([0.25, -1.0, 3.0], requires_grad=True)
    for x in (torch.full((2, 3), 7.0), torch.zeros(2, 3)):
        x.requires_grad_()
        y = layer_norm_reference(x, (3,), torch.ones(3), bias)
        assert torch.equal(y, bias.expand(2, 3))
        assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()
    assert torch.equal(layer_norm_reference(torch.randn(4, 1), (1,), torch.ones(1), torch.ones(1)), torch.ones(4, 1))
    half = (1000 + torch.randn(2, 64)).bfloat16()
    y = layer_norm_reference(half, (64,))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer_norm_reference(half.float(), (64,)).bfloat16())


def test_reference_refuses() -> None:
    with pytest.raises(ShapeError, match=r"\(\.\.\., \*\(4,\)\), got \(2, 3\)"):
        layer_norm_reference(torch.randn(2, 3), (4,))
    with pytest.raises(TypeError, match="int64"):
        layer_norm_reference(torch.ones(2, 3, dtype=torch.long), (3,))
    with pytest.raises(ShapeError, match="always zero"):
        layer_norm_reference(torch.randn(2, 1), (1,))


def test_channel_layer_norm_is_over_channels_and_positions_of_one_example() -> None:
    torch.manual_seed(0)
    norm, x = ChannelLayerNorm(3), torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    expected = layer_norm_reference(x, (3, 4, 5)) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))
    assert torch.equal(norm(x), norm.eval()(x))
    # On (B, C) it is plain layer norm.
    torch.testing.assert_close(ChannelLayerNorm(7)(x := torch.randn(4, 7)), F.layer_norm(x, (7,)))
    with pytest.raises(ShapeError, match=r"\(B, C, \.\.\.\)"):
        norm(torch.randn(2, 4, 4, 4))


def test_token_batch_norm_is_batch_norm_over_all_tokens() -> None:
    torch.manual_seed(0)
    ours, peer, x = TokenBatchNorm(5), nn.BatchNorm1d(5), torch.randn(3, 7, 5)
    torch.testing.assert_close(ours(x), peer(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(ours.eval()(x), peer.eval()(x.transpose(1, 2)).transpose(1, 2))
    peer.load_state_dict(ours.state_dict())
    with pytest.raises(ShapeError):
        ours(torch.randn(3, 5, 7))
