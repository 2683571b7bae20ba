from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.experiments.mgno import contraction
from lamina.models import MetaFormer, VisionTransformer
from lamina.nn import MultigridLinear, MultigridMixer
from lamina.nn._multigrid_levels import extend, level_grids, prolong
from lamina.nn.multigrid import schedule_for


def fields(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(*shape: int) -> Tensor:
    return fields(*shape).float()


EXAMPLES = [
    Example(
        "layer",
        "multigrid_linear",
        {"in_channels": 2, "out_channels": 3, "schedule": [[1, 1], [1, 0]]},
        inputs=lambda: (small(2, 2, 6, 7),),
        bad={"schedule": [[0, 1]]},
    ),
    Example(
        "layer",
        "multigrid_linear",
        {"in_channels": 2, "out_channels": 2, "schedule": [[1, 0], [1, 0]], "padding_mode": "circular"}
        | {"use_residual": True, "bias": True, "norm": "layer_norm", "grid": [4, 6], "widen": True},
        inputs=lambda: (small(2, 2, 4, 6),),
        bad={"grid": None},
    ),
    Example(
        "mixer",
        "multigrid_linear",
        {"width": 4, "grid": (8, 7), "padding_mode": "reflect"},
        inputs=lambda: (small(2, 4, 8, 7),),
        bad={"width": 0},
    ),
]


def cycle(*args: object, **options: object) -> MultigridLinear:
    torch.manual_seed(0)
    return MultigridLinear(*args, **options).double()


MODES = ("zeros", "circular", "reflect")


def naive(f: Tensor, w: MultigridLinear) -> Tensor:
    """The V-cycle as the card writes it, cell by cell: no convolution of torch's."""
    mode = w.padding_mode

    def at(x: Tensor, i: int, n: int) -> int | None:
        if 0 <= i < n:
            return i
        if mode == "zeros":
            return None
        return i % n if mode == "circular" else (-i if i < 0 else 2 * (n - 1) - i)

    def conv(layer: nn.Module, x: Tensor, stride: int = 1) -> Tensor:
        (h, v), weight = x.shape[2:], layer.weight
        rows, columns = -(-h // stride), -(-v // stride)
        out = []
        for i in range(rows):
            for j in range(columns):
                total = torch.zeros(len(x), weight.shape[0], dtype=x.dtype)
                for p in range(3):
                    for q in range(3):
                        a, b = at(x, stride * i + p - 1, h), at(x, stride * j + q - 1, v)
                        if a is not None and b is not None:
                            total = total + x[:, :, a, b] @ weight[:, :, p, q].T
                out.append(total if layer.bias is None else total + layer.bias)
        return torch.stack(out, -1).unflatten(-1, (rows, columns))

    def up(layer: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
        weight, out = layer.weight, []
        for i in range(size[0]):
            for j in range(size[1]):
                total = torch.zeros(len(x), weight.shape[1], dtype=x.dtype)
                # Coarse cell s lies at fine cell 2 s, tap p of its kernel at 2 s - 1 + p.
                for s in range(-1, x.shape[2] + 1):
                    for t in range(-1, x.shape[3] + 1):
                        p, q = i - 2 * s + 1, j - 2 * t + 1
                        if not (0 <= p < weight.shape[2] and 0 <= q < weight.shape[3]):
                            continue
                        a, b = beyond(s, x.shape[2], size[0]), beyond(t, x.shape[3], size[1])
                        if a is not None and b is not None:
                            total = total + x[:, :, a, b] @ weight[:, :, p, q]
                out.append(total)
        return torch.stack(out, -1).unflatten(-1, size)

    def beyond(s: int, coarse: int, fine: int) -> int | None:
        if 0 <= s < coarse:
            return s
        if mode == "zeros":
            return None
        if mode == "circular":
            return s % coarse
        # Reflect the fine cell at the fine boundary; the coarse cells are the even fine ones, the nearest from inside.
        return abs(s) if s < 0 else (2 * (fine - 1) - 2 * s) // 2

    def smooth(step: nn.Module, u: Tensor | None, f: Tensor) -> Tensor:
        if u is None:
            return conv(step.smoother, f)
        return u + conv(step.smoother, f - conv(step.operator, u))

    kept, u = [], None
    for level in w.levels:
        for step in level.pre:
            u = smooth(step, u, f)
        kept.append((u, f))
        if level.restriction is not None:
            rest = f - conv(level.restriction.operator, u) if level.restriction.operator is not None else f
            u, f = conv(level.restriction.of_u, u, 2), conv(level.restriction.of_f, rest, 2)
    for j in reversed(range(len(w.levels) - 1)):
        fine, f = kept[j]
        u = fine + up(w.levels[j].prolongation.conv, u, tuple(fine.shape[2:]))
        for step in w.levels[j].post:
            u = smooth(step, u, f)
    return u


CASES = [
    ("zeros", ((1, 0), (2, 1), (1, 0)), (7, 6), {"use_residual": True}),
    ("circular", ((1, 1), (0, 0), (1, 0)), (8, 8), {"bias": True}),
    ("reflect", ((1, 0), (0, 1), (1, 0)), (5, 6), {"grid": (5, 6)}),
    ("zeros", ((2, 1),), (1, 3), {}),
]


@pytest.mark.parametrize(("mode", "schedule", "size", "options"), CASES)
def test_it_is_the_v_cycle_cell_by_cell_with_all_gradients(mode, schedule, size, options) -> None:
    w, f = cycle(2, 3, schedule, padding_mode=mode, **options), fields(2, 2, *size)
    inputs = [f.clone().requires_grad_(), f.clone().requires_grad_()]
    outputs = [w(inputs[0]), naive(inputs[1], w)]
    torch.testing.assert_close(outputs[0], outputs[1])
    weight = fields(*outputs[0].shape, seed=1)
    found = [
        torch.autograd.grad((o * weight).sum(), [i, *w.parameters()]) for o, i in zip(outputs, inputs, strict=True)
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    low = copy.deepcopy(w).bfloat16()(f.bfloat16())
    assert (low.double() - outputs[0]).abs().max() < 0.05 * outputs[0].abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_it_is_linear_and_autograd_gives_its_adjoint(mode: str) -> None:
    w = cycle(2, 3, ((1, 1), (1, 0), (2, 0)), padding_mode=mode, use_residual=True)
    f, g = fields(2, 2, 13, 10), fields(2, 2, 13, 10, seed=1)
    torch.testing.assert_close(w(2.5 * f - 3 * g), 2.5 * w(f) - 3 * w(g), rtol=1e-10, atol=1e-10)
    assert not w(torch.zeros_like(f)).any()
    out = w(f.requires_grad_())
    other = fields(*out.shape, seed=2)
    (adjoint,) = torch.autograd.grad((out * other).sum(), f)
    torch.testing.assert_close((out * other).sum(), (f * adjoint).sum(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(cycle(2, 3, ((1, 0),), bias=True)(0 * f), torch.zeros(()).double())


RATES = {(1, 0): 0.595, (1, 1): 0.369, (2, 1): 0.24, (2, 2): 0.19}


@pytest.mark.parametrize("steps", [(1, 0), (2, 2)])
def test_with_the_weights_of_a_textbook_it_is_multigrid(steps: tuple[int, int]) -> None:
    assert contraction(32, *steps, cycles=40) == pytest.approx(RATES[steps], abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("n", [32, 64, 128])
@pytest.mark.parametrize("steps", RATES)
def test_the_factor_does_not_depend_on_the_grid(n: int, steps: tuple[int, int]) -> None:
    assert contraction(n, *steps) == pytest.approx(RATES[steps], abs=0.015)


@pytest.mark.parametrize("way", ["match", "zeros"])
@pytest.mark.parametrize("mode", MODES)
def test_only_a_periodic_cycle_commutes_with_shifts(mode: str, way: str) -> None:
    w = cycle(1, 2, ((1, 0), (1, 1), (1, 0)), padding_mode=mode, transposed_padding=way)
    f = fields(1, 1, 16, 8)
    periodic = mode == "circular" and way == "match"
    for shift in ((4, 0), (0, 4), (8, -4)):
        moved = w(f.roll(shift, (2, 3)))
        assert torch.allclose(moved, w(f).roll(shift, (2, 3)), atol=1e-12) == periodic
    assert not torch.allclose(w(f.roll(1, 2)), w(f).roll(1, 2), atol=1e-3)


def symmetric(w: MultigridLinear) -> MultigridLinear:
    """Kernels that look the same in a mirror."""
    with torch.no_grad():
        for p in w.parameters():
            core = p[..., :3, :3]
            core = core + core.flip(-1)
            core = core + core.flip(-2)
            p.zero_()
            p[..., :3, :3] = core
    return w


@pytest.mark.parametrize("kernel", ["three", "four"])
def test_reflection_is_the_periodic_cycle_on_the_mirrored_field(kernel: str) -> None:
    """No flux through the boundary: as if the field went on in a mirror standing on its last cells."""
    options = {"use_residual": True, "grid": (17, 9) if kernel == "three" else None}
    schedule = ((1, 1), (1, 0), (1, 0))
    neumann = symmetric(cycle(1, 2, schedule, padding_mode="reflect", **options))
    periodic = cycle(1, 2, schedule, padding_mode="circular", use_residual=True)
    with torch.no_grad():
        for p, q in zip(periodic.parameters(), neumann.parameters(), strict=True):
            p.zero_()
            p[..., : q.shape[-2], : q.shape[-1]] = q
    f = fields(1, 1, 17, 9)
    mirrored = torch.cat((f, f[:, :, 1:-1].flip(2)), 2)
    mirrored = torch.cat((mirrored, mirrored[..., 1:-1].flip(3)), 3)
    torch.testing.assert_close(neumann(f), periodic(mirrored)[..., :17, :9])


def test_what_lies_beyond_an_even_grid_is_the_mirror_of_the_last_coarse_cell() -> None:
    x = torch.arange(1.0, 5.0).view(1, 1, 4)
    assert extend(x, (8,), "reflect").flatten().tolist() == [2, 1, 2, 3, 4, 4]
    assert extend(x, (7,), "reflect").flatten().tolist() == [2, 1, 2, 3, 4, 3]
    assert extend(x, (8,), "circular").flatten().tolist() == [4, 1, 2, 3, 4, 1]


@pytest.mark.parametrize("padded", [True, False])
def test_the_way_up_is_the_transpose_of_the_way_down(padded: bool) -> None:
    for n in (8, 11, 12):
        m = level_grids((n,), 2, padded=padded)[1][0]
        weight, coarse, fine = fields(2, 3, 3), fields(1, 2, m, seed=1), fields(1, 3, n, seed=2)
        down = F.conv1d(fine, weight, None, 2, 1 if padded else 0)
        up = prolong(coarse, weight, (n,), "zeros", padded=padded)
        torch.testing.assert_close((up * fine).sum(), (coarse * down).sum())


def test_the_number_of_levels_decides_how_far_a_cell_is_seen() -> None:
    n, f = 32, torch.zeros(1, 1, 32, 32).double()
    f[0, 0, -1, -1] = 1.0
    assert cycle(1, 1, ((1, 0),) * 5)(f)[0, 0, 0, 0] != 0
    assert cycle(1, 1, ((1, 0),))(f)[0, 0, 0, 0] == 0
    (reach,) = (cycle(1, 1, ((2, 0),))(f)[0, 0] != 0).any(0).nonzero()[:1].tolist()
    assert reach == [n - 4]


@pytest.mark.parametrize("size", [(211, 211), (129, 129), (100, 64), (7, 63), (63, 7)])
def test_shapes_are_kept_and_parameters_do_not_depend_on_the_size_unless_it_is_named(size: tuple[int, int]) -> None:
    for bound in (None, size):
        with torch.device("meta"):
            w = MultigridLinear(2, 3, ((1, 0), (1, 0), (1, 0)), grid=bound)
            assert w(torch.empty(1, 2, *size)).shape == (1, 3, *size)
            # At a size with other parities than the one named, too.
            assert w(torch.empty(1, 2, 40, 41)).shape == (1, 3, 40, 41)
        kernels = [tuple(level.prolongation.conv.weight.shape[2:]) for level in w.levels[:-1]]
        sizes = level_grids(size, 3)[:-1]
        assert kernels == [tuple(3 if n % 2 else 4 for n in s) if bound else (4, 4) for s in sizes]


def test_planes_keep_their_format() -> None:
    w, f = cycle(3, 2, ((1, 0), (1, 1))), fields(2, 3, 8, 8)
    assert w(f).view(2, -1).shape == (2, 128)
    found = w(f.contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, w(f))


@pytest.mark.parametrize("dim", [1, 3])
def test_lines_and_volumes(dim: int) -> None:
    w = cycle(1, 2, ((1, 0), (1, 1)), dim=dim, padding_mode="circular")
    f = fields(2, 1, *[6, 4, 8][:dim])
    assert w(f).shape == (2, 2, *f.shape[2:])
    torch.testing.assert_close(w(f.roll(2, 2)), w(f).roll(2, 2))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=3))
def test_parameters_are_counted_by_the_formula(cf: int, cu: int, below: list[tuple[int, int]]) -> None:
    schedule = [(1, 0), *below, (1, 0)] if below else [(1, 0)]
    with torch.device("meta"):
        w = MultigridLinear(cf, cu, schedule)
    steps, ways = 2 * sum(a + b for a, b in schedule) - 1, len(schedule) - 1
    assert sum(p.numel() for p in w.parameters()) == 9 * cf * cu * steps + ways * (9 * (cu**2 + cf**2) + 16 * cu**2)


def test_the_cost_is_linear_in_the_number_of_cells() -> None:
    w = MultigridLinear(4, 4, ((1, 0),) * 5 + ((2, 0),)).to("meta")

    def cost(n: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            w(torch.empty(1, 4, n, n, device="meta"))
        return counter.get_total_flops()

    assert cost(256) == 4 * cost(128)
    # All coarser levels together cost less than the way to them.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        MultigridLinear(4, 4, ((1, 0), (1, 0))).to("meta")(torch.empty(1, 4, 256, 256, device="meta"))
    assert cost(256) < 1.4 * counter.get_total_flops()


def test_a_norm_over_the_grid_is_bound_to_it_and_one_of_channels_is_not() -> None:
    bound = MultigridLinear(2, 4, ((1, 0), (1, 0)), norm="layer_norm", grid=(8, 6))
    assert tuple(bound.levels[0].norm.normalized_shape) == (4, 8, 6)
    assert isinstance(bound.levels[-1].norm, nn.Identity)
    u = bound(small(3, 2, 8, 6))
    torch.testing.assert_close(u.mean((1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    with pytest.raises(ShapeError, match=r"built for \(8, 6\), got \(8, 8\)"):
        bound(small(1, 2, 8, 8))
    with pytest.raises(RecipeError, match="give grid"):
        MultigridLinear(2, 4, ((1, 0), (1, 0)), norm="layer_norm")
    free = MultigridLinear(2, 4, ((1, 0), (1, 0)), norm="channel_layer_norm")
    assert free(small(1, 2, 9, 11)).shape == (1, 4, 9, 11)


def test_levels_widen_and_shrink_without_padding() -> None:
    w = MultigridLinear(1, 4, ((1, 0),) * 3, widen=True, pad_restriction=False, padding_mode="reflect", grid=(25, 24))
    assert [level.pre[0].smoother.weight.shape[:2] for level in w.levels] == [(4, 1), (8, 2), (12, 3)]
    assert level_grids((101,), 5, padded=False) == [(101,), (50,), (24,), (11,), (5,)]
    assert w(small(1, 1, 25, 24)).shape == (1, 4, 25, 24)
    assert w.levels[0].prolongation.padding == "zeros"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"schedule": ((0, 1), (1, 0))}, ShapeError, r"must begin with a smoothing step: schedule\[0\] is \(0, 1\)"),
        ({"schedule": ()}, ShapeError, "two counts a level"),
        ({"schedule": ((1, -1),)}, ShapeError, "none negative"),
        ({"schedule": ((1, 0), (0, 0))}, ShapeError, "coarsest level must have a smoothing step"),
        ({"schedule": ((1, 0),) * 5, "grid": (16, 12)}, ShapeError, r"5 levels leave 1 cells of a grid of \(16, 12\)"),
        ({"padding_mode": "replicate"}, RecipeError, "'zeros', 'circular' or 'reflect', got 'replicate'"),
        ({"transposed_padding": "same"}, RecipeError, "'match' or 'zeros', got 'same'"),
        ({"dim": 4}, ShapeError, "dim 1, 2 or 3"),
        ({"grid": (8,)}, ShapeError, "2 sizes"),
        ({"in_channels": 0}, ShapeError, "at least 1"),
    ],
)
def test_bad_options_are_refused(options, error, words) -> None:
    with pytest.raises(error, match=words):
        MultigridLinear(**({"in_channels": 1, "out_channels": 1} | options))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (torch.zeros(1, 3, 16, 16), r"fields \(B, 2, H, W\), got torch.float32 \(1, 3, 16, 16\)"),
        (torch.zeros(1, 2, 16), "real floating-point"),
        (torch.zeros(1, 2, 16, 16, dtype=torch.complex64), "real floating-point.*complex64"),
        (torch.zeros(1, 2, 16, 8), "4 levels leave 1 cells"),
        (torch.zeros(1, 2, 1, 16), "4 levels leave 1 cells"),
    ],
)
def test_bad_fields_are_refused(field: Tensor, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        MultigridLinear(2, 1)(field)


def test_one_cell_is_a_grid_where_there_is_one_level() -> None:
    assert MultigridLinear(1, 1, ((1, 0),))(torch.ones(1, 1, 1, 1)).shape == (1, 1, 1, 1)
    with pytest.raises(ShapeError, match="needs 2"):
        MultigridLinear(1, 1, ((1, 0),), padding_mode="reflect")(torch.ones(1, 1, 1, 3))


def test_a_mixer_takes_as_many_levels_as_leave_four_cells() -> None:
    assert schedule_for((14, 14)) == ((1, 0), (1, 0), (2, 0))
    assert schedule_for((32, 100)) == ((1, 0), (1, 0), (1, 0), (2, 0))
    assert schedule_for((3, 3)) == ((2, 0),)
    with pytest.raises(RecipeError, match="give grid"):
        MultigridMixer(4)
    torch.manual_seed(0)
    meta = MetaFormer(
        (1, 1), (8, 16), mixers={"name": "multigrid_linear", "padding_mode": "reflect"}, classes=5, image=32
    )
    vit = VisionTransformer(16, 2, 2, 8, 2, classes=5, pool="mean", mixer="multigrid_linear")
    for model, size in ((meta, (32, 32)), (meta, (40, 56)), (vit, (16, 16))):
        mixers = [m for m in model.modules() if isinstance(m, MultigridMixer)]
        assert len(mixers) == 2
        model.zero_grad()
        model(small(2, 3, *size)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert [m.schedule for m in meta.modules() if isinstance(m, MultigridMixer)] == [((1, 0), (2, 0)), ((2, 0),)]


def test_a_schedule_says_more_than_the_grid() -> None:
    assert MultigridMixer(4, schedule=((1, 1), (1, 0)))(small(1, 4, 5, 9)).shape == (1, 4, 5, 9)
    with pytest.raises(LaminaError, match="levels leave"):
        MultigridMixer(4, (3, 3), ((1, 0),) * 4)
