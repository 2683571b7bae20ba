"""Picking a part of an elastic model under a limit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lamina.errors import LaminaError
from lamina.models import Transformer
from lamina.nn import Subnet, supernet
from lamina.rewrite import Elastic, rewrite
from lamina.search import pick_subnet


def elastic() -> nn.Module:
    torch.manual_seed(0)
    model = Transformer(4, 16, 2, vocabulary=32, context=8).eval()
    return rewrite(model, Elastic((1, 2), (0.25, 0.5)))


ROWS = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}


def parameters(model: nn.Module) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def test_the_best_affordable_part_of_a_small_space_is_found() -> None:
    model = elastic()
    net, costs = supernet(model), supernet(model).costs(ROWS)
    every = [
        Subnet((d,), e, ())
        for d, *e in itertools.product((1, 2, 4), *[net.choices()["expand"][0]] * 4)
        for e in [tuple(e)]
    ]
    limit = 0.6 * costs(net.full())

    # Counted, not cut out: what matters is the order.
    def worth(part: Subnet) -> int:
        return costs(part) + 100 * part.depth[0]

    best = max((p for p in every if costs(p) <= limit), key=worth)
    worths = {}

    def score(cut: nn.Module) -> float:
        hidden = [b.feed_forward.up.out_features / 64 for b in cut.blocks]
        part = Subnet((len(hidden),), (*hidden, *[1.0] * (4 - len(hidden))), ())
        worths[part] = worth(part)
        return float(worths[part])

    picked = pick_subnet(model, score, ROWS, limit=limit, population=24, generations=10, patience=None, seed=1)
    assert picked.cost == costs(picked.subnet) <= limit
    assert picked.score >= 0.9 * worth(best)
    assert picked.scored >= len(worths) > 5
    again = pick_subnet(model, score, ROWS, limit=limit, population=24, generations=10, patience=None, seed=1)
    assert again == picked


def test_latency_is_a_cost_and_so_is_any_function() -> None:
    options = {"population": 4, "generations": 1}
    model = elastic()
    picked = pick_subnet(model, parameters, ROWS, limit=10.0, cost="latency", **options)
    assert 0 < picked.cost < 10.0
    shallow = pick_subnet(model, parameters, ROWS, limit=2, cost=lambda part: part.depth[0], **options)
    assert shallow.subnet.depth[0] <= 2


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(LaminaError, match="not even the smallest part is within the limit of 10: it takes"):
        pick_subnet(elastic(), parameters, ROWS, limit=10)
    with pytest.raises(LaminaError, match="population is at least 2"):
        pick_subnet(elastic(), parameters, ROWS, limit=1e9, population=1)
    with pytest.raises(LaminaError, match="cost is multiply_adds, latency or a function"):
        pick_subnet(elastic(), parameters, ROWS, limit=1e9, cost="price")  # type: ignore[arg-type]
