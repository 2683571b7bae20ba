"""Windows: what a token sees, and nothing else; the merging of neighbours."""

import itertools

import pytest
import torch
from tests.contract.example import Example

from lamina.errors import ShapeError
from lamina.nn import Attention, TokenMerging1d, WindowedAttention, WindowKernel, attend_in_windows
from lamina.nn.attention_kernels import written_out
from lamina.rewrite import Replace, rewrite

EXAMPLES = [
    Example(
        "mixer",
        "windowed_attention",
        options={"width": 8, "heads": 2, "window": 4, "shift": 2},
        inputs=lambda: (torch.randn(2, 11, 8),),
        bad={"shift": 4},
    )
]


def pairs(length, window, shift):
    """Who sees whom: token i lies in window (i - shift) // window, and those before the shift in one of their own."""
    window_of = (torch.arange(length) - shift) // window
    return window_of[:, None] == window_of


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 31, 63])
@pytest.mark.parametrize(("window", "shift"), [(1, 0), (8, 0), (8, 4), (8, 3), (100, 0), (100, 50)])
def test_it_is_softmax_attention_with_the_table_of_pairs(length, window, shift):
    torch.manual_seed(length)
    q, k, v = torch.randn(3, 2, 2, length, 4)
    for seen in (None, torch.rand(2, length) > 0.4, torch.rand(1, length) > 0.4):
        mask = pairs(length, window, shift)[None]
        real = torch.ones(1, length, dtype=torch.bool) if seen is None else seen
        mask = mask & real[:, None]
        expected = written_out(q, k, v, mask[:, None])
        found = attend_in_windows(q, k, v, window, shift, seen)
        assert torch.isfinite(found).all()
        # A window of padding alone sees itself, where the table's row sees all: neither is read by anybody.
        kept = mask.any(-1).expand(2, -1)[:, None, :, None]
        torch.testing.assert_close(found * kept, expected * kept, rtol=1e-4, atol=1e-5)


def test_a_window_of_padding_alone_sees_all_of_it():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 16, 4)
    seen = torch.arange(16)[None] < 8
    torch.testing.assert_close(attend_in_windows(q, k, v, 8, 0, seen), attend_in_windows(q, k, v, 8))


def test_gradients_are_those_of_finite_differences_and_stay_in_the_window():
    torch.manual_seed(0)
    layer = WindowedAttention(4, heads=2, window=4, shift=2).double()
    x = torch.randn(1, 11, 4, dtype=torch.double, requires_grad=True)
    seen = torch.tensor([[True] * 9 + [False] * 2])
    assert torch.autograd.gradcheck(lambda x: layer(x, seen), (x,))
    reach = torch.stack(
        [torch.autograd.grad(layer(x)[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0 for i in range(11)]
    )
    assert torch.equal(reach, pairs(11, 4, 2))
    assert not reach[0, -1], "the first token sees the last"


def test_a_window_that_holds_all_is_full_attention_in_either_precision():
    torch.manual_seed(0)
    layer, full = WindowedAttention(12, heads=3, window=70), Attention(12, heads=3, bias=True)
    full.load_state_dict(layer.attention.state_dict())
    for length in (1, 7, 63):
        x = torch.randn(2, length, 12)
        torch.testing.assert_close(layer(x), full(x))
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16()).float(), full(x), rtol=0.05, atol=0.03)


def test_wrapped_windows_are_those_of_a_rolled_sequence():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 12, 4)
    for shift in (2, 8, 15):
        rolled = [t.roll(-shift, 2) for t in (q, k, v)]
        expected = attend_in_windows(*rolled, 4).roll(shift, 2)
        torch.testing.assert_close(attend_in_windows(q, k, v, 4, shift, wrap=True), expected)
    around = attend_in_windows(q, k, v, 4, 2, wrap=True)
    assert not torch.allclose(around[:, :, 0], attend_in_windows(q, k, v, 4, 2)[:, :, 0])


def test_padding_changes_nothing_for_the_tokens_before_it():
    torch.manual_seed(0)
    for shift, extra in itertools.product((0, 3), (1, 5, 17)):
        layer, x = WindowedAttention(8, heads=2, window=6, shift=shift), torch.randn(1, 10, 8)
        longer = torch.cat((x, torch.randn(1, extra, 8)), 1)
        seen = torch.arange(10 + extra)[None] < 10
        torch.testing.assert_close(layer(longer, seen)[:, :10], layer(x), rtol=1e-5, atol=1e-6)


def test_it_takes_over_the_weights_of_an_attention_in_a_transformers_model():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertModel(config, add_pooling_layer=False).eval()
    x, mask = torch.randint(32, (2, 9)), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    before = model(x, attention_mask=mask).last_hidden_state[mask.bool()]
    model = rewrite(model, Replace("attention", "windowed_attention", options={"window": 16})).eval()
    after = model(x, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_two_neighbours_become_one_and_masked_ones_count_as_zeros():
    torch.manual_seed(0)
    layer = TokenMerging1d(4)
    x, mask = torch.randn(1, 5, 4), torch.tensor([[True, True, True, False, False]])
    merged, seen = layer(x, mask)
    rows = torch.cat((x[0, 0], x[0, 1])), torch.cat((x[0, 2], torch.zeros(4))), torch.zeros(8)
    torch.testing.assert_close(merged[0], layer.norm(torch.stack(rows) @ layer.reduction.weight.T))
    assert seen.tolist() == [[True, True, False]]
    for length in (1, 2, 7, 63):
        assert layer(torch.randn(2, length, 4))[0].shape == (2, -(-length // 2), 4)


def test_what_does_not_fit_is_refused():
    for options, words in (
        ({"window": 4, "shift": 4}, "shift of 4 must be less than the window of 4"),
        ({"window": 0}, "window must be at least 1"),
        ({"shift": -1}, "shift at least 0"),
        ({"heads": 3}, "does not divide by 3 heads"),
    ):
        with pytest.raises(ShapeError, match=words):
            WindowedAttention(**{"width": 8, "heads": 2, **options})
    with pytest.raises(ShapeError, match="mask of keys"):
        WindowKernel(4)(*torch.randn(3, 1, 1, 6, 2), torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(ShapeError, match="attention_mask must be"):
        WindowedAttention(8, 2)(torch.randn(1, 5, 8), torch.ones(1, 4))
    with pytest.raises(ShapeError, match="the mask must be"):
        TokenMerging1d(4)(torch.randn(1, 5, 4), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"TokenMerging1d takes floating-point \(..., 4\)"):
        TokenMerging1d(4)(torch.randn(1, 5, 3))
