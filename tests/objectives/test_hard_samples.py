from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives import HardPoints, HardRays, HardSamples
from lamina.objectives.hard_samples import hardest, heaviest_points


def rays(count: int, seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed))
    return {"origins": drawn[0], "directions": nn.functional.normalize(drawn[1], dim=1)}


def fed(hard: HardSamples, steps: int, count: int = 20) -> list[dict[str, Tensor]]:
    """Some steps whose errors are the x of the origins; what was proposed."""
    proposed = []
    for step in range(steps):
        proposed.append(hard.propose(rays(count, step)))
        hard.observe(proposed[-1], proposed[-1]["origins"][:, 0])
    return proposed


def test_points_kept_are_the_heaviest_third_and_one_of_rays_that_hit_something() -> None:
    weights = torch.tensor([[0.1, 0.5, 0.2, 0.05, 0.05, 0.02, 0.02, 0.01, 0.03, 0.02]])
    faint = 0.4 * weights
    found = HardPoints().select(torch.cat([weights, faint]))
    assert found[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert not found[1].any()
    assert HardPoints(keep=1.0, min_opacity=0.0).select(0 * weights).all()
    other = weights.flip(1)
    assert HardPoints().select_either(weights, other).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 5, 7, 8, 9]
    with pytest.raises(ShapeError, match="at the same ones"):
        HardPoints().select_either(weights, weights[:, :5])
    with pytest.raises(ShapeError, match="rays, points"):
        HardPoints().select(weights[0])


@pytest.mark.parametrize(("count", "dtype"), [(1, torch.float32), (7, torch.bfloat16), (63, torch.float32)])
def test_points_kept_equal_those_of_a_stable_sort(count: int, dtype: torch.dtype) -> None:
    # Few distinct values: many are equal.
    weights = torch.randint(0, 5, (40, count), generator=torch.Generator().manual_seed(count)).to(dtype) / 4 / count
    found = heaviest_points(weights, 0.3, 0.4)
    for row, kept in zip(weights.tolist(), found.tolist(), strict=True):
        order = sorted(range(count), key=lambda i: -row[i])
        chosen = {i for rank, i in enumerate(order) if rank <= 0.3 * count}
        heavy = float(torch.tensor(row, dtype=dtype).sum()) >= 0.4
        assert {i for i, k in enumerate(kept) if k} == (chosen if heavy else set())


def test_the_hardest_are_finite_sorted_by_error_then_by_place() -> None:
    errors = torch.tensor([1.0, math.nan, 3.0, 1.0, math.inf, 3.0, 0.5])
    assert hardest(errors, 4).tolist() == [2, 5, 0, 3]
    assert hardest(errors, 9).tolist() == [2, 5, 0, 3, 6]
    assert hardest(errors, 2, max_quantile=0.5).tolist() == [0, 3], "those above the median are outliers"
    assert hardest(torch.full((3,), math.nan), 2, 0.9).tolist() == []


def test_the_pool_fills_with_the_hardest_then_exactly_the_drawn_rows_are_exchanged() -> None:
    hard = HardRays(ratio=0.25, capacity=12)
    proposed = fed(hard, 3)
    assert [len(b["origins"]) for b in proposed] == [20, 20, 20]
    assert hard.full
    # 5, 5, and the first two of the third step's.
    expected = [b["origins"][:, 0].topk(k).values for b, k in zip(proposed, (5, 5, 2), strict=True)]
    torch.testing.assert_close(hard.pool["origins"][:, 0], torch.cat(expected))
    before = hard.pool["origins"].clone()
    batch = hard.propose(rays(20, 9))
    added = batch["origins"][20:]
    slots = [int((before == row).all(1).nonzero()) for row in added]
    assert len(set(slots)) == len(added) == 5
    hard.observe(batch, batch["origins"][:, 0])
    after = hard.pool["origins"]
    assert len(after) == 12
    left = [i for i in range(12) if i not in slots]
    assert torch.equal(after[left], before[left])
    # Found among all rows of the step, the drawn ones as well.
    torch.testing.assert_close(after[slots, 0].sort().values, batch["origins"][:, 0].topk(5).values.sort().values)


def test_hard_rays_gather_where_the_error_is() -> None:
    hard = HardRays(capacity=30)
    for step in range(60):
        batch = hard.propose(rays(50, step))
        wrong = (batch["directions"][:, :2] > 0).all(1)
        noise = torch.rand(len(wrong), generator=torch.Generator().manual_seed(step))
        hard.observe(batch, wrong + 0.2 * noise)
    assert (hard.pool["directions"][:, :2] > 0).all(1).float().mean() >= 0.9


def test_where_fewer_are_finite_than_were_drawn_the_other_slots_stay() -> None:
    hard = HardRays(ratio=0.25, capacity=5)
    fed(hard, 1)
    before = hard.pool["origins"].clone()
    batch = hard.propose(rays(20, 3))
    errors = torch.full((25,), math.nan)
    errors[4] = 1.0
    hard.observe(batch, errors)
    assert (hard.pool["origins"] != before).any(1).sum() == 1
    assert (hard.pool["origins"] == batch["origins"][4]).all(1).any()


def test_of_a_batch_what_is_no_row_goes_along_and_what_is_not_kept_is_minus_one() -> None:
    hard = HardRays(ratio=0.5, capacity=2)
    batch = {**rays(4), "pose_id": torch.arange(4), "epoch": 7, "camera": torch.zeros(3)}
    hard.observe(hard.propose(batch), torch.arange(4.0))
    again = hard.propose(batch)
    assert again["pose_id"].tolist() == [0, 1, 2, 3, -1, -1]
    assert again["epoch"] == 7
    assert len(again["camera"]) == 3
    every = HardSamples(capacity=2, ratio=0.5)
    every.observe(every.propose(batch), torch.arange(4.0))
    assert sorted(every.propose(batch)["pose_id"][4:].tolist()) == [2, 3]


def test_collection_begins_where_it_is_told_and_the_gradient_stays_out() -> None:
    hard = HardSamples(capacity=8, ratio=0.5, start=0.5)
    x = torch.randn(4, 2, requires_grad=True)
    for fraction, filled in ((0.4, 0), (0.5, 2)):
        hard.set_progress(fraction)
        hard.observe({"inputs": x}, x.square().sum(1))
        assert int(hard.filled) == filled
    assert not hard.pool["inputs"].requires_grad


def test_draws_go_on_after_a_resume_and_copies_are_independent() -> None:
    hard = HardRays(ratio=0.25, capacity=10, seed=3)
    fed(hard, 4)
    other = HardRays(ratio=0.25, capacity=10, seed=3)
    other.load_state_dict(copy.deepcopy(hard.state_dict()))
    twin = copy.deepcopy(hard)
    expected = fed(hard, 3)
    for one in (other, twin):
        for a, b in zip(fed(one, 3), expected, strict=True):
            assert torch.equal(a["origins"], b["origins"])
    draws = {tuple(hard._draw(4).tolist()) for _ in range(6)}
    assert len(draws) > 1, "each draw is another"
    # A fresh state empties a pool that was filled.
    other.load_state_dict(HardRays(ratio=0.25, capacity=10).state_dict())
    assert not other.full
    assert other.pool == {}
    assert other._draw(3).tolist() == [], "what is there is drawn"


def test_any_loss_of_rows_replays_what_a_transformer_and_a_home_made_network_got_wrong() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    bert = BertForSequenceClassification(config).eval()
    home = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def tokens(step: int) -> dict[str, Tensor]:
        drawn = torch.randint(12, (8, 5), generator=torch.Generator().manual_seed(step))
        return {"input_ids": drawn, "attention_mask": torch.ones_like(drawn), "labels": drawn[:, 0] % 2}

    def numbers(step: int) -> dict[str, Tensor]:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return {"inputs": x, "labels": (x[:, 0] > 0).long()}

    for model, draw, name in ((bert, tokens, "input_ids"), (home, numbers, "inputs")):
        hard, largest = HardSamples(capacity=4, ratio=0.25), []
        for step in range(3):
            batch = hard.propose(draw(step))
            scores = model(**{k: v for k, v in batch.items() if k != "labels"}).logits if model is bert else model(batch["inputs"])  # fmt: skip  # noqa: E501
            errors = nn.functional.cross_entropy(scores, batch["labels"], reduction="none")
            errors.mean().backward()
            hard.observe(batch, errors)
            largest.append(batch[name][errors.argmax()])
        assert len(batch[name]) == 10
        assert any((row == largest[0]).all() for row in batch[name][8:]) or (hard.pool[name] == largest[0]).all(1).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.0}, "ratio"),
        ({"capacity": 0}, "capacity"),
        ({"seed": -1}, "seed"),
        ({"start": 1.5}, "start"),
        ({"max_error_quantile": 0.0}, "max_error_quantile"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        HardRays(**options)


def test_what_cannot_be_kept_is_refused() -> None:
    hard = HardSamples(capacity=2, ratio=0.5)
    with pytest.raises(LaminaError, match="capacity 2, less than the 4"):
        hard.propose(rays(8))
    with pytest.raises(LaminaError, match="finds nothing"):
        HardRays().propose({"points": torch.zeros(2, 3)})
    with pytest.raises(ShapeError, match="one error a row, 4"):
        hard.observe(rays(4), torch.zeros(4, 3))
    hard.observe({"inputs": torch.zeros(2, 3)}, torch.zeros(2))
    with pytest.raises(ShapeError, match="rows of one shape"):
        hard.observe({"inputs": torch.zeros(2, 4)}, torch.zeros(2))
    for options in ({"keep": 0.0}, {"keep": 1.1}, {"min_opacity": -0.1}):
        with pytest.raises(LaminaError, match="keep"):
            HardPoints(**options)


def test_every_process_draws_other_rows() -> None:
    hard = HardRays(ratio=0.25, capacity=10)
    fed(hard, 2)
    other = copy.deepcopy(hard)
    with mock.patch("torch.distributed.is_initialized", return_value=True), mock.patch("torch.distributed.get_rank", return_value=1):  # fmt: skip  # noqa: E501
        theirs = other.propose(rays(20))
    assert not torch.equal(theirs["origins"], hard.propose(rays(20))["origins"])
