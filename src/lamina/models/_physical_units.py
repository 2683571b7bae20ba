"""The units of fields: a network works on shifted and scaled ones, its user gives and gets physical ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError
from lamina.nn._kept_float32 import KeptFloat32, wide

Number = float | Sequence[float] | Tensor | None
"""One for all, one a channel, or a field (channels, *grid); None = leave the fields as they are."""

NAMES = ("input_shift", "input_scale", "output_shift", "output_scale")
SMALLEST = 1e-5
"""A cell's scale below this share of its channel's largest is raised to it: one that never changes has none."""


class PhysicalUnits(KeptFloat32):
    """Shifts and scales of inputs and outputs, as buffers, in float32 (float64 where the fields are).

    They stay so where the model is made bfloat16 or half. The buffers take the shape of what is loaded into them.
    """

    input_shift: Tensor
    input_scale: Tensor
    output_shift: Tensor
    output_scale: Tensor

    def __init__(self, dim: int, values: Mapping[str, Number]) -> None:
        super().__init__()
        self.dim = dim
        for name in NAMES:
            neutral = 0.0 if name.endswith("shift") else 1.0
            given = values.get(name)
            self.register_buffer(name, self._field(name, neutral if given is None else given))

    def encode(self, x: Tensor) -> Tensor:
        """Turn physical inputs into the network's: (x - shift) / scale."""
        return ((wide(x) - self.input_shift) / self.input_scale).to(x.dtype)

    def decode(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn the network's outputs into physical ones: y * scale + shift."""
        return (wide(y) * self.output_scale + self.output_shift).to(dtype)

    def fit(self, batches: Iterable[Mapping[str, Any]], *, per_cell: bool) -> tuple[int, ...]:
        """Take the mean and standard deviation of `inputs` and `targets`; return the grid.

        Raises:
            LaminaError: no batch, or numbers that are not finite.
        """
        sums = {name: _Moments(per_cell) for name in ("inputs", "targets")}
        for batch in batches:
            for name, moments in sums.items():
                if not isinstance(batch.get(name), Tensor):
                    raise LaminaError(f"the normaliser needs {name!r} in every batch, this one has {sorted(batch)}")
                moments.add(name, batch[name])
        for name, moments in sums.items():
            which = "input" if name == "inputs" else "output"
            shift, scale = moments.result(name)
            for what, value in (("shift", shift), ("scale", scale)):
                old = getattr(self, f"{which}_{what}")
                setattr(self, f"{which}_{what}", self._field(f"{which}_{what}", value).to(old))
        return sums["inputs"].grid

    def prepare_to_load(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for fields of the shapes that a file holds."""
        for name in NAMES:
            if name in shapes and tuple(getattr(self, name).shape) != tuple(shapes[name]):
                setattr(self, name, getattr(self, name).new_ones(tuple(shapes[name])))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.prepare_to_load({n: state_dict[prefix + n].shape for n in NAMES if prefix + n in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _field(self, name: str, value: float | Sequence[float] | Tensor) -> Tensor:
        """Bring a number, a number a channel or a field to (channels, *grid), or sizes of 1 in their places."""
        field = torch.as_tensor(value, dtype=torch.float32)
        if field.dim() <= 1:
            field = field.reshape(-1, *[1] * self.dim)
        if field.dim() != self.dim + 1:
            raise ShapeError(
                f"{name} must be one number, one a channel or a field (channels, *grid), got {tuple(field.shape)}"
            )
        if not field.is_meta:
            if not bool(field.isfinite().all()):
                raise LaminaError(f"{name} has numbers that are not finite")
            if name.endswith("scale") and not bool((field > 0).all()):
                raise LaminaError(f"{name} must be above 0 everywhere, its least is {float(field.min())}")
        return field


class _Moments:
    """Mean and deviation over many batches, per channel or per channel and cell, in float64."""

    def __init__(self, per_cell: bool) -> None:
        self.per_cell, self.count = per_cell, 0
        self.grid: tuple[int, ...] = ()
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, name: str, values: Tensor) -> None:
        over = (0,) if self.per_cell else (0, *range(2, values.dim()))
        if self.count and self.per_cell and tuple(values.shape[2:]) != self.grid:
            raise ShapeError(f"{name} of several grids have no field of means: {self.grid}, {tuple(values.shape[2:])}")
        self.grid = tuple(values.shape[2:])
        values = values.detach().double()
        count = values.numel() // (values.shape[1] if not self.per_cell else values[0].numel())
        mean = values.mean(over)
        squares = (values - mean.reshape(1, -1, *(self.grid if self.per_cell else [1] * len(self.grid)))).square()
        # Chan et al.: joins the moments of two parts without the cancellation of sums of squares.
        apart, total = mean - self.mean, self.count + count
        self.squares = self.squares + squares.sum(over) + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def result(self, name: str) -> tuple[Tensor, Tensor]:
        if not self.count:
            raise LaminaError("the normaliser was given no batch")
        scale = (self.squares / self.count).sqrt()
        if not bool(scale.isfinite().all()):
            raise LaminaError(f"{name} has numbers that are not finite: the normaliser would spread them everywhere")
        each = [-1, *[1] * (scale.dim() - 1)]
        largest, size = (v.abs().reshape(len(v), -1).amax(1).reshape(each) for v in (scale, self.mean))
        # What float32 cannot tell from the mean is a channel that never changes, whatever the sums left of it.
        changes = largest > torch.finfo(torch.float32).eps * size
        return self.mean, torch.where(changes, torch.maximum(scale, SMALLEST * largest), 1.0)
