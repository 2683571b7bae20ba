from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example

from lamina.errors import ShapeError
from lamina.nn.feed_forward import FeedForward, SwiGLU

EXAMPLES = [
    Example(
        "layer",
        "feed_forward",
        options={"width": 8, "hidden": 12, "activation": "relu"},
        inputs=lambda: (torch.randn(2, 3, 8),),
        bad={"hidden": 0},
    ),
    Example(
        "layer", "swiglu", options={"width": 8, "hidden": 12}, inputs=lambda: (torch.randn(2, 3, 8),), bad={"width": 0}
    ),
]


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_plain_network_written_out(activation: str) -> None:
    layer = FeedForward(8, 12, activation=activation).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    act = {"gelu": F.gelu, "relu": torch.relu, "tanh": torch.tanh}[activation]
    want = act(x @ layer.up.weight.T + layer.up.bias) @ layer.down.weight.T + layer.down.bias
    assert torch.allclose(layer(x), want, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,))


def test_gated_network_by_hand() -> None:
    layer = SwiGLU(1, 2).double()
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.up.weight.copy_(torch.tensor([[2.0], [3.0]]))
        layer.down.weight.copy_(torch.tensor([[1.0, 10.0]]))
    x = torch.tensor([[2.0]], dtype=torch.float64)
    sigmoid = 1 / (1 + torch.exp(-x))
    want = 2 * sigmoid * 4 + 10 * (-2 * (1 - sigmoid)) * 6
    assert torch.allclose(layer(x), want)
    assert torch.autograd.gradcheck(layer, (x.clone().requires_grad_(),))


def test_it_is_llamas() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    peer, ours = llama.LlamaMLP(config), SwiGLU(8, 12)
    for mine, theirs in ((ours.gate, peer.gate_proj), (ours.up, peer.up_proj), (ours.down, peer.down_proj)):
        mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.allclose(ours(x), peer(x), atol=1e-6)


@pytest.mark.parametrize("width", [24, 96, 256, 768])
def test_default_sizes_have_about_equal_parameters(width: int) -> None:
    plain, gated = (sum(p.numel() for p in cls(width, bias=False).parameters()) for cls in (FeedForward, SwiGLU))
    assert plain == 8 * width * width
    assert gated == pytest.approx(plain, rel=4 * 3 / (8 * width) + 1e-9)
    assert SwiGLU(width).gate.out_features % 8 == 0


def test_dropout_only_in_training_and_initialise() -> None:
    torch.manual_seed(0)
    for cls in (FeedForward, SwiGLU):
        layer, x = cls(64, dropout=0.5), torch.randn(4, 64)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))
        layer.initialise(0.5, 0.1)
        assert layer.up.weight.detach().std().item() == pytest.approx(0.5, rel=0.05)
        assert layer.down.weight.detach().std().item() == pytest.approx(0.1, rel=0.05)


def test_bad_sizes() -> None:
    for cls in (FeedForward, SwiGLU):
        with pytest.raises(ShapeError, match="must be positive: width=8, hidden=0"):
            cls(8, 0)
