"""Vector fields: what may stand on the right-hand side of dz/dt = f(t, z), and two made for it."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.batches import bare
from lamina.errors import LaminaError, ShapeError
from lamina.nn._inputs import check_features
from lamina.nn.ode.step import SOURCE
from lamina.registry import register


@register("layer", "time_mlp", source=f"{SOURCE}, appendix: networks of the image tasks")
class TimeMLP(nn.Module):
    """Two linear layers with tanh between them, each of which sees the time beside its input.

    (t, z (..., width)) -> dz/dt (..., width); t is 0-dim. With width 784 and hidden 100 it is the paper's network for
    MNIST, 158,568 parameters with the 10-class head behind it left out.

    Args:
        hidden: channels between the layers; None = width.
    Raises:
        ShapeError: a size is not positive, or z is not (..., width) of floating point.
    Example:
        >>> TimeMLP(8)(torch.tensor(0.5), torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        if width < 1 or hidden < 1:
            raise ShapeError(f"TimeMLP needs positive sizes, got width {width} and hidden {hidden}")
        self.width = width
        self.up, self.down = nn.Linear(width + 1, hidden), nn.Linear(hidden + 1, width)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return dz/dt."""
        check_features("TimeMLP", z, self.width)
        _check_time(t)
        return _with_time(self.down, t, torch.tanh(_with_time(self.up, t, z)))


@register("layer", "time_conv", source=f"{SOURCE}, appendix: the network of CIFAR-10 is of this kind")
class TimeConv(nn.Module):
    """Three convolutions (1, 3 and 1 cells wide) with tanh between them, each with the time as one more channel.

    (t, z (B, width, H, W)) -> dz/dt of the same shape; t is 0-dim.

    Args:
        hidden: channels between the layers; None = width.
    Raises:
        ShapeError: a size is not positive, or z has other channels.
    Example:
        >>> TimeConv(4)(torch.tensor(0.5), torch.randn(2, 4, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        if width < 1 or hidden < 1:
            raise ShapeError(f"TimeConv needs positive sizes, got width {width} and hidden {hidden}")
        self.width = width
        self.enter = nn.Conv2d(width + 1, hidden, 1)
        self.mix = nn.Conv2d(hidden + 1, hidden, 3, padding=1)
        self.leave = nn.Conv2d(hidden + 1, width, 1)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return dz/dt."""
        if z.dim() != 4 or z.shape[1] != self.width or not z.is_floating_point():
            raise ShapeError(f"TimeConv takes maps (B, {self.width}, H, W), got {z.dtype} {tuple(z.shape)}")
        _check_time(t)
        time = t.to(z.dtype).expand(len(z), 1, *z.shape[2:])
        x = torch.tanh(self.enter(torch.cat([z, time], 1)))
        x = torch.tanh(self.mix(torch.cat([x, time], 1)))
        return self.leave(torch.cat([x, time], 1))


def takes_time(func: nn.Module) -> bool:
    """Say whether a module is called as func(t, z), or as func(z), as most are: then time plays no part.

    Raises:
        LaminaError: it takes neither one tensor nor two.
    """
    parameters = inspect.signature(bare(func).forward).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in places if p.default is p.empty]
    many = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(needed) <= 1 and (places or many):
        return False
    if len(needed) == 2:
        return True
    raise LaminaError(
        f"a vector field is called as func(t, z) or func(z); {type(bare(func)).__name__}.forward needs "
        f"{len(needed)} arguments"
    )


def _check_time(t: Tensor) -> None:
    if t.numel() != 1:
        raise ShapeError(f"a vector field is at one time for the whole batch, got times of shape {tuple(t.shape)}")


def _with_time(layer: nn.Linear, t: Tensor, x: Tensor) -> Tensor:
    """Apply a linear layer to (x, t) without joining the two: the time's column is part of the bias."""
    assert layer.bias is not None
    return F.linear(x, layer.weight[:, :-1], layer.bias + layer.weight[:, -1] * t.to(x.dtype))
