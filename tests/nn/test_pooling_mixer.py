from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor, nn

from lamina import registry
from lamina.errors import LaminaError, ShapeError
from lamina.nn import ChannelLayerNorm, ChannelNorm2d, IdentityMixer, PoolingMixer, RandomMixer, SpatialLinearMixer
from lamina.nn.layout import layout_of
from lamina.nn.pooling_mixer import pool_and_subtract


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


GRID = (3, 4)
EXAMPLES = [
    Example("mixer", "pooling_mixer", inputs=lambda: (maps(2, 8, 3, 4),), bad={"kernel_size": 4}),
    Example("mixer", "identity_mixer", inputs=lambda: (maps(2, 8, 3, 4),)),
    Example("mixer", "random_mixer", {"grid": GRID}, inputs=lambda: (maps(2, 8, 3, 4),), bad={"grid": (0, 4)}),
    Example("mixer", "spatial_linear_mixer", {"grid": GRID}, inputs=lambda: (maps(2, 8, 3, 4),), bad={"grid": (3, -1)}),
    Example("norm", "channel_norm_2d", {"num_channels": 8}, inputs=lambda: (maps(2, 8, 3, 4),)),
]


def test_a_constant_image_pools_to_exactly_zero_everywhere() -> None:
    for size in ((1, 1), (1, 5), (4, 7)):
        assert not PoolingMixer()(torch.full((1, 2, *size), 0.75)).any()
        assert not PoolingMixer(kernel_size=5)(torch.full((1, 2, *size), -3.0)).any()
        # A constant that nine times itself is rounded.
        assert PoolingMixer()(torch.full((1, 2, *size), 0.7)).abs().max() < 1e-6


@pytest.mark.parametrize(("place", "neighbours"), [((0, 0), 4), ((0, 2), 6), ((2, 2), 9), ((4, 4), 4), ((3, 0), 6)])
def test_a_delta_is_shared_among_the_valid_neighbours(place: tuple[int, int], neighbours: int) -> None:
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, *place] = 1.0
    assert PoolingMixer()(x)[0, 0, *place] == pytest.approx(1 / neighbours - 1, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3, 5]))
def test_pooling_is_the_naive_mean_of_what_is_inside(height: int, width: int, size: int) -> None:
    x, reach = maps(2, 3, height, width).double(), size // 2
    expected = torch.empty_like(x)
    for i in range(height):
        for j in range(width):
            near = x[:, :, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
            expected[:, :, i, j] = near.mean((2, 3)) - x[:, :, i, j]
    torch.testing.assert_close(pool_and_subtract(x, size), expected)


def test_it_is_the_port_of_transformers() -> None:
    poolformer = pytest.importorskip("transformers.models.poolformer.modeling_poolformer")
    x = maps(2, 3, 6, 5)
    assert torch.equal(PoolingMixer(kernel_size=5)(x), poolformer.PoolFormerPooling(5)(x))


def test_the_identity_is_x() -> None:
    x = maps(1, 2, 3, 4)
    assert IdentityMixer()(x) is x


def test_rows_of_the_random_matrix_are_frozen_weights() -> None:
    mixer = RandomMixer(GRID, seed=3)
    torch.testing.assert_close(mixer.weights.sum(1), torch.ones(12))
    assert (mixer.weights > 0).all()
    assert list(mixer.parameters()) == []
    drawn = torch.rand(12, 12, generator=torch.Generator().manual_seed(3)).softmax(1)
    x = maps(2, 8, *GRID)
    expected = torch.einsum("ts,bcs->bct", drawn, x.flatten(2)).view_as(x)
    torch.testing.assert_close(mixer(x), expected)
    torch.manual_seed(0)
    assert not torch.equal(RandomMixer(GRID).weights, RandomMixer(GRID).weights)


def test_the_random_matrix_is_built_and_filled_from_meta() -> None:
    for seed in (None, 0):
        with torch.device("meta"):
            mixer = RandomMixer(GRID, seed=seed)
        assert mixer.weights.is_meta
    mixer.to_empty(device="cpu").load_state_dict(RandomMixer(GRID, seed=0).state_dict())
    assert torch.equal(mixer.weights, RandomMixer(GRID, seed=0).weights)


def test_the_spatial_layer_mixes_cells_and_no_channels() -> None:
    torch.manual_seed(0)
    mixer = SpatialLinearMixer(GRID)
    assert [tuple(p.shape) for p in mixer.parameters()] == [(12, 12)]
    x = maps(2, 8, *GRID)
    expected = torch.stack([x.flatten(2)[:, c] @ mixer.linear.weight.T for c in range(8)], dim=1).view_as(x)
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize("make", [RandomMixer, SpatialLinearMixer])
def test_a_mixer_bound_to_a_grid_says_so(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(ShapeError, match=r"built for a grid of \(3, 4\), got \(4, 3\)"):
        make(GRID)(maps(2, 8, 4, 3))
    with pytest.raises(ShapeError, match="at least 1"):
        make((3, 0))


@pytest.mark.parametrize("size", [0, 2, -1])
def test_an_even_neighbourhood_is_refused(size: int) -> None:
    with pytest.raises(ShapeError, match=rf"odd and positive.*got {size}"):
        PoolingMixer(kernel_size=size)


@pytest.mark.parametrize("name", ["pooling_mixer", "identity_mixer", "random_mixer", "spatial_linear_mixer"])
def test_the_arms_of_the_comparison_take_images(name: str) -> None:
    assert registry.find("mixer", name).layout == "grid"
    assert layout_of(registry.find("mixer", name)) == "grid"


def test_channel_norm_is_the_layer_norm_of_each_cell_and_not_the_one_group_norm() -> None:
    norm, x = ChannelNorm2d(8), 2 * maps(2, 8, *GRID) + 1
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
        norm.bias.copy_(torch.linspace(-1, 1, 8))
    for b, i, j in ((0, 0, 0), (1, 2, 3)):
        torch.testing.assert_close(norm(x)[b, :, i, j], F.layer_norm(x[b, :, i, j], (8,), norm.weight, norm.bias))
    assert not torch.allclose(ChannelNorm2d(8)(x), ChannelLayerNorm(8)(x), atol=1e-2)


def test_the_one_group_norm_looks_at_one_image_as_a_whole() -> None:
    x = 2 * maps(3, 8, *GRID) + 1
    norm = ChannelLayerNorm(8)
    torch.testing.assert_close(norm(x), F.group_norm(x, 1))
    torch.testing.assert_close(norm(x)[1:2], norm(x[1:2]))
    torch.testing.assert_close(norm(x).mean((1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert not torch.allclose(norm(x).mean(1), torch.zeros(3, *GRID), atol=1e-2)


def test_a_wrong_channel_count_is_refused() -> None:
    with pytest.raises((LaminaError, RuntimeError), match="8"):
        ChannelNorm2d(8)(maps(1, 6, 2, 2))
