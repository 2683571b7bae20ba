"""Any module's saved tensors in float8, and how many bytes a model saves for its backward pass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lamina.nn.float8.rounding import Formats, per_group, restore


class Float8Saved:
    """Mixed into a module's class: what its forward saves for backward is kept in float8, with a scale a group.

    For modules of which nothing is known. Numbers in the forward pass are untouched. Under torch.compile tensors are
    saved as they are.
    """

    float8_formats: Formats

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        run: Callable[..., Any] = super().forward  # type: ignore[misc]
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():  # type: ignore[attr-defined]
            return run(*args, **kwargs)
        with keeping_float8(self, self.float8_formats):  # type: ignore[arg-type]
            return run(*args, **kwargs)


def save_in_float8(module: nn.Module, formats: Formats) -> nn.Module:
    """Return a module with the same parts and parameters that keeps what it saves in float8 (`Float8Saved`)."""
    made = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        made.__dict__[table] = dict(module.__dict__[table])
    made.__class__ = _saving(type(module))  # type: ignore[arg-type]
    made.float8_formats = formats  # type: ignore[assignment]
    return made


@functools.cache
def _saving(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (Float8Saved, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def keeping_float8(module: nn.Module, formats: Formats) -> saved_tensors_hooks:
    """Keep what autograd saves inside in float8; parameters, buffers, integers and vectors stay as they are."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

    def pack(tensor: Tensor) -> Any:
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if not narrow or tensor.dim() < 2 or not tensor.numel() or tensor.untyped_storage().data_ptr() in own:
            return tensor
        return (*per_group(tensor.detach(), formats.forward, formats.group), tensor.dtype)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        codes, scale, dtype = packed
        return restore(codes, scale, formats.group).to(dtype)

    return saved_tensors_hooks(pack, unpack)


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return how many bytes `run()` saves for a model's backward pass: no memory twice, no parameters, no buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            # Held until the end, or another tensor might take its place.
            kept[place] = tensor.detach()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del result
    return total
