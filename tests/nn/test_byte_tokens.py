"""Bytes as tokens: two ways to one result, masks, and padding that is never trained."""

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina.errors import ShapeError
from lamina.nn import ByteEmbedding, ByteTokens, TokenReduction1d, byte_tokens
from lamina.nn.byte_tokens import MANY

EXAMPLES = [
    Example(
        "layer",
        "byte_tokens",
        options={"width": 8, "kernel": 4},
        inputs=lambda: (torch.randint(256, (2, 540)),),
        bad={"kernel": 5},
    )
]


def one_by_one(layer, x):
    """Embed, convolve: nothing is multiplied out before."""
    return layer.reduction.conv(layer.embedding.table(torch.where(x < 0, 256, x)).mT).mT


@pytest.mark.parametrize("kernel", [2, 4, 8, 32])
@pytest.mark.parametrize("length", [63, 3001])
def test_tokens_are_the_strided_convolution_of_embedded_bytes_with_its_gradients(kernel, length):
    torch.manual_seed(0)
    layer = ByteTokens(7, kernel)
    x = torch.randint(256, (3, length))
    x[1, kernel + 5 :] = -1
    assert (3 * length > MANY * kernel // 2) == (length > 100)
    tokens, mask = layer(x)
    expected = one_by_one(layer, x)
    assert tokens.shape == (3, (length - kernel) // (kernel // 2) + 1, 7)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    real = torch.stack([(x[:, i : i + kernel] >= 0).all(1) for i in range(0, length - kernel + 1, kernel // 2)], 1)
    assert torch.equal(mask, real)
    weights = torch.randn_like(tokens)
    found = torch.autograd.grad((tokens * weights).sum(), list(layer.parameters()))
    wanted = torch.autograd.grad((expected * weights).sum(), list(layer.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert found[0][256].abs().max() == 0


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x = torch.randint(256, (1, 9))
    table, weight = torch.randn(257, 2, dtype=torch.double), torch.randn(2, 2, 4, dtype=torch.double)
    table.requires_grad_()
    weight.requires_grad_()
    rows = x.unique()

    def run(part, weight):
        return byte_tokens(x, table.detach().index_put((rows,), part), weight)

    assert torch.autograd.gradcheck(run, (table[rows].detach().requires_grad_(), weight))


def test_bfloat16_follows_float32():
    torch.manual_seed(0)
    layer, x = ByteTokens(63, 8), torch.randint(256, (1, 4001))
    exact = layer(x)[0]
    assert (layer.bfloat16()(x)[0].float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_padding_is_a_row_of_zeros_that_training_leaves_alone_and_inputs_are_not_written_to():
    torch.manual_seed(0)
    layer = ByteTokens(6, 4)
    before = layer.embedding.table.weight.detach().clone()
    assert before[256].abs().max() == 0
    assert 0.3 < before[:256].std() < 0.5
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for length in (12, 1400):
        x = torch.randint(256, (2, length))
        x[1, 7:] = -1
        kept = x.clone()
        layer(x)[0].square().sum().backward()
        optimizer.step()
        assert torch.equal(x, kept)
    after = layer.embedding.table.weight.detach()
    assert after[256].abs().max() == 0
    assert not torch.equal(after[:256], before[:256])


def test_a_kernel_of_none_gives_a_token_a_byte_and_any_integers_will_do():
    layer = ByteTokens(5, 0)
    x = torch.randint(256, (2, 7), dtype=torch.uint8)
    x[0, 0] = 255
    tokens, mask = layer(x)
    assert torch.equal(tokens, layer.embedding.table.weight[x.long()])
    assert mask.all()
    assert mask.shape == (2, 7)
    for length in (20, 1500):
        reduced, x = ByteTokens(5, 4), torch.randint(250, 256, (2, length), dtype=torch.uint8)
        for a, b in zip(reduced(x), reduced(x.long()), strict=True):
            assert torch.equal(a, b)


def test_a_layer_put_in_place_of_the_convolution_or_the_table_is_the_one_that_runs():
    layer, x = ByteTokens(4, 4), torch.randint(256, (1, 1101))

    class Doubled(nn.Conv1d):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = layer(x)[0]
    doubled = Doubled(4, 4, 4, 2, bias=False)
    doubled.load_state_dict(layer.reduction.conv.state_dict())
    layer.reduction.conv = doubled
    torch.testing.assert_close(layer(x)[0], 2 * plain)


def test_a_reduction_masks_what_has_any_masked_token():
    x, mask = TokenReduction1d(3, 4)(torch.randn(1, 10, 3), torch.tensor([[True] * 7 + [False] * 3]))
    assert x.shape == (1, 4, 3)
    assert mask.tolist() == [[True, True, False, False]]
    assert ByteEmbedding(3)(torch.tensor([[5, -1]]))[1].tolist() == [[True, False]]


def test_what_are_no_bytes_is_refused():
    layer = ByteTokens(4, 8)
    short = torch.full((2, 20), -1)
    short[0, :] = 1
    short[1, :5] = 2
    for x, words in (
        (torch.full((1, 20), 256), "from 256 to 256"),
        (torch.full((1, 20), -2), "from -2"),
        (torch.rand(1, 20), "whole numbers .*float32"),
        (torch.zeros(20, dtype=torch.long), r"\(batch, length\)"),
        (torch.zeros(2, 7, dtype=torch.long), "files as long, got 7 bytes"),
        (short, "one of 5 bytes"),
    ):
        with pytest.raises(ShapeError, match=words):
            layer(x)
    for options in ({"width": 0}, {"kernel": 3}, {"kernel": -2}, {"kernel": 1}):
        with pytest.raises(ShapeError, match=r"must be|at least"):
            ByteTokens(**{"width": 4, **options})
    with pytest.raises(ShapeError, match="as many tokens, got 3"):
        TokenReduction1d(4, 8)(torch.zeros(1, 3, 4))
