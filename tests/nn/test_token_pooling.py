"""Pooling over real tokens, then the cut, then length one; what a row of padding gives; half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn import TokenPooling, cut_embedding, pool_tokens


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])


def by_hand(x: Tensor, pool: str) -> list[Tensor]:
    found = []
    for row, mask in zip(x.double(), MASK.bool(), strict=True):
        real = row[mask]
        if not len(real):
            found.append(torch.zeros(x.shape[-1], dtype=torch.float64))
        else:
            found.append({"mean": real.mean(0), "cls": row[0], "last": real[-1]}[pool])
    return found


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 63])
def test_pooling_equals_a_loop_by_hand(pool, dtype, width):
    x = tokens(3, 4, width, dtype=dtype)
    found = pool_tokens(x, MASK, pool)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(by_hand(x, pool)), rtol=1e-6, atol=1e-6)


def test_the_cut_comes_before_the_norm_and_an_empty_text_is_zeros():
    x = tokens(3, 4, 8)
    found = TokenPooling(3)(x, MASK)
    torch.testing.assert_close(found[:2].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found[0], torch.nn.functional.normalize(x[0, :2].mean(0)[:3], dim=0))
    assert not found[2].any()
    assert TokenPooling(3, normalize=False)(x, MASK)[0].norm() != 1


def test_gradients_and_autocast_in_float32():
    x = tokens(3, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: TokenPooling(3)(t, MASK[:3]), (x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert TokenPooling(3)(tokens(3, 4, 5, dtype=torch.bfloat16), MASK).dtype == torch.float32


def test_tokens_in_front_of_the_mask_are_real_and_a_function_may_pool():
    x = tokens(2, 5, 4)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(pool_tokens(x, mask)[0], x[0, :2].mean(0))
    assert torch.equal(pool_tokens(x, mask, lambda t, m: t[:, 2] * m.sum(1, keepdim=True)), x[:, 2] * mask.sum(1)[:, None].add(1))  # fmt: skip  # noqa: E501
    torch.testing.assert_close(pool_tokens(x), x.mean(1))
    assert torch.equal(pool_tokens(x, None, "last"), x[:, -1])


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(LaminaError, match=r"pool must be one of mean, cls, last.*did you mean 'mean'"):
        TokenPooling(pool="meen")  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match=r"at least 1, got 0"):
        TokenPooling(0)
    with pytest.raises(ShapeError, match=r"an embedding of 4 numbers cannot be cut to 5"):
        cut_embedding(torch.zeros(2, 4), 5)
    with pytest.raises(ShapeError, match=r"pooling takes tokens \(batch, tokens, channels\), got \(2, 4\)"):
        pool_tokens(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"need a mask \(batch, tokens\), got \(2, 6\)"):
        pool_tokens(torch.zeros(2, 5, 4), torch.ones(2, 6))
