from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn import CoordinateKernel
from lamina.nn.hyper_convolution.coordinate_kernel import coordinate_grid, renormalize, resized_positions


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "layer",
        "coordinate_kernel",
        {"dim": 2, "size": (3, 4), "out_channels": 2, "hidden": 4, "context": 3},
        inputs=lambda: (numbers(2, 3, 3, 4),),
        bad={"omega0": 0.0},
    )
]


def kernel(*args: object, **options: object) -> CoordinateKernel:
    """A kernel whose biases of positions are not zero."""
    torch.manual_seed(0)
    made = CoordinateKernel(*args, **options)
    with torch.no_grad():
        made.position_bias.copy_(numbers(*made.size, seed=3))
        made.out.bias.copy_(numbers(made.out_channels, seed=4))
    return made


def at_a_point(net: CoordinateKernel, place: tuple[int, ...], context: Tensor | None = None) -> Tensor:
    """The card's formulas at one point of the grid, without a context."""
    point = torch.tensor([-1 + 2 * i / (n - 1) if n > 1 else 0.0 for i, n in zip(place, net.size, strict=True)])
    weights, biases = net.waves.weight.chunk(net.layers + 1), net.waves.bias.chunk(net.layers + 1)
    z = torch.sin(weights[0] @ point + biases[0])
    for i, mix in enumerate(net.mixes, start=1):
        z = torch.sin(weights[i] @ point + biases[i]) * (mix.weight @ z + mix.bias) + net.position_bias[place]
    return net.out.weight @ z + net.out.bias


@pytest.mark.parametrize("size", [(1,), (7,), (63,), (3, 4), (1, 5), (2, 3, 2)])
def test_every_value_is_the_formula_at_that_point(size: tuple[int, ...]) -> None:
    net = kernel(len(size), size, 3, hidden=5, layers=3, omega0=0.5)
    values = net()
    assert values.shape == (1, 3, *size)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in size)).view(-1, len(size))[:12].tolist():
        torch.testing.assert_close(values[0, :, *place], at_a_point(net, tuple(place)), rtol=1e-4, atol=1e-5)


def test_another_size_is_the_same_function_on_a_finer_grid() -> None:
    net = kernel(2, 5, 4, omega0=0.3)
    fine = net(size=9)
    torch.testing.assert_close(fine[:, :, ::2, ::2], net(), rtol=1e-4, atol=1e-5)
    assert fine.shape == (1, 4, 9, 9)
    # In between it is the function, not an interpolation of its values.
    assert not torch.allclose(fine, F.interpolate(net(), (9, 9), mode="bilinear", align_corners=True), atol=1e-2)
    assert net(size=(2, 7)).shape == (1, 4, 2, 7)


def test_the_grid_runs_from_end_to_end_rows_first() -> None:
    grid = coordinate_grid((3, 2), torch.device("cpu"), torch.float32)
    assert grid.tolist() == [[-1, -1], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 1]]
    assert coordinate_grid((1,), torch.device("cpu"), torch.float32).tolist() == [[0]]
    assert resized_positions(torch.tensor([0.0, 2.0, 0.0]), (5,)).tolist() == [0, 1, 2, 1, 0]


def test_a_context_multiplies_after_the_renormalisation() -> None:
    net, u = kernel(2, 3, 2, hidden=4, context=3), numbers(2, 3, 3, 3)
    p, bias = coordinate_grid((3, 3), u.device, u.dtype), net.position_bias.reshape(9, 1)
    waves = [torch.sin(p @ w.T + b) for w, b in zip(net.waves.weight.chunk(3), net.waves.bias.chunk(3), strict=True)]
    for image in range(2):
        told, z = u[image].flatten(1).T, waves[0]
        for i in range(2):
            z = waves[i + 1] * net.mixes[i](z) + bias
            z = z + 0.1 * z / z.norm(dim=0, keepdim=True)
            z = z * net.contexts[i](told)
        torch.testing.assert_close(net(u)[image], net.out(z).T.view(2, 3, 3), rtol=1e-4, atol=1e-5)


def test_the_renormalisation_passes_gradients_through_the_second_term_alone() -> None:
    z, weight = numbers(2, 5, 3).double().requires_grad_(), numbers(2, 5, 3, seed=1).double()
    found = renormalize(z, 0.7, 0.1)
    norm = z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, 0.7 * z + 0.1 * z / norm)
    (gradient,) = torch.autograd.grad((found * weight).sum(), z)
    unit = z.detach() / norm.detach()
    expected = 0.1 * (weight - unit * (unit * weight).sum(1, keepdim=True)) / norm.detach()
    torch.testing.assert_close(gradient, expected)
    assert not renormalize(torch.zeros(1, 4, 2)).any()


def test_it_begins_with_gamma_frequencies_and_a_scale_of_one_over_the_positions() -> None:
    torch.manual_seed(0)
    net = CoordinateKernel(2, 8, 64, hidden=512, layers=2, omega0=3.0)
    for i, part in enumerate(net.waves.weight.chunk(3)):
        # A normal of deviation 1 (He's, two coordinates) times a gamma of mean 6 / (i + 1): E|w| is the product.
        mean = 2 * math.pi * 3.0 * 6 / (i + 1) * math.sqrt(2 / math.pi)
        assert part.abs().mean().item() == pytest.approx(mean, rel=0.12)
    assert not net.waves.bias.any()
    assert not net.position_bias.any()
    assert all((m.bias == 1).all() for m in net.mixes)
    assert net.mixes[0].weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert net.out.weight.std().item() == pytest.approx(512**-0.5 / 8, rel=0.05)


def test_it_is_computed_in_float32_under_autocast_and_from_bf16_weights() -> None:
    net = kernel(2, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(), net.forward())
        found = net()
    assert found.dtype is torch.float32
    assert torch.equal(found, net())
    for narrow in (copy.deepcopy(net).bfloat16(), copy.deepcopy(net).to("cpu", torch.half)):
        assert torch.equal(narrow(), found)
    assert copy.deepcopy(net).double()().dtype is torch.float64
    assert copy.deepcopy(net).bfloat16().to("meta").out.weight.is_meta


@pytest.mark.parametrize("omega0", [0.0, -1.0, math.nan, math.inf])
def test_a_frequency_must_be_a_positive_number(omega0: float) -> None:
    with pytest.raises(LaminaError, match="omega0 must be a finite number above 0"):
        CoordinateKernel(2, 3, 4, omega0=omega0)


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(ShapeError, match="dim must be 1, 2 or 3, got 4"):
        CoordinateKernel(4, 3, 4)
    for size in ((3, 0), (3,), 0):
        with pytest.raises(ShapeError, match="2 sizes of at least 1"):
            CoordinateKernel(2, size, 4)
    with pytest.raises(ShapeError, match="at least 1, got out_channels=0"):
        CoordinateKernel(2, 3, 0)
    with pytest.raises(ShapeError, match="built without a context"):
        CoordinateKernel(2, 3, 4)(torch.zeros(1, 3, 3, 3))
    for wrong in (None, torch.zeros(1, 3, 4, 3), torch.zeros(1, 3, 3, 3, dtype=torch.long)):
        with pytest.raises(ShapeError, match="takes a floating-point context"):
            CoordinateKernel(2, 3, 4, context=3)(wrong)
