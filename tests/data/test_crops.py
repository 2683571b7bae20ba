"""Crops: what is drawn, that cutting is interpolation of each for itself, and that a crop can be cut again."""

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example

from lamina.data import Columns, Crops, Data, Loader, crop, digits, random_crops
from lamina.errors import LaminaError, ShapeError

EXAMPLES = [
    Example(
        "data",
        "random_crops",
        {"data": {"name": "digits", "batch": 4}, "size": 7, "padding": 1},
        bad={"scale": [0.5, 1.5]},
    )
]


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def test_a_batch_of_crops_is_each_crop_interpolated_for_itself():
    x = images(40, 2, 13, 17)
    boxes, flips = (t[:, 0] for t in Crops(padding=2).draw(range(40), (13, 17)))
    found = crop(x, boxes, flips, 9)
    padded = F.pad(x, (2,) * 4)
    for image, box, flip, one in zip(padded, boxes.tolist(), flips, found, strict=True):
        top, left, tall, wide = box[0] + 2, box[1] + 2, *box[2:]
        part = image[None, :, top : top + tall, left : left + wide]
        expected = F.interpolate(part, (9, 9), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(one, expected.flip(-1) if flip else expected, atol=2e-6, rtol=0)
    assert 5 < int(flips.sum()) < 35


@pytest.mark.parametrize("side", [1, 7, 63])
def test_boxes_of_the_images_size_move_it_to_the_bit(side):
    x = images(6, 1, side, side)
    boxes, flips = (t[:, 0] for t in Crops(scale=(1, 1), ratio=(1, 1), flip=0, padding=2).draw(range(6), (side, side)))
    assert (boxes[:, 2:] == side).all()
    found = crop(x, boxes, flips)
    for image, (top, left, *_), one in zip(F.pad(x, (2,) * 4), boxes.tolist(), found, strict=True):
        assert torch.equal(one, image[:, top + 2 : top + 2 + side, left + 2 : left + 2 + side])
    low = crop(x.bfloat16(), boxes, flips)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, found.bfloat16())


def test_what_is_drawn_keeps_to_its_ranges_and_depends_on_the_row_alone():
    crops = Crops(scale=(0.2, 0.6), ratio=(0.5, 2.0), flip=0.3)
    boxes, flips = crops.draw(range(200), (40, 30), 5)
    top, left, tall, wide = boxes.reshape(-1, 4).int().unbind(1)
    assert boxes.dtype == torch.int16
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= 40).all()
    assert (left + wide <= 30).all()
    share, ratio = tall * wide / 1200, wide / tall
    assert (share.min() > 0.17) & (share.max() < 0.64)
    assert (ratio.min() > 0.45) & (ratio.max() < 2.2)
    assert 0.25 < flips.float().mean() < 0.35
    assert {int(top.min()), int((40 - top - tall).min())} == {0}, "both borders are reached"
    again = crops.draw([7, 3], (40, 30), 5)
    assert torch.equal(again[0], boxes[[7, 3]])
    assert torch.equal(again[1], flips[[7, 3]])
    assert not torch.equal(crops.draw([7], (40, 30), 5, key="1")[0], boxes[[7]])


def test_where_no_size_fits_the_middle_of_the_image_is_taken():
    box = Crops(scale=(1, 1)).draw([0], (10, 40))[0][0, 0]
    assert box.tolist() == [0, 13, 10, 13]
    assert Crops(scale=(1, 1)).draw([0], (40, 10))[0][0, 0].tolist() == [13, 0, 13, 10]


def test_training_images_are_cropped_anew_in_every_epoch_and_evaluation_is_not():
    given = digits(batch=8)
    data = random_crops(given, scale=(0.5, 1.0), seed=4)
    loader = Loader(data.train, 8, shuffle=False)
    rows = torch.arange(8)
    first = next(loader)["pixel_values"]
    assert first.shape == (8, 1, 8, 8)
    assert torch.equal(data.train.batch(rows)["pixel_values"], first)
    data.train.set_epoch(1)
    assert not torch.equal(data.train.batch(rows)["pixel_values"], first)
    assert data.evaluation is given.evaluation
    small = random_crops(given, size=5)
    assert small.sizes["image"] == 5
    held = small.evaluation.batch(rows)["pixel_values"]
    whole = F.interpolate(given.evaluation.batch(rows)["pixel_values"], (5, 5), mode="bilinear", antialias=True)
    torch.testing.assert_close(held, whole, atol=2e-6, rtol=0)


def test_what_cannot_be_cropped_is_refused():
    with pytest.raises(LaminaError, match=r"scale must be a range within 0..1"):
        Crops(scale=(0.5, 0.2))
    with pytest.raises(LaminaError, match=r"flip must be in 0..1, padding >= 0, size >= 1"):
        Crops(padding=-1)
    with pytest.raises(LaminaError, match="crops have no option 'scales'; did you mean 'scale'"):
        Crops.of({"scales": [0.5, 1]})
    assert Crops.of({"scale": [0.5, 1]}) == Crops(scale=(0.5, 1))
    with pytest.raises(ShapeError, match="crops are drawn from images of 1 to 16384 pixels a side, got 20000 x 3"):
        Crops().draw([0], (20000, 3))
    with pytest.raises(ShapeError, match=r"3 images need as many boxes \(B, 4\)"):
        crop(images(3, 1, 4, 4), torch.zeros(2, 4), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="cut out of floating-point images"):
        crop(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))
    data = random_crops(Data(Columns({"inputs": torch.rand(3, 4)}), None, 1))
    with pytest.raises(LaminaError, match="random_crops finds no 'pixel_values' in the batch"):
        data.train.batch(torch.arange(2))
    with pytest.raises(ShapeError, match=r"takes images \(B, C, H, W\), got \(2, 4\)"):
        random_crops(Data(Columns({"inputs": torch.rand(3, 4)}), None, 1), entry="inputs").train.batch(torch.arange(2))
