from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor

from lamina import io
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import (
    FNO,
    MgNO,
    mgno_darcy_rough,
    mgno_darcy_smooth,
    mgno_helmholtz,
    mgno_navier_stokes,
    mgno_pipe,
    rollout,
)
from lamina.nn import MultigridLinear, SpectralConvolution
from lamina.recipe import build


def fields(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(channels: int, side: int):
    return lambda: {"inputs": fields(1, channels, side, side), "targets": fields(1, 1, side, side, seed=1)}


SMALL = {"in_channels": 1, "out_channels": 1, "width": 4, "depth": 2, "schedule": [[1, 0], [1, 1]]}
EXAMPLES = [
    Example(
        "model",
        "mgno",
        SMALL | {"input_shift": 1.0, "input_scale": 2.0, "residual_input": True, "schedule": [[1, 0], [1, 0]]},
        batch=batch(1, 6),
        bad={"width": 0},
    ),
    Example(
        "model",
        "fno",
        {"in_channels": 1, "out_channels": 1, "width": 4, "depth": 1, "modes": 2, "output_scale": [3.0]},
        batch=batch(1, 6),
        bad={"depth": 0},
        no_onnx="the Fourier transform of several axes at once",
    ),
    Example("model", "mgno_darcy_smooth", batch=batch(1, 211), size_of="mgno", bad={"in_channels": 0}),
    Example("model", "mgno_darcy_rough", batch=batch(1, 256), size_of="mgno", bad={"side": 32}),
    Example("model", "mgno_navier_stokes", batch=batch(1, 64), size_of="mgno", bad={"side": 16}),
    Example("model", "mgno_pipe", batch=batch(2, 129), size_of="mgno", bad={"out_channels": 0}),
    Example("model", "mgno_helmholtz", batch=batch(1, 101), size_of="mgno", bad={"side": 30}),
]


def mgno(**options: object) -> MgNO:
    torch.manual_seed(0)
    return MgNO(**(SMALL | options)).eval()


def fno(**options: object) -> FNO:
    torch.manual_seed(0)
    return FNO(**({"in_channels": 1, "out_channels": 1, "width": 4, "depth": 2, "modes": 3} | options)).eval()


def test_published_sizes_have_the_published_parameters() -> None:
    with torch.device("meta"):
        found = {
            make.__name__: sum(p.numel() for p in make().parameters())
            for make in (mgno_darcy_smooth, mgno_darcy_rough, mgno_navier_stokes, mgno_pipe, mgno_helmholtz)
        }
    assert found == {
        "mgno_darcy_smooth": 678_093,
        "mgno_darcy_rough": 572_661,
        "mgno_navier_stokes": 2_885_194,
        "mgno_pipe": 783_876,
        # The first step of each of the five V-cycles holds, officially, an A that it never calls: 9 u f + f numbers.
        "mgno_helmholtz": 5_351_806 - (180 + 1) - 3 * (3600 + 20) - (180 + 20),
    }
    with torch.device("meta"):
        ours = MgNO(1, 1, 16, 3, ((1, 0),) * 3 + ((2, 0),))
        theirs = FNO(1, 1, 16, 3, 8)
    assert sum(p.numel() for p in ours.parameters()) == 114_811
    assert sum(p.numel() for p in theirs.parameters()) == 198_641


def test_it_is_the_network_of_the_card() -> None:
    model, x = mgno(), fields(2, 1, 7, 6)
    v = x
    for layer in model.layers:
        w, b = layer.operator, layer.pointwise
        v = F.gelu(w(v) + F.conv2d(v, b.weight, b.bias))
    torch.testing.assert_close(model(x), F.conv2d(v, model.head.weight))
    assert model.head.bias is None
    assert [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, MultigridLinear)] == [
        (1, 4),
        (4, 4),
    ]


def test_fno_is_the_network_of_its_paper() -> None:
    model, x = fno(out_channels=2), fields(2, 1, 7, 6)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 7), torch.linspace(0, 1, 6), indexing="ij")
    v = model.lift(torch.cat((x, rows.expand(2, 1, 7, 6), columns.expand(2, 1, 7, 6)), 1))
    first, second = model.layers
    v = F.gelu(first.operator(v) + first.pointwise(v))
    v = second.operator(v) + second.pointwise(v)
    torch.testing.assert_close(model(x), model.project[2](F.gelu(model.project[0](v))))
    blind = fno(coordinates=False)
    assert blind.lift.weight.shape == (4, 1, 1, 1)
    y = fields(1, 1, 8, 8)
    torch.testing.assert_close(blind(y.roll((3, 2), (2, 3))), blind(y).roll((3, 2), (2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [mgno, fno])
def test_units_go_in_and_come_out(make) -> None:
    plain, x = make(), fields(3, 1, 8, 6)
    scaled = make(input_shift=7.5, input_scale=[4.5], output_shift=-2.0, output_scale=0.01)
    torch.testing.assert_close(scaled(x), plain((x - 7.5) / 4.5) * 0.01 - 2.0)
    batches = [
        {"inputs": 3 * fields(4, 1, 8, 6, seed=s) + 5, "targets": 1e-3 * fields(4, 1, 8, 6, seed=s + 9) - 1}
        for s in range(3)
    ]
    every = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    model = make()
    model.fit_normalizer(batches)
    z = (x - every["inputs"].mean()) / every["inputs"].std(correction=0)
    expected = plain(z) * every["targets"].std(correction=0) + every["targets"].mean()
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    model.fit_normalizer(batches, per_cell=True)
    z = (x - every["inputs"].mean(0)) / every["inputs"].std(0, correction=0)
    expected = plain(z) * every["targets"].std(0, correction=0) + every["targets"].mean(0)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ShapeError, match=r"a value a cell for a grid of \(8, 6\), got \(8, 8\)"):
        model(fields(1, 1, 8, 8))


def test_a_cell_that_never_changes_is_no_division_by_zero() -> None:
    model, y = mgno(), fields(5, 1, 6, 6)
    y[:, :, 0] = 0.0
    model.fit_normalizer([{"inputs": torch.ones(5, 1, 6, 6), "targets": y}], per_cell=True)
    assert (model.units.input_scale == 1).all()
    assert model.units.output_scale.min() > 0
    assert model(torch.ones(1, 1, 6, 6))[:, :, 0].abs().max() < 1e-3


@pytest.mark.parametrize("per_cell", [False, True])
def test_every_channel_has_units_of_its_own(per_cell: bool) -> None:
    x = fields(8, 3, 6, 6).double()
    x[:, 1] *= 1e-8  # Pascals beside fractions: its deviation is far below that of the others.
    x[:, 2] = 0.1
    model = mgno(in_channels=3)
    model.fit_normalizer([{"inputs": part, "targets": x[:4, :1]} for part in x.split(4)], per_cell=per_cell)
    scale = model.units.input_scale
    torch.testing.assert_close(
        model.units.encode(x)[:, 1].std(correction=0), torch.tensor(1.0).double(), rtol=1e-4, atol=0
    )
    assert (scale[2] == 1).all()
    if per_cell:
        x[:, 0, 0] = 2.0
        model.fit_normalizer([{"inputs": x, "targets": x[:, :1]}], per_cell=True)
        scale = model.units.input_scale[0]
        torch.testing.assert_close(scale[0], 1e-5 * scale.max().expand(6))


def test_fitted_units_are_saved_and_loaded_whatever_their_shape(tmp_path: Path) -> None:
    batches = [{"inputs": fields(4, 1, 6, 7), "targets": fields(4, 1, 6, 7, seed=1)}]
    for per_cell in (False, True):
        model = build({"name": "mgno", **SMALL}, "model").eval()
        model.fit_normalizer(batches, per_cell=per_cell)
        io.save(model, tmp_path / "saved")
        loaded, x = io.load(tmp_path / "saved"), fields(2, 1, 6, 7, seed=2)
        assert torch.equal(loaded(x), model(x))
        assert loaded.trained_grid.tolist() == [6, 7]
        other = mgno()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))


def test_units_are_float32_where_the_network_is_not() -> None:
    model, x = mgno(output_shift=1000.0), fields(2, 1, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.float32
    # bf16 has steps of 4 at 1000.
    assert 0 < (y - model(x)).abs().max() < 0.1
    assert copy.deepcopy(model).double()(x.double()).dtype is torch.float64
    assert copy.deepcopy(model).bfloat16()(x.bfloat16()).dtype is torch.bfloat16
    # 1001 is 1000 in bf16.
    shifted = mgno(output_shift=1001.0).bfloat16()
    assert shifted.units.output_shift == 1001.0
    assert shifted.units.output_shift.dtype is torch.float32
    assert shifted.head.weight.dtype is torch.bfloat16
    assert shifted.double().units.output_shift.dtype is torch.float64


def test_another_grid_than_the_one_trained_on_is_warned_about_once() -> None:
    model, x = mgno(), fields(1, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(fields(1, 1, 12, 12))  # Not trained yet.
        model.train()(x)
        model(fields(1, 1, 12, 12))
        model.eval()(x)
    state = mgno()
    state.load_state_dict(model.state_dict())
    for one in (model, state):
        with pytest.warns(UserWarning, match=r"trained on a grid of \(8, 8\) and runs on \(16, 16\)"):
            assert one(fields(1, 1, 16, 16)).shape == (1, 1, 16, 16)
        one(fields(1, 1, 16, 16))


def test_the_grid_is_read_once_and_again_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, x = mgno(), mgno(), fields(1, 1, 8, 8)
    read: list[Tensor] = []
    known = Tensor.tolist

    def tolist(self: Tensor) -> object:
        read.append(self)
        return known(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    for _ in range(3):
        model(x)
    assert len(read) == 1
    model.train()(x)
    model.eval()(x)
    assert len(read) == 1
    other.fit_normalizer([{"inputs": fields(2, 1, 12, 12), "targets": fields(2, 1, 12, 12)}])
    model.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match=r"trained on a grid of \(12, 12\) and runs on \(8, 8\)"):
        model(x)
    with pytest.warns(UserWarning, match=r"trained on a grid of \(12, 12\)"):
        other(x)
    other.told = False
    other.fit_normalizer([{"inputs": x.expand(2, 1, 8, 8) * fields(2, 1, 1, 1), "targets": fields(2, 1, 8, 8)}])
    other(x)


def test_planes_come_out_as_they_went_in() -> None:
    model, x = mgno(in_channels=2, out_channels=3), fields(2, 2, 8, 8)
    assert model(x).view(2, -1).shape == (2, 192)
    seen: list[Tensor] = []
    model.layers[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("boundary", ["dirichlet", "periodic", "neumann"])
def test_the_boundary_is_the_padding(boundary: str) -> None:
    model = mgno(boundary=boundary)
    paddings = {m.padding_mode for m in model.modules() if isinstance(m, MultigridLinear)}
    assert paddings == {{"dirichlet": "zeros", "periodic": "circular", "neumann": "reflect"}[boundary]}
    x = fields(1, 1, 8, 8)
    shifted = torch.allclose(model(x.roll(2, 2)), model(x).roll(2, 2), atol=1e-6)
    assert shifted == (boundary == "periodic")


def test_a_step_in_time_starts_from_its_input_and_is_repeated() -> None:
    model = mgno(residual_input=True, boundary="periodic")
    with torch.no_grad():
        model.head.weight.zero_()
    x = fields(2, 1, 8, 8)
    torch.testing.assert_close(model(x), x)
    many = rollout(model, x, 3)
    torch.testing.assert_close(many, x.expand(2, 3, 8, 8))
    window = mgno(in_channels=2)
    first = window(fields(1, 2, 8, 8))
    second = window(torch.cat((fields(1, 2, 8, 8)[:, 1:], first), 1))
    torch.testing.assert_close(rollout(window, fields(1, 2, 8, 8), 2), torch.cat((first, second), 1))
    with pytest.raises(ShapeError, match="gives one frame, this one gives 2"):
        rollout(mgno(in_channels=2, out_channels=2), fields(1, 2, 8, 8), 1)


def test_other_maps_stand_in_the_slot_of_the_operator() -> None:
    model = mgno(operator={"name": "spectral_convolution", "modes": 2}, activation="tanh", norm="channel_layer_norm")
    assert sum(isinstance(m, SpectralConvolution) for m in model.modules()) == 2
    assert model(fields(1, 1, 5, 9)).shape == (1, 1, 5, 9)
    named = mgno(operator={"name": "multigrid_linear", "use_residual": True, "schedule": [[2, 0]]})
    assert [len(layer.operator.levels) for layer in named.layers] == [1, 1]


def test_lines_and_volumes() -> None:
    for dim in (1, 3):
        x = fields(2, 1, *[8, 4, 4][:dim])
        for model in (mgno(dim=dim, multigrid_output=True), fno(dim=dim, modes=2)):
            assert model(x).shape == x.shape


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"boundary": "robin"}, RecipeError, "dirichlet, periodic, neumann, got 'robin'"),
        ({"depth": 0}, ShapeError, "depth must be at least 1"),
        ({"residual_input": True, "out_channels": 2}, ShapeError, "adds 1 channels to 2"),
        ({"norm": "layer_norm"}, RecipeError, "give grid"),
        ({"schedule": ((1, 0),) * 4, "grid": (8, 8)}, LaminaError, "4 levels leave 1 cells"),
        ({"input_scale": 0.0}, LaminaError, "input_scale must be above 0"),
        ({"output_shift": float("nan")}, LaminaError, "output_shift has numbers that are not finite"),
        ({"input_shift": torch.zeros(1, 2)}, ShapeError, "input_shift must be one number, one a channel or a field"),
        ({"dim": 0}, ShapeError, "dim 1, 2 or 3"),
    ],
)
def test_bad_options_are_refused(options, error, words) -> None:
    with pytest.raises(error, match=words):
        mgno(**options)


@pytest.mark.parametrize("make", [mgno, fno])
def test_bad_fields_are_refused(make) -> None:
    model = make()
    for x in (
        fields(1, 2, 8, 8),
        fields(1, 8, 8),
        fields(1, 1, 8, 8).to(torch.complex64),
        torch.ones(1, 1, 8, 8).int(),
    ):
        with pytest.raises(ShapeError, match=r"takes real floating-point fields \(B, 1, \.\.\.\) with 2 axes"):
            model(x)
    with pytest.raises(LaminaError, match="targets has numbers that are not finite"):
        model.fit_normalizer([{"inputs": fields(2, 1, 8, 8), "targets": torch.full((2, 1, 8, 8), float("nan"))}])
    with pytest.raises(LaminaError, match="no batch"):
        model.fit_normalizer([])
    with pytest.raises(LaminaError, match="'targets' in every batch"):
        model.fit_normalizer([{"inputs": fields(2, 1, 8, 8)}])
