"""The objective: terms, places, times, adapters, teachers, frozen parts, passes cut short, what is refused."""

import torch
from tests.contract.example import Example
from torch import nn


def net(width=6, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def rows(count=8):
    g = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(count, 4, generator=g), "labels": torch.randint(3, (count,), generator=g)}


EXAMPLES = [
    Example("objective", "logit_distillation", model=net, batch=rows, bad={"terms": ["hint"]}),
    Example(
        "objective",
        "distillation",
        options={"terms": ["knowledge_distillation", {"name": "hint", "student": "2", "adapter": [6, 6]}]},
        model=net,
        batch=rows,
        bad={"terms": [{"name": "hints", "student": "2"}]},
    ),
]
