from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor

from lamina.errors import ShapeError
from lamina.nn import SpectralConvolution


def fields(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXAMPLES = [
    Example(
        "layer",
        "spectral_convolution",
        {"in_channels": 2, "out_channels": 3, "modes": 2},
        inputs=lambda: (fields(2, 2, 6, 5).float(),),
        bad={"modes": 0},
        no_onnx="the Fourier transform of several axes at once",
    )
]


def layer(*args: object, **options: object) -> SpectralConvolution:
    torch.manual_seed(0)
    return SpectralConvolution(*args, **options).double()


def naive(x: Tensor, conv: SpectralConvolution) -> Tensor:
    """Sums of waves, frequency by frequency; what the weights are not told of is zero."""
    n, m = x.shape[2:]
    weight, (k1, k2) = torch.view_as_complex(conv.weight.detach()), conv.modes
    rows, columns = torch.arange(n).double(), torch.arange(m).double()
    out = torch.zeros(len(x), weight.shape[2], n, m, dtype=torch.float64)
    for a in range(-min(k1, n // 2), min(k1, n // 2)):
        for b in range(min(k2, m // 2 + 1)):
            wave = torch.exp(2j * math.pi * (a * rows[:, None] / n + b * columns / m))
            found = (x * wave.conj()).sum((2, 3)) / (n * m)
            matrix = weight[1, :, :, k1 + a, b] if a < 0 else weight[0, :, :, a, b]
            # Every wave but those of the half plane's edge has a mirror image that completes it to a real one.
            twice = 1 if b == 0 or 2 * b == m else 2
            out = out + twice * torch.einsum("bi,io,nm->bonm", found, matrix, wave).real
    return out


@pytest.mark.parametrize(("size", "modes"), [((6, 8), 2), ((7, 5), (3, 2)), ((4, 3), 9), ((63, 7), 3)])
def test_it_is_a_sum_of_waves_with_learned_matrices(size: tuple[int, int], modes: int) -> None:
    conv, x = layer(2, 3, modes), fields(2, 2, *size)
    torch.testing.assert_close(conv(x), naive(x, conv))
    low = copy.deepcopy(conv).bfloat16()(x.bfloat16())
    assert low.dtype is torch.bfloat16
    assert (low.double() - conv(x)).abs().max() < 0.05 * conv(x).abs().max()


def test_its_gradients_are_right() -> None:
    conv, x = layer(1, 2, 2), fields(1, 1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(conv, {"weight": w}, (x,)), (x, conv.weight)
    )


def test_it_commutes_with_shifts_and_drops_what_is_higher() -> None:
    conv, x = layer(2, 2, 3), fields(1, 2, 12, 10)
    torch.testing.assert_close(conv(x.roll((5, 3), (2, 3))), conv(x).roll((5, 3), (2, 3)))
    high = torch.cos(2 * math.pi * 4 * torch.arange(12).double() / 12)[:, None].expand(1, 2, 12, 10)
    assert conv(high).abs().max() < 1e-12


def test_the_same_waves_on_a_finer_grid_give_the_same_output() -> None:
    conv = layer(1, 1, 3)

    def waves(n: int) -> Tensor:
        t = 2 * math.pi * torch.arange(n).double() / n
        return (torch.cos(t)[:, None] * torch.sin(2 * t) + torch.sin(2 * t)[:, None])[None, None]

    torch.testing.assert_close(conv(waves(48))[..., ::4, ::4], conv(waves(12)))


@pytest.mark.parametrize("dim", [1, 3])
def test_lines_and_volumes(dim: int) -> None:
    conv = layer(2, 3, 2, dim=dim)
    x = fields(2, 2, *[6, 4, 8][:dim])
    assert conv(x).shape == (2, 3, *x.shape[2:])
    torch.testing.assert_close(conv(x.roll(1, 2)), conv(x).roll(1, 2))
    assert conv.weight.shape == (2 ** (dim - 1), 2, 3, *[2] * dim, 2)
    assert conv(fields(1, 2, *[1] * dim)).shape == (1, 3, *[1] * dim)


@pytest.mark.parametrize("options", [{"in_channels": 0}, {"modes": (2, 3, 4)}, {"modes": (2, 0)}, {"dim": 4}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        SpectralConvolution(**({"in_channels": 1, "out_channels": 1} | options))


def test_bad_fields_are_refused() -> None:
    for x in (fields(1, 3, 4, 4), fields(1, 2, 4), fields(1, 2, 4, 4).to(torch.complex128)):
        with pytest.raises(ShapeError, match="real floating-point"):
            layer(2, 1)(x)
