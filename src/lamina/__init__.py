"""Lamina: published methods as composable, measured parts for any PyTorch model.

errors, registry, recipe    names, options and the sentences for a user's mistake
anatomy, probe, lineage     look into any model; follow a parameter through a rewrite
nn, data, optim, gradients  the parts: layers, data sets, optimizers, reducers
models, objectives, rewrite whole networks, what is minimised, passes over models
io, parallel                save and load; place on devices
train                       the loop
search, verify              train the points of a space; look behind what a model does
experiments, cli            the evidence, the command line
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.io import load as load
    from lamina.io import save as save
    from lamina.recipe import build as build

__version__ = "0.1.0"

_LAZY = {"load": "lamina.io", "save": "lamina.io", "build": "lamina.recipe"}
_PACKAGES = (
    "anatomy batches data errors experiments gradients io lineage models nn objectives optim "
    "parallel probe recipe registry rewrite search train verify"
).split()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"lamina.{name}")
    raise AttributeError(f"module 'lamina' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_PACKAGES])
