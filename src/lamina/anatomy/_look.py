"""Run a model only to look at it: afterwards it is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode; put back the mode, the attributes and the buffers of every module afterwards.

    A forward may leave values on its modules: Swin's writes the shift that fits the image, home-made ones count their
    calls. Weights and buffers changed in place are not copied.
    """
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        for module, _, _ in kept:
            # Set, not by `eval()`: a class may do more there (LoRA layers merge their weights).
            module.training = False
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
