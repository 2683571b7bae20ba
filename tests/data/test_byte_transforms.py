"""What is done to bytes: bijections with inverses, noise modulo 256, positions that are never seen."""

import pytest
import torch

from lamina.data import ByteNoise, BytePermutation, ByteShuffle, PositionMask, byte_table
from lamina.data.byte_transforms import make_transform
from lamina.errors import LaminaError, RecipeError, ShapeError


def content(length, seed=0):
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_a_permutation_is_one_table_of_the_values_and_has_an_inverse():
    hide = BytePermutation(3)
    x = content(1000)
    assert torch.equal(hide(x), byte_table(3)[x.long()].to(torch.uint8))
    assert torch.equal(hide.inverse()(hide(x)), x)
    assert byte_table().sort().values.tolist() == list(range(256))
    # The official table: this seed, torch's own generator.
    assert torch.equal(
        BytePermutation().table.long(), torch.randperm(256, generator=torch.Generator().manual_seed(2147483647))
    )


@pytest.mark.parametrize("length", [0, 1, 7, 63, 64, 2050])
def test_orders_are_bijections_with_exact_inverses(length):
    x = content(length)
    for shuffle in (
        *(ByteShuffle(order) for order in ("reverse", "cyclic")),
        *(ByteShuffle(order, size=size) for order in ("stride", "window") for size in (1, 8, 1024)),
    ):
        moved = shuffle(x)
        assert torch.equal(moved.sort().values, x.sort().values)
        assert torch.equal(shuffle.undo(moved), x)


def test_orders_are_those_of_the_paper():
    x = torch.arange(10, dtype=torch.uint8)
    assert ByteShuffle("reverse")(x).tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert ByteShuffle("cyclic")(x).tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert ByteShuffle("stride", 4)(x).tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 3, 7]
    windows = ByteShuffle("window", 4, seed=1)(x)
    assert windows[8:].tolist() == [8, 9]
    assert torch.equal(windows[4:8], windows[:4] + 4)
    draw = ByteShuffle("random")
    first, second = (draw(x, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert not torch.equal(first, second)
    assert first.sort().values.tolist() == list(range(10))
    with pytest.raises(LaminaError, match="cannot be undone"):
        draw.undo(x)


def test_noise_is_uniform_and_goes_round():
    x = torch.full((20_000,), 2, dtype=torch.uint8)
    found = ByteNoise(-5, 5)(x, torch.Generator().manual_seed(0)).long()
    moved = (found - 2 + 128) % 256 - 128
    assert (int(moved.min()), int(moved.max())) == (-5, 5)
    assert found.max() > 250
    assert moved.bincount(minlength=1) is not None if (moved >= 0).all() else abs(float(moved.float().mean())) < 0.1


def test_a_mask_keeps_the_same_positions_of_every_file_in_order():
    camera = PositionMask(0.25, 64, seed=1)
    x = torch.arange(64, dtype=torch.uint8)
    kept = camera(x)
    assert kept.tolist() == sorted(kept.tolist())
    assert len(kept) == 16
    assert torch.equal(camera(x + 1), kept + 1)
    assert not torch.equal(PositionMask(0.25, 64, seed=2)(x), kept)
    assert len(PositionMask(0.33, 10)(x[:10])) == 3
    with pytest.raises(ShapeError, match="files of 64 bytes, and one has 63"):
        camera(x[:63])


def test_recipes_name_them_and_mistakes_are_refused():
    made = make_transform({"name": "position_mask", "keep": 0.5, "size": 8})
    assert isinstance(made, PositionMask)
    assert isinstance(make_transform("byte_noise"), ByteNoise)
    assert make_transform(made) is made
    for node, words in (
        ("byte_nose", "did you mean 'byte_noise'"),
        ({"name": "byte_noise", "hi": 3}, "no option 'hi'; did you mean 'high'|no option 'hi'"),
        ({"name": "byte_noise", "low": 3, "high": 1}, "byte_noise: low must not be above high"),
        ({"name": "position_mask", "keep": 0.01, "size": 8}, "leaves at least a byte of 8"),
        ({"name": "byte_shuffle", "order": "backwards"}, "no order is called"),
        ({"name": "byte_shuffle", "order": "stride", "size": 0}, "size must be at least 1"),
        ({"name": "byte_permutation", "table": [0, 1]}, "each of the numbers 0..255 once"),
        ({"name": "position_mask"}, "position_mask: "),
    ):
        with pytest.raises(RecipeError, match=words):
            make_transform(node)
