"""Relative errors of fields: by hand, by their scale, and the weight of a single wave."""

import math

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives import RelativeLp, RelativeSobolev, WeightedSum
from lamina.objectives.relative_error import sobolev_weights


def fields(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model():
    torch.manual_seed(0)
    return nn.Conv2d(1, 1, 3, padding=1)


def batch():
    return {"inputs": fields(4, 1, 6, 5), "targets": fields(4, 1, 6, 5, seed=1)}


EXAMPLES = [
    Example("objective", "relative_lp", model=model, batch=batch, bad={"p": 0.5}),
    Example("objective", "relative_sobolev", model=model, batch=batch, bad={"order": 0.0}),
]
BOTH = [RelativeLp(), RelativeSobolev()]


@pytest.mark.parametrize("objective", BOTH, ids=["lp", "sobolev"])
def test_it_is_relative(objective):
    y = fields(3, 2, 8, 7)
    assert objective.loss(y, {"targets": y})["loss"] == 0
    assert objective.loss(2 * y, {"targets": y})["loss"] == pytest.approx(1.0)
    assert objective.loss(0 * y, {"targets": y})["loss"] == pytest.approx(1.0)
    p = fields(3, 2, 8, 7, seed=1)
    # Whatever the units, of every row alone.
    scale = torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1, 1)
    losses = objective.loss(p * scale, {"targets": y * scale})
    torch.testing.assert_close(losses["loss"], objective.loss(p, {"targets": y})["loss"])
    assert losses["count"] == 3


def test_by_hand():
    p, y = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 4.0]]])
    found = {p_: float(RelativeLp(p_).loss(p, {"targets": y})["loss"]) for p_ in (1, 2, math.inf)}
    assert found == pytest.approx({1: (2 / 1 + 7 / 4) / 2, 2: (2 / 1 + 5 / 4) / 2, math.inf: (2 / 1 + 4 / 4) / 2})


@pytest.mark.parametrize("k", [(0, 0), (1, 0), (2, 3), (5, 0), (0, 6)])
def test_a_single_wave_counts_by_its_frequency(k):
    """An error of one wave against a target of another: the ratio of their weights."""
    n, cutoff = 16, 5
    i = torch.arange(n).double() * 2 * math.pi / n
    wave = torch.cos(k[0] * i[:, None] + k[1] * i)[None, None]
    flat = torch.cos(i[:, None] + 0 * i)[None, None]
    squares = sum(v**2 for v in k if v < cutoff)
    expected = math.sqrt(1 + squares) * float(wave.norm()) / (math.sqrt(2) * float(flat.norm()))
    found = RelativeSobolev(cutoff=cutoff).loss(flat + wave, {"targets": flat})["loss"]
    assert float(found) == pytest.approx(expected)
    twice = RelativeSobolev(order=2.0, cutoff=None).loss(flat + wave, {"targets": flat})["loss"]
    assert float(twice) == pytest.approx((1 + sum(v**2 for v in k)) * float(wave.norm()) / (2 * float(flat.norm())))


def test_weights_in_the_order_of_the_transform():
    found = sobolev_weights(torch.Size((4, 5)), 2.0, None, torch.zeros(1))
    k, m = torch.fft.fftfreq(4, 1 / 4), torch.fft.fftfreq(5, 1 / 5)
    torch.testing.assert_close(found, 1 + k.square()[:, None] + m.square())
    capped = sobolev_weights(torch.Size((4, 5)), 2.0, 2, torch.zeros(1))
    torch.testing.assert_close(capped, 1 + (k * (k.abs() < 2)).square()[:, None] + (m * (m.abs() < 2)).square())


@pytest.mark.parametrize("shape", [(2, 1, 7), (2, 2, 63), (2, 1, 4, 3, 5), (1, 1, 1, 1)])
def test_without_derivatives_the_two_are_one(shape):
    p, y = fields(*shape), fields(*shape, seed=1)
    # No frequency is kept from the cutoff on, so that all count once: Parseval.
    p, y = ({"p": p, "y": y}[n].double() for n in "py")
    l2, sobolev = RelativeLp(), RelativeSobolev(order=1e-12)
    torch.testing.assert_close(sobolev.loss(p, {"targets": y})["loss"], l2.loss(p, {"targets": y})["loss"])


@pytest.mark.parametrize("objective", BOTH, ids=["lp", "sobolev"])
def test_half_precision_is_measured_in_float32_and_splits_add_up(objective):
    p, y = fields(4, 1, 8, 8).bfloat16(), fields(4, 1, 8, 8, seed=1)
    whole = objective.loss(p, {"targets": y})
    assert whole["loss"].dtype is torch.float32
    parts = [objective.loss(p[rows], {"targets": y[rows]}) for rows in (slice(0, 1), slice(1, 4))]
    total = sum(part["loss"] * part["count"] for part in parts) / sum(part["count"] for part in parts)
    torch.testing.assert_close(total, whole["loss"])
    summed = WeightedSum([(1.0, RelativeLp()), (0.1, RelativeSobolev())]).loss(p, {"targets": y})
    assert summed["loss"] > RelativeLp().loss(p, {"targets": y})["loss"]


def test_a_target_of_nothing_is_finite():
    y = torch.zeros(1, 1, 4, 4)
    p = torch.full((1, 1, 4, 4), 1e-9, requires_grad=True)
    loss = RelativeLp().loss(p, {"targets": y})["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(p.grad).all()


def test_mistakes_are_named():
    y = fields(2, 1, 4, 4)
    with pytest.raises(LaminaError, match="relative_lp needs 'targets' in the batch"):
        RelativeLp().loss(y, {"labels": y})
    with pytest.raises(ShapeError, match=r"got outputs \(2, 4, 4\) for targets \(2, 1, 4, 4\)"):
        RelativeLp().loss(y[:, 0], {"targets": y})
    with pytest.raises(ShapeError, match="takes fields"):
        RelativeSobolev().loss(y[:, :, 0, 0], {"targets": y[:, :, 0, 0]})
    with pytest.raises(LaminaError, match="cutoff must be at least 1"):
        RelativeSobolev(cutoff=0)
    with pytest.raises(LaminaError, match="p must be at least 1"):
        RelativeLp(0.5)
