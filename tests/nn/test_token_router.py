"""Which tokens enter: exact counts, protection against any router, ties; gather and scatter."""

import pytest
import torch
from tests.contract.example import Example

from lamina.errors import LaminaError, ShapeError
from lamina.nn import TokenRouter, TokenRouting
from lamina.nn.token_router import choose, gather, kept, scatter

EXAMPLES = [
    Example("layer", "token_router", options={"width": 8, "seed": 0}, inputs=lambda: (torch.randn(2, 5, 8),)),
]


@pytest.mark.parametrize("skippable", [1, 7, 10, 50, 63, 100, 1059])
@pytest.mark.parametrize(("skip", "hundredths"), [(0.34, 34), (0.5, 50), (0.1, 10), (0.29, 29), (0.0, 0)])
def test_the_count_is_that_of_exact_arithmetic(skippable, skip, hundredths):
    expected = skippable + 3 - hundredths * skippable // 100
    assert kept(skippable + 3, skippable, skip) == expected
    protect = torch.zeros(2, skippable + 3, dtype=torch.bool)
    protect[0, -3:] = True
    index, count = choose(torch.rand(2, skippable + 3), protect, skip)
    assert index.shape == (2, count) == (2, expected)


def test_by_hand_the_likeliest_enter_in_order_and_of_equals_the_earlier():
    p = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.5, 0.5, 0.5, 0.5]])
    index, count = choose(p, skip=0.5)
    assert count == 2
    assert index.tolist() == [[1, 3], [0, 1]]
    many = torch.full((1, 1000), 0.25)
    assert choose(many)[0].tolist() == [list(range(500))]


@pytest.mark.parametrize("seed", range(5))
def test_protected_tokens_enter_whatever_the_router_says(seed):
    generator = torch.Generator().manual_seed(seed)
    protect = torch.rand(4, 63, generator=generator) < 0.3
    # Surely out for the protected, surely in for all others: as bad as it gets.
    p = torch.where(protect, 0.0, 1.0)
    index, count = choose(p, protect, 0.5)
    assert torch.zeros_like(protect).scatter(1, index, True)[protect].all()
    assert count == 63 - (63 - int(protect.sum(1).max())) // 2


def test_padding_enters_last_and_is_never_protected():
    p = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    real = torch.tensor([[False, False, True, True]])
    assert choose(p, None, 0.5, real=real)[0].tolist() == [[2, 3]]
    protect = torch.tensor([[True, True, False, True]])
    assert choose(p, protect, 0.5, real=real)[0].tolist() == [[0, 2, 3]]


def test_a_mask_that_protects_nothing_makes_it_dense_and_so_does_one_token():
    p = torch.rand(2, 7)
    assert choose(p, torch.zeros(2, 7, dtype=torch.bool), 0.5)[0].tolist() == [list(range(7))] * 2
    assert choose(torch.rand(2, 1), None, 0.9)[1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_gather_and_scatter_equal_indexing_with_gradients(tokens, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, tokens, 5, dtype=dtype, requires_grad=True)
    index = torch.stack([torch.randperm(tokens)[: (tokens + 1) // 2].sort().values for _ in range(3)])
    rows = torch.arange(3)[:, None]
    taken = gather(x, index)
    assert torch.equal(taken, x[rows, index])
    put = scatter(x, index, taken * 2)
    expected = x.clone()
    expected[rows, index] = x[rows, index] * 2
    assert torch.equal(put, expected)
    weight = torch.randn_like(put)
    (found,) = torch.autograd.grad((put * weight).sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    assert torch.equal(found, wanted)


def test_the_router_is_a_seeded_linear_layer_in_float32():
    router, z = TokenRouter(8, seed=3), torch.randn(2, 5, 8)
    assert torch.equal(router.weight, TokenRouter(8, seed=3).weight)
    exact = router(z)
    torch.testing.assert_close(exact, z @ router.weight.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(z), exact)
    assert router.bfloat16()(z.bfloat16()).dtype == torch.float32


def test_thresholds_differ_by_phase_and_annealing_begins_dense():
    router = TokenRouter(4, seed=0)
    routing = TokenRouting(router, threshold_prefill=0.0, threshold_decode=1.0, anneal=0.5).eval()
    z = torch.randn(2, 6, 4)
    assert routing(z).enters.all()
    assert not routing(z, decoding=True).enters.any()
    routing.train()
    for fraction, count in ((0.0, 6), (0.25, 5), (0.5, 3), (1.0, 3)):
        routing.set_progress(fraction)
        assert routing(z).top.shape == (2, count)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: TokenRouter(0), ShapeError, "width must be at least 1"),
        (lambda: TokenRouter(4)(torch.zeros(2, 3)), ShapeError, r"\(batch, tokens, 4\)"),
        (lambda: TokenRouter(4)(torch.zeros(2, 3, 4, dtype=torch.long)), ShapeError, "floating-point"),
        (lambda: TokenRouting(TokenRouter(4), skip=1.0), LaminaError, "0 <= skip < 1"),
        (lambda: TokenRouting(TokenRouter(4), threshold_decode=1.5), LaminaError, "threshold_decode is a probability"),
        (lambda: TokenRouting(TokenRouter(4), anneal=-0.1), LaminaError, "anneal is a share"),
        (lambda: TokenRouting(TokenRouter(4), inference="greedy"), LaminaError, "'threshold' or 'topk'"),
        (lambda: choose(torch.rand(2, 5), torch.ones(2, 4)), ShapeError, r"protect \(2, 4\) for tokens \(2, 5\)"),
    ],
)
def test_bad_input_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
