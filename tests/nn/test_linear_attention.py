from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor

from lamina.errors import ShapeError
from lamina.models import MetaFormer, Transformer, VisionTransformer
from lamina.nn import SimplifiedLinearAttention, linear_attention
from lamina.rewrite import Hypercomplex, rewrite


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


OPTIONS = {"width": 8, "heads": 2, "grid": (3, 4)}
EXAMPLES = [
    Example("mixer", "simplified_linear_attention", OPTIONS, inputs=lambda: (drawn(2, 12, 8),), bad={"heads": 3}),
    Example("mixer", "simplified_linear_attention", {**OPTIONS, "prefix": 1}, inputs=lambda: (drawn(2, 13, 8),)),
]


def perturbed(mixer: SimplifiedLinearAttention) -> SimplifiedLinearAttention:
    """The position code starts at zero, and would hide a mistake."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return mixer


def naive(mixer: SimplifiedLinearAttention, x: Tensor) -> Tensor:
    """Every weight of every query for every key, every cell's neighbours one by one."""
    (rows, columns), prefix = mixer.grid, mixer.prefix
    tokens, d = x.shape[1], mixer.head_width
    q, k, v = mixer.query(x), mixer.key(x), mixer.value(x)
    k = torch.cat([k[:, :prefix], k[:, prefix:] + mixer.position], dim=1)
    out = torch.zeros_like(x)
    for h in range(mixer.heads):
        mine = slice(h * d, (h + 1) * d)
        for i in range(tokens):
            scores = (q[:, i, None, mine].relu() * k[:, :, mine].relu()).sum(-1)
            weights = scores / (scores.sum(1, keepdim=True) + mixer.eps)
            out[:, i, mine] = (weights[:, :, None] * v[:, :, mine]).sum(1)
    reach = mixer.convolution.kernel_size[0] // 2
    cells = v[:, prefix:].unflatten(1, mixer.grid)
    for i in range(rows):
        for j in range(columns):
            near = torch.zeros_like(cells[:, 0, 0])
            for a in range(max(i - reach, 0), min(i + reach + 1, rows)):
                for b in range(max(j - reach, 0), min(j + reach + 1, columns)):
                    weight = mixer.convolution.weight[:, 0, a - i + reach, b - j + reach]
                    near = near + cells[:, a, b] * weight.repeat(mixer.heads)
            out[:, prefix + i * columns + j] += near + mixer.convolution.bias.repeat(mixer.heads)
    return mixer.out(out)


SIZES = [((1, 1), 1, 1, 1, 0), ((1, 7), 7, 1, 3, 0), ((7, 9), 14, 2, 5, 0), ((3, 4), 6, 3, 3, 2), ((2, 2), 63, 1, 5, 1)]


@pytest.mark.parametrize(("grid", "width", "heads", "kernel", "prefix"), SIZES)
def test_it_is_the_naive_attention_with_its_gradients(
    grid: tuple[int, int], width: int, heads: int, kernel: int, prefix: int
) -> None:
    mixer = perturbed(SimplifiedLinearAttention(width, heads, grid, kernel, prefix=prefix)).double()
    x = drawn(2, prefix + grid[0] * grid[1], width).double().requires_grad_()
    expected, found = naive(mixer, x), mixer(x)
    torch.testing.assert_close(found, expected)
    signs = drawn(*x.shape, seed=1).double()
    wanted = (x, *mixer.parameters())
    pairs = [torch.autograd.grad((y * signs).sum(), wanted) for y in (found, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_in_lower_precision_it_stays_near(dtype: torch.dtype, bound: float) -> None:
    mixer, x = perturbed(SimplifiedLinearAttention(14, 2, (7, 9))), drawn(2, 63, 14)
    exact = naive(mixer.double(), x.to(dtype).double())
    found = mixer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= bound * exact.abs().max()


def test_autocast_does_not_reach_the_sums() -> None:
    mixer, x = perturbed(SimplifiedLinearAttention(**OPTIONS)), drawn(2, 12, 8)
    seen = []
    torch_bmm = torch.bmm

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        seen.append(torch_bmm(a, b))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch, "bmm", bmm)
        mixer(x)
    assert {t.dtype for t in seen} == {torch.float32}


@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (7, 1), (63, 7), (7, 63), (9, 9)])
def test_both_orders_of_the_products_agree(tokens: int, width: int) -> None:
    q, k, v = (drawn(2, tokens, width, seed=s) for s in range(3))
    q, k = q.relu(), k.relu()
    scores = q @ k.transpose(1, 2)
    one = scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)
    two = q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1)[:, :, None] + 1e-6)
    torch.testing.assert_close(linear_attention(q, k, v), one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_attention(q, k, v), two, rtol=1e-5, atol=1e-5)


def test_the_cheaper_order_is_taken() -> None:
    shapes: list[tuple[int, ...]] = []
    torch_bmm = torch.bmm

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((a.shape[1], b.shape[2]))
        return torch_bmm(a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", bmm)
        for tokens, width in ((9, 4), (4, 9)):
            linear_attention(*(drawn(1, tokens, width).relu() for _ in range(3)))
    assert shapes == [(9, 1), (4, 4), (9, 4), (4, 1), (4, 4), (4, 9)], "d x d, and N x N"


def test_the_length_of_the_keys_does_not_matter_and_a_negative_query_gives_zeros() -> None:
    q, k, v = (drawn(2, 12, 4, seed=s) for s in range(3))
    q, k = q.relu(), k.relu()
    torch.testing.assert_close(linear_attention(q, 7.5 * k, v), linear_attention(q, k, v), rtol=1e-4, atol=1e-5)
    q[0, 3] = 0
    assert torch.equal(linear_attention(q, k, v)[0, 3], torch.zeros(4))
    assert torch.isfinite(linear_attention(torch.zeros_like(q), k, v)).all()


def test_its_projections_may_become_other_layers() -> None:
    model = VisionTransformer(8, 2, 2, 8, 2, classes=3, pool="mean", mixer="simplified_linear_attention")
    model = rewrite(model, Hypercomplex(n=2))
    assert type(model.blocks[0].mixer.out).__name__ == "PHMLinear"
    assert model(drawn(2, 3, 8, 8)).shape == (2, 3)


def test_it_runs_on_the_meta_device_under_autocast() -> None:
    mixer = SimplifiedLinearAttention(**OPTIONS).to("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(torch.empty(2, 12, 8, device="meta")).shape == (2, 12, 8)


def test_without_the_convolution_it_permutes_with_the_tokens() -> None:
    mixer = SimplifiedLinearAttention(**OPTIONS)
    with torch.no_grad():
        mixer.convolution.weight.zero_()
    x, order = drawn(2, 12, 8), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order], rtol=1e-4, atol=1e-5)


def test_it_starts_without_a_position_code_and_shares_the_convolution_among_heads() -> None:
    mixer = SimplifiedLinearAttention(12, 3, (5, 5))
    assert mixer.position.shape == (1, 25, 12)
    assert not mixer.position.any()
    assert mixer.convolution.weight.shape == (4, 1, 5, 5)
    assert SimplifiedLinearAttention(12, 3, (5, 5), qkv_bias=False).query.bias is None


def test_it_stands_in_the_slots_of_our_models() -> None:
    mixer = "simplified_linear_attention"
    for pool, tokens in (("mean", 16), ("class", 17)):
        model = VisionTransformer(8, 2, 1, 8, 2, classes=3, pool=pool, mixer=mixer)
        assert model.blocks[0].mixer.position.shape[1] == 16
        assert model.blocks[0].mixer.prefix == tokens - 16
        assert model(drawn(2, 3, 8, 8)).shape == (2, 3)
    meta = MetaFormer((1,), (32,), mixers=[mixer], image=16, classes=3)
    assert meta(drawn(1, 3, 16, 16)).shape == (1, 3)
    text = Transformer(1, 8, 2, vocabulary=9, context=16, causal=False, position="none", mixer=mixer)
    assert text(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "width 8 does not divide by 3 heads"),
        ({"kernel_size": 4}, "odd and positive.*got 4"),
        ({"grid": (0, 4)}, "at least 1, got"),
        ({"grid": None}, "give the grid"),
        ({"grid": None, "context": 12}, "12 tokens are no square"),
        ({"grid": None, "context": 17}, "17 tokens are no square"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"prefix": -1}, "prefix must not be negative"),
    ],
)
def test_bad_sizes_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        SimplifiedLinearAttention(**{**OPTIONS, **options})


def test_other_lengths_are_refused_and_a_square_needs_no_grid() -> None:
    with pytest.raises(
        ShapeError, match=r"a grid of \(3, 4\) and 0 tokens before it takes floating-point \(batch, 12, 8\)"
    ):
        SimplifiedLinearAttention(**OPTIONS)(drawn(2, 13, 8))
    assert SimplifiedLinearAttention(8, 2, context=17, prefix=1).grid == (4, 4)


def test_softmax_is_not_what_it_computes() -> None:
    q, k, v = (drawn(1, 12, 4, seed=s) for s in range(3))
    assert not torch.allclose(
        linear_attention(q.relu(), k.relu(), v), F.scaled_dot_product_attention(q, k, v), atol=0.1
    )
