from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.examples import Columns
from lamina.data.loader import Loader, one_pass, permutation
from lamina.errors import LaminaError


def rows(length: int) -> Columns:
    return Columns({"inputs": torch.arange(length)})


def take(loader: Loader, count: int) -> list[list[int]]:
    return [next(loader)["inputs"].tolist() for _ in range(count)]


def test_unshuffled_order_by_hand() -> None:
    assert take(Loader(rows(5), 2, shuffle=False), 4) == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert take(Loader(rows(5), 2, shuffle=False, drop_last=False), 4) == [[0, 1], [2, 3], [4], [0, 1]]


@given(
    length=st.integers(6, 60),
    batch=st.integers(3, 6),
    world=st.integers(2, 3),
    seed=st.integers(0, 9),
    steps=st.integers(1, 30),
)
@settings(max_examples=40, deadline=None)
def test_any_number_of_processes_sees_the_same_global_batches(
    length: int, batch: int, world: int, seed: int, steps: int
) -> None:
    whole = take(Loader(rows(length), batch, seed=seed), steps)
    shards = [take(Loader(rows(length), batch, seed=seed, rank=r, world=world), steps) for r in range(world)]
    for step, expected in enumerate(whole):
        joined: list[int] = [-1] * len(expected)
        for rank in range(world):
            joined[rank::world] = shards[rank][step]
        assert joined == expected


@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 9),
    seen=st.integers(0, 60),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_resuming_continues_the_same_sequence(
    length: int, batch: int, seen: int, shuffle: bool, drop_last: bool
) -> None:
    batch = min(batch, length)
    first = Loader(rows(length), batch, seed=3, shuffle=shuffle, drop_last=drop_last)
    take(first, seen)
    second = Loader(rows(length), batch, seed=3, shuffle=shuffle, drop_last=drop_last)
    second.load_state_dict(first.state_dict())
    assert take(second, 25) == take(first, 25)


def test_resuming_does_not_touch_the_rows_before() -> None:
    class Counting(Columns):
        fetched = 0

        def batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
            Counting.fetched += len(indices)
            return super().batch(indices)

    loader = Loader(Counting({"inputs": torch.arange(100)}), 10)
    loader.load_state_dict({"epoch": 7, "position": 50, "seed": 0, "shuffle": True, "length": 100})
    assert next(loader)["inputs"].tolist() == permutation(100, 0, 7)[50:60].tolist()
    assert Counting.fetched == 10


def test_a_state_of_one_process_resumes_on_three() -> None:
    one = Loader(rows(20), 6, seed=1)
    take(one, 4)
    three = [Loader(rows(20), 6, seed=1, rank=r, world=3) for r in range(3)]
    for loader in three:
        loader.load_state_dict(one.state_dict())
    expected = take(one, 1)[0]
    assert [take(loader, 1)[0] for loader in three] == [expected[r::3] for r in range(3)]
    assert three[2].state_dict() == one.state_dict()


@given(length=st.integers(1, 50), batch=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_an_epoch_is_a_permutation(length: int, batch: int) -> None:
    loader = Loader(rows(length), min(batch, length), drop_last=False)
    for _ in range(2):
        epoch = [row for batch in take(loader, loader.batches_per_epoch) for row in batch]
        assert sorted(epoch) == list(range(length))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permutation(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_does_not_touch_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    take(Loader(rows(10), 2), 12)
    assert torch.equal(before, torch.random.get_rng_state())


@given(length=st.integers(1, 40), batch=st.integers(4, 50), world=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_one_pass_gives_every_row_once(length: int, batch: int, world: int) -> None:
    seen = [b["inputs"].tolist() for r in range(world) for b in one_pass(rows(length), batch, rank=r, world=world)]
    assert all(seen)
    assert sorted(row for batch in seen for row in batch) == list(range(length))


def test_once_leaves_the_position_alone() -> None:
    loader = Loader(rows(7), 3, seed=2)
    take(loader, 1)
    before = loader.state_dict()
    assert [b["inputs"].tolist() for b in loader.once()] == [[0, 1, 2], [3, 4, 5], [6]]
    assert loader.state_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 9}, "length 9, this loader has length 8"),
        ({"seed": 5}, "seed 5, this loader has seed 0"),
        ({"shuffle": False}, "shuffle False"),
        ({"position": 99}, "row 99"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, int], message: str) -> None:
    loader = Loader(rows(8), 2)
    with pytest.raises(LaminaError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    with pytest.raises(LaminaError, match="has no 'epoch'"):
        loader.load_state_dict({})


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(LaminaError, match="batch is 9, but the data set has 8 rows"):
        Loader(rows(8), 9)
    with pytest.raises(LaminaError, match="batch of 2 cannot be shared by 3"):
        Loader(rows(8), 2, world=3)
    with pytest.raises(LaminaError, match="rank 3 of world 3"):
        Loader(rows(8), 3, rank=3, world=3)
    with pytest.raises(LaminaError, match="last batch of 7 rows has 1, too few for 2"):
        Loader(rows(7), 3, world=2, drop_last=False)
