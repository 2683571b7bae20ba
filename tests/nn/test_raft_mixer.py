from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamina.errors import ShapeError
from lamina.nn import MixerTokenMixing, RaftTokenMixing
from lamina.nn.layout import layout_of
from lamina.nn.raft_mixer import Axis, from_columns, in_rafts, out_of_rafts, to_columns


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIZES = {"width": 8, "grid": (3, 4)}
EXAMPLES = [
    Example("mixer", "raft_token_mixing", SIZES, inputs=lambda: (maps(2, 8, 3, 4),), bad={"rafts": 3}),
    Example(
        "mixer",
        "raft_token_mixing",
        SIZES | {"rafts": 4, "residual": False, "dropout": 0.1, "drop_path": 0.3},
        inputs=lambda: (maps(2, 8, 3, 4),),
        bad={"drop_path": 1.0},
    ),
    Example("mixer", "mixer_token_mixing", SIZES, inputs=lambda: (maps(2, 8, 3, 4),), bad={"dropout": -0.1}),
]


def raft(*args: object, **options: object) -> RaftTokenMixing:
    torch.manual_seed(0)
    return RaftTokenMixing(*args, **options).eval()


def lively(module: nn.Module) -> nn.Module:
    """Norms that are not the identity, and branches that matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


class Sum(nn.Module):
    """In place of an MLP: every number of an input becomes their sum."""

    def forward(self, columns: Tensor) -> Tensor:
        return columns.sum(0, keepdim=True).expand_as(columns)


class Nothing(nn.Module):
    def forward(self, columns: Tensor) -> Tensor:
        return torch.zeros_like(columns)


def naive(x: Tensor, mixing: RaftTokenMixing, axis: str) -> Tensor:
    """One block as the card writes it: one row of length r * side for each (co, place across), an MLP, the residual."""
    batch, channels, height, width = x.shape
    r, block = mixing.rafts, getattr(mixing, axis)
    share, side, across = (
        channels // r,
        height if axis == "vertical" else width,
        width if axis == "vertical" else height,
    )
    normed = F.layer_norm(x.movedim(1, -1), (channels,), block.norm.weight, block.norm.bias).movedim(-1, 1)
    out = x.clone()
    for b in range(batch):
        for co in range(share):
            for j in range(across):
                line = normed[b, :, :, j] if axis == "vertical" else normed[b, :, j]  # (C, side)
                row = torch.cat([line[chw * share + co] for chw in range(r)])
                up, down = block.mlp.up, block.mlp.down
                mixed = F.linear(F.gelu(F.linear(row, up.weight, up.bias)), down.weight, down.bias)
                for chw in range(r):
                    piece = mixed[chw * side : (chw + 1) * side]
                    if axis == "vertical":
                        out[b, chw * share + co, :, j] += piece
                    else:
                        out[b, chw * share + co, j] += piece
    return out


SHAPES = [(2, 4, 3, 5, 2), (1, 6, 1, 7, 3), (1, 4, 7, 1, 1), (1, 2, 63, 2, 2), (3, 4, 2, 2, 4), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize(("batch", "width", "height", "columns", "rafts"), SHAPES)
def test_it_is_two_blocks_of_the_paper_with_all_gradients(
    batch: int, width: int, height: int, columns: int, rafts: int
) -> None:
    mixing = lively(raft(width, (height, columns), rafts))
    x = maps(batch, width, height, columns)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [mixing(inputs[0]), naive(naive(inputs[1], mixing, "vertical"), mixing, "horizontal")]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    weight = maps(*x.shape, seed=1)
    found = [
        torch.autograd.grad((o * weight).sum(), [i, *mixing.parameters()]) for o, i in zip(outputs, inputs, strict=True)
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_bf16_is_float32_rounded() -> None:
    mixing, x = lively(raft(8, (7, 5))), maps(2, 8, 7, 5)
    expected = mixing(x)
    found = copy.deepcopy(mixing).bfloat16()(x.bfloat16())
    assert found.dtype is torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("rafts", [1, 2, 3])
def test_a_sum_in_place_of_the_mlp_shows_which_numbers_meet(rafts: int) -> None:
    mixing, x = raft(6, (3, 4), rafts), maps(2, 6, 3, 4)
    for branch in (mixing.vertical, mixing.horizontal):
        branch.norm, branch.mlp = nn.Identity(), Nothing()
    for axis, dims in (("vertical", 2), ("horizontal", 3)):
        one = copy.deepcopy(mixing)
        getattr(one, axis).mlp = Sum()
        met = one(x) - x
        for c in range(6):
            same = [k for k in range(6) if k % (6 // rafts) == c % (6 // rafts)]
            expected = x[:, same].sum((1, dims), keepdim=True).expand(-1, 1, 3, 4)[:, 0]
            torch.testing.assert_close(met[:, c], expected)


def test_one_channel_a_raft_is_an_mlp_an_axis_that_all_channels_share() -> None:
    mixing, x = lively(raft(5, (3, 4), 1)), maps(2, 5, 3, 4)

    def mlp(branch: nn.Module, rows: Tensor) -> Tensor:
        up, down = branch.mlp.up, branch.mlp.down
        return F.linear(F.gelu(F.linear(rows, up.weight, up.bias)), down.weight, down.bias)

    y = x + mlp(mixing.vertical, mixing.vertical.norm(x.movedim(1, -1)).movedim(-1, 1).mT).mT
    y = y + mlp(mixing.horizontal, mixing.horizontal.norm(y.movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(mixing(x), y)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_parameters_and_multiply_adds_are_the_papers_formulas(rafts: int, share: int, h: int, w: int, e: int) -> None:
    width = rafts * share
    mixing = RaftTokenMixing(width, (h, w), rafts, e)
    for branch, side in ((mixing.vertical, h), (mixing.horizontal, w)):
        expected = 2 * e * (rafts * side) ** 2 + e * rafts * side + rafts * side + 2 * width
        assert sum(p.numel() for p in branch.parameters()) == expected
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixing(maps(1, width, h, w))
    assert counter.get_total_flops() == 2 * sum(2 * e * (rafts * s) ** 2 * (share * h * w // s) for s in (h, w))


def test_on_a_square_grid_the_cost_is_root_n_times_less() -> None:
    def cost(mixing: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixing(maps(1, 8, 6, 6))
        return counter.get_total_flops() // 2

    cells, e, r = 36, 2, 2
    assert cost(MixerTokenMixing(8, (6, 6))) == 2 * e * cells**2 * 8
    assert cost(RaftTokenMixing(8, (6, 6), r)) == 4 * e * r * cells * 6 * 8


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["vertical", "horizontal", "both"]),
)
def test_the_arrangements_are_undone_exactly(rafts: int, share: int, h: int, w: int, axis: Axis) -> None:
    x = maps(2, rafts * share, h, w)
    tokens = in_rafts(x, rafts)
    assert torch.equal(out_of_rafts(tokens), x)
    columns = to_columns(tokens, axis)
    assert len(columns) == rafts * {"vertical": h, "horizontal": w, "both": h * w}[axis]
    assert torch.equal(from_columns(columns, axis, tokens.shape), tokens)
    # Raft before place: the first raft's cells fill the first rows.
    first = {"vertical": x[0, 0, :, 0], "horizontal": x[0, 0, 0], "both": x[0, 0].flatten()}[axis]
    assert torch.equal(columns[: len(first), 0], first)


@pytest.mark.parametrize("make", [RaftTokenMixing, MixerTokenMixing])
def test_without_weights_nothing_happens_and_without_the_residual_nothing_is_left(make: type[nn.Module]) -> None:
    x = maps(2, 4, 3, 5)
    for residual, expected in ((True, x), (False, torch.zeros_like(x))):
        mixing = make(4, (3, 5), residual=residual)
        with torch.no_grad():
            for name, parameter in mixing.named_parameters():
                parameter.mul_("norm" in name)
        assert torch.equal(mixing(x), expected)


@pytest.mark.parametrize("make", [RaftTokenMixing, MixerTokenMixing])
def test_the_branch_is_the_block_less_x(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    block, branch = lively(make(4, (3, 5))), make(4, (3, 5), residual=False)
    branch.load_state_dict(block.state_dict())
    x = maps(2, 4, 3, 5)
    torch.testing.assert_close(branch(x), block(x) - x, rtol=1e-4, atol=1e-5)


def test_every_token_reaches_every_other_and_a_column_alone_stays_in_it() -> None:
    mixing = lively(raft(4, (5, 6)))
    x = maps(1, 4, 5, 6).requires_grad_()
    for i, j in ((0, 0), (2, 3), (4, 5)):
        (seen,) = torch.autograd.grad(mixing(x)[0, 1, i, j], x)
        assert (seen.abs().sum((0, 1)) > 0).all()
    mixing.horizontal.mlp = Nothing()
    (seen,) = torch.autograd.grad(mixing(x)[0, 1, 2, 3], x)
    reached = seen.abs().sum((0, 1)) > 0
    assert reached[:, 3].all()
    assert reached.sum() == 5


def test_gradcheck() -> None:
    mixing = lively(raft(4, (2, 3))).double()
    names = [n for n, _ in mixing.named_parameters()]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(mixing, dict(zip(names, given, strict=True)), (x,))

    weights = tuple(p.detach().clone().requires_grad_() for p in mixing.parameters())
    assert torch.autograd.gradcheck(run, (maps(1, 4, 2, 3).double().requires_grad_(), *weights), fast_mode=True)


def test_mlp_mixer_is_one_mlp_over_all_tokens() -> None:
    torch.manual_seed(0)
    mixing, x = lively(MixerTokenMixing(6, (3, 5))), maps(2, 6, 3, 5)
    branch = mixing.both
    normed = branch.norm(x.flatten(2).mT).mT
    up, down = branch.mlp.up, branch.mlp.down
    hidden = F.gelu(F.linear(normed, up.weight, up.bias))
    torch.testing.assert_close(mixing(x), x + F.linear(hidden, down.weight, down.bias).view_as(x))


def test_weights_start_as_torchs_linear_layers() -> None:
    up = raft(4, (63, 2), expansion=3).vertical.mlp.up
    assert up.weight.shape == (3 * 126, 126)
    for values in (up.weight, up.bias):
        assert values.abs().max() <= 126**-0.5
        assert values.detach().std() == pytest.approx(126**-0.5 / 3**0.5, rel=0.1)


def test_drop_path_leaves_whole_images_out_of_each_mlp_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = maps(1, 4, 2, 2).expand(4000, -1, -1, -1)
    mixing = RaftTokenMixing(4, (2, 2), drop_path=0.25, residual=False)
    mixing.horizontal.mlp = Nothing()
    with torch.no_grad():
        found, full = mixing(x), mixing.eval()(x[:1])
    kept = found.flatten(1).any(1)
    assert kept.float().mean() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(found[kept], (full / 0.75).expand(int(kept.sum()), -1, -1, -1))
    assert torch.equal(mixing(x[:2]), full.expand(2, -1, -1, -1))


def test_dropout_drops_in_training_only() -> None:
    torch.manual_seed(0)
    mixing, x = lively(RaftTokenMixing(4, (3, 3), dropout=0.5)), maps(2, 4, 3, 3)
    assert not torch.equal(mixing(x), mixing(x))
    assert torch.equal(mixing.eval()(x), mixing(x))


def test_threads_may_share_it() -> None:
    mixing = lively(raft(4, (3, 5)))
    before = {name: id(value) for name, value in vars(mixing).items()}
    inputs = [maps(n, 4, 3, 5, seed=n) for n in range(1, 9)]
    expected = [mixing(x) for x in inputs]
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: mixing(inputs[i])})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))
    assert {name: id(value) for name, value in vars(mixing).items()} == before


def test_channels_last_maps_come_out_as_they_went_in() -> None:
    x = maps(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    out = raft(4, (3, 5))(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, raft(4, (3, 5))(x.contiguous()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rafts": 3}, "rafts must divide width, got rafts=3 and width=8"),
        ({"rafts": 0}, "rafts must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1"),
        ({"grid": (0, 4)}, "rows must be at least 1"),
        ({"grid": (3, -1)}, "columns must be at least 1"),
        ({"expansion": 0}, "expansion must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path must be at least 0 and below 1, got -0.1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        RaftTokenMixing(**(SIZES | options))


@pytest.mark.parametrize("make", [RaftTokenMixing, MixerTokenMixing])
def test_bad_maps_are_refused(make: type[nn.Module]) -> None:
    mixing = make(**SIZES)
    assert layout_of(mixing) == "grid"
    with pytest.raises(ShapeError, match=r"built for a grid of \(3, 4\), got \(4, 3\).*ResizeTokenMixing"):
        mixing(maps(2, 8, 4, 3))
    for x in (maps(2, 4, 3, 4), maps(8, 3, 4), maps(2, 8, 3, 4).long()):
        with pytest.raises(ShapeError, match=r"floating-point maps \(B, 8, H, W\)"):
            mixing(x)
