from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor

from lamina.data import Columns, Data, augmented_views, cutout, load, shifted_crop, views_of
from lamina.errors import LaminaError, ShapeError

EXAMPLES = [
    Example(
        "data",
        "augmented_views",
        {"data": {"name": "digits", "batch": 4}, "count": 2},
        bad={"augment": ["crop", "cut_out"]},
    )
]


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(*shape: int) -> Tensor:
    return 1 + torch.rand(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(7, 2, 8, 9), (5, 1, 8, 7, 9), (6, 1, 11)])
def test_a_shifted_crop_is_the_image_somewhere_else(shape: tuple[int, ...]) -> None:
    x, found, moves = images(*shape), shifted_crop(images(*shape), 0.3, draw()), set()
    for one, two in zip(x, found, strict=True):
        inside = two != 0
        box = [i.unique() for i in inside.nonzero().T][1:]
        start = [int(b.min()) for b in box]
        part = two[(slice(None), *(slice(s, s + len(b)) for s, b in zip(start, box, strict=True)))]
        assert part.all()
        assert inside.sum() == part.numel(), "what came from outside is zero, in one border"
        places = [
            slice(side - len(b), None) if s == 0 else slice(0, len(b))
            for side, s, b in zip(shape[2:], start, box, strict=True)
        ]
        assert torch.equal(part, one[(slice(None), *places)])
        moves.add(tuple(start))
    assert len(moves) > 1


@pytest.mark.parametrize("shape", [(200, 2, 8, 9), (200, 1, 8, 7, 9)])
def test_a_cutout_is_a_box_of_zeros_in_some_rows(shape: tuple[int, ...]) -> None:
    x, found = images(*shape), cutout(images(*shape), 0.25, 0.5, draw())
    gone = found == 0
    rows = gone.flatten(1).any(1)
    assert 70 < int(rows.sum()) < 130
    assert torch.equal(found[~gone], x[~gone])
    volume = shape[1] * 2 ** len(shape[2:])
    assert set(gone[rows].flatten(1).sum(1).tolist()) == {volume}
    places = {tuple(g.nonzero().min(0).values.tolist()) for g in gone[rows]}
    assert len(places) > 20
    assert torch.equal(cutout(x, 0.25, 0.0), x)
    assert not cutout(x, 1.0, 1.0).any()


def test_views_differ_and_come_back_for_the_same_rows() -> None:
    data = Data(Columns({"inputs": images(10, 1, 8, 8), "age": torch.arange(10.0)}), None, 4)
    seen = augmented_views(data, 3, entry="inputs")
    rows = torch.tensor([2, 5, 7])
    one, again = (seen.train.batch(rows) for _ in range(2))
    assert one["inputs"].shape == (3, 3, 1, 8, 8)
    assert torch.equal(one["age"], torch.tensor([2.0, 5.0, 7.0]))
    assert torch.equal(one["inputs"], again["inputs"])
    assert not torch.equal(one["inputs"][:, 0], one["inputs"][:, 1])
    other = augmented_views(data, 3, entry="inputs", seed=1).train.batch(rows)
    assert not torch.equal(one["inputs"], other["inputs"])
    assert len(seen.train) == 10


def test_without_augmentation_views_are_equal_and_one_view_is_the_row() -> None:
    x = images(4, 1, 5, 5)
    assert torch.equal(views_of(x, 2, ()), torch.stack([x, x], dim=1))
    assert torch.equal(views_of(x, 1, ()), x)


def test_evaluation_has_its_views_where_they_are_several() -> None:
    data, rows = load("augmented_views", data={"name": "digits", "batch": 4}), torch.arange(2)
    found = data.evaluation.batch(rows)["pixel_values"]
    assert found.shape == (2, 2, 1, 8, 8)
    assert torch.equal(data.evaluation.batch(rows)["pixel_values"], found)
    assert len(data.evaluation) == len(load("digits").evaluation)
    plain = load("augmented_views", data={"name": "digits", "batch": 4}, count=1)
    assert torch.equal(
        plain.evaluation.batch(rows)["pixel_values"], load("digits").evaluation.batch(rows)["pixel_values"]
    )
    assert augmented_views(Data(Columns({"inputs": images(4, 1, 5, 5)}), None, 2), entry="inputs").evaluation is None


def test_bad_input_is_met_with_a_sentence() -> None:
    data = Data(Columns({"inputs": images(4, 1, 5, 5)}), None, 2)
    with pytest.raises(LaminaError, match="no augmentation is called 'cut_out'; did you mean 'cutout'"):
        augmented_views(data, augment=["cut_out"])  # type: ignore[list-item]
    with pytest.raises(LaminaError, match="views must be at least 1, got 0"):
        augmented_views(data, 0)
    with pytest.raises(LaminaError, match="finds no 'pixel_values' in the batch, which has \\['inputs'\\]"):
        augmented_views(data).train.batch(torch.arange(2))
    with pytest.raises(LaminaError, match=r"probability of cutout must be in 0\.\.1, got 2"):
        cutout(images(1, 1, 4, 4), probability=2)
    with pytest.raises(LaminaError, match=r"share of shifted_crop must be in 0\.\.1, got -1"):
        shifted_crop(images(1, 1, 4, 4), -1)
    with pytest.raises(ShapeError, match=r"floating-point \(B, C, \.\.\.\) with sides, got torch.float32 \(3, 4\)"):
        shifted_crop(images(3, 4))


def test_a_row_has_the_same_views_in_any_batch_and_others_in_the_next_epoch() -> None:
    rows = Columns({"pixel_values": torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))})
    views = augmented_views(Data(rows, None, 2, {}, "images")).train
    whole = views.batch(torch.arange(6))["pixel_values"]
    torch.testing.assert_close(views.batch(torch.tensor([4, 1]))["pixel_values"], whole[[4, 1]], rtol=0, atol=0)
    views.set_epoch(1)
    assert not torch.equal(views.batch(torch.arange(6))["pixel_values"], whole)
