"""Two fields at the same points: what each says there, and how far apart they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lamina.batches import bare
from lamina.errors import LaminaError
from lamina.nn._precision import without_autocast
from lamina.nn.fields import clip_log_density
from lamina.objectives._gather_rows import several_processes

T = TypeVar("T")

SMALLEST = 1e-12
"""Inside the root, whose gradient at 0 is no number."""


@dataclass
class Told:
    """What a field says at N points; None = not asked, or it has none."""

    feature: Tensor | None
    """(N, 16): the clipped log-density, then the geometry feature."""
    density: Tensor | None
    """(N,): the clipped log-density."""
    raw: Tensor
    """What `color` takes."""
    color: Tensor | None = None
    """(N, 3)."""


def field_in(model: nn.Module) -> Any:
    """Return the field of a model: itself, or the only module inside with `geometry` and `color`.

    Raises:
        LaminaError: there is none, or more than one.
    """
    root = bare(model)
    found = [
        m for m in root.modules() if callable(getattr(m, "geometry", None)) and callable(getattr(m, "color", None))
    ]
    if root in found:
        return root
    if len(found) != 1:
        raise LaminaError(
            f"volume_distillation needs one field (a module with bound, geometry and color), and "
            f"{type(root).__name__} has {len(found)}"
        )
    return found[0]


def geometry_of(field: Any, x: Tensor) -> Told:
    """Ask a field at points (N, dim) for all but the colour."""
    s, g = field.geometry(x)
    with without_autocast(x.device):
        if s is not None:
            s = clip_log_density(s.float(), soft=getattr(field, "soft_clip", False))
        feature = g.float() if s is None else torch.cat([s[:, None], g.float()], dim=1)
    return Told(feature if getattr(field, "features", g.shape[-1]) else None, s, g)


def check_pair(student: Any, teacher: Any) -> None:
    """Refuse two fields of different boxes, and a teacher that is not finite in its own.

    Raises:
        LaminaError: says which.
    """
    one, other = float(student.bound), float(teacher.bound)
    dims = getattr(student, "dim", 3), getattr(teacher, "dim", 3)
    if one != other or dims[0] != dims[1]:
        raise LaminaError(
            f"student and teacher must be of one box, got bound {one} and {other}, dim {dims[0]} and {dims[1]}"
        )
    like = next((p for p in (*teacher.parameters(), *teacher.buffers()) if p.is_floating_point()), torch.empty(0))
    if like.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = ((2 * torch.rand(256, dims[1], generator=generator) - 1) * other).to(like.device)
    d = nn.functional.normalize(torch.randn(256, 3, generator=generator), dim=1).to(like.device)
    with torch.no_grad():
        # Before the clip, which would make a finite number of an infinite one.
        s, g = teacher.geometry(x)
        color = teacher.color(g, d if dims[1] == 3 else None)
    if not all(bool(v.isfinite().all()) for v in (s, g, color) if v is not None):
        raise LaminaError("the teacher gives numbers that are not finite inside its box: nothing can follow it")


def comparable(student: Told, teacher: Told) -> bool:
    """Say whether the features of two fields can be compared; a warning where only their widths differ."""
    if student.feature is None or teacher.feature is None:
        return False
    widths = student.feature.shape[1], teacher.feature.shape[1]
    if widths[0] != widths[1]:
        warnings.warn(
            f"features of width {widths[0]} (student) and {widths[1]} (teacher) cannot be compared: "
            "density and colour are followed from the start",
            stacklevel=2,
        )
    return widths[0] == widths[1]


def distances(
    pairs: Mapping[str, tuple[Tensor, Tensor]], count: Tensor, kind: Literal["norm", "mse"]
) -> dict[str, Tensor]:
    """Return the distance of each pair of equally large tensors, 0-dim float32.

    "norm" is the Frobenius norm of the whole difference, "mse" its mean square, over all processes; gradients are such
    that their mean over processes, weighted by `count`, is the gradient of that. What has no element is 0.
    """
    if not pairs:
        return {}
    gaps = {name: (a.float() - b.float()) for name, (a, b) in pairs.items()}
    own = torch.stack([gap.square().sum() for gap in gaps.values()])
    # Processes need not have equally many points.
    sizes = own.new_tensor([gap.numel() for gap in gaps.values()])
    whole, size, share = own.detach(), sizes, own.new_ones(())
    if several_processes():
        every = torch.cat([whole, sizes, count.reshape(1).to(own)])
        dist.all_reduce(every)
        whole, size, share = every[: len(own)], every[len(own) : -1], every[-1] / count.clamp(min=1)
    by = share * (own - own.detach())
    if kind == "mse":
        found = (whole + by) / size.clamp(min=1)
    else:
        root = (whole + SMALLEST).sqrt()
        found = torch.where(size > 0, root, 0.0) + by / (2 * root)
    return dict(zip(gaps, found, strict=True))


def within_forward(model: nn.Module, run: Callable[[], T]) -> T:
    """Call `run` as if it were the model's forward, so that wrappers (DDP, FSDP2) do what they do around a pass.

    A compiled model runs eagerly here: its graph is of another forward.
    """
    outer = getattr(model, "_orig_mod", model)
    root = bare(outer)
    before = vars(root).get("forward")
    object.__setattr__(root, "forward", run)
    try:
        result: T = outer()
    finally:
        if before is None:
            object.__delattr__(root, "forward")
        else:
            object.__setattr__(root, "forward", before)
    return result
