from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lamina.data import phantoms
from lamina.data.phantoms import MILLIMETRES, measure
from lamina.errors import LaminaError


def test_the_rendered_grey_matter_is_the_volume_that_was_drawn() -> None:
    made = phantoms(3, 48, scanner=0.0)
    found = made.volumes.sum((1, 2, 3, 4)) * (MILLIMETRES / 48) ** 3
    torch.testing.assert_close(found, made.measures[..., 1].sum(1), rtol=0.02, atol=0)


def test_measures_of_a_ball_by_hand() -> None:
    axes, scale, thickness = torch.full((1, 3), 10.0), torch.full((1, 1), 1.1), torch.full((1, 1), 3.0)
    found = measure(axes, scale, thickness)[0, 0]
    torch.testing.assert_close(found[1], torch.tensor(4 / 3 * math.pi * (11**3 - 8**3)))
    torch.testing.assert_close(found[2], torch.tensor(4 * math.pi * 121), rtol=1e-3, atol=0)


def test_thickness_can_be_read_off_the_volume() -> None:
    """Thinner grey matter is less grey matter: the field that an encoder has to recover is there to be seen."""
    made = phantoms(100, 16, scanner=0.0)
    seen = made.volumes.sum((1, 2, 3, 4))
    assert torch.corrcoef(torch.stack([seen, made.measures[..., 1].sum(1)]))[0, 1] > 0.97


def test_age_thins_and_disease_thins_its_regions_more() -> None:
    made = phantoms(2000, 16)
    thickness, ill = made.measures[..., 0], made.diagnosis.bool()
    assert torch.corrcoef(torch.stack([made.age, thickness.mean(1)]))[0, 1] < -0.5
    lost = thickness[~ill].mean(0) - thickness[ill].mean(0)
    others = torch.ones(12, dtype=torch.bool)
    others[made.diseased] = False
    assert len(made.diseased) == 3
    assert (lost[made.diseased] - 0.5).abs().max() < 0.12
    assert lost[others].abs().max() < 0.12
    assert float(ill.float().mean()) == pytest.approx(0.15, abs=0.03)
    assert abs(float(made.age[ill].mean() - made.age[~ill].mean())) < 4


def test_a_site_shows_itself_and_says_nothing_of_anatomy() -> None:
    made, bare = phantoms(40, 16), phantoms(40, 16, scanner=0.0)
    assert torch.equal(made.measures, bare.measures)
    empty = bare.volumes == 0
    noise = torch.stack([(made.volumes[i][empty[i]]).std() for i in range(40)])
    means = torch.stack([noise[made.site == s].mean() for s in range(4)])
    assert means.std() > 3 * torch.stack([noise[made.site == s].std() for s in range(4)]).max()


def test_seeds_draw_subjects_of_one_world() -> None:
    one, again, other = phantoms(5, 16, seed=1), phantoms(5, 16, seed=1), phantoms(5, 16, seed=2)
    assert torch.equal(one.volumes, again.volumes)
    assert not torch.equal(one.age, other.age)
    assert torch.equal(one.diseased, other.diseased)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"size": 8}, "16 voxels a side, got .* size=8"),
    ({"regions": 25}, "room for 24 regions at most, got 25"),
    ({"share": 1.5}, r"share must be in 0\.\.1, .* got 1\.5"),
    ({"diseased": 13}, r"diseased in 0\.\.12, .* 13"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD)
def test_bad_numbers_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        phantoms(**({"subjects": 4} | options))
