import copy

import pytest
import torch
from tests.gradients.workers import run

from lamina.errors import LaminaError
from lamina.gradients import Mean, Median
from lamina.recipe import build
from lamina.verify import Attacked
from lamina.verify.attacks import (
    ATTACKS,
    bit_flip,
    drop,
    fall_of_empires,
    gaussian,
    label_flip,
    little_is_enough,
    random,
    reverse,
    scaled,
    sign_flip,
    stale,
)

HONEST = torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 0.0]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_attack_is_its_formula():
    assert torch.equal(reverse(HONEST, 2, seeded()), -10 * HONEST[:2])
    assert torch.equal(sign_flip(HONEST, 1, seeded()), -HONEST[:1])
    assert torch.equal(scaled(HONEST, 4, seeded()), 100 * HONEST[[0, 1, 2, 0]])
    assert torch.equal(fall_of_empires(HONEST, 2, seeded()), torch.tensor([[-0.3, 0.0]] * 2))
    deviation = torch.tensor([(8 / 3) ** 0.5] * 2)
    torch.testing.assert_close(
        little_is_enough(HONEST, 2, seeded(), z=1.5), (torch.tensor([3.0, 0.0]) - 1.5 * deviation).expand(2, -1)
    )
    assert torch.equal(stale(HONEST, 1, seeded(), earlier=HONEST[2:]), HONEST[2:])
    assert label_flip(torch.tensor([0, 9, 4, -100]), 10).tolist() == [9, 0, 5, -100]


def test_the_hiding_place_of_a_little_is_enough_is_the_normal_quantile():
    # n = 50, f = 24 (the paper's example): s = 2, z = quantile of (50 - 24 - 2) / (50 - 24).
    honest = torch.randn(26, 3, generator=seeded(), dtype=torch.float64)
    z = (honest.mean(0) - little_is_enough(honest, 24, seeded())[0]) / honest.std(0, correction=0)
    torch.testing.assert_close(z, torch.full((3,), 1.4261, dtype=torch.float64), atol=1e-4, rtol=0)


def test_random_attacks_have_their_sizes():
    honest = torch.randn(5, 4000, generator=seeded(1))
    sent = random(honest, 2, seeded())
    assert (sent.min() >= 0) & (sent.max() < 1)
    assert abs(float(sent.mean()) - 0.5) < 0.02
    torch.testing.assert_close(gaussian(honest, 2, seeded()).norm(dim=1), (20 * honest.norm(dim=1).mean()).expand(2))
    lost = drop(honest, 2, seeded()) == 0
    assert abs(float(lost.float().mean()) - 0.1) < 0.02
    flipped = bit_flip(honest, 2, seeded()) != honest[:2]
    assert abs(float(flipped.float().mean()) - 0.01) < 0.005


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_keeps_dtype_and_shape_leaves_the_honest_alone_and_repeats_itself(name):
    honest = torch.randn(3, 7, generator=seeded(1)).bfloat16()
    before = honest.clone()
    first = ATTACKS[name](honest, 2, seeded())
    assert (first.shape, first.dtype) == ((2, 7), torch.bfloat16)
    assert torch.equal(honest, before)
    assert torch.equal(first.nan_to_num(), ATTACKS[name](honest, 2, seeded()).nan_to_num())


@pytest.mark.parametrize("name", [*ATTACKS, "stale"])
def test_the_last_workers_send_what_the_attack_says(name):
    sent = torch.randn(4, 2, 3, generator=seeded(2))

    def work(rank):
        reducer = build({"name": "lamina.verify.attacks:Attacked", "base": "mean", "attack": name, "f": 1}, "reducer")
        found = [reducer.reduce({"w": sent[rank, step]}, None)["w"] for step in range(2)]
        state = copy.deepcopy(reducer.state_dict())
        again = Attacked(Mean(), name)
        again.load_state_dict(state)
        ends = [r.reduce({"w": sent[rank, 0]}, None)["w"] for r in (reducer, again)]
        assert torch.equal(ends[0].nan_to_num(), ends[1].nan_to_num())
        return found

    for found in run(4, work):
        for step in range(2):
            honest = sent[:3, step]
            if name == "stale":
                faulty = sent[3:, 0]
            elif name in ("reverse", "sign_flip", "scaled"):
                faulty = {"reverse": -10, "sign_flip": -1, "scaled": 100}[name] * honest[:1]
            else:
                faulty = ATTACKS[name](honest, 1, seeded(step))
            torch.testing.assert_close(found[step], torch.cat([honest, faulty]).mean(0), equal_nan=True)


def test_alone_nothing_is_attacked():
    assert torch.equal(Attacked(Median()).reduce({"w": HONEST}, None)["w"], HONEST)


def test_bad_input_is_refused():
    with pytest.raises(LaminaError, match="no attack is called 'reversed'; did you mean 'reverse'"):
        Attacked("mean", "reversed")
    with pytest.raises(LaminaError, match="f, the number of faulty workers, must be a whole number >= 0, got -1"):
        Attacked("mean", f=-1)

    def work(rank):
        with pytest.raises(LaminaError, match="f = 2 of 2 workers are faulty: none is left"):
            Attacked("mean", f=2).reduce({"w": HONEST}, None)

    run(2, work)
