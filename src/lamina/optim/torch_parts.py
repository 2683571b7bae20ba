"""torch's own optimizers under short names, so that recipes can name them."""

from __future__ import annotations

import torch

from lamina.registry import register

ALIASES = {
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
"""Left out: those that need a closure (LBFGS), sparse gradients alone (SparseAdam), or matrices alone (Muon)."""

for _name, _optimizer in ALIASES.items():
    register("optimizer", _name, source="torch.optim")(_optimizer)
