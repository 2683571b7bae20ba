"""What a batch is, and the one rule by which any model is called with one.

A batch is a mapping of names to tensors, in the names Hugging Face uses: `input_ids`, `attention_mask`,
`token_type_ids`, `pixel_values`; `inputs` for anything else a model takes; `labels` for the target.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
"""Names to tensors (or other values); `labels` is the target and never handed to the model."""

TARGETS = frozenset({"labels", "label", "targets", "weights"})
"""Batch entries that belong to the objective, not to the model."""


def bare(model: nn.Module) -> nn.Module:
    """Return the module behind wrappers (torch.compile, DistributedDataParallel)."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def call(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """Call `model` with the entries of `batch` that its forward names; return its raw output.

    A forward that names none of them gets the first tensor that is not a target, positionally, so a
    home-made `forward(self, x)` works with any batch. `options` are passed if forward takes them.
    A model that hands its inputs on to a module inside names it in `lamina_wrapped`: what its own forward names goes
    along, and the rest is chosen by the inner forward.
    """
    inputs = {k: v for k, v in batch.items() if k not in TARGETS}
    inner = bare(model)
    parameters, along = inspect.signature(inner.forward).parameters, {}
    if isinstance(wrapped := getattr(inner, "lamina_wrapped", None), nn.Module):
        along = {k: inputs.pop(k) for k in parameters if k in inputs}
        parameters = inspect.signature(wrapped.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {k: v for k, v in inputs.items() if k in parameters}
    extra = {k: v for k, v in options.items() if k in parameters or open_ended} | along
    if named:
        return model(**named, **extra)
    return model(first_input(inputs), **extra)


def first_input(batch: Batch) -> Tensor:
    """Return the first tensor of a batch that is no target: the image, the tokens, the features.

    Raises:
        ValueError: there is none.
    """
    for name, value in batch.items():
        if name not in TARGETS and isinstance(value, Tensor):
            return value
    raise ValueError(f"the batch has no tensor to call a model with: {sorted(batch)}")


def logits(outputs: Any) -> Tensor:
    """Take the prediction out of a model's output: a tensor, `.logits`, `.last_hidden_state`, or the first element."""
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "last_hidden_state"):
        value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise TypeError(f"cannot find the prediction in a {type(outputs).__name__}: expected a tensor, .logits or a tuple")


def to_device(batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """Move every tensor of a batch; other values stay as they are."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
