"""Rank of attention maps: by hand, against maps that a model shows itself, and one sample by itself."""

import pytest
import torch
from tests.contract.foreign import home_made, llama, ours, tokens, vision
from torch import nn

from lamina.errors import AnatomyError, LaminaError
from lamina.rewrite import attention_rank
from lamina.rewrite.depth_routing.rank import attention_probabilities, map_rank


@pytest.mark.parametrize("size", [2, 7, 63])
def test_ranks_by_hand(size):
    uniform = torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]
    sink = torch.eye(size) * 0.5
    sink[1:, 0] = 0.5
    assert map_rank(uniform) == size - 1
    assert map_rank(sink) == 1
    assert map_rank(torch.eye(size)) == 0
    assert map_rank(torch.ones(size, size) / size, causal=False) == size
    assert map_rank(torch.stack((uniform, sink, torch.eye(size)))).tolist() == [size - 1, 1, 0]


@pytest.mark.parametrize("mask", ["causal", "bool", "added", "none"])
def test_probabilities_are_those_of_the_fused_attention(mask):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6), torch.eye(7).expand(2, 2, 7, 7)
    seen = torch.rand(2, 1, 7, 7) < 0.7
    seen |= torch.eye(7, dtype=torch.bool)
    given = {"attn_mask": seen if mask == "bool" else seen.float().log().clamp(min=-1e9)} if mask in ("bool", "added") else {}  # fmt: skip  # noqa: E501
    given |= {"is_causal": mask == "causal", "enable_gqa": True}
    # Values that are the unit vectors show the weights.
    expected = nn.functional.scaled_dot_product_attention(q, k, v, **given)
    torch.testing.assert_close(attention_probabilities(q, k, v, **given), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_of_a_transformers_model_it_is_the_rank_of_the_maps_it_returns(implementation):
    model, _ = llama()
    for p in model.parameters():
        p.data.mul_(8.0)
    ids = tokens(3, 16)
    model.set_attn_implementation("eager")
    maps = model.eval()(ids, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    expected = [float(torch.linalg.matrix_rank(m.tril(-1)).float().mean()) for m in maps]
    assert attention_rank(model, [{"input_ids": ids}]) == pytest.approx(expected)
    assert model.config._attn_implementation == implementation


def test_a_samples_rank_does_not_depend_on_its_batch_or_its_padding():
    model, _ = llama()
    ids = tokens(3, 12)
    alone = [attention_rank(model, [{"input_ids": ids[i : i + 1]}]) for i in range(3)]
    together = attention_rank(model, [{"input_ids": ids}])
    assert together == pytest.approx([sum(column) / 3 for column in zip(*alone, strict=True)])
    for left, right in ((5, 0), (0, 5)):
        ends = [torch.zeros(3, n, dtype=torch.long) for n in (left, right)]
        padded = torch.cat((ends[0], ids, ends[1]), 1)
        mask = torch.cat((ends[0], torch.ones_like(ids), ends[1]), 1)
        found = attention_rank(model, [{"input_ids": padded, "attention_mask": mask}])
        assert found == pytest.approx(together)
    assert attention_rank(model, [{"input_ids": ids}], samples=1) == pytest.approx(alone[0])


@pytest.mark.parametrize("make", [ours, home_made, vision])
def test_any_attention_is_seen_and_the_model_left_as_it_was(make):
    model, batch = make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ranks = attention_rank(model.train(), [batch])
    assert len(ranks) == 4
    assert all(rank > 0 for rank in ranks)
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_torch_encoder_layers_are_seen():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert attention_rank(model, [{"inputs": torch.randn(2, 7, 16)}]) == [7.0, 7.0]


class Hidden(nn.Module):
    """Shows no probabilities: its weights are normalised by hand."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        scores = (self.q(x) @ self.k(x).transpose(-1, -2)).exp()
        return self.out(scores / scores.sum(-1, keepdim=True) @ self.v(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(8), Hidden()
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_what_shows_no_maps_is_said():
    model = nn.Sequential(*(Block() for _ in range(2)))
    with pytest.raises(AnatomyError, match=r"no attention probabilities were seen in 0\.attention, 1\.attention"):
        attention_rank(model, [{"inputs": torch.randn(2, 5, 8)}])
    with pytest.raises(LaminaError, match="on the meta device"):
        attention_rank(ours()[0].to("meta"), [ours()[1]])
    with pytest.raises(LaminaError, match="empty"):
        attention_rank(ours()[0], [])
