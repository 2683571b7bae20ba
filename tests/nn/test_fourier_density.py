from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import FourierDensity, FourierDistribution


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXAMPLES = [
    Example(
        "layer",
        "fourier_density",
        {"in_features": 6, "num_frequencies": 4},
        lambda: (normal(3, 2, 6).float(),),
        bad={"num_frequencies": 0},
        no_compile="returns a torch.distributions.Distribution, which no graph can; its methods compile (tested here)",
    )
]


def distribution(*batch: int, frequencies: int = 5, **options: Any) -> FourierDistribution:
    return FourierDistribution(normal(*batch, frequencies + 1), normal(*batch, frequencies + 1, seed=1), **options)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("frequencies", [1, 7, 63])
def test_moments_cdf_and_density_are_those_of_its_integral(frequencies: int, eps: float) -> None:
    one = distribution(frequencies=frequencies, eps=eps)
    z = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    p = one.log_prob(z).exp()
    assert torch.trapezoid(p, z).item() == pytest.approx(1, abs=1e-6)
    assert one.mean.item() == pytest.approx(torch.trapezoid(p * z, z).item(), abs=1e-6)
    spread = torch.trapezoid(p * (z - one.mean).square(), z).item()
    assert one.variance.item() == pytest.approx(spread, abs=1e-6)
    assert one.cdf(z[:1]).item() == pytest.approx(0, abs=1e-12)
    assert one.cdf(z[-1:]).item() == pytest.approx(1, abs=1e-12)
    steps = torch.cumulative_trapezoid(p, z)
    torch.testing.assert_close(one.cdf(z[1:]), steps, rtol=0, atol=1e-6)


def test_the_closed_form_of_one_frequency() -> None:
    one = FourierDistribution(torch.tensor([1.0, 1.0]), torch.zeros(2), eps=0.0)
    z = torch.tensor([-0.5, 0.0, 0.25])
    torch.testing.assert_close(one.log_prob(z).exp(), (1 + torch.cos(math.pi * z)) / 2)
    torch.testing.assert_close(one.cdf(z), (z + 1) / 2 + torch.sin(math.pi * z) / (2 * math.pi))
    assert one.mean.item() == pytest.approx(0, abs=1e-7)
    assert one.variance.item() == pytest.approx(1 / 3 - 2 / math.pi**2, abs=1e-6)


def test_the_derivative_of_the_cdf_is_the_density() -> None:
    one = distribution(3)
    z = torch.tensor([-0.7, 0.1, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(one.cdf, z)
    (slope,) = torch.autograd.grad(one.cdf(z).sum(), z)
    torch.testing.assert_close(slope, one.log_prob(z).exp())


def test_gradients_reach_the_coefficients() -> None:
    z = torch.tensor([-0.7, 0.6], dtype=torch.float64)

    def values(re: Tensor, im: Tensor) -> tuple[Tensor, ...]:
        one = FourierDistribution(re, im, validate_args=False)
        return one.log_prob(z), one.cdf(z), one.mean, one.variance

    parts = [normal(2, 4, seed=s).requires_grad_() for s in (0, 1)]
    assert torch.autograd.gradcheck(values, parts)


@pytest.mark.parametrize(("frequencies", "count"), [(1, 20_000), (8, 20_000), (64, 4_000)])
def test_samples_pass_a_test_against_the_cdf(frequencies: int, count: int) -> None:
    torch.manual_seed(0)
    one = distribution(frequencies=frequencies)
    drawn = one.sample((count,))
    assert kstest(drawn.numpy(), lambda z: one.cdf(torch.from_numpy(z)).numpy()).pvalue > 1e-3
    assert kstest(drawn.numpy(), lambda z: (z + 1) / 2).pvalue < 1e-3, "not uniform"


def test_a_floor_is_in_samples_and_quantiles_too() -> None:
    one = distribution(eps=3.0)
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(one.cdf(one.icdf(u)), u, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    drawn = one.sample((5_000,))
    assert kstest(drawn.numpy(), lambda z: one.cdf(torch.from_numpy(z)).numpy()).pvalue > 1e-3


def test_the_gradient_of_a_sample_is_that_of_its_quantile() -> None:
    re, im = normal(6).requires_grad_(), normal(6, seed=1).requires_grad_()
    torch.manual_seed(0)
    u = torch.rand(4, dtype=torch.float64)
    torch.manual_seed(0)
    drawn = FourierDistribution(re, im).rsample((4,))
    (found,) = torch.autograd.grad(drawn.sum(), re)
    step = 1e-3
    for k in (0, 2, 5):
        moved = [re.detach().clone() for _ in range(2)]
        moved[0][k] += step
        moved[1][k] -= step
        high, low = (FourierDistribution(m, im.detach()).icdf(u).sum() for m in moved)
        assert found[k].item() == pytest.approx(((high - low) / (2 * step)).item(), rel=1e-3, abs=1e-3)
    torch.testing.assert_close(FourierDistribution(re, im).icdf(u), drawn.detach())


def test_shapes_follow_torchs_rules_for_distributions() -> None:
    one = distribution(3, 2)
    assert one.batch_shape == (3, 2)
    assert one.sample((4,)).shape == (4, 3, 2)
    assert one.log_prob(torch.zeros(5, 1, 1)).shape == (5, 3, 2)
    wide = distribution(2).expand((3, 2))
    assert torch.equal(wide.log_prob(torch.zeros(3, 2)), distribution(2).log_prob(torch.zeros(2)).expand(3, 2))
    assert torch.distributions.Independent(one, 1).log_prob(torch.zeros(3, 2)).shape == (3,)


def test_the_layer_learns_a_density_that_no_gaussian_has() -> None:
    torch.manual_seed(0)
    layer, x = FourierDensity(1, 6), torch.ones(256, 1)
    side = torch.randint(0, 2, (256,)) * 2 - 1
    target = 0.5 * side + 0.05 * torch.randn(256)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -layer(x).log_prob(target).mean()
        loss.backward()
        optimizer.step()
    gaussian = -torch.distributions.Normal(target.mean(), target.std()).log_prob(target).mean()
    assert loss < gaussian - 0.5
    p = layer(x[:1]).log_prob(torch.tensor([-0.5, 0.0, 0.5])).exp()
    assert p[0] > 5 * p[1] < p[2]


def test_its_methods_compile_in_one_graph_and_run_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x, z = FourierDensity(6, 4), normal(3, 6).float(), torch.tensor([-0.5, 0.0, 0.7])

    def loss(x: Tensor) -> Tensor:
        one = layer(x)
        return one.log_prob(z).sum() + one.cdf(z).sum() + one.mean.sum()

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).log_prob(z).dtype == torch.float32
        torch.testing.assert_close(layer(x).mean, layer(x.bfloat16().float()).mean)
        torch.testing.assert_close(layer(x).mean, FourierDistribution(*layer.linear(x).float().chunk(2, -1)).mean)


def test_an_unknown_point_has_the_floors_probability() -> None:
    # (1 - cos(pi z)) / 2 is 0 at z = 0.
    zero = FourierDistribution(torch.tensor([1.0, -1.0]), torch.zeros(2), eps=1e-3)
    assert zero.log_prob(torch.tensor(0.0)).exp().item() == pytest.approx(1e-3 / 1.002, rel=1e-4)


def test_bad_input_is_refused_in_a_sentence() -> None:
    for parts in ((torch.zeros(3), torch.zeros(4)), (torch.zeros(1), torch.zeros(1)), (torch.tensor(1.0),) * 2):
        with pytest.raises(ShapeError, match="two parts of one shape"):
            FourierDistribution(*parts)
    with pytest.raises(LaminaError, match="eps must be at least 0, got -1"):
        FourierDistribution(torch.ones(3), torch.ones(3), eps=-1)
    for method in ("log_prob", "cdf"):
        with pytest.raises(ValueError, match="support"):
            getattr(distribution(validate_args=True), method)(torch.tensor(1.5))
    with pytest.raises(LaminaError, match="at least 1, got 6 and 0"):
        FourierDensity(6, 0)
    with pytest.raises(LaminaError, match="eps must be at least 0"):
        FourierDensity(6, 2, eps=-1.0)
    with pytest.raises(ShapeError, match=r"takes floating-point \(\.\.\., 6\), got torch.float32 \(2, 5\)"):
        FourierDensity(6, 2)(torch.zeros(2, 5))
    with pytest.raises(LaminaError, match="FourierDensity got coefficients that are not finite"):
        FourierDensity(6, 2)(torch.full((2, 6), math.nan))


def test_it_stands_in_a_home_made_model_and_its_state_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), FourierDensity(8, 4))
    other = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), FourierDensity(8, 4))
    other.load_state_dict(model.state_dict())
    x, z = normal(5, 3).float(), torch.zeros(5)
    assert torch.equal(model(x).log_prob(z), other(x).log_prob(z))
