from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn import MonotoneHollow, MonotoneHollowConv
from lamina.nn._state_blocks import Run, StateBlocks

TIERS = [(4, 6, 5, 2), (6, 3, 3, 2), (3, 1, 1, 1)]


def states(rows: int, width: int) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(0))


EIGENVALUES = "eigh, by which the monotonicity is guaranteed"
EXAMPLES = [
    Example(
        "layer",
        "monotone_hollow",
        {"sizes": [2, 2, 3], "rank": 2},
        lambda: (states(3, 7),),
        bad={"m": 1.0},
        no_onnx=EIGENVALUES,
    ),
    Example(
        "layer",
        "monotone_hollow",
        {"sizes": [2, 2, 3], "rank": 9},
        lambda: (states(3, 7),),
        bad={"sizes": [2, 1]},
        no_onnx=EIGENVALUES,
    ),
    Example(
        "layer",
        "monotone_hollow_conv",
        {"tiers": TIERS},
        lambda: (states(2, 177),),
        bad={"m": 0.0},
        no_onnx=EIGENVALUES,
    ),
]


def loud(coupling: Any, factor: float) -> Any:
    """Weights far beyond those that would be monotone without the scaling."""
    with torch.no_grad():
        for p in coupling.parameters():
            p.mul_(factor)
    return coupling


def holds(coupling: Any, margin: float) -> None:
    phi, blocks = coupling.dense(), coupling.blocks
    owner = blocks.spread(torch.arange(blocks.count)[None])[0]
    assert (phi - phi.T).abs().max() < 1e-12
    assert (phi * (owner[:, None] == owner)).abs().max() < 1e-12
    eigenvalues = torch.linalg.eigvalsh(torch.eye(len(phi)).double() - phi)
    assert eigenvalues[0] >= margin - 1e-6
    assert coupling.min_eigenvalue() == pytest.approx(float(eigenvalues[0]), abs=1e-9)
    assert coupling.lipschitz(60) == pytest.approx(float(eigenvalues[-1]), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(2, 7), min_size=1, max_size=8),
    st.sampled_from([1, 3, 7, 63]),
    st.sampled_from([0.01, 0.1, 0.7]),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_a_dense_coupling_is_hollow_symmetric_and_monotone(sizes: list[int], rank: int, m: float, by: float) -> None:
    torch.manual_seed(0)
    holds(loud(MonotoneHollow(sizes, rank, m).double(), by), m)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "tiers",
    [TIERS, [(4, 7, 7, 1), (4, 7, 7, 2)], [(2, 8, 8, 1), (4, 4, 4, 2), (4, 2, 2, 1)], [(3, 9, 2, 1), (2, 1, 1, 1)]],
)
@pytest.mark.parametrize("by", [0.2, 20.0])
def test_a_convolutional_coupling_is_hollow_symmetric_and_monotone(kernel: int, tiers: Any, by: float) -> None:
    torch.manual_seed(0)
    holds(loud(MonotoneHollowConv(tiers, 0.2, kernel).double(), by), 0.2)


@pytest.mark.parametrize("rank", [2, 5, 40])
def test_every_way_to_multiply_gives_the_formula(rank: int) -> None:
    torch.manual_seed(0)
    coupling = loud(MonotoneHollow([3, 3, 2, 7, 7], rank, 0.1).double(), 2.0)
    a, expected = coupling.weight.detach().clone(), torch.zeros(22, 22).double()
    pieces = a.split([3, 3, 2, 7, 7], dim=1)
    scaled = [p * min(1.0, 0.9 / float(torch.linalg.matrix_norm(p.T @ p, 2))) ** 0.5 for p in pieces]
    whole = torch.cat(scaled, dim=1)
    expected = torch.block_diag(*[p.T @ p for p in scaled]) - whole.T @ whole
    torch.testing.assert_close(coupling.dense(), expected)
    assert coupling.materialises == (rank == 40)


def test_a_convolution_is_the_formula_of_its_matrix() -> None:
    """A is read off by unit vectors from torch's own convolutions, without the bookkeeping of cells and borders."""
    torch.manual_seed(0)
    coupling = MonotoneHollowConv([(4, 5, 5, 2), (4, 3, 3, 1)], 0.1).double()
    (own, down, second) = (k.detach() for k in coupling.kernels)
    units = torch.eye(4 * 25 + 4 * 9).double()
    fine, coarse = units[:, :100].view(-1, 4, 5, 5), units[:, 100:].view(-1, 4, 3, 3)
    first = torch.nn.functional.conv2d(fine, own, padding=1).flatten(1)
    last = torch.nn.functional.conv2d(fine, down, padding=1, stride=2) + torch.nn.functional.conv2d(
        coarse, second, padding=1
    )
    a = torch.cat([first, last.flatten(1)], dim=1).T
    owner = coupling.blocks.spread(torch.arange(coupling.blocks.count)[None])[0]
    scale = torch.ones(len(owner)).double()
    for i in range(coupling.blocks.count):
        mine = owner == i
        scale[mine] = min(1.0, 0.9 / float(torch.linalg.matrix_norm(a[:, mine].T @ a[:, mine], 2))) ** 0.5
    gram = (a * scale).T @ (a * scale)
    torch.testing.assert_close(coupling.dense(), gram * (owner[:, None] == owner) - gram)


@pytest.mark.parametrize("rank", [2, 30])
def test_gradients_are_those_of_finite_differences(rank: int) -> None:
    torch.manual_seed(0)
    coupling = MonotoneHollow([2, 3, 3], rank).double()
    weight = (2 * coupling.weight).detach().requires_grad_()
    q = states(2, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, v: torch.func.functional_call(coupling, {"weight": w}, v), (weight, q))


def test_weights_of_zero_have_a_gradient() -> None:
    coupling = loud(MonotoneHollow([2, 3], 2), 0.0)
    coupling(states(2, 5)).sum().backward()
    assert torch.isfinite(coupling.weight.grad).all()


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    for coupling in (MonotoneHollow([2] * 7 + [3], 4), MonotoneHollowConv(TIERS)):
        q = states(2, coupling.blocks.dim)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(coupling(q), coupling(q))
            inside = coupling(q)
        assert torch.equal(inside, coupling(q))
        assert coupling.to(torch.bfloat16)(q.to(torch.bfloat16)).dtype == torch.bfloat16


def test_blocks_split_join_and_spread() -> None:
    blocks = StateBlocks((Run(2, 3), Run(1, 2, 4)))
    assert (blocks.dim, blocks.count) == (14, 6)
    vector = torch.arange(14.0)[None]
    assert torch.equal(blocks.join(blocks.split(vector)), vector)
    assert blocks.spread(torch.arange(6)[None])[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    sums = [p.sum(2) for p in blocks.split(blocks.softmax(torch.randn(1, 14)))]
    for s in sums:
        torch.testing.assert_close(s, torch.ones_like(s))
    assert StateBlocks.of_sizes([2, 2, 3, 2]).runs == (Run(2, 2), Run(1, 3), Run(1, 2))


def test_bad_input_is_met_with_a_sentence() -> None:
    for m in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(LaminaError, match="margin m must be strictly between 0 and 1"):
            MonotoneHollow([2, 2], 3, m)
    with pytest.raises(ShapeError, match="at least 2 states, got 1"):
        MonotoneHollow([2, 1], 3)
    with pytest.raises(ShapeError, match="at least one variable"):
        MonotoneHollow([], 3)
    with pytest.raises(ShapeError, match="rank must be at least 1, got 0"):
        MonotoneHollow([2, 2], 0)
    with pytest.raises(ShapeError, match=r"q must be \(batch, 4\), an entry a state, got \(3, 5\)"):
        MonotoneHollow([2, 2], 3)(torch.zeros(3, 5))
    with pytest.raises(ShapeError, match="groups dividing channels"):
        MonotoneHollowConv([(5, 4, 4, 2)])
    with pytest.raises(ShapeError, match="at least 2 states, got 1"):
        MonotoneHollowConv([(4, 4, 4, 4)])
    with pytest.raises(ShapeError, match="kernel_size must be at least 1"):
        MonotoneHollowConv([(4, 4, 4, 2)], kernel_size=0)
