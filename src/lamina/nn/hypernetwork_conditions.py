"""What a hypernetwork is conditioned on: a task, numbers, the data itself, noise, or several of them together.

A condition turns the value that the caller gives into a code: (width,) for one condition, (B, width) for a batch.
Source: Chauhan et al., A Brief Review of Hypernetworks in Deep Learning (2023), arXiv 2306.06955, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SOURCE = "Chauhan et al. 2023, arXiv 2306.06955"
SAMPLES = 64
"""Codes on which a fresh generator is measured."""


class Condition(nn.Module):
    """What every condition is: `width` numbers of code, and how they come from what the caller gives."""

    width: int

    def fill(self, x: Any) -> Any:
        """Return the value to use where the caller gives none; x is the target's first input.

        Raises:
            LaminaError: this condition has to be given.
        """
        raise LaminaError(f"{type(self).__name__} needs a condition at every call")

    def code_samples(self) -> Tensor:
        """Return codes (n, width) as they are before training, to measure a fresh generator on."""
        return _normal(SAMPLES, self.width)


@register("layer", source=f"{SOURCE}, task-conditioned")
class TaskCondition(Condition):
    """A learned embedding of each of a fixed set of tasks.

    index, whole number or () or (B,) -> (dim,) or (B, dim). With one task only it need not be given.

    Args:
        count: how many tasks.
        dim: width of an embedding.
    Raises:
        ShapeError: a size below 1. LaminaError: no such task, or not a whole number.
    """

    def __init__(self, count: int, dim: int = 16) -> None:
        super().__init__()
        _check_positive("TaskCondition", count=count, dim=dim)
        self.count, self.width = count, dim
        self.embedding = nn.Parameter(torch.randn(count, dim) / math.sqrt(dim))

    def forward(self, index: Tensor | int) -> Tensor:
        """Look the tasks up."""
        index = torch.as_tensor(index, device=self.embedding.device)
        if index.is_floating_point() or index.dtype == torch.bool or index.dim() > 1:
            raise LaminaError(f"a task is a whole number or a row (B,) of them, got {index.dtype} {tuple(index.shape)}")
        # Looking at values would break a traced graph and wait for a device; there the look-up itself objects.
        if not torch.compiler.is_compiling() and index.device.type == "cpu" and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= self.count:
                raise LaminaError(f"tasks are 0..{self.count - 1}, got {low if low < 0 else high}")
        return F.embedding(index, self.embedding)

    def fill(self, x: Any) -> Any:
        """Return the only task."""
        if self.count > 1:
            raise LaminaError(f"TaskCondition needs a condition at every call: one of the tasks 0..{self.count - 1}")
        return 0

    def code_samples(self) -> Tensor:
        """Return the embeddings."""
        return self.embedding.detach()

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"count={self.count}, dim={self.width}"


@register("layer", source=f"{SOURCE}; cos_sin: Ortiz et al. 2023, arXiv 2304.07645")
class VectorCondition(Condition):
    """Numbers as they are: a hyperparameter, a width, a preference, features of a task.

    (dim,) or (B, dim) -> (width,) or (B, width); with dim 1 also () and (B,), B > 1.

    Args:
        dim: how many numbers.
        encode: "cos_sin" feeds each number c of 0..1 as cos(pi c / 2), sin(pi c / 2), so that the length of the code
            is the same for all and the weights do not scale with c; width is then 2 * dim. "none": as they are.
    Raises:
        ShapeError: a size below 1, or another number of values. LaminaError: cos_sin of a number outside 0..1.
    """

    def __init__(self, dim: int, encode: Literal["none", "cos_sin"] = "none") -> None:
        super().__init__()
        _check_positive("VectorCondition", dim=dim)
        if encode not in ("none", "cos_sin"):
            raise LaminaError(f"encode must be 'none' or 'cos_sin', got {encode!r}")
        self.dim, self.encode = dim, encode
        self.width = 2 * dim if encode == "cos_sin" else dim

    def forward(self, values: Tensor | float) -> Tensor:
        """Encode the numbers."""
        values = torch.as_tensor(values)
        values = values if values.is_floating_point() else values.float()
        if self.dim == 1 and (values.dim() == 0 or (values.dim() == 1 and len(values) > 1)):
            values = values.unsqueeze(-1)
        if values.dim() not in (1, 2) or values.shape[-1] != self.dim:
            raise ShapeError(f"VectorCondition takes {self.dim} numbers a condition, got {tuple(values.shape)}")
        if self.encode == "none":
            return values
        if not torch.compiler.is_compiling() and values.device.type == "cpu":
            outside = values[~((values >= 0) & (values <= 1))]
            if len(outside):
                raise LaminaError(f"cos_sin encodes numbers of 0..1, got {float(outside[0]):g}: scale them first")
        angle = values * (math.pi / 2)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def code_samples(self) -> Tensor:
        """Return codes of standard normal numbers, or of even ones in 0..1."""
        if self.encode == "none":
            return _normal(SAMPLES, self.dim)
        here = torch.empty(0).device
        uniform = torch.rand(SAMPLES, self.dim, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        angle = uniform.to(here) * (math.pi / 2)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def extra_repr(self) -> str:
        """Show what goes in and how."""
        return f"dim={self.dim}, encode={self.encode!r}"


@register("layer", source=f"{SOURCE}, data-conditioned")
class DataCondition(Condition):
    """What an encoder sees in the data: every sample gets weights of its own.

    x as the encoder takes it -> (B, width). Where no condition is given it is the target's own first input.

    Args:
        encoder: a module, or the recipe node of one (any model, or `torch.nn:Linear`).
        dim: width of what it returns; None = of its last linear layer or convolution.
    Raises:
        LaminaError: dim is not given and the encoder has no such layer. ShapeError: it returns something else.
    """

    def __init__(self, encoder: Annotated[nn.Module | Node, Slot("model")], dim: int | None = None) -> None:
        super().__init__()
        self.encoder: nn.Module = encoder if isinstance(encoder, nn.Module) else factory("model", encoder)()
        self.width = _last_width(self.encoder) if dim is None else dim
        _check_positive("DataCondition", dim=self.width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode the samples."""
        code: Tensor = self.encoder(x)
        if code.dim() != 2 or code.shape[1] != self.width:
            raise ShapeError(f"the encoder of DataCondition must return (B, {self.width}), got {tuple(code.shape)}")
        return code

    def fill(self, x: Any) -> Any:
        """Return the target's input."""
        if not isinstance(x, Tensor):
            raise LaminaError(f"DataCondition cannot read a {type(x).__name__}: give the condition")
        return x


@register("layer", source=f"{SOURCE}, noise-conditioned")
class NoiseCondition(Condition):
    """Standard normal noise: every draw is another member of an ensemble.

    z (dim,) or (B, dim) -> the same. Where none is given one z is drawn for the whole call; `draw` gives draws that can
    be kept and replayed. Nothing makes the weights depend on z but the loss: report the spread over z.

    Raises:
        ShapeError: dim below 1, or a z of another width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        _check_positive("NoiseCondition", dim=dim)
        self.width = dim
        # Follows the module to its device and dtype, so that a draw is made there.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return z."""
        if z.dim() not in (1, 2) or z.shape[-1] != self.width:
            raise ShapeError(f"NoiseCondition takes z of width {self.width}, got {tuple(z.shape)}")
        return z

    def draw(self, count: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return z (dim,), or `count` of them (count, dim); None = from torch's own generator."""
        like: Tensor = self.get_buffer("like")
        shape = (self.width,) if count is None else (count, self.width)
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    def fill(self, x: Any) -> Any:
        """Draw one z."""
        return self.draw()

    def extra_repr(self) -> str:
        """Show the width."""
        return f"dim={self.width}"


class JointCondition(Condition):
    """Several conditions side by side; their codes are concatenated.

    The value is a tuple, one a condition (None = it fills itself), or the value of the only one that must be given.
    A single code beside batched ones stands for every row.
    """

    def __init__(self, conditions: Sequence[Condition]) -> None:
        super().__init__()
        if not conditions:
            raise LaminaError("a hypernetwork needs at least one condition, got an empty list")
        self.conditions = nn.ModuleList(conditions)
        self.width = sum(c.width for c in conditions)

    def forward(self, values: Sequence[Any]) -> Tensor:
        """Encode each and put them side by side."""
        codes = [condition(value) for condition, value in zip(self.conditions, values, strict=True)]
        sizes = {len(code) for code in codes if code.dim() == 2}
        if len(sizes) > 1:
            raise ShapeError(f"conditions that go together must be of one batch, got batches of {sorted(sizes)}")
        if sizes:
            rows = sizes.pop()
            codes = [code if code.dim() == 2 else code.expand(rows, -1) for code in codes]
        return torch.cat([code.to(codes[0].dtype) for code in codes], dim=-1)

    def complete(self, value: Any, x: Any) -> tuple[Any, ...]:
        """Return one value a condition, filling in those that are left out.

        Raises:
            LaminaError: too few, too many, or one that has to be given is left out.
        """
        members = list(self.conditions)
        if not isinstance(value, (tuple, list)):
            given = [m for m in members if not _fills_itself(m)] or members[:1]
            if value is not None and len(given) > 1:
                raise LaminaError(f"{len(given)} conditions must be given as a tuple, got one {type(value).__name__}")
            value = [value if m is given[0] else None for m in members]
        if len(value) != len(members):
            raise LaminaError(f"there are {len(members)} conditions, and {len(value)} values were given")
        return tuple(m.fill(x) if v is None else v for m, v in zip(members, value, strict=True))  # type: ignore[operator]

    def code_samples(self) -> Tensor:
        """Return the codes of all side by side, the shorter ones repeated."""
        each = [c.code_samples() for c in self.conditions]  # type: ignore[operator]
        return torch.cat([codes[torch.arange(SAMPLES) % len(codes)] for codes in each], dim=-1)


def _fills_itself(condition: nn.Module) -> bool:
    return isinstance(condition, (DataCondition, NoiseCondition)) or getattr(condition, "count", 0) == 1


def _normal(rows: int, width: int) -> Tensor:
    """Draw from a generator of its own: the same on every device, and torch's state is left alone."""
    here = torch.empty(0).device
    return torch.randn(rows, width, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(here)


def _last_width(encoder: nn.Module) -> int:
    for module in reversed(list(encoder.modules())):
        for name in ("out_features", "out_channels"):
            if isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
    raise LaminaError(f"the width of what {type(encoder).__name__} returns is not known: pass dim to DataCondition")


def _check_positive(name: str, **sizes: int) -> None:
    for key, value in sizes.items():
        if value < 1:
            raise ShapeError(f"{name}: {key} must be at least 1, got {value}")
