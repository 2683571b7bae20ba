from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lamina.errors import LaminaError
from lamina.optim.groups import is_norm, norms_and_biases, parameter_groups


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(torch.ones(4))


class PreNorm(nn.Module):
    """A wrapper that is called a norm: only what it holds itself would count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inside = nn.GroupNorm(2, 4), nn.Linear(4, 4)


class EvoNormB0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = Parameter(torch.ones(1, 4, 1, 1))


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "conv": nn.Conv2d(4, 4, 1),
            "batch": nn.BatchNorm2d(4),
            "layer": nn.LayerNorm((2, 4)),
            "rms": LlamaRMSNorm(),
            "evo": EvoNormB0(),
            "pre": PreNorm(),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "rnn": nn.GRU(4, 4),
            "relative_attention_bias": nn.Embedding(5, 2),
        }
    )


def test_what_counts_as_a_gain_or_bias() -> None:
    assert norms_and_biases(model()) == {
        "conv.bias",
        "batch.weight",
        "batch.bias",
        "layer.weight",
        "layer.bias",
        "rms.weight",
        "evo.gain",
        "pre.norm.weight",
        "pre.norm.bias",
        "pre.inside.bias",
        "attention.in_proj_bias",
        "attention.bias_k",
        "attention.bias_v",
        "attention.out_proj.bias",
        "rnn.bias_ih_l0",
        "rnn.bias_hh_l0",
    }
    assert not is_norm(nn.Linear(2, 2))


def test_two_groups_in_the_models_order() -> None:
    net = model()
    net["conv"].bias.requires_grad_(False)
    decayed, rest = parameter_groups(net, 0.1)
    names = {id(p): n for n, p in net.named_parameters()}
    assert (decayed["weight_decay"], rest["weight_decay"], rest["adapt"]) == (0.1, 0.0, False)
    assert "adapt" not in decayed
    order = list(names.values())
    for group in (decayed, rest):
        places = [order.index(names[id(p)]) for p in group["params"]]
        assert places == sorted(places)
    assert len(decayed["params"]) + len(rest["params"]) == len(order) - 1
    assert any(p is net["relative_attention_bias"].weight for p in decayed["params"])


def test_a_tied_weight_is_in_one_group_once() -> None:
    net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    groups = parameter_groups(net, 0.1)
    assert [len(g["params"]) for g in groups] == [1]


def test_hugging_face_norms_count() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    found = norms_and_biases(transformers.LlamaForCausalLM(config))
    assert found == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }


def test_nothing_excluded_and_bad_values() -> None:
    groups = parameter_groups(model(), 0.1, exclude="nothing")
    assert len(groups) == 1
    with pytest.raises(LaminaError, match="did you mean 'nothing'"):
        parameter_groups(model(), 0.1, exclude="nothng")  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="must be >= 0, got -1"):
        parameter_groups(model(), -1)
