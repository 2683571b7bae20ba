from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example

from lamina.data import Columns, Data, image_moments, with_moments
from lamina.errors import LaminaError, ShapeError

EXAMPLES = [Example("data", "with_moments", {"data": {"name": "digits", "batch": 4}}, bad={"grid": 0})]


def test_moments_of_single_bright_pixels_by_hand() -> None:
    image = torch.zeros(1, 1, 4, 6)
    image[0, 0, 0, 0] = 6.0  # top left part: in its upper left corner
    image[0, 0, 3, 4] = 3.0  # bottom right part: lowest row, middle column
    expected = torch.tensor([[1.0, -1, -1], [0, 0, 0], [0, 0, 0], [0.5, 1, 0]])
    torch.testing.assert_close(image_moments(image)[0], expected)


def test_light_added_everywhere_moves_no_centre() -> None:
    x = torch.rand(63, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    one, two = image_moments(x, 3), image_moments(x + 5, 3)
    assert one.shape == (63, 9, 3)
    torch.testing.assert_close(one[..., 1:], two[..., 1:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two[..., 0], one[..., 0] + 5)


def test_they_are_standardised_over_the_training_rows() -> None:
    x = torch.rand(50, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    data = with_moments(Data(Columns({"pixel_values": x}), Columns({"pixel_values": 2 * x}), 5), 2)
    found = data.train.batch(torch.arange(50))["moments"]
    torch.testing.assert_close(found.mean(0), torch.zeros(4, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(4, 3))
    raw = image_moments(x)
    expected = (image_moments(2 * x[:3]) - raw.mean(0)) / raw.std(0, correction=0)
    torch.testing.assert_close(data.evaluation.batch(torch.arange(3))["moments"], expected, rtol=1e-4, atol=1e-4)


def test_a_measure_that_never_changes_is_only_centred() -> None:
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[..., :2, :2] = 0.0
    x[:, 0, 2:, 2:] = 1e-7 * x[:, 0, 2:, 2:]
    data = with_moments(Data(Columns({"pixel_values": x}), Columns({"pixel_values": x + 0.5}), 5), 2)
    found = data.train.batch(torch.arange(20))["moments"]
    assert not found[:, 0].any()
    torch.testing.assert_close(found[:, 3, 0].std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(data.evaluation.batch(torch.arange(20))["moments"][:, 0, 0], torch.full((20,), 0.5))


def test_bad_input_is_met_with_a_sentence() -> None:
    with pytest.raises(ShapeError, match=r"of at least 3 pixels a side, got \(1, 1, 2, 9\)"):
        image_moments(torch.zeros(1, 1, 2, 9), 3)
    with pytest.raises(LaminaError, match=r"finds no 'pixel_values' in the batch, which has \['inputs'\]"):
        with_moments(Data(Columns({"inputs": torch.zeros(4, 1, 4, 4)}), None, 2))
