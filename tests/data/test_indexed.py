import pytest
import torch
from tests.contract.example import Example

from lamina.data import Columns, Data, Loader, augmented_views, indexed, rotated
from lamina.errors import LaminaError, ShapeError

EXAMPLES = [
    Example("data", "indexed", {"data": {"name": "digits", "batch": 4}}, bad={"data": {"name": "digitz"}}),
    Example("data", "rotated", {"data": {"name": "digits", "batch": 4}}, bad={"data": {"name": "digitz"}}),
]


def tiny(rows=6, side=3):
    images = torch.arange(rows * side * side, dtype=torch.float32).reshape(rows, 1, side, side)
    held = Columns({"pixel_values": images[:2], "labels": torch.arange(2)})
    return Data(Columns({"pixel_values": images, "labels": torch.arange(rows)}), held, 2)


def test_rows_carry_their_numbers_and_the_evaluation_goes_on_counting():
    data = indexed(tiny())
    loader = Loader(data.train, 2, seed=3)
    for _ in range(5):
        batch = next(loader)
        assert torch.equal(batch["index"], batch["labels"])
    assert data.evaluation.batch(torch.tensor([1]))["index"].tolist() == [7]
    assert batch["index"].dtype == torch.int64


def test_what_a_loader_asks_of_the_rows_is_passed_on():
    views = augmented_views(tiny(side=8), count=1, augment=["crop"])
    wrapped = indexed(views)
    wrapped.train.set_epoch(4)
    assert views.train.epoch == 4
    assert not hasattr(indexed(tiny()).train, "set_epoch")
    with pytest.raises(AttributeError, match="nothing"):
        wrapped.train.nothing


def test_every_image_is_followed_by_its_three_rotations():
    batch = rotated(indexed(tiny())).train.batch(torch.tensor([4, 1]))
    assert batch["rotation"].tolist() == [0, 1, 2, 3] * 2
    assert batch["index"].tolist() == [4] * 4 + [1] * 4
    assert batch["labels"].tolist() == [4, -100, -100, -100, 1, -100, -100, -100]
    for i, row in enumerate((4, 1)):
        image = tiny().train.columns["pixel_values"][row]
        for k in range(4):
            assert torch.equal(batch["pixel_values"][4 * i + k], image.rot90(k, (1, 2)))


def test_rotations_of_anything_but_square_images_are_refused():
    flat = Data(Columns({"inputs": torch.zeros(3, 2)}), None, 1)
    with pytest.raises(LaminaError, match=r"no 'pixel_values' in the batch, which has \['inputs'\]"):
        rotated(flat).train.batch(torch.tensor([0]))
    wide = Data(Columns({"pixel_values": torch.zeros(3, 1, 2, 4)}), None, 1)
    with pytest.raises(ShapeError, match=r"square images.*\(1, 1, 2, 4\)"):
        rotated(wide).train.batch(torch.tensor([0]))
