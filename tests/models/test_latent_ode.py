from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example

from lamina.errors import LaminaError, ShapeError
from lamina.models import LatentODE
from lamina.nn import NeuralODE

STEPS = "an adaptive solve has as many steps as its numbers ask for"
SMALL = {"channels": 2, "horizon": 2, "width": 3, "latent": 4, "hidden": 5}


def series(rows: int = 3) -> dict[str, torch.Tensor]:
    return {"inputs": torch.randn(rows, 5, 2, generator=torch.Generator().manual_seed(0))}


EXAMPLES = [Example("model", "latent_ode", SMALL, batch=series, bad={"horizon": -1}, no_compile=STEPS)]


def model(**options: object) -> LatentODE:
    torch.manual_seed(0)
    return LatentODE(**{**SMALL, **options})  # type: ignore[arg-type]


def test_the_defaults_are_the_paper_s_network() -> None:
    net = LatentODE()
    encoder = 3 * 50 * (74 + 50 + 2)
    assert sum(p.numel() for p in net.parameters()) == encoder + (50 * 40 + 40) + (21 * 40 + 40 + 41 * 20 + 20) + (
        20 * 37 + 37
    )


def test_the_path_runs_from_the_posterior_s_mean_through_the_given_rows_and_beyond() -> None:
    net = model().eval()
    x = series()["inputs"]
    out = net(x)
    assert out["logits"].shape == (3, 2, 2)
    assert out["reconstruction"].shape == (3, 5, 2)
    times = [i / 6 for i in range(7)]
    path = NeuralODE(net.ode.func, times, rtol=1e-7, atol=1e-7, all_times=True)(out["mean"])
    decoded = net.decoder(path).movedim(0, 1)
    torch.testing.assert_close(torch.cat([out["reconstruction"], out["logits"]], 1), decoded, rtol=0.0, atol=1e-3)
    _, last = net.encoder(torch.cat([x, torch.ones_like(x)], 2).flip(1))
    torch.testing.assert_close(torch.cat([out["mean"], out["log_variance"]], 1), net.posterior(last[0]))


def test_in_training_the_start_is_drawn_from_the_posterior() -> None:
    net, x = model(), series()["inputs"]
    torch.manual_seed(5)
    out = net(x)
    torch.manual_seed(5)
    start = out["mean"] + torch.randn(3, 3) * (0.5 * out["log_variance"]).exp()
    torch.testing.assert_close(out["reconstruction"][:, 0], net.decoder(start), rtol=1e-5, atol=1e-5)


def test_what_was_not_observed_is_not_looked_at() -> None:
    net, x = model().eval(), series()["inputs"]
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > 0.4
    hidden = torch.where(mask, x, torch.nan)
    assert torch.equal(net(x, mask)["logits"], net(hidden, mask)["logits"])
    assert not torch.equal(net(x, mask)["logits"], net(x)["logits"])


def test_times_may_be_uneven_and_one_row_is_a_series() -> None:
    net, x = model().eval(), series()["inputs"]
    even = net(x, times=[i / 6 for i in range(7)])
    torch.testing.assert_close(even["logits"], net(x)["logits"])
    uneven = net(x, times=torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 1.0]))
    assert not torch.allclose(uneven["logits"], even["logits"])
    alone = model(horizon=0).eval()(x[:, :1])
    assert alone["logits"].shape == (3, 1, 2)
    torch.testing.assert_close(alone["logits"][:, 0], model(horizon=0).decoder(alone["mean"]))
    for time in ([0.0], torch.tensor([3.5])):
        assert torch.equal(model(horizon=0).eval()(x[:, :1], times=time)["logits"], alone["logits"])


def test_wrong_series_are_refused() -> None:
    net = model(context=5)
    for x, sentence in ((torch.ones(2, 5, 3), r"series \(B, T, 2\)"), (torch.ones(2, 4, 2), "built for 5 rows")):
        with pytest.raises(ShapeError, match=sentence):
            net(x)
    with pytest.raises(ShapeError, match="mask must have the shape"):
        net(series()["inputs"], torch.ones(3, 5, dtype=torch.bool)[..., None])
    with pytest.raises(ShapeError, match="need 7 times, got 5"):
        net(series()["inputs"], times=[0.0, 0.1, 0.2, 0.3, 0.4])
    with pytest.raises(LaminaError, match=r"must be strictly rising, got \[6\.0, 5\.0"):
        net(series()["inputs"], times=range(6, -1, -1))
