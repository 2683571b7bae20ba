from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.nn.test_hopfield import NO_NORMS, tokens
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import Hopfield, HopfieldDecoderLayer, HopfieldEncoderLayer

PLAIN = {"name": "hopfield", **NO_NORMS}

EXAMPLES = [
    Example(
        "layer",
        "hopfield_encoder_layer",
        {"width": 16, "heads": 2, "hidden": 24, "association": {"name": "hopfield", "update_steps_max": 1}},
        inputs=lambda: (torch.randn(2, 7, 16),),
        bad={"dropout": 1.5},
    ),
    Example(
        "layer",
        "hopfield_decoder_layer",
        {"width": 16, "heads": 2, "hidden": 24, "activation": "gelu"},
        inputs=lambda: (torch.randn(2, 5, 16), torch.randn(2, 7, 16)),
        bad={"hidden": 0},
    ),
]


def copy_attention(ours: Hopfield, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        for part, weight, bias in zip(
            (ours.query, ours.key, ours.value),
            theirs.in_proj_weight.chunk(3),
            theirs.in_proj_bias.chunk(3),
            strict=True,
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
    ours.out.load_state_dict(theirs.out_proj.state_dict())


def copy_layer(ours: nn.Module, theirs: nn.Module) -> None:
    nn.init.normal_(theirs.self_attn.in_proj_bias)
    for name in ("self_attn", "multihead_attn"):
        if hasattr(theirs, name):
            copy_attention(getattr(ours, name), getattr(theirs, name))
    for name, module in theirs.named_children():
        if name.startswith(("linear", "norm")):
            getattr(ours, name).load_state_dict(module.state_dict())


def masks() -> dict[str, Tensor]:
    return {
        "mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.arange(5) >= torch.tensor([[5], [3]]),
    }


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_layer_without_norms_is_torchs(masked: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True, dtype=torch.float64)
    ours = HopfieldEncoderLayer(16, 4, hidden=24, dropout=0.0, association=PLAIN).double()
    copy_layer(ours, theirs)
    x = tokens(2, 5, 16)
    given = {f"src_{k}": v for k, v in masks().items()} if masked else {}
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x, **given), theirs.train(mode)(x, **given))


@pytest.mark.parametrize("masked", [False, True])
def test_a_decoder_layer_without_norms_is_torchs(masked: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(16, 4, 24, activation="gelu", batch_first=True, dtype=torch.float64).eval()
    ours = HopfieldDecoderLayer(16, 4, hidden=24, association=PLAIN, activation="gelu").double().eval()
    copy_layer(ours, theirs)
    tgt, memory = tokens(2, 5, 16), tokens(2, 7, 16, seed=1)
    given: dict[str, Any] = {}
    if masked:
        given = {f"tgt_{k}": v for k, v in masks().items()}
        given |= {
            "memory_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [2]]),
            "memory_mask": tokens(5, 7) > 1,
        }
    torch.testing.assert_close(ours(tgt, memory, **given), theirs(tgt, memory, **given))


def test_they_stand_in_torchs_stacks() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(HopfieldEncoderLayer(16, 2, hidden=24), 2, enable_nested_tensor=False).eval()
    decoder = nn.TransformerDecoder(HopfieldDecoderLayer(16, 2, hidden=24), 2).eval()
    x, padding = tokens(2, 5, 16).float(), masks()["key_padding_mask"]
    mask = masks()["mask"]
    found = encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=True)
    expected = x
    for layer in encoder.layers:
        expected = layer(expected, mask, padding)
    torch.testing.assert_close(found, expected)
    assert decoder(x, found, tgt_mask=mask, memory_key_padding_mask=padding).shape == (2, 5, 16)


def test_other_options_and_classes_of_association() -> None:
    layer = HopfieldDecoderLayer(16, 2, association={"name": "hopfield", "beta": 2.0}, cross_association="hopfield")
    assert layer.self_attn.beta == 2.0
    assert layer.multihead_attn.beta != 2.0
    assert HopfieldEncoderLayer(16, 2, dropout=0.3).self_attn.dropout == 0.3


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: HopfieldEncoderLayer(16, 3), LaminaError, "does not divide by 3 heads"),
        (lambda: HopfieldEncoderLayer(16, hidden=0), ShapeError, "must be positive, got 16 and 0"),
        (lambda: HopfieldEncoderLayer(16, dropout=1.0), ValueError, "dropout"),
        (lambda: HopfieldEncoderLayer(16, association="attention"), ValueError, "must be a Hopfield, got Attention"),
        (lambda: HopfieldEncoderLayer(16)(torch.ones(1, 2, 16), is_causal=True), ValueError, "needs the mask itself"),
        (
            lambda: HopfieldDecoderLayer(16)(torch.ones(1, 2, 16), torch.ones(1, 3, 16), memory_is_causal=True),
            ValueError,
            "memory_mask",
        ),
    ],
)
def test_what_cannot_be(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
